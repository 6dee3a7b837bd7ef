"""The command: what it prints where, what it writes, and what it says about wrong input."""

from __future__ import annotations

import importlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax

import bayesdl
from bayesdl.cli import main
from bayesdl.evaluation.compare import compare
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.report import Report

TARGETS = np.random.default_rng(0).integers(0, 3, 40)


def save_predictions(path: Path, seed: int, targets: np.ndarray | None = TARGETS, shift: float = 2.0) -> np.ndarray:
    """Random logits that lean towards the targets; returned as log-probabilities."""
    logits = np.random.default_rng(seed).normal(size=(40, 3))
    arrays = {"logits": logits}
    if targets is not None:
        logits[np.arange(40), targets] += shift
        arrays["targets"] = targets
    np.savez(path, **arrays)
    return log_softmax(logits, axis=1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failing(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong call leaves on the standard error stream."""
    try:
        status: int | str | None = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("bayesdl")
    return captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"bayesdl {bayesdl.__version__}\n"


def test_help_is_quick_because_it_imports_no_torch() -> None:
    code = "import sys, bayesdl.cli; bayesdl.cli.build_parser().format_help(); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_evaluate_prints_json_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_probs = save_predictions(here / "a.npz", 1)
    save_predictions(here / "out.npz", 2, targets=None)
    assert main(["evaluate", "a.npz", "--ood", "far=out.npz", "--metrics", "nll,accuracy", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["nll"] == pytest.approx(-log_probs[np.arange(40), TARGETS].mean(), abs=1e-6)
    assert values["accuracy"] == pytest.approx((log_probs.argmax(1) == TARGETS).mean())
    inside, outside = (-(np.exp(p) * p).sum(1) for p in (log_probs, save_predictions(here / "out.npz", 2, None)))
    pairs = outside[:, None] - inside[None, :]  # AUROC is the share of pairs that the score puts in the right order
    assert values["ood/far/auroc"] == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean(), abs=1e-6)


def test_evaluate_says_why_there_is_no_value(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draws = np.random.default_rng(0).normal(size=(5, 20))
    np.savez(here / "draws.npz", samples=draws, targets=draws[0])
    assert main(["evaluate", "draws.npz", "--metrics", "crps,nll"]) == 0
    out = capsys.readouterr().out
    assert "n/a (draws alone)" in out and "nan" not in out and "crps" in out


def test_evaluate_prints_a_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_probs = save_predictions(here / "a.npz", 1)
    assert main(["evaluate", "a.npz"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " nll " in line]
    assert len(lines) == 1
    assert f"{-log_probs[np.arange(40), TARGETS].mean():.6g}"[:6] in lines[0]


def test_infinite_values_are_text_in_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(here / "a.npz", probs=np.array([[1.0, 0.0], [0.5, 0.5]]), targets=np.array([1, 0]))
    assert main(["evaluate", "a.npz", "--metrics", "nll", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"nll": "inf"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required"]),
        (["evaluate", "nope.npz"], ["nope.npz"]),
        (["evaluate", "text.npz"], ["text.npz"]),
        (["evaluate", "a.npz", "--metrics", "nll,nope"], ["nope"]),
        (["evaluate", "a.npz", "--metrics", "nll,,ece"], ["--metrics"]),
        (["evaluate", "a.npz", "--ood", "nope.npz"], ["--ood", "NAME=FILE"]),
        (["compare"], ["--model"]),
        (["compare", "a.npz", "--model", "x:y"], ["--model"]),
        (["compare", "a.npz", "other.npz"], ["other", "targets"]),
        (["compare", "a.npz", "a.npz"], ["--names"]),
        (["compare", "a.npz", "b.npz", "--names", "x"], ["--names", "2 files"]),
        (["compare", "a.npz", "b.npz", "--ood", "far=out.npz"], ["ROW:NAME=FILE", "far"]),
        (["compare", "a.npz", "b.npz", "--bootstrap", "-1"], ["--bootstrap", "-1"]),
        (["compare", "a.npz", "b.npz", "--out", "a.npz"], ["--out", "a.npz"]),
        (["compare", "--model", "x:y"], ["--weights"]),
        (["compare", "--model", "nope_for_cli:build", "--weights", "w.safetensors", "--data", "x:y"], ["nope_for_cli"]),
        (["demo", "--device", "abacus"], ["--device", "abacus"]),
        (["demo", "--seed", "one"], ["--seed", "one"]),
    ],
)
def test_wrong_input_is_told_in_one_line(
    arguments: list[str], words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_predictions(here / "a.npz", 1)
    save_predictions(here / "b.npz", 2)
    save_predictions(here / "other.npz", 2, targets=(TARGETS + 1) % 3)
    (here / "text.npz").write_text("no archive")
    message = failing(arguments, capsys)
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_debug_shows_where_an_error_comes_from(here: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["evaluate", "nope.npz", "--debug"])


def test_files_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = save_predictions(here / "good.npz", 1, shift=4.0), save_predictions(here / "bad.npz", 2, shift=0.5)
    save_predictions(here / "far.npz", 3, targets=None)
    arguments = ["compare", "good.npz", "bad.npz", "--ood", "good:far=far.npz", "bad:far=far.npz"]
    assert main([*arguments, "--reference", "bad", "--bootstrap", "50", "--out", "report", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "good" in captured.out
    assert "Difference to bad" in captured.out
    assert captured.err == ""
    report = json.loads((here / "report" / "report.json").read_text())
    assert report["rows"] == ["good", "bad"]
    for row, log_probs in (("good", good), ("bad", bad)):
        expected = -log_probs[np.arange(40), TARGETS].mean()
        assert report["cells"][row]["nll"]["value"] == pytest.approx(expected, abs=1e-6)
    assert (here / "report" / "index.html").read_text().startswith("<!DOCTYPE html>")
    assert (here / "report" / "report.csv").read_text().startswith("method,")
    assert (here / "report" / "predictions" / "good" / "test.npz").is_file()


def test_a_reader_that_leaves_ends_the_command_in_silence(here: Path) -> None:
    save_predictions(here / "a.npz", 1)
    process = subprocess.Popen(
        [sys.executable, "-m", "bayesdl", "evaluate", "a.npz"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(bayesdl.__file__).parents[1])},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    message = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert message == b""


MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

def part(seed, n=60):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32)

def loaders():
    return {"train": part(0), "val": part(1), "test": part(2)}

far = DataLoader(TensorDataset(5 + torch.randn(30, 2, generator=torch.Generator().manual_seed(3))), batch_size=32)
"""


@pytest.fixture
def own_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Somebody's script in the current directory, and weights that its network was given."""
    (here / "own_for_cli.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    module = importlib.import_module("own_for_cli")
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: torch.randn(value.shape, generator=generator) for name, value in module.build().state_dict().items()
        }
        save_file(state, here / f"w{seed}.safetensors")
    yield here
    sys.modules.pop("own_for_cli", None)


def test_methods_are_compared_on_somebodys_own_network(own_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "own_for_cli:build", "--data", "own_for_cli:loaders", "--ood", "far=own_for_cli:far"]
    arguments += ["--weights", "w0.safetensors", "w1.safetensors", "--methods", "map,temperature,laplace,ensemble"]
    assert main(["compare", *arguments, "--bootstrap", "20", "--out", "report"]) == 0
    report = json.loads((own_network / "report" / "report.json").read_text())
    assert report["rows"] == ["map", "temperature", "laplace", "ensemble"]
    module = importlib.import_module("own_for_cli")
    x, y = module.part(2).dataset.tensors
    log_probs = []
    for seed in (0, 1):
        network = module.build()
        network.load_state_dict(load_file(own_network / f"w{seed}.safetensors"))
        log_probs.append(network(x).detach().log_softmax(-1)[torch.arange(60), y])
    cells = report["cells"]
    assert cells["map"]["nll"]["value"] == pytest.approx(-float(log_probs[0].mean()), abs=1e-5)
    mixture = torch.logsumexp(torch.stack(log_probs), 0) - math.log(2)
    assert cells["ensemble"]["nll"]["value"] == pytest.approx(-float(mixture.mean()), abs=1e-5)
    assert cells["temperature"]["accuracy"]["value"] == cells["map"]["accuracy"]["value"]
    assert "ood/far/auroc" in cells["laplace"]
    assert "laplace" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--methods", "nope"], ["nope"]),
        (["--methods", "ensemble"], ["ensemble", "--weights"]),
        (["--likelihood", "nope"], ["nope"]),
        (["--weights", "nope.pt"], ["nope.pt"]),
        (["--data", "own_for_cli:far"], ["--data", "own_for_cli:far"]),
        (["--ood", "far=own_for_cli:nope"], ["nope"]),
    ],
)
def test_wrong_networks_and_methods_are_told_in_one_line(
    change: list[str], words: list[str], own_network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "own_for_cli:build", "--data", "own_for_cli:loaders", "--weights", "w0.safetensors"]
    message = failing(["compare", *arguments, "--methods", "map", *change], capsys)
    assert all(word in message for word in words), message


def report_of(arguments: Sequence[str]) -> Report:
    """What `bayesdl compare` wrote."""
    assert main(["compare", *arguments, "--quiet", "--out", "report.json"]) == 0
    found = Report.from_json(Path("report.json").read_text())
    line = found.details["command"]
    assert shlex.split(line) == ["bayesdl", "compare", *arguments, "--quiet", "--out", "report.json"]
    assert str(found).endswith(f"by: {line}")
    return replace(found, details={name: value for name, value in found.details.items() if name != "command"})


def test_the_options_of_compare_on_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"a": 2.0, "b": 1.0}
    for name, shift in rows.items():
        save_predictions(here / f"{name}.npz", 1, shift=shift)
        save_predictions(here / f"{name}-held.npz", 5, shift=shift)
        save_predictions(here / f"{name}-blur.npz", 6, shift=shift / 2)
        save_predictions(here / f"{name}-far.npz", 7, targets=None)
    sets = {"ood": "far", "shift": "blur/3", "calibration": ""}
    arguments = ["a.npz", "b.npz"]
    for option, name in sets.items():
        file = name.partition("/")[0] or "held"
        arguments += [f"--{option}", *(f"{row}{':' * bool(name)}{name}={row}-{file}.npz" for row in rows)]
    found = report_of(
        [
            *arguments,
            "--metrics",
            "nll,ece",
            "--ood-group",
            "all=far",
            "--level",
            "0.8",
            "--score",
            "max_prob",
            "--bootstrap",
            "50",
        ]
    )
    expected = compare(
        {row: f"{row}.npz" for row in rows},
        ood={"far": {row: f"{row}-far.npz" for row in rows}},
        ood_groups={"all": ["far"]},
        shift={"blur": {"3": {row: f"{row}-blur.npz" for row in rows}}},
        calibration={row: f"{row}-held.npz" for row in rows},
        metrics=["nll", "ece"], level=0.8, score="max_prob", bootstrap=50, progress=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert found == expected and found.rows == ("a", "a + T", "b", "b + T") and "accuracy" not in found.columns
    assert found["a"]["shift/blur/3/nll"] != found["a"]["nll"]
    assert report_of([*arguments, "--no-twins", "--bootstrap", "0"]).rows == ("a", "b")
    assert report_of(["a.npz", "b.npz", "--twins", "--bootstrap", "0"]).rows == ("a", "a + T", "b", "b + T")
    capsys.readouterr()
    for wrong, words in (
        (["--level", "95"], "level=95.0"),
        (["--score", "nope"], "score='nope'"),
        (["--metrics", "nll,nope"], "'nope'"),
        (["--shift", "a:blur=a-blur.npz"], "NAME/SEVERITY"),
        (["--shift", "blur/3=a-blur.npz"], "ROW:NAME/SEVERITY=FILE"),
    ):
        assert words in failing(["compare", "a.npz", "b.npz", *wrong], capsys)


def test_subgroups_clusters_and_examples_that_are_not_finite(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate("ab"):
        save_predictions(here / f"{name}.npz", seed)
    with np.load(here / "b.npz") as arrays:
        faulty = {key: arrays[key].copy() for key in arrays}
    faulty["logits"][4, 1] = math.nan
    np.savez(here / "b.npz", **faulty)
    (here / "names.txt").write_text("".join(f"{'x' if n % 2 else 'y'}\n" for n in range(40)), encoding="utf-8")
    (here / "documents.txt").write_text("".join(f"document {n // 4}\n" for n in range(40)), encoding="utf-8")
    files = ["a.npz", "b.npz", "--bootstrap", "20", "--quiet", "--out", "report.json"]
    assert "b.npz" in failing(["compare", *files], capsys)
    options = ["--nan", "drop", "--group", "names.txt", "--cluster", "documents.txt"]
    assert main(["compare", *files, *options]) == 0
    capsys.readouterr()
    found = Report.from_json((here / "report.json").read_text(encoding="utf-8"))
    keep = torch.tensor([n for n in range(40) if n != 4])
    rows = {row: Predictions.load(here / f"{row}.npz", nan="drop") for row in "ab"}
    rows["a"] = rows["a"].subset(keep)
    rows["b"] = rows["b"].subset(torch.arange(39))
    expected = compare(
        rows, bootstrap=20, group=[f"{'x' if n % 2 else 'y'}" for n in keep.tolist()], cluster=keep // 4, progress=False
    )
    for row in "ab":
        np.testing.assert_equal(dict(found[row]), {**expected[row], "dropped": float(row == "b")})
    assert main(["evaluate", "b.npz", "--nan", "drop", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == 1.0
    (here / "names.txt").write_bytes(b"\xff\xfe")
    assert "UTF-8" in failing(["compare", *files, "--group", "names.txt"], capsys)


def test_seeds_in_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, shift in (("a", 4.0), ("b", 0.5)):
        for seed in (1, 2, 3):
            save_predictions(here / f"{name}-{seed}.npz", seed, shift=shift)
            save_predictions(here / f"{name}-far-{seed}.npz", 7 + seed, targets=None)
    lists = {name: [f"{name}-{seed}.npz" for seed in (1, 2, 3)] for name in "ab"}
    far = {name: [f"{name}-far-{seed}.npz" for seed in (1, 2, 3)] for name in "ab"}
    sets = [f"{name}:far={','.join(files)}" for name, files in far.items()]
    found = report_of([*(",".join(files) for files in lists.values()), "--ood", *sets])
    assert found.rows == ("a", "b") and found.details["num_seeds"] == 3
    assert found == compare(lists, ood={"far": far}, bootstrap=1000, progress=False)
    capsys.readouterr()
    assert "one for each seed" in failing(["compare", "a-1.npz,a-2.npz", "b-1.npz,b-2.npz", "--ood", *sets], capsys)
    assert "same two or more" in failing(["compare", "a-1.npz,a-2.npz", "b-1.npz"], capsys)
    assert "commas" in failing(["compare", "a-1.npz,", "b-1.npz"], capsys)


def test_a_file_that_cannot_be_read_is_a_row(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_predictions(here / "a.npz", 1)
    assert "gone.npz" in failing(["compare", "a.npz", "gone.npz"], capsys)
    found = report_of(["a.npz", "gone.npz", "--on-error", "row", "--bootstrap", "0"])
    assert found.ran == ("a",) and "gone.npz" in found.failures["gone"]
    assert "gone failed: " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:the temperature")  # random weights are best forgotten
def test_the_options_of_compare_on_a_network(own_network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (own_network / "own_for_cli.py").open("a") as file:
        file.write("\nbroken = {'test': part(2)}\nheld = part(4)\nblurred = part(5)\n")
    sys.modules.pop("own_for_cli")
    network = ["--model", "own_for_cli:build", "--weights", "w0.safetensors", "--bootstrap", "0"]
    loaders = ["--data", "own_for_cli:loaders", "--methods", "map,laplace", "--metrics", "nll", "--no-cost"]
    more = [
        "--calibration",
        "own_for_cli:held",
        "--shift",
        "blur/1=own_for_cli:blurred",
        "--ood",
        "far=own_for_cli:far",
    ]
    found = report_of([*network, *loaders, *more, "--score", "epistemic"])
    assert found.rows == ("map", "map + T", "laplace", "laplace + T") and found.details["score"] == "epistemic"
    assert "shift/blur/1/nll" in found.columns and "ms_per_example" not in found.columns
    assert "fitted to 60 calibration examples" in "".join(found.details["notes"])
    arguments = [*network, "--data", "own_for_cli:broken", "--methods", "map,laplace"]  # no training data
    capsys.readouterr()
    assert "laplace" in failing(["compare", *arguments], capsys).lower()
    found = report_of([*arguments, "--on-error", "row"])
    assert found.rows == ("map", "laplace") and found.ran == ("map",) and "data" in found.failures["laplace"]
    assert "laplace failed: " in capsys.readouterr().out
    # what is wrong with the command is no failure of a method
    for wrong, word in (("map,nope", "nope"), ("map,ensemble", "--weights"), ("map,temperature", "validation")):
        assert word in failing(["compare", *arguments[:-1], wrong, "--on-error", "row"], capsys)
    two = ["--calibration", "own_for_cli:held", "own_for_cli:far"]
    assert "one MODULE:LOADER" in failing(["compare", *network, *loaders, *two], capsys)
