"""Prior precision and noise of an exact regression, by evidence; no refit, no step size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.last_layer.exact import ConjugateRegression

GRID, LOW, HIGH = 200, 1e-10, 1e4
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
ROUNDS, TOLERANCE = 1000, 1e-10
SHARINGS = ("output", "shared")
Objective = Callable[[Tensor], Tensor]


def maximise(
    regression: ConjugateRegression,
    *,
    sharing: str = "output",
    prior_precision: Tensor | None = None,
    noise_variance: Tensor | None = None,
) -> tuple[ConjugateRegression, Tensor]:
    """rho and s^2 of highest evidence.

    Args:
        regression: the decomposed data.
        sharing: "output" (one prior precision per output) or "shared" (one for all).
        prior_precision: lambda kept as given, `(K,)`.
        noise_variance: s^2 kept as given, `(K,)`.

    Returns:
        the regression at the optimum, and a mask `(K,)` of outputs whose optimum lies at an end of the range searched.

    Raises:
        ArgumentError: unknown sharing.
    """
    if sharing not in SHARINGS:
        raise ArgumentError(f"prior_sharing={sharing!r}; choose one of {SHARINGS}")
    if prior_precision is not None and noise_variance is not None:
        ratio = prior_precision * noise_variance
        return regression.with_hyperparameters(ratio, noise_variance), torch.zeros_like(ratio, dtype=torch.bool)
    scale = regression.values.max().clamp(min=torch.finfo(torch.float64).tiny)
    low, high = math.log(LOW) + scale.log(), math.log(HIGH) + scale.log()
    if prior_precision is not None:
        fixed = prior_precision

        def of_noise(log_ratio: Tensor) -> Tensor:
            ratio = log_ratio.exp()
            return regression.evidence(ratio, ratio / fixed)

        best, edge = search(of_noise, low, high, regression.num_outputs)
        return regression.with_hyperparameters(best.exp(), best.exp() / fixed), edge
    if sharing == "shared":
        return _shared(regression, noise_variance, low, high)
    if noise_variance is not None:
        known = noise_variance

        def of_prior(log_ratio: Tensor) -> Tensor:
            return regression.evidence(log_ratio.exp(), known)

        best, edge = search(of_prior, low, high, regression.num_outputs)
        return regression.with_hyperparameters(best.exp(), known), edge

    best, edge = search(lambda log_ratio: regression.profile(log_ratio.exp()), low, high, regression.num_outputs)
    return regression.with_ratio(best.exp()), edge


def search(objective: Objective, low: Tensor, high: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Maximum of each column of `objective` on [low, high]: a grid, then golden section around its best point.

    Args:
        objective: `(G, K)` -> `(G, K)`.
        low: scalar.
        high: scalar.
        columns: K.

    Returns:
        positions `(K,)`, and a mask `(K,)` of those at an end of the range.
    """
    grid = low + (high - low) * torch.linspace(0.0, 1.0, GRID, dtype=low.dtype, device=low.device)
    # a row at a time: the objective holds (d', K) for every candidate
    values = torch.stack([objective(point.expand(1, columns))[0] for point in grid])
    best = values.argmax(0)
    step = (high - low) / (GRID - 1)
    left, right = (grid[best] - step).clamp(min=low), (grid[best] + step).clamp(max=high)
    for _ in range(64):  # the bracket shrinks to 1e-13 of a grid step
        inner, outer = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
        rising = objective(inner.unsqueeze(0))[0] < objective(outer.unsqueeze(0))[0]
        left, right = torch.where(rising, inner, left), torch.where(rising, right, outer)
    found = 0.5 * (left + right)
    return found, (found - low < step) | (high - found < step)


def _shared(
    regression: ConjugateRegression, noise_variance: Tensor | None, low: Tensor, high: Tensor
) -> tuple[ConjugateRegression, Tensor]:
    """One prior precision for all outputs (MacKay 1992): lambda = sum gamma_k / sum |w_k|^2 and its own noise each."""
    if noise_variance is not None:
        known = noise_variance

        def of_precision(log_precision: Tensor) -> Tensor:
            return regression.evidence(log_precision.exp() * known, known).sum(-1, keepdim=True)

        best, edge = search(of_precision, low - known.log().max(), high - known.log().min(), 1)
        return regression.with_hyperparameters(best.exp() * known, known), edge.expand(len(known))
    start, _ = maximise(regression)
    noise, precision = start.noise_variance, start.prior_precision.log().mean().exp()
    least, most = low.exp(), high.exp()
    for _ in range(ROUNDS):
        ratio = (precision * noise).clamp(least, most)
        shrunk = regression.target / (regression.values.unsqueeze(1) + ratio)
        used = (regression.values.unsqueeze(1) / (regression.values.unsqueeze(1) + ratio)).sum(0)
        # the residual alone: R holds rho |w|^2 too
        misfit = (regression.misfit(ratio) - ratio * shrunk.square().sum(0)).clamp(min=0)
        updated = used.sum() / shrunk.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        noise = (misfit / (regression.degrees - used).clamp(min=1e-12)).clamp(min=torch.finfo(torch.float64).tiny)
        step, precision = (updated / precision).log().abs(), updated
        if bool(step < TOLERANCE):
            break
    ratio = precision * noise
    return regression.with_hyperparameters(ratio.clamp(least, most), noise), (ratio < least) | (ratio > most)
