"""Plain training, as in any script, and a cache of its result: trained networks are what the demo starts from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_LOG = logging.getLogger(__name__)
RECIPE_VERSION = 1  # raise it whenever the same recipe would give other weights: it is part of the cache key


@final
@dataclass(frozen=True)
class Recipe:
    """How one network is trained: Adam without weight decay on the mean loss, for a fixed number of epochs."""

    name: str
    epochs: int
    batch_size: int = 32
    lr: float = 2e-3


def train(
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    on_epoch: Callable[[], object] = lambda: None,
) -> nn.Module:
    """Build and train a network on the device of `inputs`; returned in evaluation mode.

    Initialisation and dropout draw from torch's own generators; they are put back as they were.
    """
    cuda = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        network = build().to(inputs.device).train()
        optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr)
        for _ in range(recipe.epochs):
            for chosen in torch.randperm(len(inputs)).to(inputs.device).split(recipe.batch_size):
                optimizer.zero_grad()
                loss(network(inputs[chosen]), targets[chosen]).backward()
                optimizer.step()
            on_epoch()
    return network.eval()


def cache_directory() -> Path:
    """`bayesdl` in the user's cache folder: `$XDG_CACHE_HOME` where that is absolute, else `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "bayesdl"


def cache_file(recipe: Recipe, seed: int, inputs: Tensor, targets: Tensor, cache: Path) -> Path:
    """Where the network of this recipe, seed, data, device kind and torch version is kept."""
    data = hashlib.sha256()
    for tensor in (inputs, targets):
        data.update(str(tuple(tensor.shape)).encode())
        data.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    key = {
        "version": RECIPE_VERSION,
        "recipe": asdict(recipe),
        "seed": seed,
        "data": data.hexdigest(),
        "device": inputs.device.type,
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache / f"{recipe.name}-seed{seed}-{digest}.safetensors"


def trained(
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    cache: Path | None,
    on_epoch: Callable[[], object] = lambda: None,
) -> nn.Module:
    """The network of this recipe and seed: read from `cache` where it lies there, else trained and put there.

    A file that cannot be read or does not fit is trained anew; a cache that cannot be written to is done without.
    """
    if cache is None:
        return train(build, loss, inputs, targets, recipe, seed=seed, on_epoch=on_epoch)
    path = cache_file(recipe, seed, inputs, targets, cache)
    if path.exists():
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten at once
            network = build().to(inputs.device)
        try:
            network.load_state_dict(load_file(path, device=str(inputs.device)))
        except (SafetensorError, OSError, RuntimeError) as error:
            _LOG.warning("%s cannot be used and is made anew: %s", path, error)
        else:
            return network.eval()
    network = train(build, loss, inputs, targets, recipe, seed=seed, on_epoch=on_epoch)
    try:
        _store(network, path)
    except OSError as error:
        _LOG.warning("the trained network is not kept, %s cannot be written: %s", path, error)
    return network


def _store(network: nn.Module, path: Path) -> None:
    """Write beside the target and rename, so that an interrupted run leaves no half a file under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        temporary = Path(folder) / path.name
        save_file({name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}, temporary)
        os.replace(temporary, path)
