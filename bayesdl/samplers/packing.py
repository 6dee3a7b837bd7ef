"""States as trees of dictionaries, lists, numbers and tensors, taken apart into JSON and tensors. Never pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import FileFormatError
from bayesdl.tensorfile import DAMAGE

_TENSOR, _PAIRS, _TUPLE = "tensor", "pairs", "tuple"  # the one key of a dictionary that stands for something else


def pack(tree: Any, path: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """JSON that refers to tensors, and those tensors by name.

    Raises:
        FileFormatError: the tree holds something else, such as a function; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    return _packed(tree, path, tensors), tensors


def unpack(found: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `pack`: dictionaries keep the types of their keys, tuples stay tuples.

    Raises:
        FileFormatError: no such tree.
    """
    try:
        return _unpacked(found, tensors)
    except DAMAGE as error:
        raise FileFormatError(f"a stored state is damaged: {error!r}") from error


def state_of(thing: Any) -> Any:
    """`state_dict()`, or the state of a generator."""
    return thing.get_state() if isinstance(thing, torch.Generator) else thing.state_dict()


def load_state(thing: Any, state: Any) -> None:
    """Inverse of `state_of`."""
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    else:
        thing.load_state_dict(state)


def has_state(thing: Any) -> bool:
    """Whether `state_of` and `load_state` take it."""
    return isinstance(thing, torch.Generator) or (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"))


def _unpacked(found: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(found, list):
        return [_unpacked(item, tensors) for item in found]
    if not isinstance(found, dict):
        return found
    ((kind, value),) = found.items()
    if kind == _TENSOR:
        return tensors[value]
    if kind == _TUPLE:
        return tuple(_unpacked(item, tensors) for item in value)
    if kind != _PAIRS:
        raise FileFormatError(f"{kind!r} is neither a tensor nor a container")
    return {key: _unpacked(item, tensors) for key, item in value}


def _packed(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = f"{len(tensors)} {path}"
        tensors[name] = tree
        return {_TENSOR: name}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, (bool, int, float, str)):
                raise FileFormatError(f"{path} has the key {key!r}, which is neither a number nor a string")
        return {_PAIRS: [[key, _packed(item, f"{path}.{key}", tensors)] for key, item in tree.items()]}
    if isinstance(tree, (list, tuple)):
        items = [_packed(item, f"{path}.{i}", tensors) for i, item in enumerate(tree)]
        return items if isinstance(tree, list) else {_TUPLE: items}
    raise FileFormatError(
        f"{path} is {type(tree).__name__}, which a resume file cannot hold: expected numbers, strings, tensors, and "
        "lists and dictionaries of them"
    )
