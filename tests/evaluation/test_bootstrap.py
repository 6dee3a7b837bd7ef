"""Resamples are paired and repeatable; intervals cover what they should, calibration errors included."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from scipy import stats

from bayesdl.evaluation import bootstrap as boot
from bayesdl.evaluation.metrics import METRICS, metrics_for
from bayesdl.evaluation.ood import ood_metrics
from bayesdl.evaluation.predictions import Predictions


def calibrated(n: int, seed: int, classes: int = 4, scale: float = 1.0) -> Predictions:
    """A forecaster whose labels are drawn from its own probabilities; `scale` then distorts what it says."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, dtype=torch.float64, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return Predictions.from_logits(scale * logits, targets)


class TestResamples:
    def test_rows_are_multinomial_and_do_not_depend_on_the_chunk(self) -> None:
        resamples = boot.Resamples.draw(40, 300, generator=torch.Generator().manual_seed(0))
        matrix = resamples.matrix()
        assert matrix.shape == (300, 40) and bool((matrix.sum(1) == 40).all())
        assert torch.equal(matrix, torch.cat(list(resamples.chunks(7))))
        # 12 000 counts of variance 1 - 1/40 about 1: the mean is exactly 1, the variance within 0.97 +- 6 * 0.016.
        assert float(matrix.var()) == pytest.approx(0.975, abs=0.1)

    def test_seeds(self) -> None:
        first, second = (
            boot.Resamples.draw(9, 5, generator=torch.Generator().manual_seed(1)).matrix() for _ in range(2)
        )
        assert torch.equal(first, second)
        generator = torch.Generator().manual_seed(1)
        one, two = boot.Resamples.draw(9, 5, generator=generator), boot.Resamples.draw(9, 5, generator=generator)
        assert not torch.equal(one.matrix(), two.matrix())
        assert torch.equal(boot.Resamples.draw(9, 5).matrix(), boot.Resamples.draw(9, 5).matrix())

    def test_clusters_stay_together(self) -> None:
        group = torch.tensor([7, 7, 3, 3, 3, 9])
        matrix = boot.Resamples.draw(6, 50, group=group).matrix()
        for label in (7, 3, 9):
            rows = matrix[:, group == label]
            assert torch.equal(rows, rows[:, :1].expand_as(rows))
        assert bool((matrix[:, [0, 2, 5]].sum(1) == 3).all())

    def test_bad_input(self) -> None:
        for n, count in ((0, 5), (5, 0), (5, 1.5), (True, 5)):
            with pytest.raises(ValueError, match="expected an integer"):
                boot.Resamples.draw(n, count)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="group"):
            boot.Resamples.draw(5, 5, group=[1, 2])
        with pytest.raises(ValueError, match="do not fit"):
            boot.resample(calibrated(4, 0), ["nll"], boot.Resamples.draw(5, 5))


def test_values_are_those_of_the_metric_on_each_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "CHUNK", 150)
    found = calibrated(50, 0)
    resamples = boot.Resamples.draw(50, 8)
    names = [name for name in metrics_for("classification") if name not in ("disagreement", "joint_nll_10")]
    values = boot.resample(found, names, resamples)
    for i, row in enumerate(resamples.matrix()):
        copies = found.subset(torch.repeat_interleave(torch.arange(50), row.long()))
        for name in names:
            assert float(values[name][i]) == pytest.approx(METRICS[name].fn(copies), abs=1e-11), name


def test_ood_values_resample_both_sets() -> None:
    inside, outside = calibrated(30, 0, scale=3), calibrated(20, 1, scale=0.5)
    left, right = boot.Resamples.draw(30, 6), boot.Resamples.draw(20, 6)
    values = boot.resample_ood(inside, outside, left, right)
    for i, (a, b) in enumerate(zip(left.matrix(), right.matrix(), strict=True)):
        expected = ood_metrics(inside, outside, id_weights=a, ood_weights=b)
        assert {name: float(value[i]) for name, value in values.items()} == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="must agree"):
        boot.resample_ood(inside, outside, left, boot.Resamples.draw(20, 7))


def test_a_resample_without_a_class_is_a_gap() -> None:
    found = Predictions.from_probs([[0.9, 0.1]] * 4, [0, 0, 0, 1])
    values = boot.resample(found, ["error_auroc"], boot.Resamples.draw(4, 200))["error_auroc"]
    # P(no error drawn) = (3/4)^4 = 0.316; 200 draws stay within 0.316 +- 0.17 but for 1 in 10^6.
    assert 0.15 < float(values.isnan().double().mean()) < 0.48
    found_interval = boot.interval("error_auroc", found, values)
    assert (found_interval.low, found_interval.high, found_interval.method) == (0.5, 0.5, "percentile")


def test_bca_is_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = -torch.rand(80, dtype=torch.float64, generator=generator).log()
    values = torch.cat([c @ losses / 80 for c in boot.Resamples.draw(80, 20_000).chunks()])
    ours = boot.bca_interval(float(losses.mean()), values, losses)
    peer = stats.bootstrap(
        (losses.numpy(),), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0), vectorized=True
    ).confidence_interval
    width = peer.high - peer.low
    # Ends of 20 000 resamples have a standard error of about 1 % of the width: 5 % is five of them.
    assert ours.low == pytest.approx(peer.low, abs=0.05 * width)
    assert ours.high == pytest.approx(peer.high, abs=0.05 * width)
    symmetric = boot.percentile_interval(values)
    assert ours.high > symmetric.high and ours.low > symmetric.low, "a right-skewed mean shifts the interval up"


def test_bca_covers_a_skewed_mean() -> None:
    # 300 samples of 40 exponentials, true mean 1, level 90 %: BCa covers about 88 %; below 82 % once in 1000 runs.
    generator = torch.Generator().manual_seed(1)
    weights = boot.Resamples.draw(40, 600).matrix()
    hits = 0
    for _ in range(300):
        losses = -torch.rand(40, dtype=torch.float64, generator=generator).log()
        found = boot.bca_interval(float(losses.mean()), weights @ losses / 40, losses, level=0.9)
        hits += found.low <= 1.0 <= found.high
    assert 0.82 <= hits / 300 <= 0.95


def test_bca_of_clusters_uses_their_sums() -> None:
    # Every example twice: resampling the pairs must give what resampling the originals gives.
    losses = -torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log()
    values = boot.Resamples.draw(30, 400).matrix() @ losses / 30
    single = boot.bca_interval(float(losses.mean()), values, losses)
    double = boot.bca_interval(float(losses.mean()), values, losses.repeat(2), group=torch.arange(30).repeat(2))
    assert (double.low, double.high) == pytest.approx((single.low, single.high))


def test_degenerate_values() -> None:
    same = torch.full((20,), 0.3, dtype=torch.float64)
    assert boot.bca_interval(0.3, torch.full((50,), 0.3).double(), same) == boot.Interval(0.3, 0.3, "bca")
    assert boot.bca_interval(0.3, torch.full((5,), math.nan), same).method == "none"
    endless = torch.tensor([1.0, math.inf, math.inf, 2.0]).double()
    found = boot.percentile_interval(endless)
    assert (found.low, found.high) == (1.0, math.inf)
    sure = Predictions.from_probs([[1.0, 0.0]] * 10, [0] * 9 + [1])
    values = boot.resample(sure, ["nll"], boot.Resamples.draw(10, 50))["nll"]
    assert boot.interval("nll", sure, values).high == math.inf


def test_a_root_moves_with_its_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(60, 1, dtype=torch.float64, generator=generator)
    found = Predictions.from_gaussian(torch.zeros(60, 1).double(), torch.ones(60, 1).double(), y)
    values = boot.resample(found, ["rmse"], boot.Resamples.draw(60, 500))["rmse"]
    root = boot.interval("rmse", found, values)
    mean = boot.bca_interval(float(y.square().mean()), values.square(), y.square()[:, 0])
    assert (root.low**2, root.high**2) == pytest.approx((mean.low, mean.high))


def test_calibration_intervals_of_calibrated_forecasters_cover_zero() -> None:
    # 100 calibrated data sets, level 95 %: fewer than 88 covering would happen once in 700 runs.
    covered = 0
    for seed in range(100):
        found = calibrated(400, seed)
        values = boot.resample(found, ["ece"], boot.Resamples.draw(400, 200))["ece"]
        generator = torch.Generator().manual_seed(seed)
        covered += boot.interval("ece", found, values, generator=generator, draws=300).low == 0.0
    assert covered >= 88


def test_calibration_intervals_of_distorted_forecasters_do_not() -> None:
    found = calibrated(4000, 4, scale=3.0)
    names = [name for name, metric in METRICS.items() if metric.null is not None]
    values = boot.resample(found, names, boot.Resamples.draw(4000, 200))
    for name in names:
        estimate = METRICS[name].fn(found)
        assert isinstance(estimate, float)
        interval = boot.interval(name, found, values[name], generator=torch.Generator().manual_seed(0), draws=200)
        assert interval.method == "reflected" and interval.null_mean is not None and interval.null_quantile is not None
        assert 0 < interval.null_mean < interval.null_quantile < estimate
        assert 0 < interval.low <= interval.high <= 1


@pytest.mark.parametrize("name", ["ece", "classwise_ece", "ece_mass", "mce"])
def test_the_null_is_the_law_of_calibrated_labels(name: str) -> None:
    # 200 label sets drawn through torch.multinomial against 2000 redrawn ones: means within five standard errors.
    found, generator = calibrated(300, 0), torch.Generator().manual_seed(5)
    null = METRICS[name].null
    assert null is not None
    redrawn = null(found, 2000, generator)
    assert redrawn.shape == (2000,)
    direct = []
    for _ in range(200):
        targets = torch.multinomial(found.probs, 1, generator=generator)[:, 0]
        direct.append(float(METRICS[name].fn(Predictions.from_probs(found.probs, targets))))
    error = float(np.std(direct)) / math.sqrt(200)
    assert float(redrawn.mean()) == pytest.approx(float(np.mean(direct)), abs=5 * error)


def test_p_values() -> None:
    assert boot.bootstrap_p(torch.full((999,), 0.5)) == pytest.approx(2 / 1000)
    assert boot.bootstrap_p(torch.cat([torch.full((500,), -1.0), torch.full((499,), 1.0)])) == 1.0
    assert boot.bootstrap_p(torch.zeros(99)) == 1.0
    assert boot.bootstrap_p(torch.tensor([math.nan, 1.0, 1.0, 1.0])) == pytest.approx(0.5)


@pytest.mark.slow
def test_a_thousand_resamples_of_ten_thousand_are_quick() -> None:
    found = calibrated(10_000, 0, classes=10)
    started = time.process_time()  # which other processes do not lengthen
    boot.resample(found, ["nll", "brier", "accuracy", "ece", "aurc", "error_auroc"], boot.Resamples.draw(10_000, 1000))
    assert time.process_time() - started < 6.6
