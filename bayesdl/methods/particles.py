"""Weights of particles: effective numbers, resampling, and how far a likelihood may be let in at once."""

from __future__ import annotations

import torch
from torch import Tensor


def effective(log_weights: Tensor) -> float:
    """`1 / sum w^2` of log weights `(J,)`, normalised or not."""
    return float(1.0 / torch.softmax(log_weights, 0).square().sum())


def systematic(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Indices `(J,)` of particles drawn by systematic resampling: each J w_j times on average, rounded up or down."""
    count = len(log_weights)
    edges = torch.softmax(log_weights.double(), 0).cumsum(0).cpu()
    edges[-1] = 1.0  # rounding must not leave a point behind the last edge
    points = (torch.arange(count) + torch.rand((), dtype=torch.float64, generator=generator)) / count
    return torch.searchsorted(edges, points, right=True).clamp(max=count - 1).to(log_weights.device)


def largest_rise(log_weights: Tensor, increments: Tensor, room: float, share: float = 0.5) -> float:
    """Largest r <= room for which weights times exp(r increments) keep `share` of the particles effective.

    By bisection. At least 2^-30 of the room, so that a step is always made.
    """
    goal = share * len(log_weights)
    if effective(log_weights + room * increments) >= goal:
        return room
    low, high = 0.0, room
    for _ in range(30):
        middle = 0.5 * (low + high)
        if effective(log_weights + middle * increments) >= goal:
            low = middle
        else:
            high = middle
    return low or high
