"""Predictions as `.npz` archives of plain arrays: never pickled, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bayesdl.errors import FileFormatError
from bayesdl.tensorfile import DAMAGE

GROWTH, SLACK = 64, 1 << 26  # how much larger than the file its arrays may be: times, and bytes beyond
FORECASTS = ("logits", "log_probs", "probs", "samples")


def write_archive(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write one `.npz`, atomically (temporary file, fsync, rename); the name is kept as given."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, header=np.array(json.dumps(dict(header))), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_archive(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All arrays of an `.npz`.

    Raises:
        FileFormatError: it is none, or holds pickled objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            size = sum(member.file_size for member in members)
            if size > SLACK + GROWTH * os.path.getsize(path):
                raise FileFormatError(
                    f"{path}: holds {size / 1e9:.1f} GB in a file of {os.path.getsize(path) / 1e9:.3f} GB; write it "
                    "uncompressed (numpy.savez) if it is yours"
                )
            return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
    except (FileNotFoundError, FileFormatError):
        raise
    except (*DAMAGE, OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise FileFormatError(f"{path}: not a readable .npz archive of plain arrays ({error})") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array; what its header claims is compared with what is there before memory is taken."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds pickled objects; save plain arrays")
    claimed = math.prod(shape) * dtype.itemsize
    if not 0 <= claimed <= member.file_size:
        raise ValueError(f"{member.filename} claims {claimed} bytes and has {member.file_size}")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def which_forecast(arrays: Mapping[str, Any]) -> str:
    """The key of the forecasts in a hand-made archive; "mean" stands for mean and variance.

    Raises:
        FileFormatError: none, several, or keys that mean nothing.
    """
    keys = set(arrays) - {"targets", "group"}
    found = ", ".join(sorted(keys)) or "none"
    if keys & {"mean", "variance"}:
        if keys != {"mean", "variance"}:
            raise FileFormatError(f"keys {found}: regression needs exactly mean and variance")
        return "mean"
    if keys & set(FORECASTS) and (unknown := sorted(keys - set(FORECASTS))):
        raise FileFormatError(f"unknown keys {', '.join(unknown)}; beside the forecasts: targets and group")
    if len(keys) != 1 or not keys <= set(FORECASTS):
        raise FileFormatError(f"keys {found}: expected one of {', '.join(FORECASTS)}, or mean and variance")
    return keys.pop()
