"""`nan="drop"`: the same numbers as on data from which the faulty examples were cut by hand, for every method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesdl
from bayesdl.errors import ArgumentError, FileFormatError, NonFiniteError, ShapeError
from bayesdl.evaluation import dropping
from bayesdl.evaluation.compare import compare, evaluate
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.report import Report
from tests.evaluation.made_up import classes

QUIET: dict[str, Any] = {"progress": False, "cost": False}
N = 80
HOLES = {"a": {3: math.nan, 41: math.inf}, "b": {41: math.nan, 7: -math.inf, 79: math.nan}}
GONE = [3, 7, 41, 79]


def logits(seed: int) -> Tensor:
    noise = torch.randn(N, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise + nn.functional.one_hot(torch.arange(N) % 3)


TARGETS = torch.arange(N) % 3
KEPT = torch.tensor([n for n in range(N) if n not in GONE])


def written(folder: Path, row: str, seed: int, holes: dict[int, float] | None = None) -> Path:
    values = logits(seed)
    for place, fault in (HOLES[row] if holes is None else holes).items():
        values[place, place % 3] = fault
    path = folder / f"{row}{seed}.npz"
    np.savez(path, logits=values.numpy(), targets=TARGETS.numpy())
    return path


def cut(seed: int) -> Predictions:
    return Predictions.from_logits(logits(seed)[KEPT], TARGETS[KEPT])


def assert_same(found: Report, expected: Report, *, extra: set[str]) -> None:
    assert set(found.columns) - set(expected.columns) == extra and set(expected.columns) <= set(found.columns)
    for row in expected.rows:
        for column in expected.columns:
            assert found.cell(row, column) == expected.cell(row, column), (row, column)
    for column, values in expected.replicates.items():
        np.testing.assert_array_equal(found.replicates[column], values)


def test_files_are_scored_as_if_cut_by_hand(tmp_path: Path) -> None:
    files = {row: written(tmp_path, row, seed) for seed, row in enumerate("ab")}
    ids = torch.arange(N) // 4
    rep = compare(files, bootstrap=60, nan="drop", cluster=ids, twins=True, **QUIET)
    by_hand = compare({"a": cut(0), "b": cut(1)}, bootstrap=60, cluster=ids[KEPT], twins=True, **QUIET)
    assert_same(rep, by_hand, extra={"dropped"})
    assert rep.details["n"] == N - len(GONE)
    assert rep["a"]["dropped"] == 2.0 and rep["b"]["dropped"] == 3.0
    note = next(note for note in rep.details["notes"] if "left out" in note)
    assert note.startswith("Test data: 4 of 80 examples") and "a on 2, b on 3" in note
    assert Report.from_json(rep.to_json()).to_json() == rep.to_json()
    with pytest.raises(FileFormatError, match="NaN"):
        compare(files, bootstrap=0, **QUIET)
    with pytest.raises(ShapeError, match="cluster has 76 entries"):
        compare(files, bootstrap=0, nan="drop", cluster=ids[KEPT], **QUIET)
    again = compare({r: s["test"] for r, s in rep.predictions.items()}, bootstrap=0, **QUIET)
    assert again["a"]["nll"] == rep["a"]["nll"] and again.details["n"] == N - len(GONE)


def test_nothing_to_drop_changes_nothing() -> None:
    rows = {"a": cut(0), "b": cut(1)}
    found = compare(rows, bootstrap=30, nan="drop", **QUIET)
    assert_same(found, compare(rows, bootstrap=30, **QUIET), extra={"dropped"})
    assert found["a"]["dropped"] == 0.0 and not any("left out" in note for note in found.details["notes"])


def test_an_example_of_one_seed_is_dropped_for_all(tmp_path: Path) -> None:
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        folder.mkdir()
    files = {
        "a": [written(folders[0], "a", 0, {3: math.nan}), written(folders[1], "a", 1, {79: math.nan})],
        "b": [written(folders[0], "b", 2, {7: math.nan}), written(folders[1], "b", 3, {3: math.nan, 41: math.nan})],
    }
    rep = compare(files, nan="drop", group=["x" if n < 40 else "y" for n in range(N)], **QUIET)
    by_hand = compare(
        {"a": [cut(0), cut(1)], "b": [cut(2), cut(3)]}, group=["x" if n < 40 else "y" for n in KEPT.tolist()], **QUIET
    )
    assert_same(rep, by_hand, extra={"dropped"})
    assert rep["b"]["dropped"] == 1.5  # the mean over seeds, as every cell


class Logarithm(nn.Module):
    """Finite for most finite inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 50, (-x).log(), x)


def network(seed: int, outputs: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Logarithm(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_models_are_scored_as_if_cut_by_hand(likelihood: str) -> None:
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y = (x[:, 0] > 0).long() if likelihood == "categorical" else x[:, :1].sin()
    outputs = 2 if likelihood == "categorical" else 1
    clean = [(x[:30], y[:30]), (x[30:], y[30:])]
    rows = {
        "map": bayesdl.wrap(network(0, outputs), "map", clean, likelihood=likelihood),
        "laplace": bayesdl.wrap(network(1, outputs), "laplace", clean, likelihood=likelihood, progress=False),
    }
    bad_x, bad_y, out = x.clone(), y.clone(), [4, 31, 60]
    bad_x[4, 1], bad_x[31, 0] = 99.0, math.nan  # an output, and an input
    if likelihood == "gaussian":
        bad_y[60] = math.nan
    else:
        bad_x[60, 3] = -math.inf
    keep = torch.tensor([n for n in range(N) if n not in out])
    faulty, left = [(bad_x[:30], bad_y[:30]), (bad_x[30:], bad_y[30:])], [(x[keep], y[keep])]
    far, far_left = [(bad_x[:20] * 2, y[:20])], [(torch.cat([x[:4], x[5:20]]) * 2, torch.cat([y[:4], y[5:20]]))]
    rep = compare(rows, faulty, ood={"far": far}, bootstrap=30, nan="drop", **QUIET)
    by_hand = compare(rows, left, ood={"far": far_left}, bootstrap=30, **QUIET)
    assert set(rep.columns) - set(by_hand.columns) == {"dropped", "ood/far/dropped"}
    for row in rows:
        assert rep[row]["dropped"] == 3.0 and rep[row]["ood/far/dropped"] == 1.0
        for column in by_hand.columns:
            if column not in ("fit_seconds",):
                # batches of other sizes round otherwise, and a float64 sum over them is not the same sum
                assert rep[row][column] == pytest.approx(by_hand[row][column], rel=1e-9, abs=1e-9, nan_ok=True), column
    with pytest.raises(NonFiniteError):
        compare(rows, faulty, bootstrap=0, **QUIET)
    values = evaluate(rows["map"], faulty, {"far": far}, nan="drop")
    assert values["dropped"] == 3.0 and values["ood/far/dropped"] == 1.0
    assert values["nll"] == pytest.approx(rep["map"]["nll"], rel=1e-12)
    timed = compare({"map": rows["map"]}, faulty, bootstrap=0, nan="drop", progress=False)
    assert timed["map"]["ms_per_example"] > 0


def test_what_cannot_be_dropped_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match='"raise" or "drop"'):
        compare({"a": cut(0)}, nan="ignore", **QUIET)
    everything = written(tmp_path, "a", 0, dict.fromkeys(range(N), math.nan))
    with pytest.raises(FileFormatError, match="none of the 80 examples"):
        evaluate(everything, nan="drop")
    halves = {
        "a": written(tmp_path, "a", 1, dict.fromkeys(range(40), math.nan)),
        "b": written(tmp_path, "b", 2, dict.fromkeys(range(40, N), math.nan)),
    }
    with pytest.raises(NonFiniteError, match="nothing is left"):
        compare(halves, nan="drop", **QUIET)
    # as many left out, but not the same ones: pairs would not be pairs
    one, other = (Predictions.load(written(tmp_path, "b", 3 + n, {n: math.nan}), nan="drop") for n in (0, 1))
    with pytest.raises(NonFiniteError, match='nan="drop" leaves them out'):
        compare({"a": one, "b": other}, bootstrap=0, **QUIET)
    assert compare({"a": one, "b": other}, bootstrap=0, nan="drop", **QUIET).details["n"] == N - 2
    damaged = Predictions.from_logits(logits(0), TARGETS, meta={"dropped": ["x"]})
    with pytest.raises(ArgumentError, match="numbers of examples"):
        compare({"a": damaged}, nan="drop", **QUIET)
    with pytest.raises(ShapeError, match="at least 81"):
        compare({"a": classes(N, sharpness=1.0), "b": damaged_far()}, nan="drop", **QUIET)


def damaged_far() -> Predictions:
    found = classes(N, sharpness=1.0)
    return Predictions("classification", found.targets, found.log_probs, meta={"dropped": [N]})


def test_a_part_forgets_what_the_whole_lacked(tmp_path: Path) -> None:
    found = Predictions.load(written(tmp_path, "b", 0), nan="drop")
    assert dropping.dropped_of(found) == [7, 41, 79] and len(found) == N - 3
    assert dropping.dropped_of(found.subset(torch.arange(5))) == []


def test_arrays_with_members_first() -> None:
    values = torch.zeros(2, 5, 3)
    values[1, 2, 0] = math.nan
    kept, out = dropping.finite_arrays({"logits": values, "targets": torch.arange(5)})
    assert out == [2] and kept["logits"].shape == (2, 4, 3) and kept["targets"].tolist() == [0, 1, 3, 4]
    draws = torch.zeros(7, 5)
    draws[6, 4] = math.inf
    kept, out = dropping.finite_arrays({"samples": draws, "targets": torch.tensor([math.nan, 1, 2, 3, 4])})
    assert out == [0, 4] and kept["samples"].shape == (7, 3)
    minus = torch.tensor([[0.0, -math.inf], [math.nan, 0.0]])
    assert dropping.finite_arrays({"log_probs": minus})[1] == [1]
    unequal = {"probs": torch.ones(3, 2), "targets": torch.zeros(2)}
    assert dropping.finite_arrays(unequal) == (unequal, [])


def test_batches_are_halved_down_to_the_example() -> None:
    seen: list[int] = []

    def predict(batches: Any) -> Predictions:
        x = torch.cat([batch["x"] for batch in batches])
        seen.append(len(x))
        if not bool(x.isfinite().all()):
            raise NonFiniteError("no")
        return Predictions.from_logits(torch.stack([x, -x], -1), torch.zeros(len(x), dtype=torch.int64))

    x = torch.arange(64.0)
    x[[5, 50]] = math.nan
    found = dropping.finite_predictions(predict, [{"x": x[:32]}, {"x": x[32:]}])
    assert dropping.dropped_of(found) == [5, 50] and len(found) == 62
    assert len(seen) <= 2 + 2 * (2 * 5 + 1)  # a path of halves for each fault
    with pytest.raises(NonFiniteError, match="none of the 2"):
        dropping.finite_predictions(predict, [{"x": x[[5, 50]]}])
    with pytest.raises(ArgumentError, match="cuts batches of tensors"):
        dropping.batch_length("text")
    with pytest.raises(ArgumentError, match="one prediction"):
        dropping.finite_predictions(lambda b: doubled(predict(b)), [{"x": x}])


def doubled(found: Predictions) -> Predictions:
    return found.subset(torch.arange(len(found)).repeat(2))
