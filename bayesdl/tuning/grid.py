"""A grid of prior precisions for a linearised Laplace posterior: one pass of the network, whatever is tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.batch import index_batch
from bayesdl.curvature.chunking import chunk_size, chunks
from bayesdl.curvature.factor import Factor
from bayesdl.data import batches, in_batch
from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.likelihoods import Gaussian
from bayesdl.posteriors import GaussianPosterior

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel

Passes = Iterable[tuple[Tensor, Tensor, Sequence[Factor]]]


def grid_of(grid: Sequence[float] | None) -> Tensor:
    """Candidates, float64; by default 41 values from 1e-4 to 1e6, evenly spaced in logarithm.

    Raises:
        ArgumentError: empty, or a value that is not positive.
    """
    if grid is None:
        return torch.logspace(-4, 6, 41, dtype=torch.float64)
    candidates = torch.as_tensor(grid, dtype=torch.float64)
    if candidates.dim() != 1 or not len(candidates) or not bool((candidates > 0).all()):
        raise ArgumentError(f"grid={grid!r}; expected positive prior precisions")
    return candidates


def passes(
    model: BayesianModel,
    posterior: GaussianPosterior,
    data: Iterable[Any],
    describe: str,
    progress: bool,
    limit: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Sequence[Factor]]]:
    """Outputs, targets, and the part of the outputs' covariance that no prior changes, chunk by chunk.

    Args:
        model: gives network and likelihood.
        posterior: its posterior.
        data: loader with targets.
        describe: title of the progress bar.
        progress: whether to show it.
        limit: stop after so many examples.
    """
    step = chunk_size(posterior.layout, posterior.curvature, torch.float32, device=model.device)
    seen = 0
    for number, inputs, target in batches(model.network, data, progress=progress, describe=describe):
        for rows, labels in chunks(inputs, target, step):
            with in_batch(number):
                if limit is not None and len(labels) > limit - seen:
                    rows, labels = index_batch(rows, slice(0, limit - seen)), labels[: limit - seen]
                mean, factors = posterior.linearize(model.network, rows)
                model.likelihood.check_outputs(mean)
                checked = model.likelihood.check_targets(mean, torch.as_tensor(labels))
            yield mean, checked, posterior.structure.prepared(factors)
            seen += len(mean)
            if limit is not None and seen >= limit:
                return


def training_source(
    model: BayesianModel, data: Iterable[Any] | None, rule: str
) -> tuple[GaussianPosterior, Iterable[Any]]:
    """What a rule on the training data works with: the posterior, and the loader given or the one of the fit.

    Raises:
        ArgumentError: no data is known.
        UnsupportedError: not a linearised Gaussian posterior.
    """
    posterior = model.posterior
    if not isinstance(posterior, GaussianPosterior) or posterior.predictive != "linearized":
        raise UnsupportedError(f'tune("{rule}") needs a linearised Laplace posterior; use tune("heldout", val_loader)')
    source = model.fit_data if data is None else data
    if source is None:
        raise ArgumentError(
            f'this model does not know its training data (was it loaded from a file?): tune("{rule}", loader)'
        )
    return posterior, source


def relative_noise(posterior: GaussianPosterior) -> Tensor:
    """Noise scales of the outputs up to the common factor, float64."""
    if posterior.noise is None or not posterior.parts:
        return torch.ones((), dtype=torch.float64, device=posterior.precision.device)
    return posterior.noise.double()


def choose(
    model: BayesianModel,
    posterior: GaussianPosterior,
    candidates: Tensor,
    best: int,
    factors: Tensor | None,
    how: str,
) -> BayesianModel:
    """The model at one of the candidates.

    Args:
        model: to be tuned.
        posterior: its posterior.
        candidates: prior precisions; with `factors` relative to the noise, s^p * prior precision.
        best: which of them.
        factors: common factor s of the noise scales at each; None where the noise is not open.
        how: end of the finding's sentence.
    """
    precision = candidates[best].to(posterior.precision.device)
    likelihood, noise = model.likelihood, None
    found = []
    if factors is not None and posterior.noise is not None and isinstance(likelihood, Gaussian):
        noise = factors[best] * relative_noise(posterior) * torch.ones_like(posterior.noise)
        precision = precision / factors[best] ** posterior.noise_power
        likelihood = likelihood.with_noise(noise)
        values = ", ".join(f"{float(v):.4g}" for v in noise[:8])
        found.append(Finding("info", f"noise (standard deviation) {values} chosen {how}", topic="noise"))
    found.insert(0, Finding("info", f"prior precision {float(precision):.4g} (scalar) chosen {how}", topic="prior"))
    if best in (0, len(candidates) - 1):
        found.append(
            Finding(
                "warning", "the prior precision lies at the end of the grid", "pass a wider grid= to tune()", "prior"
            )
        )
    tuned = posterior.with_prior(precision, noise)
    return model.replaced(posterior=tuned, likelihood=likelihood, findings=tuple(found))
