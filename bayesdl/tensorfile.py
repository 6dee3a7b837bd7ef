"""Tensors with a JSON header in one file: safetensors, written atomically, with a checksum. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import FileFormatError

FORMAT = 1
KEY = "bayesdl"
DIGEST = "sha256"
# dtypes as the format calls them
_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
# what a header that is not ours can make the code that reads it raise
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


def write_described(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Tensors with a JSON header, which gains the format's version, and a checksum over both, which is returned.

    Raises:
        FileFormatError: the header is not JSON.
    """
    header = {"format": FORMAT, **header}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        # one entry: the order of several would differ from one file to the next
        digest = checksum(header, plain)
        text = json.dumps({**header, DIGEST: digest})
    except TypeError as error:
        raise FileFormatError(f"the model cannot be described in JSON: {error}") from error
    write_tensors(path, plain, {KEY: text})
    return digest


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that is either the old one or the new one, whenever the process dies.

    Contiguous tensors on the CPU go from their own memory to the file: nothing is copied.
    """
    # not from tempfile, whose files nobody else may read
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            for piece in _serialised(tensors, metadata):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _serialised(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The pieces of a safetensors file: length of the header, header, tensors."""
    if sys.byteorder != "little" or any(value.dtype not in _NAMES for value in tensors.values()):
        from safetensors.torch import save

        try:
            yield save({name: value.clone() for name, value in tensors.items()}, metadata)
        except KeyError as error:
            raise FileFormatError(
                f"this version of safetensors cannot hold {error}: pip install -U safetensors"
            ) from error
        return
    # the wide ones first, so that all are aligned
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, value in order:
        end = start + value.numel() * value.element_size()
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, value in order:
        yield _bytes(value)


def _bytes(value: Tensor) -> memoryview:
    # through a flat view: a tensor without dimensions has no other dtype's view
    return value.reshape(-1).contiguous().view(torch.uint8).numpy().data


def read_described(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_described` wrote.

    Raises:
        FileFormatError: there is no such file, it is another, of another format version, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileFormatError(f"{path} does not exist")
    try:
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # copies: safetensors maps the file, and who writes into it later would change what was checked
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        header = json.loads(metadata[KEY])
        version = header["format"]
        sound = header.pop(DIGEST, None) == checksum(header, tensors)
    except (SafetensorError, OSError, *DAMAGE) as error:
        raise FileFormatError(f"{path} is not a bayesdl file, or it is damaged: {error}") from error
    if version != FORMAT:
        raise FileFormatError(f"{path} has format version {version}; this library reads version {FORMAT}")
    if not sound:
        raise FileFormatError(f"{path} is damaged: its contents do not match their checksum")
    return header, tensors


def checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header and over names, shapes, dtypes and bytes of all tensors."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name}|{tuple(value.shape)}|{value.dtype}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable."""
    # not every platform lets a folder be opened
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
