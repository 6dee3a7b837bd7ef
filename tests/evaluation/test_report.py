"""`Report` as a value: look-ups, JSON, and every text form."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bayesdl.errors import FileFormatError, UnknownNameError, UnsupportedError
from bayesdl.evaluation import render
from bayesdl.evaluation.cells import Cell, Column, loss_of
from bayesdl.evaluation.report import Report
from tests.evaluation.made_up import NAMES, report

PLAIN, ODD = NAMES


def test_values_are_floats_and_gaps_are_nan() -> None:
    rep = report()
    assert rep[PLAIN]["nll"] == 0.25
    assert rep[ODD]["nll"] == math.inf
    assert isinstance(rep[PLAIN]["parameters"], float)
    assert math.isnan(rep[PLAIN]["peak_mib"])
    assert rep.interval(PLAIN, "nll") == (0.21, 0.30)
    assert all(math.isnan(end) for end in rep.interval(PLAIN, "parameters"))
    assert rep.rows == NAMES and rep.columns == ("nll", "accuracy", "ece", "peak_mib", "parameters")


def test_unknown_names_list_what_there_is() -> None:
    rep = report()
    with pytest.raises(UnknownNameError, match="its rows are plain"):
        rep["nobody"]
    with pytest.raises(KeyError, match="its columns are nll, accuracy"):
        rep[PLAIN]["nothing"]
    with pytest.raises(UnknownNameError, match="no column 'nothing'"):
        rep.interval(PLAIN, "nothing")


def test_best_follows_the_direction() -> None:
    rep = report()
    assert rep.best("nll") == PLAIN and rep.best("accuracy") == PLAIN
    assert rep.best("peak_mib") == ODD  # the other has no value
    assert rep.best("parameters") is None
    target = Column("picp", "coverage", "calibration", "target", "fraction", target=0.9)
    assert loss_of(target, 0.95) == pytest.approx(0.05) and loss_of(target, 0.85) == pytest.approx(0.05)
    with pytest.raises(UnsupportedError, match="never ranked"):
        loss_of(rep.column("parameters"), 1.0)


def test_json_round_trip_is_strict_and_equal() -> None:
    rep = report()
    text = rep.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = Report.from_json(text)
    assert again == rep
    assert again.to_json() == text
    assert again != Report(rep.rows, rep.specs, {**rep.cells, PLAIN: rep.cells[ODD]}, rep.details)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a report"),
        ("[]", "not a report"),
        ('{"format": "bayesdl-report", "version": 99}', "version 99"),
        ('{"format": "bayesdl-report", "version": 1, "rows": []}', "damaged"),
    ],
)
def test_other_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        Report.from_json(text)


def test_a_report_from_json_says_why_it_cannot_draw_or_test() -> None:
    rep = Report.from_json(report().to_json())
    with pytest.raises(UnsupportedError, match="read from JSON"):
        rep.plot.reliability(PLAIN)
    with pytest.raises(UnsupportedError, match="no resamples"):
        rep.difference(PLAIN, ODD, "nll")
    with pytest.raises(UnsupportedError, match="read from JSON"):
        rep.save_predictions("nowhere")


def test_pandas_has_rows_columns_and_intervals() -> None:
    pytest.importorskip("pandas")
    rep = report()
    frame = rep.to_pandas()
    assert list(frame.index) == list(NAMES) and list(frame.columns) == list(rep.columns)
    assert frame.loc[PLAIN, "nll"] == 0.25 and math.isnan(frame.loc[PLAIN, "peak_mib"])
    wide = rep.to_pandas(intervals=True)
    assert wide.loc[PLAIN, ("accuracy", "high")] == 0.92


def test_csv_keeps_full_precision() -> None:
    lines = list(csv.DictReader(io.StringIO(report().to_csv())))
    assert [line["method"] for line in lines] == list(NAMES)
    assert float(lines[0]["nll.low"]) == 0.21 and lines[1]["nll"] == "inf" and lines[0]["peak_mib"] == ""
    assert "parameters.low" not in lines[0]


def test_markdown_has_one_line_a_row_and_escapes() -> None:
    text = report().to_markdown()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert table[0] == "| method | NLL (nats) ↓ | accuracy (%) ↑ | ECE (%) ↓ | peak memory (MiB) ↓ |"
    assert table[2].startswith("| plain | **0.250** [0.210, 0.300] | **90.0** [87.0, 92.0] |")
    assert "<b>" not in text and "&lt;b>" in text
    assert "n/a (not measured here)" in text and "∞" in text
    assert "up to 2.7" in text  # ECE under perfect calibration
    assert "200 paired bootstrap resamples" in text and "seed 3" in text
    assert "[" not in report().to_markdown(intervals=False, notes=False).replace("\\[", "")


def test_plain_text_marks_the_best_and_stays_narrow() -> None:
    text = str(report())
    assert "0.250* [0.210, 0.300]" in text and "Proper scores" in text and "Cost" in text
    assert max(map(len, text.splitlines())) < 120
    assert "parameters" not in text  # not a headline column


def test_rich_shows_names_as_they_are() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, record=True)
    odd = report()
    odd = Report(("[red]x[/red]",), odd.specs, {"[red]x[/red]": odd.cells[PLAIN]}, odd.details)
    console.print(odd)
    text = console.export_text()
    assert "[red]x[/red]" in text and "0.250" in text and "Calibration" in text


def test_latex_is_booktabs_with_bold_and_escapes() -> None:
    text = report().to_latex()
    assert r"\toprule" in text and r"\textbf{0.250}" in text and r"$\downarrow$" in text
    assert r"\textless{}b\textgreater{}bold \& " in text and r"(\%)" in text and r"$\infty$" in text
    # The best alone is bold; what is not separable from it is underlined as well.
    assert (
        r"\textbf{90.0}" in text and r"\underline{\textbf{89.0}}" in text and r"\underline{\textbf{90.0}}" not in text
    )


@pytest.mark.parametrize(
    ("width", "unit", "expected"),
    [(0.02, "nats", 3), (0.002, "nats", 4), (0.2, "nats", 2), (20.0, "nats", 0), (0.02, "fraction", 1)],
)
def test_decimals_reach_the_second_digit_of_the_error_bar(width: float, unit: str, expected: int) -> None:
    column = Column("x", "x", "proper", "min", unit)
    assert render.decimals(column, [Cell(1.0, 1.0 - width, 1.0 + width)]) == expected


def test_numbers_print_in_their_unit() -> None:
    share, plain = Column("a", "a", "accuracy", unit="fraction"), Column("b", "b", "cost", unit="ms")
    assert render.fixed(share, 0.94123, 1) == "94.1"
    assert render.fixed(plain, -1.5, 1) == "\N{MINUS SIGN}1.5"
    assert render.fixed(plain, -0.0001, 2) == "0.00"
    assert render.fixed(plain, 1234567.0, 0) == "1\N{THIN SPACE}234\N{THIN SPACE}567"
    assert render.fixed(plain, math.nan, 2) == "n/a" and render.fixed(plain, -math.inf, 2) == "-∞"


def test_the_summary_names_the_cheapest_of_equals() -> None:
    def sentences(times: tuple[float, float], *, equal: bool = True) -> tuple[str, ...]:
        base = report()
        cells = {row: dict(found) for row, found in base.cells.items()}
        cells[NAMES[1]]["nll"] = Cell(0.26, p=0.3 if equal else 0.01, best=equal)
        for row, value in zip(NAMES, times, strict=True):
            cells[row]["ms_per_example"] = Cell(value)
        column = Column("ms_per_example", "time", "cost", "min", "ms / example", "Milliseconds to predict one example.")
        return replace(base, specs=(*base.specs, column), cells=cells).summary()

    best, other = "plain", NAMES[1]
    assert (
        f"Of these, {other} is the cheapest to run: 0.25\N{NO-BREAK SPACE}ms an example ({best}: "
        in sentences((2.0, 0.25))[1]
    )
    assert sentences((0.25, 2.0))[1] == "Of these, plain is the cheapest to run: 0.25\N{NO-BREAK SPACE}ms an example."
    apart = sentences((2.0, 0.25), equal=False)
    assert not any("Of these" in line for line in apart) and any(f"Cheapest to run: {other}" in line for line in apart)


def test_summary_is_computed_from_the_numbers() -> None:
    first, *rest = report().summary()
    assert first.startswith("plain predicts best by negative log-likelihood (NLL): 0.250")
    assert "more than chance explains" in first
    assert any("methods cannot be told apart: from 90.0" in line for line in rest)
    assert any("ECE) of plain" in line and "Miscalibrated beyond chance: <b>bold" in line for line in rest)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles_in_a_plain_document(tmp_path: Path) -> None:
    base = report()
    hostile = "a < b > c | d & e % f $ g # h _ i { j } k ~ l ^ m \\ n - o"
    names = (NAMES[0], hostile)
    cells = dict(zip(names, base.cells.values(), strict=True))
    table = replace(base, rows=names, cells=cells).to_latex()
    assert r"a \textless{} b \textgreater{} c \textbar{} d" in table
    lines = r"\documentclass{article}", r"\usepackage{booktabs}", r"\begin{document}", table, r"\end{document}", ""
    (tmp_path / "table.tex").write_text("\n".join(lines), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "table.log").read_text(encoding="utf-8", errors="replace")
