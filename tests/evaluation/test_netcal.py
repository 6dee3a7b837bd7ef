"""What netcal does behind this interface: detectors, Gaussian processes; nothing printed, no seed touched."""

from __future__ import annotations

import logging
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdl.errors import UnknownNameError, UnsupportedError
from bayesdl.evaluation import (
    Predictions,
    classification,
    dispersion,
    evaluate_metrics,
    recalibrate_regression,
    regression,
)
from bayesdl.evaluation import classification as cls
from bayesdl.evaluation.netcal import detection_ece
from bayesdl.evaluation.validation import UndefinedError

pytest.importorskip("netcal")


def test_a_detector_without_boxes_is_a_binary_calibration_error(capfd: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    # In the middle of a bin of 20, where the two edge rules agree.
    confidence = (torch.randint(20, (400,), generator=generator) + 0.5) / 20
    matched = (torch.rand(400, generator=generator) < 0.7 * confidence).long()
    expected = classification.ece(matched, probs=confidence, bins=20, kind="positive")
    assert detection_ece(matched, confidence, bins=20) == pytest.approx(float(expected), abs=1e-6)
    assert capfd.readouterr() == ("", "")


def test_errors_that_depend_on_the_place_show_with_boxes() -> None:
    # Right on average at every confidence, over-confident on the left and under-confident on the right.
    generator = torch.Generator().manual_seed(1)
    place = torch.rand(4000, 1, generator=generator)
    confidence = torch.full((4000,), 0.55)
    matched = (torch.rand(4000, generator=generator) < torch.where(place[:, 0] < 0.5, 0.25, 0.85)).long()
    # 4000 draws: the plain error has sd 0.008, the local one lies at 0.3.
    assert detection_ece(matched, confidence) < 0.04
    assert detection_ece(matched, confidence, place, bins=16) == pytest.approx(0.3, abs=0.04)


def test_bad_detections() -> None:
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        detection_ece([0, 2], [0.5, 0.5])
    with pytest.raises(ValueError, match="use logits"):
        detection_ece([0, 1], [0.5, 1.5])
    with pytest.raises(ValueError, match="nothing is broadcast"):
        detection_ece([[0], [1]], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        detection_ece([0, 1], [0.5, 0.5], [[0.1], [3.0]])


@pytest.mark.slow
def test_a_gaussian_process_mends_deviations_where_they_are_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gpytorch")
    # Deviations three times too small where the mean is negative, right elsewhere: no one factor mends both.
    generator = torch.Generator().manual_seed(0)
    mean, noise = torch.randn(2, 300, dtype=torch.float64, generator=generator)
    deviation = 0.3 + 0.2 * mean.abs()
    y = mean + noise * deviation * torch.where(mean < 0, 3.0, 1.0)
    found = Predictions.from_gaussian(mean, deviation.square(), y)
    state, level = torch.get_rng_state(), logging.root.manager.disable
    fitted = recalibrate_regression(found, "gp_normal", epochs=60)
    moved = fitted.apply(found)
    assert torch.equal(state, torch.get_rng_state()) and logging.root.manager.disable == level
    assert capfd.readouterr() == ("", "")
    assert moved.variance.equal(fitted.apply(found).variance)
    scaled = recalibrate_regression(found).apply(found)
    nll = [evaluate_metrics(p, ("nll",))["nll"] for p in (moved, scaled, found)]
    # The best possible is 0.30 nats below one common factor.
    assert nll[0] < nll[1] - 0.1 < nll[2]
    ratio = moved.variance.sqrt()[:, 0] / deviation
    assert float(ratio[mean < -0.3].median()) > 1.5 * float(ratio[mean > 0.3].median())


@pytest.mark.slow
def test_bent_and_cauchy_laws_mend_noise_that_is_not_gaussian() -> None:
    pytest.importorskip("gpytorch")
    generator = torch.Generator().manual_seed(0)
    mean, normal = torch.randn(2, 400, dtype=torch.float64, generator=generator)
    deviation = 0.3 + 0.2 * mean.abs()
    tails = normal / torch.randn(400, dtype=torch.float64, generator=generator)  # a standard Cauchy variable

    def distance(pit: Tensor) -> float:  # of Kolmogorov and Smirnov, to the uniform law
        level = pit[:, 0].sort().values
        steps = torch.arange(1, len(level) + 1, dtype=level.dtype) / len(level)
        return float(torch.maximum((steps - level).abs(), (steps - 1 / len(level) - level).abs()).max())

    # Noise whose median is far below its mean; and noise without a variance.
    for method, noise in (("gp_beta", (normal.exp() - math.exp(0.5)) / 2), ("gp_cauchy", tails)):
        found = Predictions.from_gaussian(mean, deviation.square(), mean + deviation * noise)
        state = torch.get_rng_state()
        fitted = recalibrate_regression(found, method, epochs=100)  # type: ignore[arg-type]
        assert torch.equal(state, torch.get_rng_state()) and torch.equal(fitted.pit(found), fitted.pit(found))
        scaled = recalibrate_regression(found).pit(found)
        assert distance(fitted.pit(found)) < 0.5 * distance(scaled)
        for q in (0.05, 0.5, 0.9):  # the quantile is where the distribution function is q
            at = Predictions.from_gaussian(mean, deviation.square(), fitted.quantile(found, q)[:, 0])
            torch.testing.assert_close(fitted.pit(at), torch.full((400, 1), q).double(), atol=1e-6, rtol=0)
        with pytest.raises(UnsupportedError, match="pit"):
            fitted.apply(found)


def test_calibration_errors_as_a_second_opinion() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(1500, 4, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    for kind in ("top_label", "classwise"):
        for metric in (cls.ece, cls.mce, cls.ece_unweighted):
            ours, theirs = (metric(y, logits=logits, kind=kind, backend=name) for name in ("torch", "netcal"))
            assert theirs == pytest.approx(ours, abs=1e-9)
    few = y < 2  # a slice with two of four labels is still about four classes
    assert cls.ece(y[few], logits=logits[few], backend="netcal") == pytest.approx(
        cls.ece(y[few], logits=logits[few]), abs=1e-9
    )
    with pytest.raises(UnsupportedError, match="no weights"):
        cls.ece(y, logits=logits, backend="netcal", weights=torch.ones(1500))
    with pytest.raises(UnknownNameError, match="torch, netcal"):
        cls.ece(y, logits=logits, backend="sklearn")


def test_regression_errors_by_the_definitions_of_netcal() -> None:
    generator = torch.Generator().manual_seed(4)
    sd = 0.5 + torch.rand(800, 2, generator=generator, dtype=torch.float64)
    y = 1.3 * sd * torch.randn(800, 2, generator=generator, dtype=torch.float64)
    given = {"mean": torch.zeros(800, 2, dtype=torch.float64), "variance": sd.square()}
    expected: dict[str, list[float]] = {"ence": [], "uce": [], "qce": []}
    for s, errors in zip(sd.T.numpy(), y.T.numpy(), strict=True):
        bin_of = np.clip(((s - s.min()) / (s.max() - s.min()) * 10).astype(int), 0, 9)
        cells = [(s[bin_of == b], errors[bin_of == b]) for b in range(10)]
        gaps = [abs(np.sqrt((a**2).mean()) - np.sqrt((e**2).mean())) / np.sqrt((a**2).mean()) for a, e in cells]
        expected["ence"].append(float(np.mean(gaps)))
        spread = s**2
        bin_of = np.clip(((spread - spread.min()) / (spread.max() - spread.min()) * 10).astype(int), 0, 9)
        parts = [(spread[bin_of == b], errors[bin_of == b]) for b in range(10)]
        expected["uce"].append(sum(abs(v.mean() - (e**2).mean()) * len(v) / 800 for v, e in parts))
        levels = np.arange(1, 20) / 20
        inside = (np.abs(errors / s)[:, None] <= [NormalDist().inv_cdf((1 + q) / 2) for q in levels]).mean(0)
        expected["qce"].append(float(np.abs(inside - levels).mean()))
    for name, metric in (("ence", dispersion.ence), ("uce", dispersion.uce)):
        found = metric(y, **given, bins=10, backend="netcal")
        assert found == pytest.approx(np.mean(expected[name]), rel=1e-9)
    assert regression.qce(y, **given, backend="netcal") == pytest.approx(np.mean(expected["qce"]), abs=1e-9)
    with pytest.raises(UndefinedError, match="equal deviations"):
        dispersion.ence(y, mean=given["mean"], variance=torch.ones(800, 2), backend="netcal")
