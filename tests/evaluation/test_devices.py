"""Every metric gives on each device what it gives on the CPU; labels and weights may come from another device."""

from __future__ import annotations

import pytest
import torch

from bayesdl.evaluation import bootstrap, classification, ranking, selective
from bayesdl.evaluation.metrics import METRICS, evaluate_metrics, metrics_for
from bayesdl.evaluation.ood import ood_metrics
from bayesdl.evaluation.predictions import Predictions


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_metrics_and_resamples(task: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(3, 200, 4, dtype=torch.float64, generator=generator)
    if task == "classification":
        found = Predictions.from_logits(f, torch.arange(200) % 4)
    else:
        found = Predictions.from_gaussian(f, f.square() + 0.1, f[0].flip(0))
    moved = found.map(lambda t: t.to(device))
    names = [name for name, metric in metrics_for(task).items() if "samples" not in metric.needs]
    assert evaluate_metrics(moved, names) == pytest.approx(evaluate_metrics(found, names), rel=1e-9)
    resamples = bootstrap.Resamples.draw(200, 4)
    here, there = bootstrap.resample(found, names, resamples), bootstrap.resample(moved, names, resamples)
    for name in names:
        assert there[name].tolist() == pytest.approx(here[name].tolist(), rel=1e-9), name
        if METRICS[name].resampled:
            interval = bootstrap.interval(name, moved, there[name], generator=generator, draws=10)
            assert interval.low <= interval.high
    assert ood_metrics(moved, found.without_targets())["auroc"] == 0.5


def test_mixed_devices(device: torch.device) -> None:
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(device)
    targets, weights = torch.arange(50) % 3, torch.ones(2, 50)
    for metric in (classification.nll, classification.ece, classification.ece_mass, classification.error_auroc):
        assert metric(targets, logits=logits, weights=weights).shape == (2,)
    found = Predictions.from_logits(logits, targets, group=targets)
    assert found.targets is not None and found.targets.device.type == device.type
    confidence = logits.amax(1)
    assert selective.aurc(confidence, targets == 0, weights=weights).shape == (2,)
    assert ranking.auroc(confidence, targets == 0, weights=weights).shape == (2,)
    band = classification.reliability(targets, logits=logits, generator=torch.Generator().manual_seed(0), draws=20)
    assert band.low.shape == (15,)
