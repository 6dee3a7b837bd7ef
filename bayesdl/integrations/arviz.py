"""Chains for ArviZ: what samples predict at probe inputs, their log-likelihoods and the steps they came from.

Weights of networks are not exported: their symmetries make diagnostics on them meaningless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, NotFittedError, UnsupportedError, require
from bayesdl.likelihoods import Likelihood, resolve
from bayesdl.samplers.chain import Chain
from bayesdl.samplers.diagnostics import by_chain
from bayesdl.samplers.records import SampleRecord, relative_weights

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

__all__ = ["to_arviz"]

# names of ArviZ for the fields of a sample's record
_STATS = {
    "lp_prior": "log_prior",
    "loss": "loss",
    "step_size": "h",
    "temperature": "temperature",
    "psi": "psi",
    "weight": "weight",
}


def to_arviz(
    source: BayesianModel | Chain | Sequence[Chain],
    probe: Any = None,
    targets: Tensor | None = None,
    *,
    likelihood: str | Likelihood | None = None,
    ignore_weights: bool = False,
) -> Any:
    """An `InferenceData` (ArviZ 0.x) or `DataTree` (1.x), arrays (chain, draw, ...).

    Groups: `posterior` with the probabilities (categorical, bernoulli) or means at the probe inputs, `output`
    (chain, draw, input, output); with `targets`, `log_likelihood` with `y` (chain, draw, input); of chains,
    `sample_stats` with what their records hold. Of chains of unequal length the first draws are taken.

    Args:
        source: a model whose posterior is samples, a chain, or several chains of one network, made with `probe=`.
        probe: a batch of inputs, for a model.
        targets: of the probe inputs.
        likelihood: name or object, for chains.
        ignore_weights: export samples that weigh differently as if they did not.

    Raises:
        ArgumentError: a model without probe, chains with one or without likelihood.
        NotFittedError: a chain without samples.
        UnsupportedError: a posterior that is no samples, or samples of different weights, which ArviZ has no place for.
        MissingDependencyError: ArviZ is not installed.
    """
    from bayesdl.model import BayesianModel

    arviz = require("arviz", extra="arviz")
    if isinstance(source, BayesianModel):
        outputs, chains, weights, rule = _of_model(source, probe)
        records: list[SampleRecord] = []
    else:
        outputs, records, rule = _of_chains([source] if isinstance(source, Chain) else list(source), probe, likelihood)
        chains, weights = torch.tensor([r.chain for r in records]), torch.tensor(relative_weights(records))
    if not ignore_weights and not torch.allclose(weights, weights[:1].expand_as(weights), rtol=1e-4):
        raise UnsupportedError(
            'samples of different weights, and ArviZ has none: collect="time" takes samples that weigh the same, '
            "ignore_weights=True exports these as they are"
        )
    groups = {"posterior": {"output": _array(_means(outputs, rule), chains)}}
    if targets is not None:
        scores = torch.stack([rule.log_prob(f, targets.to(f.device)) for f in outputs])
        groups["log_likelihood"] = {"y": _array(scores, chains)}
    stats = _stats(records, chains)
    if stats:
        groups["sample_stats"] = stats
    if int(arviz.__version__.split(".")[0]) >= 1:  # one dictionary of groups
        return arviz.from_dict(groups)
    return arviz.from_dict(**groups)


def _of_model(model: BayesianModel, probe: Any) -> tuple[Tensor, Tensor, Tensor, Likelihood]:
    from bayesdl.latent import SampleLatent
    from bayesdl.posteriors import SamplePosterior

    if not isinstance(model.posterior, SamplePosterior):
        raise UnsupportedError(f"the posterior of method {model.method_name!r} is not a chain of samples")
    if probe is None:
        raise ArgumentError("probe=None: to_arviz(model, inputs) exports what the samples predict at inputs")
    with torch.no_grad():
        latent = model(probe).latent
    assert isinstance(latent, SampleLatent)
    posterior = model.posterior
    chains = torch.zeros(len(posterior), dtype=torch.long) if posterior.chains is None else posterior.chains.cpu()
    return latent.samples, chains, posterior.weights, model.likelihood


def _of_chains(
    chains: list[Chain], probe: Any, likelihood: str | Likelihood | None
) -> tuple[Tensor, list[SampleRecord], Likelihood]:
    if likelihood is None or probe is not None or not chains:
        raise ArgumentError(
            "chains need likelihood=, which turns their outputs into probabilities or means, and record outputs at the "
            "probe= they were made with: to_arviz(chains, likelihood=...)"
        )
    records = [record for chain in chains for record in chain.kept]
    if not all(chain.kept for chain in chains):
        raise NotFittedError("a chain holds no sample: lower burn_in or thin, or run longer")
    return torch.cat([chain.probes() for chain in chains]), records, resolve(likelihood)


def _means(outputs: Tensor, likelihood: Likelihood) -> Tensor:
    given = likelihood.distribution(outputs)
    found: Tensor = given.probs if hasattr(given, "probs") else given.mean
    return found


def _stats(records: Sequence[SampleRecord], chains: Tensor) -> dict[str, Any]:
    found = {}
    for name, field in _STATS.items():
        values = [getattr(record, field) for record in records]
        if values and all(value is not None for value in values):
            found[name] = _array(torch.tensor(values, dtype=torch.float64), chains)
    return found


def _array(values: Tensor, chains: Tensor) -> Any:
    return by_chain(values.detach().cpu(), chains.cpu()).numpy()
