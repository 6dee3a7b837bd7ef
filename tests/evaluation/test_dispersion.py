"""Calibration of spreads: closed forms, brute force, calibrated forecasts, and the traps of public implementations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesdl.evaluation import dispersion as d
from bayesdl.evaluation.validation import UndefinedError


def drawn(n: int, *, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and targets of right forecasts, whose deviation is multiplied by `scale`."""
    generator = torch.Generator().manual_seed(seed)
    mean, noise = torch.randn(2, n, dtype=torch.float64, generator=generator)
    deviation = 0.2 + torch.rand(n, dtype=torch.float64, generator=generator)
    return mean, (scale * deviation).square(), mean + deviation * noise


def test_miscalibration_area_is_the_integral() -> None:
    mean, variance, y = drawn(50, scale=0.6)
    pit = torch.special.ndtr((y - mean) / variance.sqrt())
    levels = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    share = torch.searchsorted((2 * pit - 1).abs().sort().values, levels, right=True) / 50
    expected = float((share - levels).abs().mean())
    assert d.miscal_area(y, mean=mean, variance=variance) == pytest.approx(expected, abs=1e-5)
    # All targets at the median: every level covers everything, and the area is that above the diagonal.
    assert d.miscal_area([0.0] * 4, mean=[0.0] * 4, variance=[1.0] * 4) == pytest.approx(0.5)


def test_ence_and_uce_of_constant_deviations() -> None:
    # One bin: RMV 2, RMSE sqrt(mean of 1, 9, 1, 1) = sqrt(3).
    y, mean, variance = [1.0, -3.0, 1.0, -1.0], [0.0] * 4, [4.0] * 4
    assert d.ence(y, mean=mean, variance=variance) == pytest.approx((2 - math.sqrt(3)) / 2)
    assert d.uce(y, mean=mean, variance=variance) == pytest.approx(1.0)


def test_ence_and_uce_of_two_bins() -> None:
    y, mean, variance = [1.0, 3.0, 2.0, 4.0], [0.0] * 4, [1.0, 1.0, 9.0, 9.0]
    assert d.ence(y, mean=mean, variance=variance, bins=2) == pytest.approx(
        (abs(1 - math.sqrt(5)) + abs(3 - math.sqrt(10)) / 3) / 2
    )
    assert d.uce(y, mean=mean, variance=variance, bins=2) == pytest.approx((4 + 1) / 2)


def test_right_forecasts_are_calibrated_and_sharp_ones_are_not() -> None:
    # 20,000 examples: the expected values of right forecasts are below these bounds by more than twice.
    mean, variance, y = drawn(20_000)
    assert d.ence(y, mean=mean, variance=variance) < 0.05
    assert d.miscal_area(y, mean=mean, variance=variance) < 0.02
    assert d.ence(y, mean=mean, variance=variance / 4) > 0.8
    assert d.miscal_area(y, mean=mean, variance=variance / 4) > 0.15


def test_ause_by_brute_force() -> None:
    mean, variance, y = drawn(40)
    error, spread = (y - mean).abs(), variance.sqrt()

    def curve(key: Tensor) -> float:
        order = key.argsort(descending=True)
        return sum(float(error[order[i:]].mean()) for i in range(40)) / 40

    expected = (curve(spread) - curve(error)) / float(error.mean())
    assert d.ause(y, mean=mean, variance=variance) == pytest.approx(expected)
    with pytest.raises(UndefinedError, match="every error is 0"):
        d.ause(mean, mean=mean, variance=variance)


def test_smallest_coverage_of_strata() -> None:
    width = torch.arange(100)
    covered = torch.ones(100, dtype=torch.int64)
    covered[:10] = 0
    assert d.ssc(covered, width, strata=5) == pytest.approx(0.5)
    assert d.ssc(covered, torch.ones(100), strata=5) == pytest.approx(0.9)


def test_worst_slab_finds_what_marginal_coverage_hides() -> None:
    x = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    everywhere = torch.rand(4000, generator=torch.Generator().manual_seed(1)) < 0.9
    # Coverage 0.9 everywhere: the measured half has at least 200 points in the slab, sd 0.021, 5 sd below.
    assert d.worst_slab(everywhere, x) > 0.79
    hidden = torch.where(x[:, 0] > 1.3, 0, 1)
    assert float(hidden.double().mean()) > 0.88
    assert d.worst_slab(hidden, x) < 0.4
    assert d.worst_slab(hidden, x) == d.worst_slab(hidden, x)
    with pytest.raises(ValueError, match="hold no slab"):
        d.worst_slab(hidden[:6], x[:6])
