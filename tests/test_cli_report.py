"""`bayesdl report`, single output files and twins on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bayesdl.cli import main
from tests.test_cli import failing, here, save_predictions  # noqa: F401


@pytest.fixture
def compared(here: Path, capsys: pytest.CaptureFixture[str]) -> Path:  # noqa: F811
    """A folder with the report of two files."""
    save_predictions(here / "a.npz", 1)
    save_predictions(here / "b.npz", 2)
    assert main(["compare", "a.npz", "b.npz", "--bootstrap", "50", "--out", "out", "--quiet"]) == 0
    capsys.readouterr()
    return here


def test_report_prints_and_converts(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "out"]) == 0
    printed = capsys.readouterr().out
    assert "NLL" in printed and "a" in printed
    for name, start in (("r.html", "<!"), ("r.md", "| method |"), ("r.tex", "\\begin{tabular}"), ("r.csv", "method,")):
        assert main(["report", "out/report.json", "--out", name]) == 0
        assert (compared / name).read_text(encoding="utf-8").lower().startswith(start.lower())
    assert main(["report", "out", "--out", "again.json"]) == 0
    assert json.loads((compared / "again.json").read_text()) == json.loads((compared / "out/report.json").read_text())
    capsys.readouterr()
    assert ".html" in failing(["report", "out", "--out", "r.pdf"], capsys)
    assert "nowhere.json" in failing(["report", "nowhere.json"], capsys)
    (compared / "bad.json").write_text("{}")
    assert "bad.json: not a report" in failing(["report", "bad.json"], capsys)


def test_compare_writes_one_file_with_twins(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["compare", "a.npz", "b.npz", "--bootstrap", "0", "--quiet", "--out", "table.md"]
    assert main([*common, "--calibration", "a=b.npz", "b=a.npz"]) == 0
    rows = [line.split("|")[1].strip() for line in (compared / "table.md").read_text().splitlines() if "|" in line]
    assert rows[2:6] == ["a", "a + T", "b", "b + T"]
    assert main([*common, "--twins"]) == 0
    assert "cross-fitted" in (compared / "table.md").read_text()
    capsys.readouterr()
    assert "one of the rows a, b" in failing([*common, "--calibration", "c=a.npz"], capsys)
