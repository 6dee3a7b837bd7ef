"""Measurement sets: where the functions of network and target are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError


class Places(Protocol):
    """A fresh set of points at every call."""

    def draw(self, generator: torch.Generator) -> Tensor:
        """Points `(M, ...)`."""


@final
@dataclass(frozen=True, eq=False)
class Measurement:
    """Some of the inputs, and points drawn uniformly from their box.

    Args:
        inputs: `(N, D)`, or `(N, ...)` with real = 1. The box comes from these alone: nothing of a test set leaks in.
        num_points: M.
        real: share of points that are inputs, without replacement.
        margin: the box grows by this share of its width on every side.
    """

    inputs: Tensor
    num_points: int = 100
    real: float = 0.7
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.num_points < 2 or not 0.0 <= self.real <= 1.0:
            raise ArgumentError(
                f"num_points={self.num_points} and real={self.real}; expected >= 2 and a share in [0, 1]"
            )
        if self.inputs.dim() != 2 and (self.real < 1.0 or len(self.inputs) < self.num_points):
            raise ArgumentError(
                f"inputs of shape {tuple(self.inputs.shape)} have no box to draw from: use real=1.0 and num_points of "
                f"at most {len(self.inputs)}"
            )

    @property
    def box(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest corner, `(D,)`."""
        low, high = self.inputs.amin(0), self.inputs.amax(0)
        return low - self.margin * (high - low), high + self.margin * (high - low)

    def draw(self, generator: torch.Generator) -> Tensor:
        """A shuffled set of points."""
        count = min(round(self.real * self.num_points), len(self.inputs))
        chosen = torch.randperm(len(self.inputs), generator=generator)[:count].to(self.inputs.device)
        points = self.inputs[chosen]
        if count < self.num_points:
            low, high = self.box
            uniform = torch.rand(self.num_points - count, len(low), generator=generator).to(low)
            points = torch.cat([points, low + (high - low) * uniform])
        return points[torch.randperm(self.num_points, generator=generator).to(points.device)]


@final
@dataclass(frozen=True)
class Grid:
    """`num` evenly spaced points on [low, high], for functions of one input."""

    low: float
    high: float
    num: int = 200

    def __post_init__(self) -> None:
        if not self.high > self.low or self.num < 2:
            raise ArgumentError(
                f"low={self.low}, high={self.high}, num={self.num}; expected low < high and >= 2 points"
            )

    def draw(self, generator: torch.Generator) -> Tensor:
        """`(num, 1)`, the same at every call."""
        del generator
        return torch.linspace(self.low, self.high, self.num).unsqueeze(1)


@final
@dataclass(frozen=True, eq=False)
class Fixed:
    """The same points every time."""

    points: Tensor

    def draw(self, generator: torch.Generator) -> Tensor:
        """`points`."""
        del generator
        return self.points
