"""Edges of equal-width bins, ranks of equal-mass bins, sums under weights."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesdl.evaluation import binning


@pytest.mark.parametrize("bins", [1, 3, 5, 7, 10, 15, 20, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_edge_opens_its_bin(bins: int, dtype: torch.dtype) -> None:
    edges = torch.tensor([float(Fraction(k, bins)) for k in range(bins + 1)], dtype=dtype)
    assert binning.equal_width(edges, bins).tolist() == [*range(bins), bins - 1]
    inside = torch.tensor([(k + 0.5) / bins for k in range(bins)], dtype=dtype)
    assert binning.equal_width(inside, bins).tolist() == list(range(bins))


def test_the_tolerance_of_an_edge() -> None:
    assert binning.equal_width(torch.tensor([0.6 - 9e-7, 0.6 - 2e-6], dtype=torch.float64), 5).tolist() == [3, 2]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 8), st.integers(0, 1000))
def test_equal_mass_bins_by_counting(values: list[int], bins: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 4, (2, len(values)), generator=generator).double()
    weights[:, 0] = 1
    scores = torch.tensor(values) / 6

    def count(copies: list[int], value: int) -> int:
        below, tied = sum(v < value for v in copies), sum(v == value for v in copies)
        return bins * (2 * below + tied) // (2 * len(copies))

    assert binning.equal_mass(scores, bins).tolist() == [count(values, v) for v in values]
    found = binning.equal_mass(scores, bins, weights)
    for row, index in zip(weights, found, strict=True):
        copies = [v for v, w in zip(values, row, strict=True) for _ in range(int(w))]
        held = [i for i, w in enumerate(row) if w > 0]
        assert [int(index[i]) for i in held] == [count(copies, values[i]) for i in held]


def test_distinct_scores_fill_equal_mass_bins_evenly() -> None:
    scores = torch.rand(90, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.bincount(binning.equal_mass(scores, 9)).tolist() == [10] * 9


def test_sums_over_chunks_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 4, (50,), generator=generator)
    columns = torch.rand(3, 50, dtype=torch.float64, generator=generator)
    weights = torch.rand(6, 50, dtype=torch.float64, generator=generator)
    monkeypatch.setattr(binning, "CHUNK", 7)
    found = binning.bin_totals(index, columns, 4, weights)
    expected = torch.einsum("rn,kn,nb->rkb", weights, columns, torch.nn.functional.one_hot(index, 4).double())
    assert torch.allclose(found, expected, rtol=1e-13)
    plain = binning.bin_totals(index, columns, 4, None)
    assert torch.allclose(plain, binning.bin_totals(index, columns, 4, torch.ones(50).double()), rtol=1e-13)


def test_redrawn_hits_are_the_sums_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(40, dtype=torch.float64, generator=generator)
    hits = torch.rand(5, 40, generator=generator) < 0.5
    for mass in (False, True):
        together = binning.redrawn_sums(confidence, hits, 6, mass=mass).ece()
        alone = [float(binning.bin_sums(confidence, row, 6, mass=mass).ece()) for row in hits]
        assert together.tolist() == pytest.approx(alone, abs=1e-13)


def test_empty_bins_have_no_gap() -> None:
    sums = binning.bin_sums(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]), 10)
    assert sums.gap[0].tolist() == pytest.approx([0] + [0.1] + [0] * 7 + [0.1])
    assert float(sums.unweighted()) == pytest.approx(0.1) and math.isfinite(float(sums.l2()))
