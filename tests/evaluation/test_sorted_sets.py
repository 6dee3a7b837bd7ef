"""Sorted sets: counts against comparison of all pairs, mean harmonic numbers against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from bayesdl.evaluation import sorted_sets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_sorting_copies_and_places_count(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randint(-5, 5, (n,), generator=generator).to(device, dtype) for n in (7, 40))
    kept = few.clone()
    first, second = sorted_sets.ascending(few), sorted_sets.ascending(many)
    assert few.equal(kept) and first.equal(few.sort().values)
    below, upto = sorted_sets.places(first, second)
    assert below.equal((second < first[:, None]).sum(1)) and upto.equal((second <= first[:, None]).sum(1))


@pytest.mark.parametrize(("start", "size"), [(0, 1), (0, 5), (3, 1), (7, 90), (99, 2), (100, 1), (101, 3), (5000, 800)])
def test_mean_harmonic_numbers(start: int, size: int) -> None:
    numbers = [Fraction(0)]
    for k in range(1, start + size):
        numbers.append(numbers[-1] + Fraction(1, k))
    expected = float(sum(numbers[start : start + size], Fraction(0)) / size)
    found = float(sorted_sets.mean_harmonic(torch.tensor(start), torch.tensor(size)))
    assert found == pytest.approx(expected, rel=1e-13, abs=1e-14)
    assert float(sorted_sets.harmonic(torch.tensor(start + size - 1))) == pytest.approx(float(numbers[-1]), rel=1e-14)


def test_mean_harmonic_keeps_its_digits_at_ten_million() -> None:
    # One place has H_a exactly; two have H_a + 1 / (2 (a + 1)).
    start = torch.tensor(10_000_000)
    single = sorted_sets.mean_harmonic(start, torch.tensor(1))
    assert float(single - sorted_sets.harmonic(start)) == pytest.approx(0.0, abs=1e-14)
    pair = sorted_sets.mean_harmonic(start, torch.tensor(2))
    assert float(pair - single) == pytest.approx(0.5 / 10_000_001, rel=1e-5)
