"""Weights that somebody saved: state dictionaries in safetensors or torch files, never unpickled beyond tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import FileFormatError

_TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin")
_NESTED_KEYS = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights of a checkpoint


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """State dictionary of a `.safetensors` file, or of a torch file that holds nothing but tensors and containers.

    A checkpoint that keeps the weights under `state_dict`, `model_state_dict` or `model` is unpacked, and the prefix
    that data-parallel wrappers put before every name is taken away.

    Raises:
        FileFormatError: there is no such file, it is neither, or it holds no weights.
    """
    file = Path(path)
    if not file.is_file():
        raise FileFormatError(f"{path} does not exist")
    if file.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        raise FileFormatError(f"{path}: expected .safetensors or one of {', '.join(_TORCH_SUFFIXES)}")
    try:
        state = _read(file)
    except Exception as error:  # each reader has errors of its own, and none may pass as success
        raise FileFormatError(
            f"{path} cannot be read as weights ({error}); save the state dict alone: torch.save(net.state_dict(), path)"
        ) from error
    for key in _NESTED_KEYS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileFormatError(f"{path} holds {type(state).__name__}; expected a mapping of tensors, a state dict")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)
