"""Tuning on held-out data by the predictive negative log-likelihood. The network runs once, whatever is tried."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.curvature.estimate import chunk_size, chunks
from bayesdl.curvature.factor import Factor
from bayesdl.data import batches, in_batch
from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.latent import Latent
from bayesdl.likelihoods import Gaussian
from bayesdl.linalg import eigh
from bayesdl.posteriors import GaussianPosterior, ScaledPosterior
from bayesdl.tuning.temperature import fit_noise, fit_temperature, minimise, predictive_nll

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel


def tune_heldout(
    model: BayesianModel,
    data: Iterable[Any] | None = None,
    *,
    grid: Sequence[float] | None = None,
    progress: bool = False,
) -> BayesianModel:
    """Minimise NLL on held-out data.

    A linearised Laplace posterior: the scalar prior precision over `grid` (and for open Gaussian noise its scale at
    every candidate). Any other posterior: a temperature on the outputs, or the noise of a Gaussian likelihood.

    Args:
        model: any method.
        data: loader of held-out batches with targets.
        grid: prior precisions to try; default 41 values from 1e-4 to 1e6, evenly spaced in logarithm.

    Raises:
        ArgumentError: no data.
        UnsupportedError: a likelihood whose outputs have no temperature.
    """
    if data is None:
        raise ArgumentError('tune("heldout", val_loader) needs a loader of data the network was not trained on')
    posterior = model.posterior
    if isinstance(posterior, GaussianPosterior) and posterior.predictive == "linearized":
        return _tune_prior(model, posterior, data, grid, progress)
    latent, targets = _latents(model, data, progress)
    if isinstance(model.likelihood, Gaussian):
        noise = _best_noise(model.likelihood, latent, targets)
        found = Finding("info", f"noise {[round(float(v), 4) for v in noise]} chosen on held-out data")
        return model.replaced(likelihood=model.likelihood.with_noise(noise), findings=(found,))
    if model.likelihood.task not in ("classification", "multilabel"):
        raise UnsupportedError(
            f"a {model.likelihood.name} likelihood has no output temperature; tune the method instead"
        )
    temperature, findings = fit_temperature(model.likelihood, latent, targets)
    base = posterior
    if isinstance(posterior, ScaledPosterior):
        base, temperature = posterior.base, temperature * posterior.temperature.to(temperature)
    return model.replaced(posterior=ScaledPosterior(base, temperature), findings=findings)


def _best_noise(likelihood: Gaussian, latent: Latent, targets: Tensor) -> Tensor:
    """The fitted noise, or the present one where it scores better (the optimum of a mixture may be a local one)."""
    noise = fit_noise(latent, targets)
    if likelihood.noise is None:
        return noise
    present = likelihood.scale(latent.mean).to(noise)
    exact, goal = latent.map(Tensor.double), targets.double()
    scores = [float(predictive_nll(Gaussian(candidate), exact, goal)) for candidate in (noise, present)]
    return noise if scores[0] <= scores[1] else present


def _latents(model: BayesianModel, data: Iterable[Any], progress: bool) -> tuple[Latent, Tensor]:
    """Beliefs over outputs and checked targets of a whole loader."""
    prediction, targets = model.predict_with_targets(data, progress=progress)
    if targets is None:
        raise ArgumentError("the held-out loader yields no targets; expected (inputs, target)")
    latent = prediction.latent
    return latent, model.likelihood.check_targets(latent.mean, targets)


def _tune_prior(
    model: BayesianModel,
    posterior: GaussianPosterior,
    data: Iterable[Any],
    grid: Sequence[float] | None,
    progress: bool,
) -> BayesianModel:
    candidates = torch.logspace(-4, 6, 41, dtype=torch.float64) if grid is None else torch.as_tensor(grid, dtype=torch.float64)
    if candidates.dim() != 1 or not len(candidates) or not bool((candidates > 0).all()):
        raise ArgumentError(f"grid={grid!r}; expected positive prior precisions")
    passes = _passes(model, posterior, data, progress)
    if isinstance(model.likelihood, Gaussian) and posterior.noise is not None:
        scores, factors = _profiled_scores(posterior, candidates, passes)
    else:
        scores, factors = _scores(model, posterior, candidates, passes), None
    return _with_choice(model, posterior, candidates, int(scores.argmin()), factors)


def _passes(
    model: BayesianModel, posterior: GaussianPosterior, data: Iterable[Any], progress: bool
) -> Iterator[tuple[Tensor, Tensor, Sequence[Factor]]]:
    """Outputs, targets, and the part of the outputs' covariance that no prior changes, chunk by chunk."""
    step = chunk_size(posterior.layout, posterior.curvature.name, torch.float32)
    for number, inputs, target in batches(model.network, data, progress=progress, describe="held-out"):
        for rows, labels in chunks(inputs, target, step):
            with in_batch(number):
                mean, factors = posterior.linearize(model.network, rows)
                model.likelihood.check_outputs(mean)
                checked = model.likelihood.check_targets(mean, torch.as_tensor(labels))
            yield mean, checked, posterior.structure.prepared(factors)


def _scores(
    model: BayesianModel,
    posterior: GaussianPosterior,
    candidates: Tensor,
    passes: Iterable[tuple[Tensor, Tensor, Sequence[Factor]]],
) -> Tensor:
    """Mean NLL of every candidate prior precision; nothing is kept from one chunk to the next."""
    totals, count = candidates.new_zeros(len(candidates)), 0
    for mean, target, turned in passes:
        for i, value in enumerate(candidates):
            latent = posterior.latent(mean, turned, posterior.scale, value / posterior.temperature)
            totals[i] += predictive_nll(model.likelihood, latent, target).cpu() * len(mean)
        count += len(mean)
    return totals / count


def _profiled_scores(
    posterior: GaussianPosterior,
    candidates: Tensor,
    passes: Iterable[tuple[Tensor, Tensor, Sequence[Factor]]],
) -> tuple[Tensor, Tensor]:
    """Mean NLL of every candidate at its own best common factor s of the noise scales, and those factors.

    The covariance of the outputs at factor s is s^p Q with Q at the candidate s^p * prior precision (p = 2; 4 for
    the empirical Fisher). In the eigenbasis of Q relative to the noise the NLL is a sum over scalars.
    """
    relative = _relative(posterior)
    heat = posterior.precision.new_tensor(1.0 / posterior.temperature)
    spreads: list[list[Tensor]] = [[] for _ in candidates]
    squares: list[list[Tensor]] = [[] for _ in candidates]
    for mean, target, turned in passes:
        level = relative.expand(mean.shape[-1])
        residual = (target - mean).double() / level
        for i, value in enumerate(candidates):
            covariance = posterior.structure.quad_prepared(turned, heat, value * heat).double()
            values, basis = eigh(covariance / level.unsqueeze(-1) / level, "covariance of the outputs")
            spreads[i].append(values)
            squares[i].append(torch.einsum("bij,bi->bj", basis, residual).square())
    scores, factors = [], []
    for spread, square in zip(map(torch.cat, spreads), map(torch.cat, squares), strict=True):
        factor = _best_factor(spread, square, posterior.noise_power)
        variance = factor**posterior.noise_power * spread + factor.square()
        scores.append(0.5 * (variance.log() + square / variance).sum(-1).mean())
        factors.append(factor)
    return torch.stack(scores).cpu(), torch.stack(factors)


def _best_factor(spread: Tensor, square: Tensor, power: int) -> Tensor:
    """s that minimises the sum of log v + square / v, v = s^power spread + s^2."""
    if power == 2:
        return (square / (spread + 1.0)).mean().sqrt().clamp(min=1e-12)
    centre = square.mean().sqrt().clamp(min=1e-12)

    def loss(log_factor: Tensor) -> Tensor:
        factor = centre * log_factor.exp()
        variance = factor**power * spread + factor.square()
        return (variance.log() + square / variance).mean()

    return centre * math.exp(minimise(loss, spread.device))


def _relative(posterior: GaussianPosterior) -> Tensor:
    """Noise scales of the outputs up to the common factor, float64."""
    if posterior.noise is None or not posterior.parts:
        return torch.ones((), dtype=torch.float64, device=posterior.precision.device)
    return posterior.noise.double()


def _with_choice(
    model: BayesianModel, posterior: GaussianPosterior, candidates: Tensor, best: int, factors: Tensor | None
) -> BayesianModel:
    precision = candidates[best].to(posterior.precision.device)
    likelihood, noise = model.likelihood, None
    if factors is not None and posterior.noise is not None and isinstance(likelihood, Gaussian):
        noise = (factors[best] * _relative(posterior)).expand(len(posterior.noise)).clone()
        precision = precision / factors[best] ** posterior.noise_power
        likelihood = likelihood.with_noise(noise)
    findings = [Finding("info", f"prior precision {float(precision):.4g} (scalar) chosen on held-out data")]
    if best in (0, len(candidates) - 1):
        findings.append(
            Finding("warning", "the prior precision lies at the end of the grid", "pass a wider grid= to tune()")
        )
    return model.replaced(
        posterior=posterior.with_prior(precision, noise), likelihood=likelihood, findings=tuple(findings)
    )
