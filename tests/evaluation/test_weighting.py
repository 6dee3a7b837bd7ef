"""Weighted means, with the infinite losses that an impossible event costs."""

from __future__ import annotations

import math

import pytest
import torch

from bayesdl.evaluation import weighting
from bayesdl.evaluation.validation import UndefinedError

VALUES = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def test_one_path_for_no_weights_a_vector_and_resamples() -> None:
    assert weighting.mean(VALUES, None) == pytest.approx(7 / 3)
    assert weighting.mean(VALUES, torch.tensor([1.0, 0.0, 1.0]).double()) == 2.5
    found = weighting.mean(VALUES, torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]]).double())
    assert isinstance(found, torch.Tensor) and found.tolist() == [2.5, 2.0]
    assert weighting.total(VALUES, None) == 7.0


def test_an_infinite_loss_counts_only_where_it_has_weight() -> None:
    values = torch.tensor([1.0, math.inf, 3.0], dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]).double()
    assert weighting.mean(values, None) == math.inf
    assert weighting.mean(values, weights).tolist() == [2.0, math.inf]  # type: ignore[union-attr]


def test_undefined_is_an_error_for_one_value_and_a_gap_among_resamples() -> None:
    gap = torch.tensor([math.nan]).double()
    with pytest.raises(UndefinedError, match="no value") as caught:
        weighting.defined(gap, None, "no value", "why")
    assert caught.value.reason == "why"
    assert weighting.defined(gap, torch.ones(1, 2), "no value", "why").isnan().all()  # type: ignore[union-attr]
