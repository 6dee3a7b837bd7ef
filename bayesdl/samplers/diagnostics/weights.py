"""What the weights of samples and the steps of an adaptive sampler say of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.samplers.records import SampleRecord


def weighted_ess(weights: Tensor) -> float:
    """`(sum w)^2 / sum w^2` of weights `(S,)`: S where all are equal.

    Raises:
        ArgumentError: a negative weight, or none that is positive.
    """
    if weights.numel() == 0 or not bool((weights >= 0).all()) or not bool((weights > 0).any()):
        raise ArgumentError("expected weights of at least 0, one of them positive")
    values = weights.double()
    return float(values.sum().square() / values.square().sum())


@final
@dataclass(frozen=True)
class StepTrace:
    """Steps of the samples of a chain, `(S,)` each, float64.

    Attributes:
        step: k.
        h: step size.
        psi: adaptive factor of the time step; 1 throughout for samplers without one.
        time: sum of the weights of the steps before.
    """

    step: Tensor
    h: Tensor
    psi: Tensor
    time: Tensor

    @property
    def spread(self) -> float:
        """Largest over smallest psi."""
        return float(self.psi.max() / self.psi.min())

    def share_near(self, bound: float, relative: float = 0.01) -> float:
        """Share of the steps with psi within a relative distance of a bound (m or M of SA-SGLD)."""
        return float(((self.psi / bound - 1).abs() <= relative).double().mean())


def step_trace(records: Sequence[SampleRecord]) -> StepTrace:
    """Steps of one chain's records, in their order.

    Raises:
        ArgumentError: no records, or such of a chain without a sampler.
    """
    known = [(r.step, r.h, r.psi, r.time) for r in records]
    if not known or any(value is None for row in known for value in row):
        raise ArgumentError("no step sizes are known: the chain needs samples, and sampler= when it is made")
    columns = torch.tensor(known, dtype=torch.float64).T
    return StepTrace(*columns)
