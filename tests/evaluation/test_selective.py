"""Risk-coverage curves against enumeration of every order of the ties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesdl.evaluation import selective

repeatable = settings(derandomize=True, deadline=None, max_examples=60)


def expected_risks(confidence: list[float], loss: list[float]) -> np.ndarray:
    """R_i, i = 1..N, averaged over every order that sorts by confidence."""
    order = range(len(loss))
    curves = [
        np.cumsum([loss[i] for i in places]) / np.arange(1, len(loss) + 1)
        for places in itertools.permutations(order)
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(places))
    ]
    return np.mean(curves, axis=0)


def draw(n: int, seed: int, levels: int = 4) -> tuple[Tensor, Tensor]:
    """Confidences with ties and 0/1 losses."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.randint(1, levels + 1, (n,), generator=generator) / levels
    return confidence, (torch.rand(n, generator=generator) > confidence * 0.9).double()


@repeatable
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_against_all_orders_of_the_ties(n: int, seed: int) -> None:
    confidence, loss = draw(n, seed, levels=3)
    risks = expected_risks(confidence.tolist(), loss.tolist())
    i = np.arange(1, n + 1)
    assert selective.aurc(confidence, loss) == pytest.approx(risks.mean(), abs=1e-12)
    assert selective.augrc(confidence, loss) == pytest.approx((i / n * risks).mean(), abs=1e-12)
    best = expected_risks((-loss).tolist(), loss.tolist()).mean()
    assert selective.eaurc(confidence, loss) == pytest.approx(max(risks.mean() - best, 0), abs=1e-12)
    for coverage in (0.07, 0.3, 0.5, 1.0):
        at = math.ceil(coverage * n - 1e-9)
        assert selective.risk_at_coverage(confidence, loss, coverage=coverage) == pytest.approx(risks[at - 1])


def test_curve_by_hand() -> None:
    confidence, loss = [0.9, 0.8, 0.8, 0.3], [0, 1, 0, 1]
    curve = selective.risk_coverage(confidence, loss)
    assert curve.coverage.tolist() == [0.25, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 3, 0.5])
    assert curve.threshold.tolist() == pytest.approx([0.9, 0.8, 0.3])
    assert selective.aurc(confidence, loss) == pytest.approx((0 + 0.25 + 1 / 3 + 0.5) / 4)
    assert selective.coverage_at_risk(confidence, loss, risk=0.34) == 0.75
    assert selective.coverage_at_risk(confidence, loss, risk=0.1) == 0.25
    assert selective.coverage_at_risk([0.5, 0.6], [0, 1], risk=0.1) == 0.0


@repeatable
@given(st.integers(1, 80), st.integers(0, 10_000))
def test_order_bounds_and_weights(n: int, seed: int) -> None:
    confidence, loss = draw(n, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    weights = torch.randint(0, 4, (2, n), generator=generator)
    weights[:, 0] = 1
    found = {
        "aurc": selective.aurc,
        "eaurc": selective.eaurc,
        "augrc": selective.augrc,
        "risk": lambda c, x, **k: selective.risk_at_coverage(c, x, coverage=0.6, **k),
        "coverage": lambda c, x, **k: selective.coverage_at_risk(c, x, risk=0.3, **k),
    }
    values = {name: metric(confidence, loss) for name, metric in found.items()}
    assert 0 <= values["augrc"] <= values["aurc"] + 1e-12 and values["eaurc"] >= 0
    for name, metric in found.items():
        assert metric(confidence[order], loss[order]) == pytest.approx(values[name], abs=1e-12)
        assert metric(torch.exp(5 * confidence.double()), loss) == pytest.approx(values[name], abs=1e-12)
        together = metric(confidence, loss, weights=weights)
        assert together.shape == (2,)
        for row, value in zip(weights, together, strict=True):
            copies = torch.repeat_interleave(torch.arange(n), row)
            assert metric(confidence[copies], loss[copies]) == pytest.approx(float(value), abs=1e-10)


def test_fractional_weights_extend_the_whole_ones() -> None:
    confidence, loss = draw(50, 0)
    whole, nearly = torch.full((50,), 2.0), torch.full((50,), 2.0 + 1e-9)
    for metric in (selective.aurc, selective.augrc, selective.eaurc):
        exact = metric(confidence, loss, weights=whole)
        assert metric(confidence, loss, weights=nearly) == pytest.approx(exact, abs=1e-7)


def test_no_loss_of_digits_on_many_examples() -> None:
    # A loss that is constant has the same risk everywhere, whatever the number of examples and ties.
    confidence = torch.arange(300_000) // 3
    loss = torch.full((300_000,), 0.3, dtype=torch.float64)
    assert selective.aurc(confidence, loss) == pytest.approx(0.3, rel=1e-10)


@pytest.mark.parametrize(
    ("confidence", "loss", "message"),
    [
        ([0.5, math.nan], [0, 1], "confidence"),
        ([0.5, 0.6], [0, math.inf], "loss"),
        ([0.5, 0.6], [0, 1, 1], r"\(3,\)"),
        ([[0.5], [0.6]], [0, 1], "expected 1-D"),
        ([], [], "empty"),
    ],
)
def test_bad_input(confidence: list[float], loss: list[float], message: str) -> None:
    for metric in (selective.aurc, selective.eaurc, selective.augrc, selective.risk_coverage):
        with pytest.raises(ValueError, match=message):
            metric(confidence, loss)


def test_bad_coverage() -> None:
    with pytest.raises(ValueError, match="coverage="):
        selective.risk_at_coverage([0.5], [0], coverage=80)
