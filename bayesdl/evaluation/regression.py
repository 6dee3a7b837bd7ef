"""Regression metrics of Gaussian forecasts and of Gaussian mixtures (every ensemble), in closed form or by bisection.

`mean` and `variance` (noise included) are (N,) or (N, D), or (S, N, D) for a mixture of S components with
`member_weights` (S,); `targets` has the shape of one component. Unless said otherwise values are means over examples
and outputs. Results are floats, or float64 (R,) for `weights` (R, N). Bad input raises subclasses of `ValueError`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.evaluation import validation, weighting
from bayesdl.evaluation.draws import Draws

# Elements of the largest temporary in sums over pairs of components.
CHUNK = 1 << 21
LEVELS = tuple(i / 20 for i in range(1, 20))


@final
@dataclass(frozen=True)
class Mixture:
    """Gaussian components (S, N, D) float64 with weights (S,) that sum to 1."""

    means: Tensor
    deviations: Tensor
    weights: Tensor

    @classmethod
    def of(cls, means: Tensor, variances: Tensor, member_weights: Tensor | None = None) -> Mixture:
        """From checked moments."""
        means = validation.wide(means)
        count = len(means)
        weights = means.new_full((count,), 1 / count) if member_weights is None else validation.wide(member_weights)
        return cls(means, validation.wide(variances).sqrt(), weights.to(means.device))

    @classmethod
    def read(cls, mean: Any, variance: Any, member_weights: Any) -> Mixture:
        """Check and convert."""
        means, variances = validation.moments(mean, variance)
        return cls.of(means, variances, validation.member_weights(member_weights, len(means)))

    @property
    def column(self) -> Tensor:
        """Weights as (S, 1, 1)."""
        return self.weights[:, None, None]

    @property
    def mean(self) -> Tensor:
        """(N, D)."""
        return (self.column * self.means).sum(0)

    @property
    def variance(self) -> Tensor:
        """(N, D), by the law of total variance."""
        return (self.column * (self.deviations.square() + (self.means - self.mean).square())).sum(0)

    def member_log_prob(self, y: Tensor) -> Tensor:
        """(S, N), joint log-density over outputs of every component."""
        z = (y - self.means) / self.deviations
        return (-0.5 * z.square() - self.deviations.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def log_prob(self, y: Tensor) -> Tensor:
        """(N,), joint log-density over outputs, which are independent within a component."""
        return (self.member_log_prob(y) + self.weights.log()[:, None]).logsumexp(0)

    def cdf(self, y: Tensor) -> Tensor:
        """(N, D), P(Y <= y) of every output."""
        return (self.column * torch.special.ndtr((y - self.means) / self.deviations)).sum(0)

    def quantile(self, q: float) -> Tensor:
        """(N, D), by bisection on the CDF to 1e-10 relative, bracketed by the components' quantiles."""
        z = float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))
        each = self.means + z * self.deviations
        low, high = each.amin(0), each.amax(0)
        if len(each) == 1:
            return low
        # Near 0 a relative error means nothing: the narrowest component sets the scale there.
        scale = self.deviations.amin(0)
        # Each output stops by itself, so that a quantile does not depend on the examples beside it.
        while bool((open_ := high - low > 1e-10 * torch.maximum(scale, torch.maximum(low.abs(), high.abs()))).any()):
            middle = (low + high) / 2
            left = self.cdf(middle) < q
            low, high = torch.where(open_ & left, middle, low), torch.where(open_ & ~left, middle, high)
        return (low + high) / 2

    def crps(self, y: Tensor) -> Tensor:
        """(N, D), sum_i w_i A(y - mu_i, v_i) - 1/2 sum_ij w_i w_j A(mu_i - mu_j, v_i + v_j) (Grimit et al. 2006)."""
        first = (self.column * _spread(y - self.means, self.deviations)).sum(0)
        # The diagonal of the double sum has mean difference 0: A(0, 2 v) = 2 s / sqrt(pi).
        second = (self.column.square() * self.deviations).sum(0) * (2 / math.sqrt(math.pi))
        count = len(self.means)
        left, right = torch.triu_indices(count, count, 1, device=self.means.device)
        step = max(1, CHUNK // y.numel())
        for start in range(0, len(left), step):
            i, j = left[start : start + step], right[start : start + step]
            deviation = (self.deviations[i].square() + self.deviations[j].square()).sqrt()
            pairs = _spread(self.means[i] - self.means[j], deviation)
            second = second + 2 * ((self.weights[i] * self.weights[j])[:, None, None] * pairs).sum(0)
        return first - second / 2


def nll(
    targets: Any,
    *,
    mean: Any,
    variance: Any,
    member_weights: Any = None,
    weights: Any = None,
    per_example: bool = False,
) -> float | Tensor:
    """Minus the log predictive density in nats, summed over outputs."""
    mixture, y = read(targets, mean, variance, member_weights)
    return _reduce(-mixture.log_prob(y), weights, per_example)


def crps(
    targets: Any,
    *,
    mean: Any,
    variance: Any,
    member_weights: Any = None,
    weights: Any = None,
    per_example: bool = False,
) -> float | Tensor:
    """Continuous ranked probability score in target units, closed form for a Gaussian and for a Gaussian mixture."""
    mixture, y = read(targets, mean, variance, member_weights)
    return _reduce(mixture.crps(y).mean(1), weights, per_example)


def interval_score(
    targets: Any,
    *,
    mean: Any,
    variance: Any,
    level: float = 0.9,
    member_weights: Any = None,
    weights: Any = None,
    per_example: bool = False,
) -> float | Tensor:
    """(u - l) + (2/a)(l - y)+ + (2/a)(y - u)+ of the central interval, a = 1 - level (Gneiting and Raftery 2007)."""
    mixture, y = read(targets, mean, variance, member_weights)
    return _reduce(interval_score_losses(y, *interval_of(mixture, level), level), weights, per_example)


def pinball(
    targets: Any,
    *,
    mean: Any,
    variance: Any,
    q: float = 0.5,
    member_weights: Any = None,
    weights: Any = None,
    per_example: bool = False,
) -> float | Tensor:
    """Quantile loss max(q (y - f), (q - 1) (y - f)) at the predicted q-quantile f; its mean over q is half the CRPS."""
    mixture, y = read(targets, mean, variance, member_weights)
    losses = pinball_losses(y, mixture.quantile(validation.fraction(q, "q")), q)
    return _reduce(losses, weights, per_example)


def picp(
    targets: Any,
    *,
    mean: Any,
    variance: Any,
    level: float = 0.9,
    member_weights: Any = None,
    weights: Any = None,
    per_example: bool = False,
) -> float | Tensor:
    """Share of targets with (1 - level)/2 <= F(y) <= (1 + level)/2; best is `level`."""
    mixture, y = read(targets, mean, variance, member_weights)
    return _reduce(coverage_losses(mixture.cdf(y), level), weights, per_example)


def mpiw(
    *,
    mean: Any,
    variance: Any,
    level: float = 0.9,
    member_weights: Any = None,
    weights: Any = None,
    per_example: bool = False,
) -> float | Tensor:
    """Mean width of the central interval in target units."""
    low, high = interval_of(Mixture.read(mean, variance, member_weights), level)
    return _reduce((high - low).mean(1), weights, per_example)


def rmse(
    targets: Any, *, mean: Any, variance: Any = None, member_weights: Any = None, weights: Any = None
) -> float | Tensor:
    """Root of the mean squared error of the predictive mean; `variance` is not needed."""
    centre, y = _point(targets, mean, variance, member_weights)
    value = weighting.mean((y - centre).square().mean(1), validation.example_weights(weights, len(y)))
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def mae(
    targets: Any,
    *,
    mean: Any,
    variance: Any = None,
    member_weights: Any = None,
    weights: Any = None,
    per_example: bool = False,
) -> float | Tensor:
    """Mean absolute error of the predictive mean; `variance` is not needed."""
    centre, y = _point(targets, mean, variance, member_weights)
    return _reduce((y - centre).abs().mean(1), weights, per_example)


def sharpness(*, mean: Any, variance: Any, member_weights: Any = None, weights: Any = None) -> float | Tensor:
    """Root of the mean predictive variance, in target units."""
    spread = Mixture.read(mean, variance, member_weights).variance.mean(1)
    value = weighting.mean(spread, validation.example_weights(weights, len(spread)))
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def qce(
    targets: Any,
    *,
    mean: Any,
    variance: Any,
    member_weights: Any = None,
    weights: Any = None,
    backend: validation.Backend = "torch",
) -> float | Tensor:
    """Mean over the levels 0.05 .. 0.95 of |share of PIT values <= level - level|, averaged over outputs.

    `backend="netcal"` computes it by netcal, for which a level is that of a central interval of the normal law with the
    forecast's mean and variance: another number, not a check of this one.
    """
    mixture, y = read(targets, mean, variance, member_weights)
    if validation.other_backend(backend, weights):
        from bayesdl.evaluation.netcal import deviation_error

        return deviation_error("qce", mixture.mean, mixture.variance, y, levels=LEVELS)
    return qce_of(mixture.cdf(y), validation.example_weights(weights, len(y)))


def pit(targets: Any, *, mean: Any, variance: Any, member_weights: Any = None) -> Tensor:
    """(N, D) float64, probability integral transform F(y); uniform for a right forecaster."""
    mixture, y = read(targets, mean, variance, member_weights)
    return mixture.cdf(y)


def mixture_cdf(y: Any, *, mean: Any, variance: Any, member_weights: Any = None) -> Tensor:
    """(N, D) float64, P(Y <= y); the same as `pit`, under its plain name."""
    return pit(y, mean=mean, variance=variance, member_weights=member_weights)


def mixture_quantile(q: float, *, mean: Any, variance: Any, member_weights: Any = None) -> Tensor:
    """(N, D) float64, the q-quantile of every output, 0 < q < 1, to 1e-10 relative; always finite."""
    return Mixture.read(mean, variance, member_weights).quantile(validation.fraction(q, "q"))


def interval_of(law: Mixture | Draws, level: float) -> tuple[Tensor, Tensor]:
    """Lower and upper end (N, D) of the central interval."""
    level = validation.fraction(level, "level")
    return law.quantile((1 - level) / 2), law.quantile((1 + level) / 2)


def interval_score_losses(y: Tensor, low: Tensor, high: Tensor, level: float) -> Tensor:
    """(N,), interval score of given ends (N, D), mean over outputs."""
    factor = 2 / (1 - level)
    return (high - low + factor * (low - y).clamp_min(0) + factor * (y - high).clamp_min(0)).mean(1)


def pinball_losses(y: Tensor, quantile: Tensor, q: float) -> Tensor:
    """(N,), quantile loss of a given quantile (N, D)."""
    off = y - quantile
    return torch.maximum(q * off, (q - 1) * off).mean(1)


def coverage_losses(cdf: Tensor, level: float) -> Tensor:
    """(N,), share of outputs inside the central interval, from PIT values (N, D)."""
    level = validation.fraction(level, "level")
    return ((cdf >= (1 - level) / 2) & (cdf <= (1 + level) / 2)).double().mean(1)


def qce_of(cdf: Tensor, weights: Tensor | None) -> float | Tensor:
    """`qce` of PIT values (N, D) under checked weights."""
    levels = torch.tensor(LEVELS, dtype=torch.float64, device=cdf.device)
    below = (cdf[..., None] <= levels).double().flatten(1)
    table = weighting.rows(weights, len(cdf), cdf.device)
    share = (table @ below / table.sum(1, keepdim=True)).unflatten(1, (cdf.shape[1], len(LEVELS)))
    return weighting.finish((share - levels).abs().mean((1, 2)), weights)


def _spread(difference: Tensor, deviation: Tensor) -> Tensor:
    # A(m, v) = E|Z|, Z ~ N(m, v): 2 s phi(m/s) + m (2 Phi(m/s) - 1).
    z = difference / deviation
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return 2 * deviation * density + difference * torch.erf(z / math.sqrt(2))


def read(targets: Any, mean: Any, variance: Any, member_weights: Any) -> tuple[Mixture, Tensor]:
    """Checked mixture and targets (N, D) float64."""
    mixture = Mixture.read(mean, variance, member_weights)
    return mixture, _targets(targets, mean, mixture.means)


def _targets(targets: Any, mean: Any, means: Tensor) -> Tensor:
    # A mean (N,) was given a trailing axis; its targets must then be (N,) too, and (N, 1) stays an error.
    flat = validation.tensor(mean, "mean").dim() == 1
    shape = tuple(means.shape[1:2]) if flat else tuple(means.shape[1:])
    y = validation.wide(validation.real_targets(targets, shape)).to(means.device)
    return y[:, None] if flat else y


def _point(targets: Any, mean: Any, variance: Any, member_weights: Any) -> tuple[Tensor, Tensor]:
    if variance is None:
        variance = torch.ones_like(validation.tensor(mean, "mean"), dtype=torch.float64)
    mixture, y = read(targets, mean, variance, member_weights)
    return mixture.mean, y


def _reduce(losses: Tensor, weights: Any, per_example: bool) -> float | Tensor:
    if per_example:
        return losses
    return weighting.mean(losses, validation.example_weights(weights, len(losses)))
