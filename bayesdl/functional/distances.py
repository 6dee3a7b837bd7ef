"""Distances between two laws of function values at the same points.

H `(n, M, C)` are draws under the weight prior, with a graph, G `(n', M, C)` draws under the target, K `(M, M)` the
target's covariance where it is known. Outputs are compared one by one and summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl import linalg
from bayesdl.errors import ArgumentError
from bayesdl.functional.gp import kernel_root

DIRECTIONS = 256
Value = Callable[[Tensor, Tensor, "Tensor | None", torch.Generator], Tensor]


@dataclass(frozen=True)
class Distance:
    """A distance by name.

    Attributes:
        value: `(H, G, K, generator) -> scalar`, differentiable in H.
        needs_moments: whether K must be known.
        critic: whether a function is fitted in between (its value is then computed in `bayesdl.functional.critic`).
    """

    value: Value | None
    needs_moments: bool = False
    critic: str = ""


def energy(h: Tensor, g: Tensor, k: Tensor | None, generator: torch.Generator) -> Tensor:
    """2 E|H - G| - E|H - H'| - E|G - G'| as U-statistics (Szekely and Rizzo 2013)."""
    del k, generator
    first, second = _by_output(h), _by_output(g)
    cross = 2.0 * _distances(first, second).mean((1, 2))
    return (cross - _pairs(_distances(first, first)) - _pairs(_distances(second, second))).sum()


def mmd(h: Tensor, g: Tensor, k: Tensor | None, generator: torch.Generator) -> Tensor:
    """Squared maximum mean discrepancy, unbiased (Gretton et al. 2012).

    Kernels at 1/2, 1 and 2 times the median distance of the target's draws. With K the target's expectations are exact
    and add no noise.
    """
    del generator
    first, second = _by_output(h), _by_output(g)
    with torch.no_grad():
        apart = _distances(second, second)
        upper = torch.triu_indices(apart.shape[1], apart.shape[1], 1)
        median = apart[:, upper[0], upper[1]].median(1).values
    total = h.new_zeros(())
    within = _squares(first, first)
    for factor in (0.5, 1.0, 2.0):
        scale = (factor * median).square()[:, None, None]
        total = total + _pairs(torch.exp(-0.5 * within / scale)).sum()
        if k is None:
            total = total - 2.0 * torch.exp(-0.5 * _squares(first, second) / scale).mean((1, 2)).sum()
            total = total + _pairs(torch.exp(-0.5 * _squares(second, second) / scale)).sum()
        else:
            for values, width in zip(first, scale.flatten(), strict=True):
                total = total - 2.0 * gaussian_kernel_mean(values, k.to(values), width).mean()
                eye = torch.eye(len(k), dtype=values.dtype, device=values.device)
                total = total + torch.exp(-0.5 * torch.logdet(eye + 2.0 * k.to(values) / width))
    return total / 3.0


def gaussian_kernel_mean(values: Tensor, covariance: Tensor, width: Tensor) -> Tensor:
    """E exp(-|x - G|^2 / (2 l^2)) over G ~ N(0, K) for x `(n, M)` and l^2 = `width`: `(n,)`."""
    eye = torch.eye(len(covariance), dtype=values.dtype, device=values.device)
    factor = linalg.cholesky(width * eye + covariance, "covariance of the target")
    solved = torch.linalg.solve_triangular(factor, values.mT, upper=False)
    scale = torch.logdet(eye + covariance / width)
    return torch.exp(-0.5 * (solved.square().sum(0) + scale))


def gaussian_w2(h: Tensor, g: Tensor, k: Tensor | None, generator: torch.Generator) -> Tensor:
    """Squared 2-Wasserstein distance of centred Gaussians: tr K + |F|^2 - 2 |L^T F|_*, F = H^T / sqrt(n), K = L L^T."""
    del g, generator
    covariance = _needed(k, "gaussian-w2")
    factor = kernel_root(covariance).to(h)
    total = h.new_zeros(())
    for values in _by_output(h):
        root = values.mT / math.sqrt(len(values))
        nuclear = torch.linalg.svdvals(factor.mT @ root).sum()
        total = total + covariance.diagonal().sum().to(h) + root.square().sum() - 2.0 * nuclear
    return total


def moments(h: Tensor, g: Tensor, k: Tensor | None, generator: torch.Generator) -> Tensor:
    """|C - K|_F^2 / |K|_F^2 without bias, from two independent halves of the draws."""
    del g, generator
    covariance = _needed(k, "moments").to(h)
    total = h.new_zeros(())
    for values in _by_output(h):
        half = len(values) // 2
        if half < 1:
            raise ArgumentError('distance="moments" needs num_functions of at least 2')
        one, two = (part.mT @ part / len(part) - covariance for part in (values[:half], values[half:]))
        total = total + (one * two).sum() / covariance.square().sum()
    return total


def sliced(h: Tensor, g: Tensor, k: Tensor | None, generator: torch.Generator) -> Tensor:
    """Sliced 2-Wasserstein distance, squared: mean over random directions (Rabin et al. 2012)."""
    del k
    directions = torch.randn(DIRECTIONS, h.shape[1], generator=generator).to(h)
    directions = directions / directions.norm(dim=1, keepdim=True)
    return projected(h, g, directions).mean()


def projected(h: Tensor, g: Tensor, directions: Tensor, power: int = 2) -> Tensor:
    """W_p^p of the projections on each direction `(P, M)`, summed over outputs: `(P,)`."""
    total = h.new_zeros(len(directions))
    for first, second in zip(_by_output(h), _by_output(g), strict=True):
        a, b = (first @ directions.mT).sort(0).values, (second.to(h) @ directions.mT).sort(0).values
        if len(a) != len(b):
            b = _resampled(b, len(a))
        total = total + (a - b).abs().pow(power).mean(0)
    return total


def _resampled(ordered: Tensor, count: int) -> Tensor:
    """Quantiles of sorted columns at the mid-points of `count` equal cells, by linear interpolation."""
    levels = (torch.arange(count, dtype=ordered.dtype, device=ordered.device) + 0.5) / count * len(ordered) - 0.5
    low = levels.floor().clamp(0, len(ordered) - 1).long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    share = (levels - low).clamp(0.0, 1.0).unsqueeze(1)
    return ordered[low] * (1.0 - share) + ordered[high] * share


def _by_output(values: Tensor) -> Tensor:
    return values.permute(2, 0, 1)


def _squares(first: Tensor, second: Tensor) -> Tensor:
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").square()


def _distances(first: Tensor, second: Tensor) -> Tensor:
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def _pairs(matrix: Tensor) -> Tensor:
    """Mean over i != j of `(C, n, n)`: `(C,)`."""
    n = matrix.shape[1]
    if n < 2:
        raise ArgumentError("at least two functions are needed to compare distances within a set")
    return (matrix.sum((1, 2)) - matrix.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))


def _needed(k: Tensor | None, name: str) -> Tensor:
    if k is None:
        raise ArgumentError(
            f'distance="{name}" needs the target\'s covariance, which this target does not know (hyper-priors, or '
            "samples alone); use 'w1', 'energy', 'mmd', 'sw' or 'dsw'"
        )
    return k


DISTANCES: dict[str, Distance] = {
    "w1": Distance(None, critic="w1"),
    "energy": Distance(energy),
    "mmd": Distance(mmd),
    "gaussian-w2": Distance(gaussian_w2, needs_moments=True),
    "moments": Distance(moments, needs_moments=True),
    "sw": Distance(sliced),
    "dsw": Distance(None, critic="dsw"),
}
