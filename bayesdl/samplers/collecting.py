"""When a chain keeps theta_k: every so many steps, or at equal distances in a sampler's own time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

from bayesdl.errors import ArgumentError
from bayesdl.samplers.record import StepRecord


class Rule(ABC):
    """Counts calls of `chain.step`; all of them are burn-in up to `burn_in`."""

    name: ClassVar[str]

    def __init__(self, burn_in: int, thin: int) -> None:
        self.burn_in, self.thin = burn_in, thin
        self.calls = 0

    @property
    def burning(self) -> bool:
        """Whether the next call belongs to burn-in."""
        return self.calls < self.burn_in

    @abstractmethod
    def ahead(self, record: StepRecord | None) -> int:
        """How often theta_k is collected if the next call is one of sampling; asked once a step of the sampler."""

    @abstractmethod
    def weight(self, record: StepRecord | None) -> float:
        """Weight of a sample taken with this step."""

    @abstractmethod
    def call(self, sampling: bool) -> None:
        """Count a call of `chain.step`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Numbers that decide what is collected from here on."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Continue with them."""


@final
class EverySteps(Rule):
    """Every `thin` calls with sampling=True after burn-in; the weight is that of the step."""

    name: ClassVar[str] = "steps"

    def __init__(self, burn_in: int, thin: int) -> None:
        super().__init__(burn_in, thin)
        self.sampled = 0

    def ahead(self, record: StepRecord | None) -> int:
        return int(not self.burning and (self.sampled + 1) % self.thin == 0)

    def weight(self, record: StepRecord | None) -> float:
        return 1.0 if record is None else record.weight

    def call(self, sampling: bool) -> None:
        if not self.burning:
            self.sampled += sampling
        self.calls += 1

    def state(self) -> dict[str, Any]:
        return {"calls": self.calls, "sampled": self.sampled}

    def load(self, state: dict[str, Any]) -> None:
        self.calls, self.sampled = int(state["calls"]), int(state["sampled"])


@final
class EqualTimes(Rule):
    """theta_k as often as `[t_k, t_k + w_k)` holds multiples of the spacing: all samples weigh the same.

    w_k is the time that the step from theta_k advances, t_k their sum over the steps of sampling so far. The spacing is
    `thin` times the mean w of burn-in; without burn-in, of the first step.
    """

    name: ClassVar[str] = "time"

    def __init__(self, burn_in: int, thin: int) -> None:
        super().__init__(burn_in, thin)
        self._seen, self._steps = 0.0, 0  # of burn-in
        self.spacing: float | None = None
        self._clock, self._passed = 0.0, 0
        self._advance, self._crossed = 0.0, 0  # since the last call

    def ahead(self, record: StepRecord | None) -> int:
        assert record is not None
        if self.burning:
            self._seen, self._steps = self._seen + record.weight, self._steps + 1
            return 0
        if self.spacing is None:
            self.spacing = self.thin * (self._seen / self._steps if self._steps else record.weight)
            if not self.spacing > 0:
                raise ArgumentError(
                    'collect="time" spaces samples by the mean step of burn-in, and that is 0: raise lr, or pass '
                    'collect="steps"'
                )
        self._advance += record.weight
        before = self._passed + self._crossed
        passed = before
        while (passed + 1) * self.spacing < self._clock + self._advance:
            passed += 1
        self._crossed += passed - before
        return passed - before

    def weight(self, record: StepRecord | None) -> float:
        return 1.0

    def call(self, sampling: bool) -> None:
        if sampling:
            self._clock, self._passed = self._clock + self._advance, self._passed + self._crossed
        self._advance, self._crossed = 0.0, 0
        self.calls += 1

    def state(self) -> dict[str, Any]:
        numbers = {"seen": self._seen, "steps": self._steps, "spacing": self.spacing}
        return {"calls": self.calls, "clock": self._clock, "passed": self._passed, **numbers}

    def load(self, state: dict[str, Any]) -> None:
        self.calls, self._clock, self._passed = int(state["calls"]), float(state["clock"]), int(state["passed"])
        self._seen, self._steps, self.spacing = float(state["seen"]), int(state["steps"]), state["spacing"]
        self._advance, self._crossed = 0.0, 0


RULES: dict[str, type[Rule]] = {"steps": EverySteps, "time": EqualTimes}
