"""Cyclical step sizes (Zhang et al. 2020): explore without noise at large steps, then sample at small ones."""

from __future__ import annotations

import math
from typing import Any, final

from bayesdl.errors import ArgumentError, FileFormatError
from bayesdl.samplers.base import Sampler


@final
class Cyclical:
    """A schedule around any sampler.

    Step k = 1, 2, ... has the phase `r_k = mod(k - 1, cycle) / cycle` and the learning rate
    `lr_min + (lr_0 - lr_min) / 2 (cos(pi r_k) + 1)`; while r_k < explore its temperature is 0, later the sampler's.

        opt = bdl.samplers.SGLD(net.parameters(), lr=0.5, num_data=N)
        schedule = bdl.samplers.Cyclical(opt, cycle=50 * len(loader))
        loss.backward(); opt.step(); schedule.step(); chain.step(schedule.sampling)

    Args:
        sampler: its learning rates are the lr_0 of each group; writes them and its temperature from now on.
        cycle: steps per cycle, a whole number.
        cycles: number of cycles.
        explore: share of a cycle without noise; 0 samples always.
        lr_min: learning rate that a cycle runs towards; above 0 its last samples differ more.

    Raises:
        ArgumentError: a cycle that is not whole or has no sampling step, or a sampler with schedules of its own.
    """

    def __init__(
        self, sampler: Sampler, cycle: int, cycles: int = 4, explore: float = 0.9, lr_min: float = 0.0
    ) -> None:
        if isinstance(cycle, bool) or int(cycle) != cycle or cycle < 1 or int(cycles) != cycles or cycles < 1:
            raise ArgumentError(
                f"cycle={cycle!r}, cycles={cycles!r}; expected whole numbers of at least 1 (cycle: in steps)"
            )
        if not 0 <= explore < 1 or (cycle - 1) / cycle < explore:
            raise ArgumentError(
                f"explore={explore!r} leaves no sampling step in a cycle of {cycle}; expected at most "
                f"{(cycle - 1) / cycle:g}"
            )
        if callable(sampler.temperature_schedule) or any(sampler._lr_functions):
            raise ArgumentError("the sampler has a function of the step as lr or temperature; the schedule sets both")
        rates = [group["lr"] for group in sampler.param_groups]
        if not 0 <= lr_min <= min(rates):
            raise ArgumentError(f"lr_min={lr_min!r}; expected from 0 to the sampler's lr {min(rates):g}")
        self.sampler, self.cycle, self.cycles, self.explore, self.lr_min = (
            sampler,
            int(cycle),
            int(cycles),
            explore,
            lr_min,
        )
        self.steps = 0
        self._rates = rates
        self._temperature = sampler.temperature
        self._set()

    @property
    def total(self) -> int:
        """Steps of all cycles."""
        return self.cycle * self.cycles

    @property
    def finished(self) -> bool:
        """Whether all cycles have been run."""
        return self.steps >= self.total

    @property
    def sampling(self) -> bool:
        """Whether the last step made was one of sampling: True is the moment to collect."""
        return self.steps > 0 and self.phase >= self.explore

    @property
    def phase(self) -> float:
        """r_k of the last step made."""
        return ((self.steps - 1) % self.cycle) / self.cycle if self.steps else 0.0

    @property
    def index(self) -> int:
        """Cycle, from 0, of the last step made."""
        return max(self.steps - 1, 0) // self.cycle

    @property
    def weight(self) -> float:
        """Weight of a sample taken after the last step: its learning rate over the sum of a cycle's sampling steps."""
        if not self.sampling:
            return 0.0
        first = math.ceil(self.explore * self.cycle - 1e-9)
        rates = [self._rate(i / self.cycle, self._rates[0]) for i in range(first, self.cycle)]
        return self._rate(self.phase, self._rates[0]) / sum(rates)

    def step(self) -> None:
        """Call after each `sampler.step()`.

        Raises:
            ArgumentError: all cycles have been run.
        """
        if self.finished:
            raise ArgumentError(f"all {self.cycles} cycles of {self.cycle} steps have been run (see `finished`)")
        self.steps += 1
        if not self.finished:
            self._set()

    def state_dict(self) -> dict[str, Any]:
        """Numbers only; the sampler has its own."""
        keys = ("cycle", "cycles", "explore", "lr_min", "steps")
        return {**{key: getattr(self, key) for key in keys}, "rates": self._rates, "temperature": self._temperature}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was taken. Raises `FileFormatError` for another schedule's."""
        mine = self.state_dict()
        if set(state_dict) != set(mine) or any(
            state_dict[key] != mine[key] for key in ("cycle", "cycles", "explore", "lr_min")
        ):
            raise FileFormatError(f"the state {state_dict} is of another schedule; expected one like {mine}")
        self.steps, self._rates = int(state_dict["steps"]), list(state_dict["rates"])
        self._temperature = float(state_dict["temperature"])
        if not self.finished:
            self._set()

    def _rate(self, phase: float, start: float) -> float:
        return self.lr_min + 0.5 * (start - self.lr_min) * (math.cos(math.pi * phase) + 1)

    def _set(self) -> None:
        """Learning rate and temperature of the step to come."""
        phase = (self.steps % self.cycle) / self.cycle
        for group, start in zip(self.sampler.param_groups, self._rates, strict=True):
            group["lr"] = self._rate(phase, start)
        self.sampler.temperature = self._temperature if phase >= self.explore else 0.0

    def __repr__(self) -> str:
        return (
            f"Cyclical(cycle={self.cycle}, cycles={self.cycles}, explore={self.explore:g}, lr_min={self.lr_min:g}, "
            f"T={self._temperature:g}, step {self.steps} of {self.total}, around {self.sampler!r})"
        )
