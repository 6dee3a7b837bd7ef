"""Prior and noise of an exact regression by predictive scores: leave-one-out in closed form, or held-out data.

For a ratio rho both have residuals r_n and spreads c_n with y_n ~ N(prediction, s^2 c_n), so that the best noise is
the closed form s^2 = mean r_n^2 / c_n. Leaving out point n of leverage h_n gives r_n / (1 - h_n) and 1 / (1 - h_n).

Left-out residuals of the whole network under a noise that is given: at a point that is conditioned on the spread
1 + h_n stays below 2 under any prior, so that where residuals are larger than the noise no prior would be too wide.
They are scored under 1 / (1 - h_n), the spread at a point that has been left out, which has no such bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.last_layer.exact import ConjugateRegression
from bayesdl.last_layer.search import maximise

GRID = 121
LOW, HIGH = 1e-10, 1e4
CHUNK = 64 << 20
# by how much left-out residuals may lower a precision below what evidence and the targets' spread agree on: with many
# points for their features every wider prior scores the same on these, and differs far away from them alone
WIDER = 300.0
Scored = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def leave_one_out(
    regression: ConjugateRegression,
    phi: Tensor,
    y: Tensor,
    *,
    prior_precision: Tensor | None = None,
    noise_variance: Tensor | None = None,
    shared: bool = False,
) -> ConjugateRegression:
    """rho and s^2 of the best leave-one-out log-density on the training pairs `(N, d)`, `(N, K)`.

    `prior_precision` or `noise_variance`, `(K,)`, is kept where it is given; `shared` chooses one prior precision for
    all outputs, by the sum of their scores, and otherwise each output has its own.
    """
    return _best(regression, phi, y, _refitted, prior_precision, noise_variance, shared)


def held_out(
    regression: ConjugateRegression,
    phi: Tensor,
    y: Tensor,
    *,
    prior_precision: Tensor | None = None,
    noise_variance: Tensor | None = None,
    shared: bool = False,
) -> ConjugateRegression:
    """rho and s^2 of the best log-density on pairs that the regression has not seen; arguments as `leave_one_out`."""
    return _best(regression, phi, y, _unseen, prior_precision, noise_variance, shared)


def left_out(
    regression: ConjugateRegression,
    phi: Tensor,
    y: Tensor,
    *,
    prior_precision: Tensor | None = None,
    noise_variance: Tensor | None = None,
    shared: bool = False,
) -> ConjugateRegression:
    """rho and s^2 for training features with targets at the left-out distance of `left_out_pairs`.

    As `held_out`, but for a noise that is given and a prior that is not: the spread is then that of a left-out point,
    and the precision is at least 1 / 300 of the smaller of that of the evidence and that whose prior outputs vary over
    the training features as the targets do. Arguments as `leave_one_out`.
    """
    if noise_variance is None or prior_precision is not None:
        return held_out(
            regression, phi, y, prior_precision=prior_precision, noise_variance=noise_variance, shared=shared
        )
    sharing = "shared" if shared else "output"
    evident = maximise(regression, sharing=sharing, noise_variance=noise_variance)[0].ratio
    # mean squared feature over the variance of the targets; constant targets bound nothing
    tiny = torch.finfo(torch.float64).tiny
    spread = regression.values.sum() / regression.statistics.residual.clamp(min=tiny) * noise_variance
    least = torch.minimum(evident, spread) / WIDER
    if shared:  # the widest that any of the outputs allows
        least = (least / noise_variance).min() * noise_variance
    return _best(regression, phi, y, _apart, None, noise_variance, shared, least)


def leave_one_out_residuals(regression: ConjugateRegression, phi: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals on the training pairs, as fitted and left out: two `(N, K)`. Exact at fixed rho and s^2."""
    fitted = y.double() - regression.latent(phi.double())[0]
    return fitted, fitted / (1.0 - regression.leverage(phi.double())).clamp(min=1e-12)


def _best(
    regression: ConjugateRegression,
    phi: Tensor,
    y: Tensor,
    scored: Scored,
    prior_precision: Tensor | None,
    noise_variance: Tensor | None,
    shared: bool,
    least: Tensor | None = None,
) -> ConjugateRegression:
    if prior_precision is not None and noise_variance is not None:
        return regression.with_hyperparameters(prior_precision * noise_variance, noise_variance)
    scale = float(regression.values.max().clamp(min=torch.finfo(torch.float64).tiny))
    grid = torch.logspace(math.log10(LOW), math.log10(HIGH), GRID, dtype=torch.float64, device=phi.device) * scale
    candidates, present = grid.unsqueeze(1).expand(-1, regression.num_outputs), regression.ratio.to(grid)
    together = shared and prior_precision is None
    if together and noise_variance is not None:
        candidates = candidates * (noise_variance / noise_variance.mean())
        present = (present / noise_variance).log().mean().exp() * noise_variance
    # the present ones too: no choice is worse than none
    ratios = torch.cat([candidates, present.unsqueeze(0)])
    if least is not None:
        ratios = torch.maximum(ratios, least)
    sums = [_sums(regression.with_hyperparameters(r, torch.ones_like(r)), phi, y, scored) for r in ratios]
    square, log = (torch.stack(part) / len(phi) for part in zip(*sums, strict=True))  # (candidates, K)
    if together and noise_variance is None:
        prior_precision = _common(ratios, square, log)
    variance = square.clamp(min=torch.finfo(torch.float64).tiny)
    if noise_variance is not None:
        variance = noise_variance.expand_as(square)
    elif prior_precision is not None:
        variance = ratios / prior_precision
    scores = _score(variance, square, log)
    one = together and noise_variance is not None
    chosen = scores.sum(1).argmin().expand(scores.shape[1]) if one else scores.argmin(0)
    columns = torch.arange(regression.num_outputs, device=phi.device)
    return regression.with_hyperparameters(ratios[chosen, columns], variance[chosen, columns])


def _common(ratios: Tensor, square: Tensor, log: Tensor) -> Tensor:
    """The precision, one for all outputs, under which their best ratios and the noises that follow score best."""
    level = square.clamp(min=torch.finfo(torch.float64).tiny).log().mean().exp()
    precisions = ratios.log().mean(1).exp() / level
    best = torch.stack([_score(ratios / p, square, log).min(0).values.sum() for p in precisions]).argmin()
    return precisions[best].expand(ratios.shape[1])


def _score(variance: Tensor, square: Tensor, log: Tensor) -> Tensor:
    """Mean of -log N(r | 0, s^2 c), up to a constant."""
    return 0.5 * (variance.log() + log + square / variance)


def _sums(candidate: ConjugateRegression, phi: Tensor, y: Tensor, scored: Scored) -> tuple[Tensor, Tensor]:
    """sum r^2 / c and sum log c per output, in chunks of rows."""
    step = max(1, CHUNK // (8 * max(1, phi.shape[1])))
    squares = torch.zeros_like(candidate.ratio)
    logs = torch.zeros_like(candidate.ratio)
    for rows, targets in zip(phi.split(step), y.split(step), strict=True):
        mean, leverage = candidate.latent(rows.double())  # unit noise: the variance is the leverage
        residual, spread = scored(targets.double() - mean, leverage)
        squares = squares + (residual.square() / spread).sum(0)
        logs = logs + spread.log().sum(0)
    return squares, logs


def _refitted(residual: Tensor, leverage: Tensor) -> tuple[Tensor, Tensor]:
    """Of a training point that the regression does without."""
    rest = (1.0 - leverage).clamp(min=1e-12)
    return residual / rest, 1.0 / rest


def _unseen(residual: Tensor, leverage: Tensor) -> tuple[Tensor, Tensor]:
    """Of a point that the regression has not seen."""
    return residual, 1.0 + leverage


def _apart(residual: Tensor, leverage: Tensor) -> tuple[Tensor, Tensor]:
    """Of a training point whose residual is left out already."""
    return residual, 1.0 / (1.0 - leverage).clamp(min=1e-12)
