"""What a chain writes of one sample: its record, and its tensors beyond the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from bayesdl.batch import BatchAdapter
from bayesdl.samplers.assembling import PROBE, decoded
from bayesdl.samplers.cyclical import Cyclical
from bayesdl.samplers.probing import fresh_statistics, probed
from bayesdl.samplers.record import StepRecord
from bayesdl.samplers.records import SampleRecord
from bayesdl.samplers.sampled import Snapshot


@final
@dataclass(frozen=True)
class Pending:
    """theta_k, taken before the step from it; kept if the next call of `chain.step` is one of sampling."""

    snapshot: Snapshot
    record: StepRecord | None
    copies: int


@final
@dataclass(frozen=True)
class Extras:
    """What is computed with the network at a sample.

    Attributes:
        net: the network; read only.
        probe: inputs whose outputs are kept; None keeps none.
        data: loader for fresh batch-norm statistics; None leaves them as they are.
        batch: adapter of both.
    """

    net: nn.Module
    probe: Any
    data: Iterable[Any] | None
    batch: str | BatchAdapter | None

    def added(self, values: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
        """A sample as it is kept, with refreshed statistics, and outputs at the probe."""
        if self.data is not None:
            values = {**values, **fresh_statistics(self.net, decoded(values, base), self.data, self.batch)}
        if self.probe is not None:
            values = {**values, PROBE: probed(self.net, decoded(values, base), self.probe, self.batch)}
        return values


def described(step: StepRecord | None, calls: int, schedule: Any, **own: Any) -> SampleRecord:
    """The record of a sample.

    Args:
        step: the sampler's step from it; None where the chain has no sampler.
        calls: of `chain.step`, which count where there is none.
        schedule: gives cycle and phase if it is `Cyclical`.
        own: the other fields.
    """
    known: dict[str, Any] = {"step": calls}
    if step is not None:
        known = {name: getattr(step, name) for name in ("step", "lr", "h", "temperature", "psi", "time")}
    if isinstance(schedule, Cyclical):
        known |= {"cycle": schedule.index, "phase": schedule.phase}
    loss = own.pop("loss")
    return SampleRecord(loss=float(loss.detach()) if isinstance(loss, Tensor) else loss, **known, **own)
