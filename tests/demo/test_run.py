"""The demo from end to end, with networks that are hardly trained so that it is quick."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from bayesdl.cli import main
from bayesdl.demo.run import Settings, compare_diabetes, compare_digits
from bayesdl.evaluation.report import Report

QUICK = Settings(epochs=3, draws=4, bootstrap=20, limit=60, progress=False)


def values(report: Report) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Every number but the measured costs, which no seed can fix."""
    return {
        (row, column.key): (report[row][column.key], *report.interval(row, column.key))
        for row in report.rows
        for column in report.specs
        if column.group != "cost"
    }


def same(first: Report, second: Report) -> bool:
    pairs = zip(values(first).items(), values(second).items(), strict=True)
    return all(
        a == b and all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(u, v, strict=True))
        for (a, u), (b, v) in pairs
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def report(cache: Path) -> Report:
    return compare_digits(dataclasses.replace(QUICK, cache=cache))


def test_rows_and_data_sets(report: Report) -> None:
    assert report.rows == (
        "map", "temperature", "laplace, last layer", "laplace, all layers", "swag", "dropout", "ensemble",
    )  # fmt: skip
    sets = set(report.predictions["map"])
    assert {"test", "ood/digits 8-9", "ood/photographs", "ood/noise", "shift/rotation/75", "shift/blur/3.0"} <= sets


def test_every_method_predicts_something_of_its_own(report: Report) -> None:
    for row in report.rows:
        assert math.isfinite(report[row]["nll"])
        assert report[row]["accuracy"] > 1 / 8
    assert len({report[row]["nll"] for row in report.rows}) == len(report.rows)


def test_temperature_never_changes_a_decision(report: Report) -> None:
    assert report["temperature"]["accuracy"] == report["map"]["accuracy"]


def test_same_seed_same_table_from_networks_just_trained_and_from_the_cache(report: Report, cache: Path) -> None:
    assert len(list(cache.iterdir())) == 5
    torch.rand(3)  # the global generator has no say
    assert same(report, compare_digits(dataclasses.replace(QUICK, cache=cache)))


def test_regression(cache: Path) -> None:
    settings = dataclasses.replace(QUICK, epochs=20, limit=None, cache=cache)
    report = compare_diabetes(settings)
    assert set(report.rows) == {
        "map", "laplace, last layer", "laplace, all layers", "swag", "dropout", "ensemble",
    }  # fmt: skip
    for row in report.rows:
        assert {"nll", "crps", "picp_90", "mpiw_90"} <= set(report[row])
        assert report[row]["rmse"] < 1.2  # the targets are standardised: 1 is what a constant would reach
    assert not same(report, compare_diabetes(dataclasses.replace(settings, seed=1)))


@pytest.mark.slow
def test_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    captured = capsys.readouterr()
    assert "laplace, last layer" in captured.out
    assert str(Path("bayesdl-report", "index.html")) in captured.out
    page = (tmp_path / "bayesdl-report" / "index.html").read_text(encoding="utf-8")
    assert "laplace, last layer" in page
    assert (tmp_path / "bayesdl-report" / "predictions" / "map" / "test.npz").is_file()
    assert len(list((tmp_path / "cache" / "bayesdl" / "demo").iterdir())) == 5
