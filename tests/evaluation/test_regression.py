"""Regression metrics: quadrature, Monte Carlo with stated error, other libraries, invariances, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

from bayesdl.evaluation import regression as reg

repeatable = settings(derandomize=True, deadline=None, max_examples=25)
WITH_LOSSES = [reg.nll, reg.crps, reg.interval_score, reg.picp, reg.mae]
ALL = [*WITH_LOSSES, reg.rmse, reg.qce]


def draw(members: int, n: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances (S, N, D) and targets (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (members, n, outputs)
    mean = torch.randn(shape, dtype=torch.float64, generator=generator)
    variance = 0.1 + torch.rand(shape, dtype=torch.float64, generator=generator)
    return mean, variance, 1.5 * torch.randn(n, outputs, dtype=torch.float64, generator=generator)


def crps_by_quadrature(y: float, mean: np.ndarray, sd: np.ndarray, weights: np.ndarray) -> float:
    """Integral of (F(t) - 1[t >= y])^2."""

    def square(t: float) -> float:
        return float((weights * stats.norm.cdf(t, mean, sd)).sum() - (t >= y)) ** 2

    low, high = min(y, mean.min()) - 12 * sd.max(), max(y, mean.max()) + 12 * sd.max()
    left = integrate.quad(square, low, y, epsabs=1e-11, limit=400)[0]
    return left + integrate.quad(square, y, high, epsabs=1e-11, limit=400)[0]


@pytest.mark.parametrize("weights", [None, [0.5, 0.2, 0.3]])
def test_crps_of_a_mixture_is_its_integral(weights: list[float] | None) -> None:
    mean, variance, y = draw(3, 4, 1)
    found = reg.crps(y, mean=mean, variance=variance, member_weights=weights, per_example=True)
    share = np.full(3, 1 / 3) if weights is None else np.array(weights)
    for i in range(4):
        m, s = mean[:, i, 0].numpy(), variance[:, i, 0].sqrt().numpy()
        assert float(found[i]) == pytest.approx(crps_by_quadrature(float(y[i, 0]), m, s, share), abs=1e-8)


def test_crps_of_one_gaussian_and_of_equal_components() -> None:
    # Gneiting and Raftery (2007), eq. 21: s (z (2 Phi(z) - 1) + 2 phi(z) - 1/sqrt(pi)).
    mean, variance, y = draw(1, 50, 1)
    s = variance[0].sqrt().numpy()
    z = ((y - mean[0]).numpy()) / s
    expected = s * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    assert reg.crps(y, mean=mean[0], variance=variance[0]) == pytest.approx(float(expected.mean()), rel=1e-12)
    five = {"mean": mean.expand(5, -1, -1), "variance": variance.expand(5, -1, -1)}
    assert reg.crps(y, **five) == pytest.approx(float(expected.mean()), rel=1e-12)


def test_crps_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, variance, y = draw(7, 20, 2)
    whole = reg.crps(y, mean=mean, variance=variance)
    monkeypatch.setattr(reg, "CHUNK", 50)
    assert reg.crps(y, mean=mean, variance=variance) == pytest.approx(whole, rel=1e-13)


@pytest.mark.peer
def test_crps_and_interval_score_against_scoringrules() -> None:
    peer = pytest.importorskip("scoringrules")
    mean, variance, y = draw(4, 30, 1)
    m, s = mean[..., 0].T.numpy(), variance[..., 0].sqrt().T.numpy()
    expected = peer.crps_mixnorm(y[:, 0].numpy(), m, s)
    assert reg.crps(y, mean=mean, variance=variance) == pytest.approx(float(expected.mean()), rel=1e-10)
    low, high = reg.interval_of(reg.Mixture.read(mean, variance, None), 0.8)
    expected = peer.interval_score(y.numpy(), low.numpy(), high.numpy(), 0.2)
    found = reg.interval_score(y, mean=mean, variance=variance, level=0.8)
    assert found == pytest.approx(float(expected.mean()), rel=1e-10)


@pytest.mark.parametrize("members", [1, 3])
def test_nll_is_minus_the_log_density(members: int) -> None:
    mean, variance, y = draw(members, 20, 2)
    density = stats.norm.pdf(y.numpy(), mean.numpy(), variance.sqrt().numpy()).prod(-1).mean(0)
    assert reg.nll(y, mean=mean, variance=variance) == pytest.approx(-np.log(density).mean(), rel=1e-12)


def test_nll_far_in_the_tail_stays_finite() -> None:
    value = reg.nll([[1000.0]], mean=[[[0.0]], [[1.0]]], variance=[[[1.0]], [[1.0]]])
    assert value == pytest.approx(0.5 * 999**2 + 0.5 * math.log(2 * math.pi) + math.log(2), rel=1e-12)


@pytest.mark.parametrize("q", [1e-9, 0.025, 0.5, 0.975, 1 - 1e-9])
def test_mixture_quantile_inverts_the_cdf(q: float) -> None:
    mean, variance, _ = draw(5, 30, 2)
    weights = [0.4, 0.1, 0.1, 0.2, 0.2]
    found = reg.mixture_quantile(q, mean=mean, variance=variance, member_weights=weights)
    back = reg.mixture_cdf(found, mean=mean, variance=variance, member_weights=weights)
    assert bool(torch.isfinite(found).all())
    assert torch.allclose(back, torch.full_like(back, q), rtol=1e-6, atol=1e-9)


def test_mixture_quantile_of_equal_and_of_distant_components() -> None:
    mean = torch.tensor([[[-1e6]], [[1e6]]], dtype=torch.float64)
    variance = torch.full((2, 1, 1), 1e-4, dtype=torch.float64)
    # Below the gap half of the mass: the 25 % point of the mixture is the median of the left component.
    left = reg.mixture_quantile(0.25, mean=mean, variance=variance)
    assert float(left) == pytest.approx(-1e6, rel=1e-10)
    same = reg.mixture_quantile(0.9, mean=mean[:1].expand(3, -1, -1), variance=variance[:1].expand(3, -1, -1))
    assert float(same) == pytest.approx(-1e6 + 1e-2 * stats.norm.ppf(0.9), rel=1e-10)


def test_interval_metrics_of_one_gaussian_by_hand() -> None:
    mean, variance = torch.zeros(4, dtype=torch.float64), torch.full((4,), 4.0, dtype=torch.float64)
    half = 2 * stats.norm.ppf(0.95)
    y = torch.tensor([0.0, half - 0.01, half + 1, -half - 2], dtype=torch.float64)
    given_ = {"mean": mean, "variance": variance}
    assert reg.mpiw(level=0.9, **given_) == pytest.approx(2 * half)
    assert reg.picp(y, level=0.9, **given_) == 0.5
    assert reg.interval_score(y, level=0.9, **given_) == pytest.approx(2 * half + 20 * 3 / 4)
    assert reg.sharpness(**given_) == 2.0


def test_a_right_ensemble_covers_its_level() -> None:
    # Targets from the mixture itself. 20 000 draws at 90 %: four standard errors are 0.0085, failure rate 6e-5.
    generator = torch.Generator().manual_seed(0)
    mean, variance, _ = draw(4, 20_000, 1)
    pick = torch.randint(4, (20_000,), generator=generator)
    rows = torch.arange(20_000)
    noise = torch.randn(20_000, 1, dtype=torch.float64, generator=generator)
    y = mean[pick, rows] + variance[pick, rows].sqrt() * noise
    assert reg.picp(y, mean=mean, variance=variance, level=0.9) == pytest.approx(0.9, abs=0.0085)
    low, high = reg.interval_of(reg.Mixture.read(mean, variance, None), 0.9)
    assert float(((y >= low) & (y <= high)).double().mean()) == pytest.approx(0.9, abs=0.0085)
    # Uniform PIT: each level misses by about sqrt(a (1 - a) / n) <= 0.0036, the mean over levels by less than 0.01.
    assert reg.qce(y, mean=mean, variance=variance) < 0.01
    assert reg.qce(y, mean=mean + 1, variance=variance) > 0.1


def test_qce_of_known_pit_values() -> None:
    # PIT exactly 0.5 for every example: the share at or below a is 0 under 0.5 and 1 from 0.5 on.
    y = torch.zeros(10)
    expected = np.mean([a if a < 0.5 - 1e-9 else 1 - a for a in reg.LEVELS])
    assert reg.qce(y, mean=torch.zeros(10), variance=torch.ones(10)) == pytest.approx(expected)


def test_point_metrics() -> None:
    mean, _, y = draw(3, 20, 2)
    error = (y - mean.mean(0)).numpy()
    assert reg.rmse(y, mean=mean) == pytest.approx(math.sqrt((error**2).mean()))
    assert reg.mae(y, mean=mean) == pytest.approx(np.abs(error).mean())


@pytest.mark.parametrize("shape", [(12,), (12, 1), (12, 2), (3, 12, 2)])
def test_shapes(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.1
    y = torch.zeros(shape if len(shape) < 3 else shape[1:])
    for metric in ALL:
        assert math.isfinite(metric(y, mean=mean, variance=variance))


@repeatable
@given(st.integers(1, 3), st.integers(2, 40), st.integers(0, 1000))
def test_weights_permutation_and_precision(members: int, n: int, seed: int) -> None:
    mean, variance, y = draw(members, n, 2, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 4, (2, n), generator=generator)
    weights[:, 0] = 1
    order = torch.randperm(n, generator=generator)
    for metric in ALL:
        value = metric(y, mean=mean, variance=variance)
        assert metric(y[order], mean=mean[:, order], variance=variance[:, order]) == pytest.approx(value, abs=1e-12)
        assert metric(y.float(), mean=mean.float(), variance=variance.float()) == pytest.approx(
            value, rel=1e-4, abs=0.06
        )
        together = metric(y, mean=mean, variance=variance, weights=weights)
        for row, found in zip(weights, together, strict=True):
            copies = torch.repeat_interleave(torch.arange(n), row)
            alone = metric(y[copies], mean=mean[:, copies], variance=variance[:, copies])
            assert alone == pytest.approx(float(found), abs=1e-11)


@repeatable
@given(st.integers(1, 4), st.floats(0.02, 0.9), st.integers(0, 1000))
def test_coverage_and_width_grow_with_the_level(members: int, level: float, seed: int) -> None:
    mean, variance, y = draw(members, 30, 1, seed)
    given_ = {"mean": mean, "variance": variance}
    assert reg.picp(y, level=level, **given_) <= reg.picp(y, level=level + 0.05, **given_)
    assert reg.mpiw(level=level, **given_) < reg.mpiw(level=level + 0.05, **given_)


def test_pinball_over_quantiles_approaches_half_the_crps() -> None:
    mean, variance, y = draw(3, 10, 1)
    levels = [(i + 0.5) / 400 for i in range(400)]
    quantiles = [reg.mixture_quantile(q, mean=mean, variance=variance) for q in levels]
    losses = [torch.maximum(q * (y - f), (q - 1) * (y - f)).mean() for q, f in zip(levels, quantiles, strict=True)]
    half = reg.crps(y, mean=mean, variance=variance) / 2
    assert float(torch.stack(losses).mean()) == pytest.approx(half, rel=2e-3)


def test_per_example_losses_average_to_the_metric() -> None:
    mean, variance, y = draw(3, 20, 2)
    for metric in WITH_LOSSES:
        losses = metric(y, mean=mean, variance=variance, per_example=True)
        assert losses.shape == (20,)
        assert float(losses.mean()) == pytest.approx(metric(y, mean=mean, variance=variance), rel=1e-13)


@pytest.mark.parametrize(
    ("mean", "variance", "targets", "message"),
    [
        (np.zeros((3, 1)), np.ones((3, 1)), np.zeros(3), r"\(3,\).*\(3, 1\)"),
        (np.zeros(3), np.ones(3), np.zeros((3, 1)), r"\(3, 1\).*\(3,\)"),
        (np.zeros(3), np.ones((3, 1)), np.zeros(3), "both must be equal"),
        (np.zeros(3), np.array([1.0, 0.0, 1.0]), np.zeros(3), r"index \(1,\)"),
        (np.zeros(3), np.array([1.0, 1.0, -1.0]), np.zeros(3), "not positive"),
        (np.zeros(3), np.array([1.0, math.nan, 1.0]), np.zeros(3), "NaN"),
        (np.array([math.inf, 0, 0]), np.ones(3), np.zeros(3), "infinite"),
        (np.zeros(3), np.ones(3), np.array([0, 0, math.nan]), r"index \(2,\)"),
        (np.zeros(0), np.ones(0), np.zeros(0), "empty"),
        (np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1, 1)), np.zeros(1), "expected"),
    ],
)
@pytest.mark.parametrize("metric", ALL)
def test_bad_input(
    metric: Callable[..., float], mean: np.ndarray, variance: np.ndarray, targets: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(targets, mean=mean, variance=variance)


@pytest.mark.parametrize("level", [0.0, 1.0, 90, math.nan, "0.9", True])
def test_bad_levels(level: object) -> None:
    with pytest.raises(ValueError, match="level="):
        reg.picp([0.0], mean=[0.0], variance=[1.0], level=level)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q="):
        reg.mixture_quantile(level, mean=[0.0], variance=[1.0])  # type: ignore[arg-type]


def test_bad_member_weights() -> None:
    mean, variance, y = draw(3, 2, 1)
    for weights in ([1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="member_weights"):
            reg.nll(y, mean=mean, variance=variance, member_weights=weights)


def test_pinball_averages_to_half_the_crps() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, y = torch.randn(2, 20, dtype=torch.float64, generator=generator)
    variance = 0.2 + torch.rand(20, dtype=torch.float64, generator=generator)
    levels = (torch.arange(2000) + 0.5) / 2000
    total = sum(reg.pinball(y, mean=mean, variance=variance, q=float(q)) for q in levels) / 2000
    assert 2 * total == pytest.approx(reg.crps(y, mean=mean, variance=variance), rel=1e-4)
    assert reg.pinball([3.0], mean=[1.0], variance=[1.0], q=0.5) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="q="):
        reg.pinball([0.0], mean=[0.0], variance=[1.0], q=1.0)
