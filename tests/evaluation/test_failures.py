"""`compare(..., on_error="row")`: a method that fails is a row that says why; the others are compared without it."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, FileFormatError, LabelError, NonFiniteError, UnsupportedError
from bayesdl.evaluation.compare import compare
from bayesdl.evaluation.report import Report
from tests.evaluation.made_up import classes
from tests.evaluation.test_compare import StandIn, loader

QUIET: dict[str, Any] = {"progress": False, "cost": False}
REASON = "RuntimeError: no <memory> | left & 100 % gone"


class Broken(StandIn):
    """Fails on every loader, or on those whose inputs are larger than `limit`."""

    method_name = "broken"

    def __init__(self, limit: float = 0.0) -> None:
        super().__init__(torch.eye(3))
        self.limit = limit

    def predict_with_targets(self, loader: Any) -> tuple[Any, Tensor | None]:
        self.calls += 1
        if max(float(x.abs().max()) for x, _ in loader) > self.limit:
            raise RuntimeError("no <memory>\n| left & 100 % gone")
        return super().predict_with_targets(loader)


def methods() -> dict[str, Any]:
    return {"broken": Broken(), "good": StandIn(2 * torch.eye(3)), "poor": StandIn(-torch.eye(3))}


@pytest.fixture(scope="module")
def report() -> Report:
    outside = {"far": loader(100, seed=3, scale=0.1)}
    return compare(methods(), loader(), ood=outside, bootstrap=100, on_error="row", progress=False)


def test_the_error_is_raised_unless_rows_are_asked_for() -> None:
    with pytest.raises(RuntimeError, match="left & 100"):
        compare(methods(), loader(), **QUIET)
    with pytest.raises(ArgumentError, match='"raise" or "row"'):
        compare(methods(), loader(), on_error="ignore", **QUIET)


def test_the_others_are_compared_as_if_it_were_not_there(report: Report) -> None:
    outside = {"far": loader(100, seed=3, scale=0.1)}
    alone = compare(
        {row: method for row, method in methods().items() if row != "broken"}, loader(), ood=outside, bootstrap=100,
        cost=False, progress=False,
    )  # fmt: skip
    assert report.rows == ("broken", "good", "poor") and report.ran == ("good", "poor")
    assert dict(report.failures) == {"broken": REASON}
    for column in alone.columns:
        assert report.cell("broken", column).value is None and report.cell("broken", column).note == "failed"
        assert report.best(column) == alone.best(column)
        if column.split("/")[-1] in ("fit_seconds", "forward_passes", "parameters"):
            continue
        for row in alone.rows:
            assert report.cell(row, column) == alone.cell(row, column)  # marks and p-values too
        if column in alone.replicates:
            assert report.difference("poor", "good", column) == alone.difference("poor", "good", column)
            assert np.isnan(report.replicates[column][0]).all()
    assert {"nll", "ece", "ood/far/auroc"} <= set(alone.replicates)
    # what it took to fit is no figure to rank: without a prediction it would look cheap
    assert report.cell("broken", "fit_seconds").value is None and report.cell("good", "fit_seconds").value == 1.5


def test_no_difference_to_what_has_no_values(report: Report) -> None:
    for pair in (("broken", "good"), ("good", "broken")):
        with pytest.raises(UnsupportedError, match="failed: RuntimeError"):
            report.difference(*pair, "nll")
    found = compare(methods(), loader(), bootstrap=100, on_error="row", reference="broken", **QUIET)
    assert "There are no differences to broken, since it failed." in found.details["notes"]


def test_every_table_says_why(report: Report) -> None:
    words = f"failed: {REASON}"
    assert f"broken {words}" in str(report).splitlines()
    assert not any(line.lstrip().startswith("broken") and "n/a" in line for line in str(report).splitlines())
    lines = report.to_markdown(notes=False).splitlines()
    (line,) = [line for line in lines if line.startswith("| broken |")]
    assert "failed: RuntimeError: no &lt;memory> \\| left & 100 % gone" in line
    assert line.replace("\\|", "").count("|") == lines[0].replace("\\|", "").count("|")
    table = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [entry["failed"] for entry in table] == [REASON, "", ""] and table[0]["nll"] == ""
    (tex,) = [line for line in report.to_latex().splitlines() if line.startswith("broken")]
    assert tex.startswith(rf"broken & \multicolumn{{{len(report.headline())}}}{{l}}{{failed: RuntimeError")
    assert tex.endswith(r"left \& 100 \% gone} \\")
    assert math.isnan(report["broken"]["nll"])
    assert any(sentence == f"broken {words}." for sentence in report.summary())
    assert "over every other method" in report.summary()[0] or "tell it apart" in report.summary()[0]


def test_rich_says_why(report: Report) -> None:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=400)
    console.print(report)
    assert f"broken failed: {REASON}" in console.file.getvalue()


def test_json_keeps_it_and_is_looked_at(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert again == report and dict(again.failures) == {"broken": REASON} and again.to_csv() == report.to_csv()
    for damage in ('"broken": 3', '"stranger": "why"'):
        key, value = damage.split(": ")
        with pytest.raises(FileFormatError, match="failures"):
            Report.from_json(
                report.to_json(indent=None).replace(
                    f'"failures": {{"broken": "{REASON}"', f'"failures": {{{key}: {value}'
                )
            )


def test_the_page_says_why_and_its_figures_skip_it(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    why = "failed: RuntimeError: no &lt;memory&gt; | left &amp; 100\N{NO-BREAK SPACE}% gone"
    assert f'"><span>{why}</span></td>' in page
    assert "Reliability diagram of good" in page and "Reliability diagram of broken" not in page
    for axes in (report.plot.risk_coverage(), report.plot.roc(), report.plot.decomposition()):
        words = [text.get_text() for text in axes.figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert any("good" in word for word in words) and not any("broken" in word for word in words)
    report.plot.reliability(), report.plot.ood_histogram()
    with pytest.raises(UnsupportedError, match="nothing to draw"):
        report.plot.reliability("broken")


def test_failing_on_another_set_costs_those_columns_alone() -> None:
    outside = {"far": loader(100, seed=3, scale=10.0)}
    both = {"part": Broken(limit=6.0), "good": StandIn(2 * torch.eye(3))}
    rep = compare(both, loader(), ood=outside, calibration=loader(seed=5), bootstrap=50, on_error="row", **QUIET)
    assert not rep.failures and rep.ran == rep.rows == ("part", "part + T", "good", "good + T")
    assert rep.cell("part", "nll").value is not None and rep.cell("part", "ood/far/auroc").note == "failed"
    assert rep.cell("part + T", "ood/far/auroc").value is None
    assert any(note == f"part failed on far: {REASON}" for note in rep.details["notes"])
    small = {"part": Broken(limit=6.0), "good": StandIn(2 * torch.eye(3))}
    rep = compare(small, loader(), calibration=loader(seed=5, scale=10.0), bootstrap=0, on_error="row", **QUIET)
    assert rep.rows == ("part", "good", "good + T")  # no temperature was fitted to what it never predicted
    assert any(note == f"part failed on calibration: {REASON}" for note in rep.details["notes"])


def test_files_nan_and_the_comparison_itself(tmp_path: Path) -> None:
    held = classes(60, sharpness=1.0)
    rep = compare({"gone": tmp_path / "none.npz", "here": held}, bootstrap=0, on_error="row", **QUIET)
    assert rep.ran == ("here",) and "none.npz" in rep.failures["gone"]
    with_group = compare(
        {"gone": tmp_path / "none.npz", "here": held},
        cluster=torch.arange(60) // 2,
        bootstrap=20,
        on_error="row",
        **QUIET,
    )
    assert with_group.cell("here", "nll").low is not None
    nan = StandIn(torch.full((3, 3), math.nan))
    with pytest.raises((NonFiniteError, ValueError)):
        compare({"nan": nan}, loader(), on_error="row", **QUIET)  # nothing is left to compare
    # different targets are no failure of one method, and the first row having failed does not hide them
    other = classes(60, sharpness=1.0, seed=4)
    with pytest.raises(LabelError, match="'here' differ"):
        compare({"gone": tmp_path / "none.npz", "here": held, "there": other}, on_error="row", **QUIET)


def test_a_method_that_fails_for_one_seed_has_no_mean_over_seeds() -> None:
    seeds = {
        "part": [StandIn(torch.eye(3)), Broken()],
        "good": [StandIn(2 * torch.eye(3)), StandIn(1.9 * torch.eye(3))],
        "poor": [StandIn(-torch.eye(3)), StandIn(-1.1 * torch.eye(3))],
    }
    rep = compare(seeds, loader(), on_error="row", **QUIET)
    assert dict(rep.failures) == {"part": f"seed 2: {REASON}"} and rep.ran == ("good", "poor")
    assert rep.cell("part", "nll").value is None and rep.cell("good", "nll").value is not None
    assert "part" not in rep.predictions
    found = rep.difference("poor", "good", "nll")
    assert found.p == found.adjusted and not math.isnan(found.p)  # Holm over one test, not two


class Untimed(StandIn):
    """Predicts with targets as ever, and fails after `good` plain predictions, which only the clock asks for."""

    def __init__(self, good: int) -> None:
        super().__init__(torch.eye(3))
        self.good = good

    def predict(self, loader: Any) -> Any:
        self.good -= 1
        if self.good < 0:
            raise MemoryError("no room for the second time")
        return super().predict(loader)


@pytest.mark.parametrize("good", [0, 1, 2])  # fails as it warms up, at its first and at its second timed run
def test_failing_while_costs_are_measured_costs_those_cells_alone(good: int) -> None:
    words = "slow failed while its cost was measured: MemoryError: no room for the second time"
    with pytest.raises(MemoryError):
        compare({"slow": Untimed(good), "good": StandIn(torch.eye(3))}, loader(), bootstrap=0, progress=False)
    rep = compare(
        {"slow": Untimed(good), "good": StandIn(torch.eye(3))}, loader(), bootstrap=0, progress=False, on_error="row"
    )
    assert not rep.failures and rep.ran == ("slow", "good") and words in rep.details["notes"]
    assert rep["slow"]["nll"] == rep["good"]["nll"]
    for key in ("ms_per_example", "peak_mib"):
        if key in rep.columns:  # memory cannot be read everywhere
            assert rep.cell("slow", key).note == "failed" and rep.cell("good", key).value is not None
    assert "ms_per_example" in rep.columns and rep.cell("slow", "fit_seconds").value == 1.5
    assert words in rep.to_markdown() and Report.from_json(rep.to_json()) == rep


def test_the_notes_of_later_seeds_say_what_failed() -> None:
    seeds = {"slow": [StandIn(torch.eye(3)), Untimed(0)], "good": [StandIn(torch.eye(3)), StandIn(torch.eye(3))]}
    rep = compare(seeds, loader(), progress=False, on_error="row")
    assert rep.cell("slow", "ms_per_example").note == "failed" and rep.cell("slow", "nll").value is not None
    (note,) = [note for note in rep.details["notes"] if note.startswith("Seed 2: ")]
    assert note == "Seed 2: slow failed while its cost was measured: MemoryError: no room for the second time"


class Density:
    """OOD scores by the length of an input; inputs beyond `limit` are too much for it."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def scores(self, loader: Any) -> Tensor:
        lengths = torch.cat([x for x, _ in loader]).norm(dim=1)
        if float(lengths.max()) > self.limit:
            raise ValueError("too far")
        return lengths


@pytest.mark.parametrize(("limit", "near", "far"), [(math.inf, True, True), (9.0, True, False), (0.0, False, False)])
def test_a_failing_feature_score_costs_its_columns_alone(limit: float, near: bool, far: bool) -> None:
    outside = {"near": loader(100, seed=3), "far": loader(100, seed=3, scale=10.0)}
    given: dict[str, Any] = {"ood": outside, "scores": {"length": Density(limit)}, "bootstrap": 0, **QUIET}
    if not far:
        with pytest.raises(ValueError, match="too far"):
            compare({"good": StandIn(torch.eye(3))}, loader(), **given)
    rep = compare({"good": StandIn(torch.eye(3))}, loader(), on_error="row", **given)
    found = {name: rep.cell("good", f"ood/{name}/length/auroc") for name in outside}
    assert [found["near"].value is not None, found["far"].value is not None] == [near, far]
    assert {cell.note for cell in found.values() if cell.value is None} <= {"failed"}
    told = [note for note in rep.details["notes"] if note.startswith("The score length of good failed on ")]
    assert len(told) == {True: 0, False: 1}[far] + (0 if near else 2) and all("too far" in note for note in told)
