"""Certificates: limits against closed forms, and the promised rate of failures over repeated calibration data."""

from __future__ import annotations

import math

import pytest
import torch

from bayesdl.decisions import binomial_limit, certify, upper_limit


def test_clopper_pearson_closed_forms() -> None:
    # No error in m: 1 - delta^(1/m). All errors, or nothing seen: 1.
    assert binomial_limit(0, 50, 0.05) == pytest.approx(1 - 0.05 ** (1 / 50))
    assert binomial_limit(7, 7, 0.05) == 1.0 and upper_limit(torch.zeros(0), 0.05) == 1.0
    limit = binomial_limit(3, 40, 0.1)
    tail = sum(math.comb(40, k) * limit**k * (1 - limit) ** (40 - k) for k in range(4))
    assert tail == pytest.approx(0.1)


@pytest.mark.parametrize("bound", ["clopper_pearson", "hoeffding_bentkus", "empirical_bernstein"])
def test_limits_fail_no_more_often_than_promised(bound: str) -> None:
    # 600 repeats at delta 0.1 of rate 0.2: the share of failures has sd 0.012; 4 of them.
    generator = torch.Generator().manual_seed(0)
    losses = (torch.rand(600, 80, generator=generator, dtype=torch.float64) < 0.2).double()
    missed = sum(upper_limit(row, 0.1, bound) < 0.2 for row in losses)  # type: ignore[arg-type]
    assert missed / 600 < 0.1 + 4 * 0.0123
    assert upper_limit(losses[0], 0.1, bound) < 0.6  # type: ignore[arg-type]


@pytest.mark.parametrize("correction", ["fixed_sequence", "bonferroni"])
def test_true_risk_is_violated_at_most_in_a_share_delta(correction: str) -> None:
    # P(error | confidence c) = 1 - c, c uniform on [0.5, 1]: accepting above t has risk (1 - t) / 2.
    generator = torch.Generator().manual_seed(1)
    wrong = certified = 0
    for _ in range(400):
        confidence = 0.5 + torch.rand(300, generator=generator, dtype=torch.float64) / 2
        error = torch.rand(300, generator=generator, dtype=torch.float64) > confidence
        found = certify(confidence, error, 0.15, delta=0.1, correction=correction)  # type: ignore[arg-type]
        certified += found.certified
        wrong += found.certified and (1 - found.threshold) / 2 > 0.15
    # sd of the share is 0.015: 3 of them.
    assert certified > 200 and wrong / 400 < 0.1 + 0.045


def test_random_confidence_is_not_certified_below_the_base_risk() -> None:
    generator = torch.Generator().manual_seed(2)
    found = 0
    for _ in range(200):
        confidence, u = torch.rand(2, 200, generator=generator, dtype=torch.float64)
        found += certify(confidence, u < 0.3, 0.25, delta=0.05).certified
    # sd of the share is 0.015: 4 of them.
    assert found / 200 < 0.05 + 0.062


def test_largest_coverage_by_hand() -> None:
    confidence = torch.tensor([0.9] * 60 + [0.7] * 60 + [0.5] * 60)
    loss = torch.tensor([0] * 60 + [0] * 58 + [1] * 2 + [1] * 60)
    found = certify(confidence, loss, 0.1, thresholds=[0.5, 0.7, 0.9])
    assert found.certified and found.threshold == pytest.approx(0.7) and (found.accepted, found.errors) == (120, 2.0)
    assert found.coverage == pytest.approx(2 / 3) and found.limit == pytest.approx(binomial_limit(2, 120, 0.05))
    assert "3 thresholds" in str(found)
    none = certify(confidence, torch.ones(180), 0.1)
    assert not none.certified and none.threshold == math.inf and "abstain" in str(none)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="values in"):
        certify([0.5], [2.0], 0.1)
    with pytest.raises(ValueError, match="0/1 errors"):
        certify([0.5], [0.5], 0.1)
    with pytest.raises(ValueError, match="risk="):
        certify([0.5], [1.0], 1.5)
    with pytest.raises(ValueError, match="correction="):
        certify([0.5], [1.0], 0.1, correction="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected \\(1,\\)"):
        certify([0.5], [1.0, 0.0], 0.1)
