"""Forecasts that are draws (S, N, D) of the predictive and nothing else: proper scores, PIT values, quantiles.

Scores are the fair estimators, unbiased for every number of draws, so that forecasts with different S compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.evaluation import validation, weighting

# Elements of the largest temporary in sums over pairs of draws.
CHUNK = 1 << 22


@final
@dataclass(frozen=True)
class Draws:
    """S draws (S, N, D) float64 of every target, read as `regression.Mixture` is read."""

    samples: Tensor

    @property
    def mean(self) -> Tensor:
        """(N, D)."""
        return self.samples.mean(0)

    @property
    def variance(self) -> Tensor:
        """(N, D), unbiased."""
        return self.samples.var(0)

    def log_prob(self, y: Tensor) -> Tensor:
        """Raises `UndefinedError`: draws have no density."""
        raise validation.UndefinedError("draws have no density; score them by CRPS or the energy score", "draws alone")

    def cdf(self, y: Tensor) -> Tensor:
        """(N, D), (#{x_s < y} + (ties + 1) / 2) / (S + 1): the mean of the randomised PIT of `pit_samples`."""
        return _rank(self.samples, y, torch.full_like(y, 0.5))

    def quantile(self, q: float) -> Tensor:
        """(N, D), linear between the order statistics, of which the k-th of S estimates k / (S + 1)."""
        ordered, count = self.samples.sort(0).values, len(self.samples)
        place = min(max(q * (count + 1) - 1, 0.0), count - 1.0)
        low = int(place)
        return torch.lerp(ordered[low], ordered[min(low + 1, count - 1)], place - low)

    def crps(self, y: Tensor) -> Tensor:
        """(N, D), mean_s |x_s - y| - sum_{s < t} |x_s - x_t| / (S (S - 1)) (Ferro 2014)."""
        count = len(self.samples)
        rank = 2 * torch.arange(1, count + 1, dtype=torch.float64, device=self.samples.device) - count - 1
        pairs = torch.tensordot(rank, self.samples.sort(0).values, 1) / (count * (count - 1))
        return (self.samples - y).abs().mean(0) - pairs

    def energy(self, y: Tensor) -> Tensor:
        """(N,), as `crps` with the Euclidean distance over outputs (Gneiting and Raftery 2007)."""
        count = len(self.samples)
        total = torch.zeros(y.shape[0], dtype=torch.float64, device=y.device)
        step = max(1, CHUNK // self.samples.numel())
        for start in range(0, count, step):
            part = self.samples[start : start + step]
            total = total + (part[:, None] - self.samples).norm(dim=-1).sum((0, 1))
        return (self.samples - y).norm(dim=-1).mean(0) - total / (2 * count * (count - 1))


def crps_samples(targets: Any, samples: Any, *, weights: Any = None, per_example: bool = False) -> float | Tensor:
    """CRPS from draws (S, N) or (S, N, D) of the predictive: the fair estimator, unbiased for every S (Ferro 2014).

    mean_s |x_s - y| - sum_{s < t} |x_s - x_t| / (S (S - 1)), mean over outputs.

    Raises:
        UndefinedError: a single draw has no spread.
    """
    draws, y = _draws(targets, samples)
    return _reduce(_several(draws).crps(y).mean(1), weights, per_example)


def energy_score(targets: Any, samples: Any, *, weights: Any = None, per_example: bool = False) -> float | Tensor:
    """Energy score from draws (S, N, D): the proper score of outputs together (Gneiting and Raftery 2007), fair.

    mean_s |x_s - y| - sum_{s < t} |x_s - x_t| / (S (S - 1)) with Euclidean distances over the D outputs, in target
    units; for one output it is the CRPS.

    Raises:
        UndefinedError: a single draw has no spread.
    """
    draws, y = _draws(targets, samples)
    return _reduce(_several(draws).energy(y), weights, per_example)


def pit_samples(targets: Any, samples: Any, *, generator: torch.Generator | None = None) -> Tensor:
    """Randomised PIT (N, D) from draws (S, N) or (S, N, D): (#{x_s < y} + u (ties + 1)) / (S + 1), uniform if right."""
    draws, y = _draws(targets, samples)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    u = torch.rand(y.shape, dtype=torch.float64, generator=generator, device=generator.device).to(y.device)
    return _rank(draws.samples, y, u)


def checked_samples(samples: Any) -> Tensor:
    """Finite draws (S, N), (S, N, D) as (S, N, D)."""
    x = validation.tensor(samples, "samples")
    validation.rank(x, "samples", (2, 3))
    validation.not_empty(x, "samples")
    validation.finite(x, "samples")
    return x[..., None] if x.dim() == 2 else x


def _rank(samples: Tensor, y: Tensor, u: Tensor) -> Tensor:
    return ((samples < y).sum(0) + u * ((samples == y).sum(0) + 1)) / (len(samples) + 1)


def _several(draws: Draws) -> Draws:
    if len(draws.samples) < 2:
        raise validation.UndefinedError("the fair score compares draws; one was given", "one draw")
    return draws


def _reduce(losses: Tensor, weights: Any, per_example: bool) -> float | Tensor:
    return losses if per_example else weighting.mean(losses, validation.example_weights(weights, len(losses)))


def _draws(targets: Any, samples: Any) -> tuple[Draws, Tensor]:
    flat = validation.tensor(samples, "samples").dim() == 2
    x = checked_samples(samples)
    y = validation.real_targets(targets, tuple(x.shape[1:2] if flat else x.shape[1:]))
    x, y = validation.wide(x), validation.wide(y).to(x.device)
    return Draws(x), y[:, None] if flat else y
