"""Samples of a chain in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, final

from torch import Tensor

from bayesdl.samplers.records import SampleRecord

Values = Mapping[str, Tensor]


class Samples(Protocol):
    """Where a chain's samples are."""

    def records(self) -> list[SampleRecord]:
        """All that were collected, in order."""

    def kept(self) -> list[SampleRecord]:
        """Those that can be read."""

    def add(self, record: SampleRecord, values: Values) -> None:
        """Keep a sample; what it takes the place of is gone."""

    def skip(self, record: SampleRecord) -> None:
        """A sample that is not kept."""

    def read(self, record: SampleRecord) -> dict[str, Tensor]:
        """The tensors of a kept sample."""


@final
class MemorySamples:
    """On the CPU, so that a long chain does not fill an accelerator."""

    def __init__(self) -> None:
        self._records: list[SampleRecord] = []
        self._values: dict[int, dict[str, Tensor]] = {}

    def records(self) -> list[SampleRecord]:
        return list(self._records)

    def kept(self) -> list[SampleRecord]:
        return [record for record in self._records if record.id in self._values]

    def add(self, record: SampleRecord, values: Values) -> None:
        for number in record.drops:
            del self._values[number]
        self._records.append(record)
        self._values[record.id] = {name: value.cpu() for name, value in values.items()}

    def skip(self, record: SampleRecord) -> None:
        self._records.append(record)

    def read(self, record: SampleRecord) -> dict[str, Tensor]:
        return dict(self._values[record.id])

    def state(self) -> dict[str, Any]:
        """Everything, for the checkpoints of somebody else's."""
        return {"records": [record.to_json() for record in self._records], "values": dict(self._values)}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self._records = [SampleRecord.from_json(record) for record in state["records"]]
        self._values = {int(number): dict(values) for number, values in state["values"].items()}
