"""Traces and diagonals of dense matrices whose exact values are known, and honest standard errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesdl.curvature import traces
from bayesdl.curvature.traces import DIAGONALS, TRACES, Probes
from bayesdl.errors import ArgumentError, UnknownNameError
from tests.curvature.test_krylov import matrix

SIZE = 60


def probes(a: Tensor, seed: int = 0) -> Probes:
    return Probes(lambda v: a @ v, len(a), a[0, 0], torch.Generator().manual_seed(seed))


def decaying() -> Tensor:
    return matrix(torch.logspace(2, -2, SIZE, dtype=torch.float64))


@pytest.mark.parametrize("method", TRACES)
def test_trace_is_exact_where_probes_span_the_space(method: str) -> None:
    a = decaying()
    for count in (SIZE, SIZE + 5):
        found = traces.trace(probes(a), count, method)
        torch.testing.assert_close(found.value, a.trace(), rtol=1e-12, atol=0.0)
        assert float(found.standard_error) == 0.0


@pytest.mark.parametrize("method", DIAGONALS)
def test_diagonal_is_exact_where_probes_span_the_space(method: str) -> None:
    a = decaying()
    found = traces.diagonal(probes(a), SIZE, method)
    torch.testing.assert_close(found.value, a.diagonal(), rtol=1e-12, atol=0.0)
    assert not bool(found.standard_error.any())


@pytest.mark.parametrize(("method", "count", "rank"), [("hutch++", 24, 8), ("xtrace", 24, 11), ("xtrace", 24, 12)])
def test_trace_is_exact_for_low_rank(method: str, count: int, rank: int) -> None:
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[:rank] = torch.linspace(1.0, 9.0, rank, dtype=torch.float64)
    values[0] = -4.0  # a Hessian's
    a = matrix(values)
    found = traces.trace(probes(a), count, method)
    if rank < 12:
        torch.testing.assert_close(found.value, a.trace(), rtol=1e-9, atol=0.0)
        assert float(found.standard_error) < 1e-8
    else:  # each probe meets one direction that the eleven others leave
        assert float(found.standard_error) > 1e-3


def test_diagonal_is_exact_for_low_rank() -> None:
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[:8] = torch.linspace(1.0, 9.0, 8, dtype=torch.float64)
    a = matrix(values)
    found = traces.diagonal(probes(a), 24)
    torch.testing.assert_close(found.value, a.diagonal(), rtol=1e-9, atol=1e-9)
    assert float(found.standard_error.max()) < 1e-8


@pytest.mark.parametrize("method", TRACES)
def test_trace_error_is_honest(method: str) -> None:
    # 200 independent estimates: their mean is within 5 standard errors of the truth (failure below 1e-6 for another
    # seed), and the stated errors agree with the spread of the estimates to a third (spread of a standard deviation
    # from 200 values: 5 percent)
    a, generator = decaying(), torch.Generator().manual_seed(3)
    found = [traces.trace(Probes(lambda v: a @ v, SIZE, a[0, 0], generator), 24, method) for _ in range(200)]
    values = torch.stack([f.value for f in found])
    stated = torch.stack([f.standard_error for f in found]).square().mean().sqrt()
    spread = values.std()
    assert abs(float(values.mean() - a.trace())) < 5.0 * float(spread) / math.sqrt(200)
    assert 0.67 < float(stated / spread) < 1.5


@pytest.mark.parametrize("method", DIAGONALS)
def test_diagonal_error_is_honest(method: str) -> None:
    # as above, over all 60 entries: 5.5 standard errors (failure below 3e-6)
    a, generator = decaying(), torch.Generator().manual_seed(4)
    found = [traces.diagonal(Probes(lambda v: a @ v, SIZE, a[0, 0], generator), 24, method) for _ in range(200)]
    values = torch.stack([f.value for f in found])
    stated = torch.stack([f.standard_error for f in found]).square().mean(0).sqrt()
    spread = values.std(0)
    assert bool(((values.mean(0) - a.diagonal()).abs() < 5.5 * spread / math.sqrt(200)).all())
    assert 0.8 < float((stated / spread).median()) < 1.25


def test_deflation_beats_plain_probes_on_a_decaying_spectrum() -> None:
    a = matrix(torch.logspace(2, -10, SIZE, dtype=torch.float64))
    plain = float(traces.trace(probes(a), 24, "hutchinson").standard_error)
    for method in ("hutch++", "xtrace"):
        assert float(traces.trace(probes(a), 24, method).standard_error) < 0.2 * plain
    plain = float(traces.diagonal(probes(a), 24, "hutchinson").standard_error.norm())
    assert float(traces.diagonal(probes(a), 24).standard_error.norm()) < 0.2 * plain


@pytest.mark.parametrize(("method", "calls"), [("hutchinson", 1), ("hutch++", 2), ("xtrace", 2)])
def test_products_are_asked_for_together(method: str, calls: int) -> None:
    a, seen = decaying(), []

    def product(v: Tensor) -> Tensor:
        seen.append(v.shape[1])
        return a @ v

    traces.trace(Probes(product, SIZE, a[0, 0], torch.Generator().manual_seed(0)), 24, method)
    assert len(seen) == calls
    assert sum(seen) == 24


@pytest.mark.parametrize("method", TRACES)
def test_seeds_decide(method: str) -> None:
    a = decaying()
    same = [traces.trace(probes(a, 5), 24, method).value for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], traces.trace(probes(a, 6), 24, method).value)


def test_an_unknown_method_and_too_few_probes_are_refused() -> None:
    a: Any = decaying()
    with pytest.raises(UnknownNameError, match="'exact' is not known.*hutch"):
        traces.trace(probes(a), 24, "exact")
    with pytest.raises(UnknownNameError, match="'xtrace' is not known"):
        traces.diagonal(probes(a), 24, "xtrace")
    for method, least in (("hutchinson", 2), ("xtrace", 4), ("hutch++", 6)):
        with pytest.raises(ArgumentError, match=f"at least {least}"):
            traces.trace(probes(a), least - 1, method)
