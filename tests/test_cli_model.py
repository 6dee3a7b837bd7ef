"""Networks, weights and loaders named on a command line: what is accepted, and what an error says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bayesdl import cli_model
from bayesdl.errors import ArgumentError, FileFormatError

MODULE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))

def number():
    return 3

net = build()
batches = [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))]

def tuple3():
    return batches, batches * 2, batches * 3

def tuple2():
    return batches, batches * 3

def mapping():
    return {"train": batches, "validation": batches * 2, "test": batches * 3}

def only_test():
    return {"test": batches}

def odd():
    return {"test": batches, "trian": batches}

def generator():
    return {"test": (b for b in batches)}

class Holder:
    build = staticmethod(build)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current directory; its name is forgotten afterwards."""
    (tmp_path / "mine_for_cli.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "mine_for_cli"
    sys.modules.pop("mine_for_cli", None)


def test_factory_of_the_current_directory(module: str) -> None:
    assert isinstance(cli_model.build_network(f"{module}:build"), nn.Sequential)
    assert isinstance(cli_model.build_network(f"{module}:Holder.build"), nn.Sequential)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mine_for_cli", ["module:attribute"]),
        ("no_such_module:build", ["no_such_module"]),
        ("mine_for_cli.sub:build", ["mine_for_cli.sub"]),
        ("mine_for_cli:bild", ["bild", "build"]),
        ("mine_for_cli:net", ["callable", "Sequential"]),
        ("mine_for_cli:number", ["int", "torch.nn.Module"]),
    ],
)
def test_wrong_factories_are_named(module: str, spec: str, words: list[str]) -> None:
    with pytest.raises(ArgumentError) as caught:
        cli_model.build_network(spec)
    assert all(word in str(caught.value) for word in ["--model", spec, *words])
    assert "\n" not in str(caught.value)


def test_a_missing_import_inside_the_module_is_not_hidden(module: str, tmp_path: Path) -> None:
    (tmp_path / "broken_for_cli.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        cli_model.build_network("broken_for_cli:build")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("form", ["safetensors", "pt", "nested", "parallel"])
def test_weights_in_every_usual_form(form: str, tmp_path: Path) -> None:
    source, target = network(0), network(1)
    state = source.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "nested":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif form == "parallel":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    assert not equal(source, target)
    cli_model.load_weights(target, path)
    assert equal(source, target)


def test_weights_of_another_network_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = network(0).state_dict()
    state["2.weight"] = torch.zeros(5, 3)
    state["3.extra"] = state.pop("0.bias")
    save_file(state, tmp_path / "w.safetensors")
    target = network(1)
    with pytest.raises(FileFormatError) as caught:
        cli_model.load_weights(target, tmp_path / "w.safetensors")
    for word in ["w.safetensors", "lacks 0.bias", "unknown 3.extra", "2.weight (5, 3) for (2, 3)"]:
        assert word in str(caught.value)
    assert equal(target, network(1))


@pytest.mark.parametrize(
    ("name", "content"),
    [("w.safetensors", b"nonsense"), ("w.pt", b"nonsense"), ("w.pt", b""), ("w.npz", b"")],
)
def test_a_file_that_holds_no_weights(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=name):
        cli_model.read_weights(tmp_path / name)


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "w.pt")
    with pytest.raises(FileFormatError, match="state_dict"):
        cli_model.read_weights(tmp_path / "w.pt")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"w\.pt"):
        cli_model.read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(("spec", "val"), [("tuple3", 2), ("mapping", 2), ("tuple2", None)])
def test_loaders_in_every_form(module: str, spec: str, val: int | None) -> None:
    loaders = cli_model.load_data(f"{module}:{spec}")
    assert len(list(loaders.test)) == 3
    assert loaders.train is not None
    assert len(list(loaders.train)) == 1
    assert (len(list(loaders.val)) if loaders.val is not None else None) == val


def test_only_a_test_loader_is_enough(module: str) -> None:
    loaders = cli_model.load_data(f"{module}:only_test")
    assert loaders.train is None
    assert loaders.val is None


@pytest.mark.parametrize(("spec", "word"), [("odd", "trian"), ("number", "int"), ("generator", "several times")])
def test_wrong_loaders_are_named(module: str, spec: str, word: str) -> None:
    with pytest.raises(ArgumentError, match=word) as caught:
        cli_model.load_data(f"{module}:{spec}")
    assert "--data" in str(caught.value)


def test_ood_sets(module: str) -> None:
    sets = cli_model.load_ood([f"a={module}:batches", f"b={module}:tuple2"])
    assert list(sets) == ["a", "b"]


@pytest.mark.parametrize("entries", [["a"], ["=x:y"], ["a="], ["a=x:y", "a=x:z"]])
def test_wrong_names(entries: list[str]) -> None:
    with pytest.raises(ArgumentError, match="--ood"):
        cli_model.named_entries(entries, "--ood", "module:loader")
