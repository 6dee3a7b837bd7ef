"""Tuning on held-out data by a proper score, the log density by default. The network runs once, whatever is tried."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.latent import Latent
from bayesdl.likelihoods import Gaussian
from bayesdl.posteriors import GaussianPosterior, ScaledPosterior
from bayesdl.tuning.grid import Passes, choose, grid_of, losses, passes, pick, projected, relative_noise
from bayesdl.tuning.interpolation import shifts_of
from bayesdl.tuning.scores import Score, resolve_score
from bayesdl.tuning.temperature import fit_noise, fit_temperature, minimise, predictive_nll

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel


def tune_heldout(
    model: BayesianModel,
    data: Iterable[Any] | None = None,
    *,
    grid: Sequence[float] | None = None,
    standard_errors: float = 0.0,
    score: str | Score = "nll",
    progress: bool = False,
) -> BayesianModel:
    """Minimise NLL, or another proper score, on held-out data.

    A linearised Laplace posterior: the scalar prior precision over `grid` (and for open Gaussian noise its scale at
    every candidate). Any other posterior: a temperature on the outputs, or the noise of a Gaussian likelihood.

    Args:
        model: any method.
        data: loader of held-out batches with targets.
        grid: prior precisions to try; default 41 values from 1e-4 to 1e6, evenly spaced in logarithm.
        standard_errors: how many standard errors above the least NLL a candidate may lie; the largest precision within
            is chosen. Zero takes the least, one is the one-standard-error rule (Breiman et al. 1984), for held-out
            sets so small that their choice of a wide posterior may be chance.
        score: "nll"; "brier" (class probabilities); "crps" (normal predictives, summed over outputs); or a function
            `(distribution, targets) -> (B,)` of losses.

    Raises:
        ArgumentError: no data, or a negative number of standard errors.
        UnsupportedError: a likelihood whose outputs have no temperature; another score than NLL where a noise is open.
    """
    if data is None:
        raise ArgumentError('tune("heldout", val_loader) needs a loader of data the network was not trained on')
    if not standard_errors >= 0:
        raise ArgumentError(f"standard_errors={standard_errors}; expected zero or more")
    posterior, measure = model.posterior, resolve_score(score)
    open_noise = isinstance(model.likelihood, Gaussian) and not (
        isinstance(posterior, GaussianPosterior) and posterior.predictive == "linearized" and posterior.noise is None
    )
    if open_noise and score != "nll":
        raise UnsupportedError(
            f"the noise is chosen here too, by NLL, and score={score!r} was given; fix it, "
            'likelihood=bdl.Gaussian(noise=...), or use score="nll"'
        )
    if isinstance(posterior, GaussianPosterior) and posterior.predictive == "linearized":
        return _tune_prior(model, posterior, data, grid, standard_errors, measure, progress)
    latent, targets = _latents(model, data, progress)
    if isinstance(model.likelihood, Gaussian):
        noise = _best_noise(model.likelihood, latent, targets)
        found = Finding("info", f"noise {[round(float(v), 4) for v in noise]} chosen on held-out data", topic="noise")
        return model.replaced(likelihood=model.likelihood.with_noise(noise), findings=(found,))
    if model.likelihood.task not in ("classification", "multilabel"):
        raise UnsupportedError(
            f"a {model.likelihood.name} likelihood has no output temperature; tune the method instead"
        )
    temperature, findings = fit_temperature(model.likelihood, latent, targets, measure)
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
    seen = prediction.observed(targets)
    return seen[0].latent, seen[1]


def _tune_prior(
    model: BayesianModel,
    posterior: GaussianPosterior,
    data: Iterable[Any],
    grid: Sequence[float] | None,
    standard_errors: float,
    score: Score,
    progress: bool,
) -> BayesianModel:
    candidates = grid_of(grid)
    rows = passes(model, posterior, data, "held-out", progress, candidates=len(candidates))
    factors = None
    if isinstance(model.likelihood, Gaussian) and posterior.noise is not None:
        table, factors = profiled_losses(posterior, candidates, rows)
    else:
        table = losses(model, posterior, candidates, rows, score)
    best = pick(candidates, table, standard_errors)
    within = f", within {standard_errors:g} standard errors of the least loss" if standard_errors > 0 else ""
    return choose(model, posterior, candidates, best, factors, f"on held-out data{within}")


def profiled_losses(
    posterior: GaussianPosterior,
    candidates: Tensor,
    rows: Passes,
) -> tuple[Tensor, Tensor]:
    """NLL `(R, N)` of every candidate at its own best common factor s of the noise scales, and those factors `(R,)`.

    The covariance of the outputs at factor s is s^p Q with Q at the candidate s^p * prior precision (p = 2; 4 for
    the empirical Fisher). In the eigenbasis of Q relative to the noise the NLL is a sum over scalars.
    """
    relative = relative_noise(posterior)
    heat = posterior.precision.new_tensor(1.0 / posterior.temperature)
    shifts = shifts_of(candidates / posterior.temperature)
    spreads, squares = [], []
    for mean, target, turned in rows:
        level = relative.expand(mean.shape[-1])
        spread, square = projected(posterior, shifts, turned, heat, level, (target - mean).double() / level)
        spreads.append(spread)
        squares.append(square)
    table, factors = [], []
    for spread, square in zip(torch.cat(spreads, 1), torch.cat(squares, 1), strict=True):
        factor = _best_factor(spread, square, posterior.noise_power)
        variance = factor**posterior.noise_power * spread + factor.square()
        table.append(0.5 * (variance.log() + square / variance).sum(-1))
        factors.append(factor)
    return torch.stack(table).cpu(), torch.stack(factors)


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
