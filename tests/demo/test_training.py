"""Training is reproducible and its cache is never worse than no cache."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bayesdl.demo import training

RECIPE = training.Recipe("small", epochs=3, batch_size=8)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1))


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, 3, generator=generator), torch.randn(20, 1, generator=generator)


def run(cache: Path | None, seed: int = 0, data_seed: int = 0) -> tuple[list[Tensor], int]:
    """Weights, and how many epochs were trained for them."""
    epochs: list[int] = []
    network = training.trained(
        build,
        nn.functional.mse_loss,
        *data(data_seed),
        RECIPE,
        seed=seed,
        cache=cache,
        on_epoch=lambda: epochs.append(1),
    )
    assert not network.training
    return [p.detach() for p in network.parameters()], len(epochs)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_seed_decides_the_weights_and_the_global_state_stays() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, epochs = run(None)
    torch.rand(7)
    again, _ = run(None)
    other, _ = run(None, seed=1)
    torch.random.set_rng_state(before)
    run(None)
    assert epochs == RECIPE.epochs
    assert same(first, again)
    assert not same(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_lowers_the_loss() -> None:
    inputs, _ = data()
    targets = inputs.sum(1, keepdim=True)
    start = training.train(build, nn.functional.mse_loss, inputs, targets, training.Recipe("x", epochs=0), seed=0)
    end = training.train(
        build, nn.functional.mse_loss, inputs, targets, training.Recipe("x", epochs=100, lr=2e-2), seed=0
    )
    with torch.no_grad():
        losses = [float(nn.functional.mse_loss(network(inputs), targets)) for network in (start, end)]
    assert losses[1] < 0.5 * losses[0]


def test_cached_network_is_the_trained_one(tmp_path: Path) -> None:
    first, trained_epochs = run(tmp_path / "cache")
    second, cached_epochs = run(tmp_path / "cache")
    assert (trained_epochs, cached_epochs) == (RECIPE.epochs, 0)
    assert same(first, second)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"data_seed": 1}])
def test_another_seed_or_other_data_are_other_files(tmp_path: Path, change: dict[str, int]) -> None:
    run(tmp_path)
    _, epochs = run(tmp_path, **change)
    assert epochs == RECIPE.epochs
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_file_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = run(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"half a file")
    with caplog.at_level(logging.WARNING, "bayesdl.demo.training"):
        second, epochs = run(tmp_path)
    assert epochs == RECIPE.epochs
    assert same(first, second)
    assert path.name in caplog.text
    assert run(tmp_path)[1] == 0


def test_a_cache_that_cannot_be_written_to_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    with caplog.at_level(logging.WARNING, "bayesdl.demo.training"):
        weights, _ = run(blocked)
    assert same(weights, run(None)[0])
    assert "cannot be written" in caplog.text


def test_cache_directory_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert training.cache_directory() == tmp_path / "bayesdl"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")  # the specification says that such a value is to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert training.cache_directory() == tmp_path / "home" / ".cache" / "bayesdl"
