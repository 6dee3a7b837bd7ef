"""Ways to damage a file: bytes at random, and headers that are signed again so that only their contents are wrong."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesdl import tensorfile

DELETED = object()
VALUES = (
    *(None, True, -1, 0, 1, 3, 2**63, 2**70, 10**400, -0.5, 0.5, 1e308, float("inf"), float("nan")),
    *("", "1", "\x00", "../../etc/passwd", "/etc/passwd", "os.system", "x" * 1000, [], {}, [[]], [1, 2, 3]),
    *({"a": {"b": 1}}, {"tensor": "no such"}, json.loads("[" * 400 + "]" * 400), DELETED),
)


class Executed(Exception):
    """Raised by `PICKLE` when somebody unpickles it."""


def execute() -> None:
    raise Executed


class _Bomb:
    def __reduce__(self) -> Any:
        return execute, ()


PICKLE = pickle.dumps(_Bomb())
_HUGE = b'{"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,8]}}'
# whole files that are none of ours, whatever they are called
FILES = {
    "empty": b"",
    "noise": b"noise" * 20,
    "pickle": PICKLE,
    "zip": b"PK\x05\x06" + bytes(18),
    "header beyond the file": (2**62).to_bytes(8, "little") + b"{}",
    "header beyond the integers": (2**64 - 1).to_bytes(8, "little") + b"{}",
    "nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "nested text": b"[" * 200_000,
    "tensor beyond the file": len(_HUGE).to_bytes(8, "little") + _HUGE + bytes(8),
}


def damaged_bytes(whole: bytes) -> st.SearchStrategy[bytes]:
    """Cut, flipped, removed or inserted bytes."""
    place = st.integers(0, len(whole) - 1)

    def flip(where: int, mask: int) -> bytes:
        return whole[:where] + bytes([whole[where] ^ mask]) + whole[where + 1 :]

    return st.one_of(
        place.map(lambda n: whole[:n]),
        st.builds(flip, place, st.integers(1, 255)),
        st.builds(lambda n, k: whole[:n] + whole[n + k :], place, st.integers(1, 9)),
        st.builds(lambda n, extra: whole[:n] + extra + whole[n:], place, st.binary(min_size=1, max_size=9)),
    )


def places(node: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all entries of a JSON document."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield (*before, key)
        yield from places(value, (*before, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with one entry replaced, or deleted."""
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if value is DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


def damaged_documents(document: Any) -> st.SearchStrategy[Any]:
    """One entry anywhere is hostile."""
    return st.builds(changed, st.just(document), st.sampled_from(list(places(document))), st.sampled_from(VALUES))


def damaged_tensors(tensors: dict[str, Tensor]) -> st.SearchStrategy[dict[str, Tensor]]:
    """One tensor is missing, too many, or of another shape, dtype or content."""

    def change(name: str, how: int) -> dict[str, Tensor]:
        value = tensors[name]
        others = {key: other for key, other in tensors.items() if key != name}
        shapes: tuple[Tensor, ...] = (
            value.reshape(-1)[:0],
            value.unsqueeze(0),
            torch.zeros(2, 2, dtype=value.dtype),
            torch.zeros((), dtype=value.dtype),
            value.float() if not value.is_floating_point() else value.long(),
            value.double() if value.dtype is not torch.float64 else value.half(),
            torch.full_like(value, float("nan")) if value.is_floating_point() else value + 1,
        )
        if how == len(shapes):
            return {**others, name: value, "extra": torch.ones(2)}
        return others or {"extra": torch.ones(2)} if how > len(shapes) else {**others, name: shapes[how].contiguous()}

    return st.builds(change, st.sampled_from(sorted(tensors)), st.integers(0, 8))


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[tensorfile.KEY]), {
            name: file.get_tensor(name).clone() for name in file.keys()
        }


def sign(path: Path, header: Any, tensors: dict[str, Tensor]) -> None:
    """Write a header with a checksum that fits: what is left to notice is what it says."""
    if isinstance(header, dict):
        header = {key: value for key, value in header.items() if key != tensorfile.DIGEST}
        header[tensorfile.DIGEST] = tensorfile.checksum(header, tensors)
    save_file(tensors, path, {tensorfile.KEY: json.dumps(header)})
