"""Records of samples go to JSON and back, and to the checkpoints of others, which do without the text of it."""

from __future__ import annotations

import json

from bayesdl.samplers.records import SampleRecord


def test_records_come_back() -> None:
    record = SampleRecord(3, 1, 40, weight=0.5, drops=(0, 2), cycle=1, lr=0.1, loss=0.7)
    assert SampleRecord.from_json(record.to_json()) == record
    assert SampleRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
