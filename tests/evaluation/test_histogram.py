"""Rank metrics from counts: within their bounds of the exact ones, exact to merge, in any order, on any scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesdl.evaluation import ScoreHistogram, score_metrics
from bayesdl.evaluation.validation import UndefinedError

repeatable = settings(derandomize=True, deadline=None, max_examples=40)


def two_sets(seed: int, scale: float = 1.0, shift: float = 0.7, decimals: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inside = scale * torch.randn(300, generator=generator, dtype=torch.float64)
    outside = scale * (torch.randn(200, generator=generator, dtype=torch.float64) + shift)
    return inside.round(decimals=decimals), outside.round(decimals=decimals)


def filled(inside: Tensor, outside: Tensor, bits: int = 14) -> ScoreHistogram:
    histogram = ScoreHistogram(bits)
    histogram.update(inside, False)
    histogram.update(outside, True)
    return histogram


@repeatable
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-12, 0.01, 1.0, 40.0, 1e9]),
    bits=st.integers(10, 20),
    decimals=st.sampled_from([0, 1, 9]),
)
def test_exact_values_lie_within_the_bounds(seed: int, scale: float, bits: int, decimals: int) -> None:
    inside, outside = two_sets(seed, decimals=decimals)
    inside, outside = (scale * values.float().double() for values in (inside, outside))
    exact = score_metrics(inside.float(), outside.float())
    for name, found in filled(inside, outside, bits).compute().items():
        assert abs(found.value - float(exact[name])) <= found.error + 1e-9, name
        assert 0 <= found.error <= 0.5


def test_fine_grids_are_tight() -> None:
    inside, outside = two_sets(0)
    found = filled(inside, outside, 26).compute()
    assert max(value.error for value in found.values()) < 2e-3
    # Energies between 30 and 50, as they are: the grid follows the numbers.
    shifted = filled(40 + inside, 40 + outside, 24).compute()
    assert shifted["auroc"].value == pytest.approx(found["auroc"].value, abs=2e-3)


def test_all_scores_equal_is_chance_with_full_doubt() -> None:
    found = filled(torch.zeros(5), torch.full((7,), -0.0)).compute()
    assert (found["auroc"].value, found["auroc"].error) == (0.5, 0.5)


def test_any_split_and_order_of_merging_is_the_same(device: str) -> None:
    inside, outside = (values.to(device) for values in two_sets(1))
    whole = filled(inside, outside)
    labels = torch.cat([torch.zeros(300), torch.ones(200)]).to(device)
    scores = torch.cat([inside, outside])
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0)).to(device)
    parts = []
    for rows in order.split(37):
        part = ScoreHistogram(14)
        part.update(scores[rows], labels[rows])
        parts.append(part)
    forward, backward = parts[0], parts[-1]
    for part in parts[1:]:
        forward = forward.merge(part)
    for part in parts[-2::-1]:
        backward = backward.merge(part)
    assert forward.compute() == backward.compute() == whole.compute()
    again = ScoreHistogram(14)
    again.load(whole.state())
    assert again.compute() == whole.compute()


def test_infinities_rank_and_nan_is_reported_at_the_end() -> None:
    histogram = filled(torch.tensor([-torch.inf, 0.0]), torch.tensor([1.0, torch.inf]))
    assert histogram.compute()["auroc"].value == 1.0
    histogram.update([float("nan")], [1])
    with pytest.raises(ValueError, match="1 scores are NaN"):
        histogram.compute()


def test_bad_input() -> None:
    with pytest.raises(UndefinedError, match="both classes"):
        filled(torch.ones(3), torch.ones(0)).compute()
    with pytest.raises(ValueError, match="bits=9"):
        ScoreHistogram(9)
    with pytest.raises(ValueError, match="cannot be merged"):
        ScoreHistogram(12).merge(ScoreHistogram(13))
    with pytest.raises(ValueError, match="no state"):
        ScoreHistogram(12).load({"counts": torch.zeros(3)})
    with pytest.raises(ValueError, match="nothing is broadcast"):
        ScoreHistogram(12).update([0.1, 0.2], [[1], [0]])
