"""What is known of one step of a sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class StepRecord:
    """What is known of the step about to be made from theta_k, when pre-update hooks fire.

    Attributes:
        step: k, from 0.
        lr: learning rate of the first parameter group.
        h: its step size in the units of the full potential, `psi^2 lr / N` with momentum, `psi lr / N` without.
        temperature: T; 0 while exploring.
        psi: adaptive factor of the time step; 1 for samplers without one.
        weight: time that the step advances: weight of theta_k in averages, up to a constant.
        time: sum of the weights of the steps before.
    """

    step: int
    lr: float
    h: float
    temperature: float
    psi: float
    weight: float
    time: float
