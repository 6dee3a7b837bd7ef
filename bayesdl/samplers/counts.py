"""Steps that were not what the sampler's law assumes: refused ones, and ones whose gradient was clipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from bayesdl.diagnose import Finding
from bayesdl.errors import FileFormatError

CLIPPED = 1e-4  # relative distance to the largest norm; clipping leaves its bound times n / (n + 1e-6)
WORTH_SAYING = 0.01  # share of the steps


@final
@dataclass
class StepCounts:
    """What became of the steps of a sampler.

    Attributes:
        made: steps that moved the parameters.
        refused: steps that raised because a gradient was not finite or the step too large; nothing moved.
        largest: the largest norm of a gradient of the mean loss so far.
        at_largest: steps whose gradient had that norm. Clipping before the step leaves many with one norm, its bound;
            otherwise the largest norm is hardly met twice.
    """

    made: int = 0
    refused: int = 0
    largest: float = 0.0
    at_largest: int = 0

    def note(self, norm: float) -> None:
        """A step with a gradient of this norm is being made."""
        self.made += 1
        if norm > self.largest * (1 + CLIPPED):
            self.at_largest = 0
        if norm >= self.largest * (1 - CLIPPED):
            self.at_largest += 1
        self.largest = max(self.largest, norm)

    @property
    def clipped(self) -> float:
        """Share of the steps whose gradient was clipped, judged by its norm; 0 where the largest norm came once."""
        return self.at_largest / self.made if self.at_largest > 1 and self.largest > 0 else 0.0

    def state(self) -> dict[str, Any]:
        """Numbers by name."""
        return asdict(self)

    @classmethod
    def from_state(cls, found: Any) -> StepCounts:
        """Inverse of `state`; None, of a sampler that did not count yet, begins anew."""
        if found is None:
            return cls()
        kinds = {name: type(value) for name, value in cls().state().items()}
        if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != kinds:
            raise FileFormatError(f"the counts of a sampler's steps are {str(found)[:80]!r}")
        return cls(**found)


def step_findings(counts: StepCounts | None, calls: int, idle: int) -> Sequence[Finding]:
    """What a chain says of its steps.

    Args:
        counts: of its sampler; None without one.
        calls: of `chain.step`.
        idle: calls before which its sampler had made no step.
    """
    found = []
    if idle:
        text = f"{100 * idle / calls:.3g} % of the calls of chain.step came without a step of the sampler"
        action = "gradients being accumulated, or steps that AMP's scaler skipped, do not count as steps of the chain"
        found.append(Finding("info", text, action, "steps"))
    if counts is None:
        return found
    if counts.refused:
        share = 100 * counts.refused / (counts.made + counts.refused)
        text = f"{counts.refused} steps ({share:.3g} %) were refused: a gradient was not finite, or the step too large"
        found.append(Finding("warning", text, "a smaller lr; look at the loss and the data of those steps", "steps"))
    if counts.clipped > WORTH_SAYING:
        text = (
            f"the gradient had one and the same norm, {counts.largest:.4g}, in {100 * counts.clipped:.3g} % of the "
            "steps, as clipping leaves it: those steps do not follow the posterior's gradient"
        )
        found.append(
            Finding("warning", text, "a smaller lr in place of clipping, or a bound that is seldom met", "steps")
        )
    return found
