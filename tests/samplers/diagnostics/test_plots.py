from __future__ import annotations

import math

import pytest
import torch

from bayesdl.errors import ArgumentError
from bayesdl.samplers.diagnostics import convergence, plots
from bayesdl.samplers.records import SampleRecord


def test_trace_has_a_line_per_chain() -> None:
    axes = plots.trace(torch.randn(3, 20), label="log p")
    assert len(axes.lines) == 3 and axes.get_ylabel() == "log p"
    with pytest.raises(ArgumentError, match="one quantity"):
        plots.trace(torch.zeros(3))


def test_histogram_counts_every_quantity() -> None:
    result = convergence(torch.randn(2, 30, 17, generator=torch.Generator().manual_seed(0)))
    axes = plots.rhat_histogram(result)
    assert sum(patch.get_height() for patch in axes.patches) == 17


def test_steps_shows_h() -> None:
    records = [SampleRecord(i, c, step=i, h=10.0**-i, psi=1.0, time=0.0) for c in (0, 4) for i in range(3)]
    axes = plots.steps(records)
    assert len(axes.lines) == 2 and list(axes.lines[1].get_ydata()) == pytest.approx([1, 0.1, 0.01])
    with pytest.raises(ArgumentError, match="nothing to draw"):
        plots.steps([])
    records = [SampleRecord(i, 0, step=i, h=1.0, psi=0.5 + i, time=0.0) for i in range(3)]
    axes = plots.steps(records, quantity="psi")
    assert list(axes.lines[0].get_ydata()) == [0.5, 1.5, 2.5] and "psi" in axes.get_ylabel()
    with pytest.raises(ArgumentError, match="quantity='zeta'"):
        plots.steps(records, quantity="zeta")


def test_nll_of_averages() -> None:
    p = torch.tensor([[0.2, 0.5], [0.6, 0.1]])
    line = plots.nll_by_samples(p.log()).lines[0].get_ydata()
    expected = [-(math.log(0.2) + math.log(0.5)) / 2, -(math.log(0.4) + math.log(0.3)) / 2]
    assert list(line) == pytest.approx(expected)
