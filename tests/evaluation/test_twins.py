"""Twins, seeds, references and feature scores in `compare`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, UnknownNameError
from bayesdl.evaluation import classification as cls
from bayesdl.evaluation.compare import compare
from bayesdl.evaluation.feature_density import FeatureDensity
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.recalibration import Recalibrator
from bayesdl.evaluation.report import Report
from tests.evaluation.made_up import classes, numbers

QUIET: dict[str, Any] = {"progress": False}


def test_twins_take_the_temperature_of_the_calibration_data() -> None:
    methods = {"sharp": classes(400, sharpness=3.0), "right": classes(400, sharpness=1.0)}
    held = {row: classes(600, sharpness=s, seed=1) for row, s in (("sharp", 3.0), ("right", 1.0))}
    outside = {row: classes(100, sharpness=0.5, seed=2) for row in methods}
    rep = compare(methods, ood={"far": outside}, calibration=held, bootstrap=50, **QUIET)
    assert rep.rows == ("sharp", "sharp + T", "right", "right + T")
    fitted = Recalibrator().fit(held["sharp"].log_mean_probs, held["sharp"].labelled())
    expected = cls.nll(methods["sharp"].labelled(), probs=fitted.transform(methods["sharp"].log_mean_probs).exp())
    assert rep["sharp + T"]["nll"] == pytest.approx(expected)
    assert rep["sharp + T"]["ece"] < 0.5 * rep["sharp"]["ece"]
    assert rep["sharp + T"]["accuracy"] == rep["sharp"]["accuracy"]
    assert not math.isnan(rep["sharp + T"]["ood/far/auroc"])
    assert any(note.startswith("sharp + T: temperature") for note in rep.details["notes"])
    assert Report.from_json(rep.to_json()) == rep


def test_twins_without_calibration_are_cross_fitted() -> None:
    found = classes(503, sharpness=2.5)
    rep = compare({"a": found}, twins=True, bootstrap=0, **QUIET)
    twin = rep.predictions["a + T"]["test"]
    assert twin.labelled().equal(found.labelled()) and twin.predicted.equal(found.predicted)
    # Every example was scaled by a temperature fitted without it, and the five differ.
    ratio = twin.log_mean_probs.diff(dim=1)[:, 0] / found.log_mean_probs.diff(dim=1)[:, 0]
    assert len(ratio.mul(1e6).round().unique()) == 5
    assert rep["a + T"]["nll"] < rep["a"]["nll"]
    assert any("cross-fitted" in note for note in rep.details["notes"])


def test_groups_are_not_split_between_folds() -> None:
    base = classes(400, sharpness=2.0)
    found = Predictions(
        task="classification", log_probs=base.log_probs, targets=base.targets, group=torch.arange(400) // 8
    )
    twin = compare({"a": found}, twins=True, bootstrap=0, **QUIET).predictions["a + T"]["test"]
    ratio = (twin.log_mean_probs.diff(dim=1)[:, 0] / found.log_mean_probs.diff(dim=1)[:, 0]).mul(1e6).round()
    assert all(len(part.unique()) == 1 for part in ratio.split(8))


def test_a_row_without_logits_has_no_twin_and_regression_none_at_all() -> None:
    hard = Predictions.from_probs(torch.eye(2, dtype=torch.float64)[[0, 1, 1] * 5], [0, 1, 0] * 5)
    rep = compare({"hard": hard}, twins=True, bootstrap=0, **QUIET)
    assert rep.rows == ("hard",) and any("no temperature-scaled twin" in n for n in rep.details["notes"])
    with pytest.raises(ArgumentError, match="matter of classes"):
        compare({"a": numbers(20, scale=1.0)}, twins=True, bootstrap=0, **QUIET)
    found = classes(50, sharpness=1.0)
    with pytest.raises(ArgumentError, match="rename it"):
        compare({"a": found, "a + T": found}, twins=True, bootstrap=0, **QUIET)


def test_seeds_give_means_standard_errors_and_paired_t() -> None:
    rows = {
        "good": [classes(200, sharpness=1.0, seed=s) for s in range(4)],
        "sharp": [classes(200, sharpness=2.5, seed=s) for s in range(4)],
    }
    rep = compare(rows, **QUIET)
    nll = {row: np.array([cls.nll(p.labelled(), probs=p.probs) for p in seeds]) for row, seeds in rows.items()}
    cell = rep.cell("sharp", "nll")
    assert rep["sharp"]["nll"] == pytest.approx(nll["sharp"].mean())
    error = nll["sharp"].std(ddof=1) / 2
    assert (cell.low, cell.high) == (pytest.approx(cell.value - error), pytest.approx(cell.value + error))
    expected = stats.ttest_rel(nll["sharp"], nll["good"])
    assert cell.p == pytest.approx(expected.pvalue) and not cell.best and rep.cell("good", "nll").best
    found = rep.difference("sharp", "good", "nll")
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert any("4 training seeds" in note for note in rep.details["notes"])
    assert Report.from_json(rep.to_json()) == rep and "| good |" in rep.to_markdown()
    for bad in ({"a": rows["good"], "b": rows["sharp"][:2]}, {"a": rows["good"], "b": rows["sharp"][0]}):
        with pytest.raises(ArgumentError, match="compared in pairs"):
            compare(bad, **QUIET)


def test_reference_adds_differences_to_the_notes() -> None:
    methods = {"a": classes(200, sharpness=1.0), "b": classes(200, sharpness=2.0)}
    rep = compare(methods, reference="a", bootstrap=99, **QUIET)
    found = rep.difference("b", "a", "nll")
    note = next(n for n in rep.details["notes"] if n.startswith("b minus a"))
    assert f"NLL {found.value:+.3g} [{found.low:.3g}, {found.high:.3g}], p {found.adjusted:.2g}" in note
    with pytest.raises(UnknownNameError, match="no method"):
        compare(methods, reference="c", **QUIET)


def test_feature_scores_become_columns() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 3
    x = torch.randn(240, 3, generator=generator) + 3 * torch.eye(3)[y]
    train, test, far = [(x[:120], y[:120])], [(x[120:], y[120:])], [(x[120:] + 20, y[120:])]
    bayes = bdl.wrap(net, "map", train, likelihood="categorical", progress=False)
    density = FeatureDensity(kind="single").fit(bayes, train, progress=False)
    rep = compare(
        {"map": bayes}, test, ood={"far": far}, scores={"features": density}, bootstrap=0, cost=False, **QUIET
    )
    assert rep["map"]["ood/far/features/auroc"] == 1.0
    assert rep.column("ood/far/features/auroc").headline
    per_row = compare(
        {"map": bayes}, test, ood={"far": far}, scores={"f": {"map": density}}, bootstrap=0, cost=False, **QUIET
    )
    assert per_row["map"]["ood/far/f/auroc"] == 1.0
    with pytest.raises(ArgumentError, match="expected a fitted density"):
        compare({"map": bayes}, test, scores={"f": FeatureDensity()}, cost=False, **QUIET)
    with pytest.raises(ArgumentError, match="no row"):
        compare({"map": bayes}, test, scores={"f": {"x": density}}, cost=False, **QUIET)
