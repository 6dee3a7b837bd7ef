"""Pooling adjacent violators against scikit-learn, against the definition, and on orders made to be slow."""

from __future__ import annotations

import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from bayesdl.evaluation import isotonic


@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(700, dtype=torch.float64, generator=generator) + torch.linspace(0, 2, 700)
    weights = torch.rand(700, dtype=torch.float64, generator=generator) + 0.1
    expected = IsotonicRegression().fit(range(700), values.numpy(), weights.numpy()).predict(range(700))
    assert isotonic.pool(values, weights).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_orders_that_need_more_rounds_than_there_are() -> None:
    # The last value pulls in one block after another.
    values = torch.cat([torch.arange(200, dtype=torch.float64), torch.tensor([-1e5], dtype=torch.float64)])
    expected = IsotonicRegression().fit_transform(range(201), values.numpy())
    assert isotonic.pool(values, torch.ones_like(values)).tolist() == pytest.approx(expected.tolist())


def test_ties_share_a_value_and_weights_are_copies() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.2], dtype=torch.float64)
    outcomes = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    weights = torch.tensor([2.0, 1.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    knots, fitted = isotonic.fit(scores, outcomes, weights)
    assert knots.tolist() == [0.1, 0.4, 0.9] and fitted.tolist() == [0.0, 0.25, 1.0]
    again = isotonic.fit(scores.repeat_interleave(weights.long()), outcomes.repeat_interleave(weights.long()))
    assert again[1].tolist() == [0.0, 0.25, 1.0]


def test_interpolation_is_linear_inside_and_constant_outside() -> None:
    knots, values = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 2.0, 6.0])
    at = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 9.0])
    assert isotonic.interpolate(knots, values, at).tolist() == [1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 6.0]
    assert isotonic.interpolate(knots[:1], values[:1], at).tolist() == [1.0] * 7
