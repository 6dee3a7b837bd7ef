"""Streams as torchmetrics: the same numbers, values of batches, resets, and what is kept for whole-set metrics."""

from __future__ import annotations

import pytest
import torch

from bayesdl.evaluation import (
    METRICS,
    ClassificationStream,
    MetricStream,
    Predictions,
    ScoreHistogram,
    evaluate_metrics,
)
from tests.evaluation.made_up import classes

pytest.importorskip("torchmetrics")


def test_a_stream_of_arrays() -> None:
    found = classes(90, sharpness=1.5)
    probs, y = found.probs.float(), found.labelled()
    stream, metric = ClassificationStream(bins=10), ClassificationStream(bins=10).as_torchmetric()
    for p, labels in zip(probs.split(20), y.split(20), strict=True):
        stream.update(labels, probs=p)
        batch = metric(labels, probs=p)
        alone = ClassificationStream(bins=10)
        alone.update(labels, probs=p)
        assert {k: float(v) for k, v in batch.items()} == pytest.approx(alone.compute(), rel=1e-6)
    assert {k: float(v) for k, v in metric.compute().items()} == pytest.approx(stream.compute(), rel=1e-6)
    assert metric.state_dict() == {} and all(buffer.dtype != torch.float32 for buffer in metric.metric_state.values())
    metric.reset()
    metric.update(y, probs=probs)
    assert float(metric.compute()["accuracy"]) == pytest.approx(float(found.correct.double().mean()))


@pytest.mark.parametrize("names", [("nll", "brier"), ("nll", "ece_mass", "aurc", "disagreement")])
def test_a_stream_of_predictions(names: tuple[str, ...]) -> None:
    found = classes(60, sharpness=1.5)
    metric = MetricStream(names).as_torchmetric()
    for rows in torch.arange(60).split(25):
        metric.update(found.subset(rows))
    assert {k: float(v) for k, v in metric.compute().items()} == pytest.approx(evaluate_metrics(found, names), rel=1e-6)
    assert METRICS["nll"].accumulator().as_torchmetric() is not None


def test_regression_keeps_its_members() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 12, 2, dtype=torch.float64, generator=generator)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = Predictions.from_gaussian(mean, mean.square() + 0.1, mean[0], member_weights=weights)
    metric = MetricStream(("ence", "crps")).as_torchmetric()
    for rows in torch.arange(12).split(5):
        metric.update(found.subset(rows))
    expected = evaluate_metrics(found, ("ence", "crps"))
    assert {k: float(v) for k, v in metric.compute().items()} == pytest.approx(expected, rel=1e-6)


def test_rank_metrics_in_constant_memory() -> None:
    histogram, metric = ScoreHistogram(16), ScoreHistogram(16).as_torchmetric()
    scores = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for target in (histogram, metric):
        target.update(scores[:50], False)
        target.update(scores[50:] + 1, True)
    assert {k: float(v) for k, v in metric.compute().items()} == pytest.approx(
        {k: v.value for k, v in histogram.compute().items()}, rel=1e-6
    )


def test_nothing_seen_is_the_streams_own_error() -> None:
    for metric in (ClassificationStream().as_torchmetric(), MetricStream(("aurc",)).as_torchmetric()):
        with pytest.warns(UserWarning, match="before the"), pytest.raises(ValueError, match="nothing was seen"):
            metric.compute()
