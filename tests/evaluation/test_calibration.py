"""Calibration errors and tests beyond bins: closed forms, brute force, and what calibrated forecasts must give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesdl.evaluation import calibration as cal
from bayesdl.evaluation.brier_terms import brier_decomposition
from bayesdl.evaluation.classification import brier, ece_mass
from bayesdl.evaluation.validation import UndefinedError

EVERY = (cal.ace, cal.tace, cal.ce2_debiased, cal.smece, cal.skce, cal.calibration_p, cal.spiegelhalter_z)
P = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [1, 0, 0]], dtype=torch.float64)
Y = torch.tensor([0, 1, 1, 2, 0])


def drawn(n: int, classes: int = 4, *, seed: int = 0, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits and labels; forecasts are right where `sharpness` is 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, classes, dtype=torch.float64, generator=generator)
    return sharpness * logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("metric", EVERY)
def test_order_dtype_and_copies_do_not_matter(metric) -> None:  # type: ignore[no-untyped-def]
    logits, y = drawn(80)
    value = metric(y, logits=logits)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    assert metric(y[order], logits=logits[order]) == pytest.approx(value, abs=1e-12)
    assert metric(y, logits=logits.float()) == pytest.approx(value, abs=2e-6)
    assert metric(y, probs=logits.softmax(-1)) == pytest.approx(value, abs=1e-12)
    copies = metric(y.repeat(2), logits=logits.repeat(2, 1))
    assert metric(y, logits=logits, weights=2 * torch.ones(80)) == pytest.approx(copies, abs=1e-12)


def test_ace_of_one_bin_is_the_mean_gap_of_the_classes() -> None:
    one_hot = torch.nn.functional.one_hot(Y, 3).double()
    assert cal.ace(Y, probs=P, bins=1) == pytest.approx(float((P.mean(0) - one_hot.mean(0)).abs().mean()))
    # Above 0.5 there are four values of class 0 or 1, each class in one bin.
    gaps = [abs((0.7 + 0.6 + 1.0) / 3 - 2 / 3), abs(0.8 - 1.0)]
    assert cal.tace(Y, probs=P, bins=1, threshold=0.5) == pytest.approx(sum(gaps) / 2)
    with pytest.raises(UndefinedError):
        cal.tace(Y, probs=P, threshold=1.0)


def test_ce2_by_hand_and_unbiased() -> None:
    hits = torch.tensor([1, 0, 1, 1, 1], dtype=torch.float64)
    expected = (P.amax(1).mean() - hits.mean()) ** 2 - hits.mean() * (1 - hits.mean()) / 4
    assert cal.ce2_debiased(Y, probs=P, bins=1) == pytest.approx(float(expected))
    # One forecast value, so that the plug-in has no error of binning: 400 data sets, mean 0 within 4 standard errors
    # (a false alarm in 6e-5 of seeds); the biased square is 0.21 / 50 above 0.
    generator = torch.Generator().manual_seed(0)
    probs = torch.full((50, 2), 0.3, dtype=torch.float64)
    probs[:, 1] = 0.7
    values, squares = [], []
    for _ in range(400):
        y = (torch.rand(50, generator=generator) < 0.7).long()
        values.append(cal.ce2_debiased(y, probs=probs))
        squares.append(ece_mass(y, probs=probs) ** 2)
    found = torch.tensor(values)
    assert abs(float(found.mean())) < 4 * float(found.std()) / 20
    assert sum(squares) / 400 > 0.7 * 0.21 / 50


def test_smece_is_its_own_bandwidth() -> None:
    conf, hits = torch.rand(2, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    conf = 0.5 + conf / 2
    right = (hits < conf.square()).double()
    value = float(cal.smece_of(conf, right, None))
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    mirrors = [sign * conf + 2 * shift for shift in (-1, 0, 1) for sign in (1, -1)]
    kernel = sum(torch.exp(-0.5 * ((t[:, None] - m) / value).square()) for m in mirrors)
    curve = (kernel @ (right - conf)).abs() / (300 * value * math.sqrt(2 * math.pi))  # type: ignore[operator]
    assert float(torch.trapezoid(curve, t)) == pytest.approx(value, rel=1e-6)


def test_smece_of_one_forecast_is_its_gap() -> None:
    # One residual of one sign: the kernel integrates to 1 whatever its width.
    conf, hits = torch.full((100,), 0.9, dtype=torch.float64), torch.arange(100) < 60
    assert float(cal.smece_of(conf, hits, None)) == pytest.approx(0.3, abs=1e-9)
    assert float(cal.smece_of(conf, torch.arange(100) < 90, None)) < 1e-9


def test_skce_is_the_mean_over_pairs() -> None:
    logits, y = drawn(30, 3, seed=3)
    p = logits.softmax(-1)
    e = torch.nn.functional.one_hot(y, 3) - p
    pairs = [float(e[i] @ e[j] * torch.exp(-(p[i] - p[j]).norm() / 0.4)) for i in range(30) for j in range(i)]
    assert cal.skce(y, logits=logits, bandwidth=0.4) == pytest.approx(sum(pairs) / len(pairs))
    distances = torch.pdist(p)
    low, high = float(distances.sort().values[217]), float(distances.sort().values[218])
    assert cal.skce(y, logits=logits) == pytest.approx(cal.skce(y, logits=logits, bandwidth=low), rel=(high - low) * 20)
    with pytest.raises(UndefinedError):
        cal.skce(y[:1], logits=logits[:1])


def test_skce_of_calibrated_forecasts_is_near_zero() -> None:
    # netcal's kernel error gives 0.21 on such data. 40 data sets: the mean is 0 within 4 standard errors (6e-5).
    values = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        p = torch.rand(400, generator=generator, dtype=torch.float64)
        y = (torch.rand(400, generator=generator, dtype=torch.float64) < p).long()
        values.append(cal.skce(y, probs=p))
    found = torch.tensor(values)
    assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(40) < 1e-3
    logits, y = drawn(400, sharpness=3.0)
    assert cal.skce(y, logits=logits) > 0.01


def test_p_values_are_uniform_when_calibrated_and_small_when_not() -> None:
    # 200 p-values, Kolmogorov-Smirnov distance below 1.95 / sqrt(200): fails for 1 seed in 1000 when exact.
    found = torch.tensor([cal.calibration_p(y, logits=f) for f, y in (drawn(600, seed=s) for s in range(200))])
    steps = torch.arange(1, 201) / 200
    assert float((found.sort().values - steps).abs().max()) < 1.95 / math.sqrt(200)
    logits, y = drawn(600, sharpness=2.0)
    assert cal.calibration_p(y, logits=logits) < 1e-6
    with pytest.raises(UndefinedError):
        cal.calibration_p([0, 1], probs=[[1.0, 0.0], [0.0, 1.0]])


def test_law_of_the_maximum_of_brownian_motion() -> None:
    # Tabulated upper 5 % point 2.2414, and the two series agree where they meet.
    upper = torch.tensor(2.2414027, dtype=torch.float64)
    assert float(cal.brownian_maximum_cdf(upper)) == pytest.approx(0.95, abs=1e-7)
    ends = cal.brownian_maximum_cdf(torch.tensor([3.0, 3.0 + 1e-12, 0.0, 50.0], dtype=torch.float64))
    assert float(ends[0]) == pytest.approx(float(ends[1]), abs=1e-12)
    assert ends[2:].tolist() == [0.0, 1.0]


def test_spiegelhalter_is_standard_normal_when_calibrated() -> None:
    # 200 statistics: mean within 4 / sqrt(200), sd within 4 / sqrt(400) of 1; fails for about 1 seed in 8000.
    found = torch.tensor([cal.spiegelhalter_z(y, logits=f) for f, y in (drawn(300, seed=s) for s in range(200))])
    assert abs(float(found.mean())) < 4 / math.sqrt(200) and abs(float(found.std()) - 1) < 0.2
    by_hand = (1 - 0.8) * (1 - 1.6) / math.sqrt((1 - 1.6) ** 2 * 0.16)
    assert cal.spiegelhalter_z([0], probs=[[0.8, 0.2]]) == pytest.approx(by_hand)
    with pytest.raises(UndefinedError):
        cal.spiegelhalter_z([0], probs=[[0.5, 0.5]])


@pytest.mark.parametrize("groups", ["value", "bins", "isotonic"])
def test_brier_terms_add_up(groups: str) -> None:
    rounded = (drawn(500)[0].softmax(-1) * 20).round() / 20
    y, probs = drawn(500)[1], rounded / rounded.sum(1, keepdim=True)
    for column in (False, True):
        given, labels = (probs[:, 1], (y == 1).long()) if column else (probs, y)
        t = brier_decomposition(labels, probs=given, groups=groups)  # type: ignore[arg-type]
        assert t.brier == pytest.approx(brier(labels, probs=given), abs=1e-12)
        total = t.reliability - t.resolution + t.uncertainty + t.within_variance - t.within_covariance
        assert total == pytest.approx(t.brier, abs=1e-12)
        assert min(t.reliability, t.resolution) >= 0


def test_brier_terms_by_hand() -> None:
    t = brier_decomposition([0, 1, 1, 1], probs=[0.2, 0.2, 0.8, 0.8])
    assert t.reliability == pytest.approx((2 * 0.3**2 + 2 * 0.2**2) / 4)
    assert t.resolution == pytest.approx(0.25**2) and t.uncertainty == pytest.approx(0.75 * 0.25)
    # Isotonic: recalibrated to 0.5 and 1, whose score is 0.125.
    i = brier_decomposition([0, 1, 1, 1], probs=[0.2, 0.2, 0.8, 0.8], groups="isotonic")
    assert i.reliability == pytest.approx(t.brier - 0.125) and i.resolution == pytest.approx(0.1875 - 0.125)
    with pytest.raises(ValueError, match="groups="):
        brier_decomposition([0, 1], probs=[0.2, 0.2], groups="class")  # type: ignore[arg-type]
