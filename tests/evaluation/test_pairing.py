"""Subgroups of the test data: the columns are the metrics of the parts, paired over methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.evaluation.compare import compare
from bayesdl.evaluation.metrics import evaluate_metrics
from bayesdl.evaluation.report import Report
from tests.evaluation.made_up import classes, numbers

QUIET: dict[str, Any] = {"progress": False, "cost": False}


def test_subgroups_have_the_metrics_of_their_parts(tmp_path: Path) -> None:
    names = ["north <1>" if n % 3 else "south" for n in range(90)]
    rows = {"a": classes(90, sharpness=1.0), "b": classes(90, sharpness=2.0)}
    rep = compare(rows, group=names, bootstrap=50, **QUIET)
    plain = compare(rows, bootstrap=50, **QUIET)
    assert [c for c in rep.columns if c not in plain.columns] == [
        f"group/{name}/{metric}" for name in ("south", "north <1>") for metric in ("nll", "accuracy", "ece")
    ]
    for column in plain.columns:  # the others do not change by a bit
        for row in rows:
            assert rep.cell(row, column) == plain.cell(row, column)
    for name, size in {"south": 30, "north <1>": 60}.items():
        where = torch.tensor([n for n in range(90) if names[n] == name])
        for row, found in rows.items():
            expected = evaluate_metrics(found.subset(where), ("nll", "accuracy", "ece"))
            for metric, value in expected.items():
                cell, key = rep.cell(row, f"group/{name}/{metric}"), f"group/{name}/{metric}"
                assert cell.value == value
                assert cell.low is not None and cell.high is not None and cell.low <= cell.high
                spec = next(c for c in rep.specs if c.key == key)
                assert spec.n == size and spec.group == "group" and spec.place == name
    assert rep.cell("a", "group/south/ece").expected is not None  # a small group's error is read beside it
    assert "Subgroups" in rep.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert Report.from_json(rep.to_json()).to_json() == rep.to_json()
    assert set(rep.predictions["a"]) == {"test"}


def test_resamples_of_a_subgroup_are_paired() -> None:
    same = classes(60, sharpness=1.0)
    rep = compare({"a": same, "b": same}, group=torch.arange(60) % 2, bootstrap=40, metrics=["brier"], **QUIET)
    assert [key for key in rep.columns if key.startswith("group/")] == ["group/0/brier", "group/1/brier"]
    for key in ("group/0/brier", "group/1/brier"):
        np.testing.assert_array_equal(rep.replicates[key][0], rep.replicates[key][1])
        assert rep.difference("a", "b", key).value == 0.0 and np.ptp(rep.replicates[key][0]) > 0


def test_clusters_within_subgroups_are_resampled_whole() -> None:
    # Ten copies of each example: without the clusters the intervals would be sqrt(10) times too narrow.
    few = numbers(60, scale=1.0)
    index = torch.arange(60).repeat_interleave(10)
    many = few.subset(index)
    width = {}
    for name, found, cluster in (("few", few, None), ("alone", many, None), ("clustered", many, index)):
        group = (torch.arange(60) % 2)[index] if len(found) > 60 else torch.arange(60) % 2
        rep = compare({"a": found}, group=group, cluster=cluster, bootstrap=400, **QUIET)
        cell = rep.cell("a", "group/1/nll")
        assert cell.low is not None and cell.high is not None
        width[name] = cell.high - cell.low
    # 400 resamples know the width to about 5 %, so that 25 % is five standard errors
    assert width["clustered"] == pytest.approx(width["few"], rel=0.25)
    assert width["alone"] < 0.6 * width["clustered"]


def test_names_that_do_not_fit_are_refused() -> None:
    found = classes(30, sharpness=1.0)
    with pytest.raises(ShapeError, match="group has 29 entries, the test data have 30"):
        compare({"a": found}, group=["x"] * 29, **QUIET)
    for name in ("", "a/b"):
        with pytest.raises(ArgumentError, match="cannot name a subgroup"):
            compare({"a": found}, group=["x"] * 29 + [name], **QUIET)
