"""Files: safetensors plus JSON metadata, written atomically, checked against the base network. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter
from bayesdl.diagnose import Finding
from bayesdl.errors import FileFormatError
from bayesdl.network import Network
from bayesdl.posteriors import POSTERIORS

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

FORMAT = 1
KEY = "bayesdl"
DIGEST = "sha256"
HEADER = {
    *("format", "method", "cost", "findings", "posterior", "config"),
    *("likelihood", "likelihood_config", "select", "names", "fingerprint"),
}
# what a header that is not ours can make the code that reads it raise
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


def save(model: BayesianModel, path: str | Path) -> None:
    """Posterior, likelihood, selection and record; the base network's weights are not stored.

    Raises:
        FileFormatError: a likelihood of the user's own (pass it again to `load`: it is saved by name only) holds
            arguments that are not JSON.
    """
    header = {
        "format": FORMAT,
        "method": model.record.method,
        "cost": list(model.record.cost),
        "findings": [[f.severity, f.text, f.action, f.topic] for f in model.record.findings],
        "posterior": model.posterior.kind,
        "config": model.posterior.config(),
        "likelihood": model.likelihood.name,
        "likelihood_config": model.likelihood.config(),
        "select": model.network.select,
        "names": list(model.network.names),
        "fingerprint": model.network.fingerprint(),
        "torch": str(torch.__version__),
    }
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.posterior.tensors().items()}
    tensors = tensors or {"empty": torch.zeros(1)}
    try:
        # one entry: the order of several would differ from one file to the next
        text = json.dumps({**header, DIGEST: _digest(header, tensors)})
    except TypeError as error:
        raise FileFormatError(f"the model cannot be described in JSON: {error}") from error
    write_tensors(Path(path), tensors, {KEY: text})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that is either the old one or the new one, whenever the process dies."""
    from safetensors.torch import save as serialise

    payload = serialise(tensors, metadata)
    # not from tempfile, whose files nobody else may read
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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
    if header["fingerprint"] != network.fingerprint():
        raise FileFormatError(
            f"{path} was saved for a network with other weights (fingerprint {str(header['fingerprint'])[:12]}, "
            f"this network {network.fingerprint()[:12]}); load the weights that were wrapped"
        )
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
        findings = tuple(Finding(*map(str, row)) for row in header["findings"])
        cost = tuple((str(name), float(value)) for name, value in header["cost"])
    except DAMAGE as error:
        raise FileFormatError(f"{path} is damaged: {error!r} while rebuilding the model") from error
    return BayesianModel(network, posterior, likelihood, record=Record(str(header["method"]), cost, findings))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileFormatError(f"{path} does not exist")
    try:
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = json.loads(metadata[KEY])
        version = header["format"]
        sound = header.pop(DIGEST, None) == _digest(header, tensors)
    except (SafetensorError, OSError, *DAMAGE) as error:
        raise FileFormatError(f"{path} is not a bayesdl file, or it is damaged: {error}") from error
    if version != FORMAT:
        raise FileFormatError(f"{path} has format version {version}; this library reads version {FORMAT}")
    if not sound:
        raise FileFormatError(f"{path} is damaged: its contents do not match their checksum")
    missing = HEADER - set(header)
    if missing:
        raise FileFormatError(f"{path} is damaged: its header lacks {sorted(missing)[0]!r}")
    return header, tensors


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header and over names, shapes, dtypes and bytes of all tensors."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name}|{tuple(value.shape)}|{value.dtype}\n".encode())
        digest.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # makes the rename itself durable; not every platform lets a folder be opened
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
