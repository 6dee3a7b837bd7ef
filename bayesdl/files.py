"""Files: safetensors plus JSON metadata, written atomically, checked against the base network. Never pickle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter
from bayesdl.diagnose import Finding
from bayesdl.errors import FileFormatError
from bayesdl.network import Network
from bayesdl.posteriors import POSTERIORS
from bayesdl.tensorfile import DAMAGE, read_described, write_described

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

EMPTY = "empty"  # stands where there is no tensor: the format wants one
HEADER = {
    *("format", "method", "cost", "findings", "posterior", "config"),
    *("likelihood", "likelihood_config", "select", "names", "fingerprint"),
}


def save(model: BayesianModel, path: str | Path) -> None:
    """Posterior, likelihood, selection and record; the base network's weights are not stored.

    Raises:
        FileFormatError: a likelihood of the user's own (pass it again to `load`: it is saved by name only) holds
            arguments that are not JSON.
    """
    header = {
        "method": model.record.method,
        "cost": list(model.record.cost),
        "findings": [[f.severity, f.text, f.action, f.topic] for f in model.record.findings],
        "posterior": model.posterior.kind,
        "config": model.posterior.config(),
        "likelihood": model.likelihood.name,
        "likelihood_config": model.likelihood.config(),
        "select": model.network.select,
        "names": list(model.network.names),
        "fingerprint": model.network.fingerprint(type(model.posterior).concerns(model.posterior.config())),
        "torch": str(torch.__version__),
    }
    write_described(Path(path), header, model.posterior.tensors() or {EMPTY: torch.zeros(1)})


def load(
    path: str | Path,
    model: nn.Module,
    *,
    likelihood: Any = None,
    batch: str | BatchAdapter | None = None,
) -> BayesianModel:
    """Read what `BayesianModel.save` wrote.

    Args:
        path: the file.
        model: the base network, with the weights it had when it was wrapped.
        likelihood: needed for a likelihood of the user's own, which a file cannot hold.
        batch: batch adapter, as in `wrap`.

    Raises:
        FileFormatError: not such a file, another format version, or another network.
    """
    from bayesdl.likelihoods import LIKELIHOODS, resolve
    from bayesdl.model import BayesianModel, Record

    header, tensors = _read(Path(path))
    network = Network(model, batch=batch)
    _check_fingerprint(path, network, header)
    if likelihood is None and str(header["likelihood"]) not in LIKELIHOODS:
        raise FileFormatError(
            f"{path} holds the likelihood {header['likelihood']!r}, which is not one of the library's: pass likelihood="
        )
    try:
        network = network.reselect([str(name) for name in header["names"]])
        network.select = str(header["select"])
        if likelihood is None:
            likelihood = resolve(str(header["likelihood"]), **header["likelihood_config"])
        with torch.inference_mode(False):
            moved = {name: value.to(network.device) for name, value in tensors.items()}
            posterior = POSTERIORS[str(header["posterior"])].restore(moved, header["config"])
            posterior.check(network)
            _check_whole(posterior.tensors(), moved)
        findings = tuple(Finding(*map(str, row)) for row in header["findings"])
        cost = tuple((str(name), float(value)) for name, value in header["cost"])
    except DAMAGE as error:
        raise FileFormatError(f"{path} is damaged: {error!r} while rebuilding the model") from error
    return BayesianModel(network, posterior, likelihood, record=Record(str(header["method"]), cost, findings))


def _check_fingerprint(path: str | Path, network: Network, header: dict[str, Any]) -> None:
    """Raise `FileFormatError` unless the file is of a network with these weights."""
    kind = POSTERIORS.get(str(header["posterior"]))
    try:
        fingerprint = network.fingerprint(None if kind is None else kind.concerns(header["config"]))
        if header["fingerprint"] == fingerprint:
            return
        if kind is not None:
            kind.check_network(network, header["config"])
    except FileFormatError:
        raise
    except DAMAGE as error:
        raise FileFormatError(f"{path} is damaged: {error!r} while it was compared with the network") from error
    raise FileFormatError(
        f"{path} was saved for a network with other weights (fingerprint {str(header['fingerprint'])[:12]}, "
        f"this network {fingerprint[:12]}); load the weights that were wrapped"
    )


def _check_whole(kept: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise `FileFormatError` where the file holds a tensor that the posterior did not take."""
    extra = sorted(set(found) - set(kept) - {EMPTY})
    if extra:
        raise FileFormatError(f"tensor {extra[0]!r} belongs to nothing")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header, tensors = read_described(path)
    missing = HEADER - set(header)
    if missing:
        raise FileFormatError(f"{path} is damaged: its header lacks {sorted(missing)[0]!r}")
    return header, tensors
