"""Calibration of spreads: closed forms, brute force, calibrated forecasts, and the traps of public implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdl.evaluation import dispersion as d
from bayesdl.evaluation import regression
from bayesdl.evaluation.validation import UndefinedError


def drawn(n: int, *, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and targets of right forecasts, whose deviation is multiplied by `scale`."""
    generator = torch.Generator().manual_seed(seed)
    mean, noise = torch.randn(2, n, dtype=torch.float64, generator=generator)
    deviation = 0.2 + torch.rand(n, dtype=torch.float64, generator=generator)
    return mean, (scale * deviation).square(), mean + deviation * noise


def test_pinball_averages_to_half_the_crps() -> None:
    mean, variance, y = drawn(20)
    levels = (torch.arange(2000) + 0.5) / 2000
    total = sum(d.pinball(y, mean=mean, variance=variance, q=float(q)) for q in levels) / 2000
    assert 2 * total == pytest.approx(regression.crps(y, mean=mean, variance=variance), rel=1e-4)
    assert d.pinball([3.0], mean=[1.0], variance=[1.0], q=0.5) == pytest.approx(1.0)


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


def test_fair_crps_is_the_formula_and_unbiased() -> None:
    samples = torch.randn(5, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(7, 2, dtype=torch.float64)
    pairs = (samples[:, None] - samples[None]).abs().sum((0, 1)) / (2 * 5 * 4)
    expected = float((samples.abs().mean(0) - pairs).mean())
    assert d.crps_samples(y, samples) == pytest.approx(expected)
    # Two draws estimate the same number as the closed form: 40,000 examples, 5 standard errors.
    many = torch.randn(2, 40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    closed = regression.crps([0.5], mean=[0.0], variance=[1.0])
    losses = d.crps_samples(torch.full((40_000,), 0.5), many, per_example=True)
    assert isinstance(losses, Tensor)
    assert abs(float(losses.mean()) - closed) < 5 * float(losses.std()) / 200
    with pytest.raises(UndefinedError, match="one was given"):
        d.crps_samples(y, samples[:1])


def test_randomised_pit_is_uniform_with_ties() -> None:
    # Counts: ties are the rule. Kolmogorov-Smirnov below 1.95 / sqrt(n): 1 seed in 1000 fails.
    generator = torch.Generator().manual_seed(0)
    rate = torch.full((10, 4000), 1.5)
    samples, y = torch.poisson(rate, generator), torch.poisson(rate[0], generator)
    pit = np.sort(d.pit_samples(y, samples, generator=generator)[:, 0].numpy())
    assert np.abs(pit - np.arange(1, 4001) / 4000).max() < 1.95 / math.sqrt(4000)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected 2-D or 3-D"):
        d.crps_samples([0.0], [0.0])
    with pytest.raises(ValueError, match="nothing is broadcast"):
        d.crps_samples(torch.zeros(3, 1), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="q="):
        d.pinball([0.0], mean=[0.0], variance=[1.0], q=1.0)
