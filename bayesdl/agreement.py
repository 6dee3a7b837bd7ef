"""Choices that several processes must share: the first one chooses, the others take what it chose."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from bayesdl.diagnose import Finding
from bayesdl.distributed import Group, together
from bayesdl.likelihoods import LIKELIHOODS, Gaussian, resolve
from bayesdl.posteriors import POSTERIORS

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

# tensors that every process holds already
CURVATURE = ("curvature.", "parts.")


def first_decides(group: Group | None, model: BayesianModel, decide: Callable[[], BayesianModel]) -> BayesianModel:
    """`decide()` on the group's first process, and a model that chose the same on all others.

    Args:
        group: None for this process alone.
        model: fitted, with the same curvature on all processes.
        decide: tunes `model`; may read data, which only the first process does.

    Raises:
        DistributedError: the first process failed; its own message says why.
    """
    from safetensors.torch import load, save

    if group is None:
        with model.network.session():
            return decide()
    with together(group), model.network.session():
        chosen = decide() if group.rank == 0 else model
        tensors = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in chosen.posterior.tensors().items()
            if not name.startswith(CURVATURE)
        }
        packed = json.dumps(_header(chosen)).encode(), save(tensors or {"empty": torch.zeros(1)})
    header, values = (group.message(part) for part in packed)
    return chosen if group.rank == 0 else _taken_over(model, json.loads(header), load(values))


def _header(model: BayesianModel) -> dict[str, Any]:
    return {
        "posterior": [model.posterior.kind, model.posterior.config()],
        "likelihood": [model.likelihood.name, model.likelihood.config()],
        "findings": [[f.severity, f.text, f.action, f.topic] for f in model.record.findings],
    }


def _taken_over(model: BayesianModel, header: dict[str, Any], values: dict[str, torch.Tensor]) -> BayesianModel:
    kind, config = header["posterior"]
    kept = {name: value for name, value in model.posterior.tensors().items() if name.startswith(CURVATURE)}
    moved = {name: value.to(model.device) for name, value in values.items()}
    posterior = POSTERIORS[kind].restore(kept | moved, config)
    name, arguments = header["likelihood"]
    likelihood = resolve(name, **arguments) if name in LIKELIHOODS else model.likelihood
    if isinstance(likelihood, Gaussian) and isinstance(likelihood.noise, list):  # JSON has no tensors
        likelihood = likelihood.with_noise(torch.tensor(likelihood.noise, dtype=torch.float64, device=model.device))
    return model.replaced(
        posterior=posterior, likelihood=likelihood, findings=tuple(Finding(*row) for row in header["findings"])
    )
