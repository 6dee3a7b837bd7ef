from __future__ import annotations

import pytest
import torch

from bayesdl.errors import ArgumentError
from bayesdl.samplers.diagnostics import step_trace, weighted_ess
from bayesdl.samplers.records import SampleRecord


def test_weighted_ess() -> None:
    assert weighted_ess(torch.full((7,), 0.3)) == pytest.approx(7.0)
    assert weighted_ess(torch.tensor([1.0, 0.0, 0.0])) == 1.0
    assert weighted_ess(torch.tensor([1.0, 3.0])) == pytest.approx(16 / 10)
    for bad in ([-1.0, 2.0], [0.0, 0.0], [], [float("nan")]):
        with pytest.raises(ArgumentError, match="weights"):
            weighted_ess(torch.tensor(bad))


def test_step_trace() -> None:
    records = [SampleRecord(i, 0, step=10 * i, h=0.1 * psi, psi=psi, time=float(i)) for i, psi in enumerate((1, 2, 4))]
    found = step_trace(records)
    assert found.step.tolist() == [0, 10, 20] and found.psi.tolist() == [1, 2, 4]
    assert found.spread == 4.0 and found.share_near(2.01) == pytest.approx(1 / 3)
    with pytest.raises(ArgumentError, match="sampler="):
        step_trace([SampleRecord(0, 0, step=1)])
    with pytest.raises(ArgumentError, match="samples"):
        step_trace([])
