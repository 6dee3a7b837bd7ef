"""Isotonic regression by pooling adjacent violators, exact, mostly vectorised."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.evaluation.binning import tie_groups

# Rounds that pool all runs of violators at once; what an adversarial order leaves over is pooled one by one.
ROUNDS = 32


def pool(values: Tensor, weights: Tensor) -> Tensor:
    """Non-decreasing (N,) float64 nearest to `values` (N,) in squares weighted by positive `weights` (N,).

    Blocks whose means fall from one to the next share a block in the solution, whatever the order in which they are
    pooled (Barlow et al. 1972); so all runs of falling means are pooled together, round after round.
    """
    total, mass = values * weights, weights.clone()
    size = torch.ones(len(values), dtype=torch.int64, device=values.device)
    for _ in range(ROUNDS):
        mean = total / mass
        start = torch.ones(len(mean), dtype=torch.bool, device=mean.device)
        start[1:] = mean[1:] > mean[:-1]
        if bool(start.all()):
            return mean.repeat_interleave(size)
        block = start.cumsum(0) - 1
        count = int(block[-1]) + 1
        total, mass = (part.new_zeros(count).index_add_(0, block, part) for part in (total, mass))
        size = size.new_zeros(count).index_add_(0, block, size)
    mean, size = _one_by_one(total, mass, size)
    return mean.repeat_interleave(size)


def fit(scores: Tensor, outcomes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Isotonic regression of `outcomes` (N,) on `scores` (N,): distinct scores (G,) ascending and fitted values (G,).

    Tied scores share one value. `weights` (N,) non-negative; scores of weight 0 do not appear.
    """
    weights = torch.ones_like(outcomes) if weights is None else weights
    held = weights > 0
    scores, outcomes, weights = scores[held], outcomes[held], weights[held]
    order, group, ends = tie_groups(scores)
    mass = weights.new_zeros(len(ends)).index_add_(0, group, weights[order])
    mean = weights.new_zeros(len(ends)).index_add_(0, group, (weights * outcomes)[order]) / mass
    return scores[order][ends], pool(mean, mass)


def interpolate(knots: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """The piecewise linear function through (`knots`, `values`) (G,), constant outside; `at` of any shape."""
    if len(knots) == 1:
        return values.expand(at.shape).clone()
    flat = at.contiguous()
    right = torch.searchsorted(knots, flat).clamp(1, len(knots) - 1)
    left = right - 1
    share = ((flat - knots[left]) / (knots[right] - knots[left])).clamp(0.0, 1.0)
    return values[left] + share * (values[right] - values[left])


def _one_by_one(total: Tensor, mass: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    stack: list[tuple[float, float, int]] = []
    for s, m, n in zip(total.tolist(), mass.tolist(), size.tolist(), strict=True):
        while stack and stack[-1][0] * m >= s * stack[-1][1]:
            other = stack.pop()
            s, m, n = s + other[0], m + other[1], n + other[2]
        stack.append((s, m, n))
    mean = total.new_tensor([s / m for s, m, _ in stack])
    return mean, size.new_tensor([n for _, _, n in stack])
