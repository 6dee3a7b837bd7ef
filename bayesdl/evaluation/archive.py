"""Predictions as `.npz` archives of plain arrays: never pickled, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bayesdl.errors import FileFormatError

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
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile) as error:
        # A lone .npy comes back as an array, which is no context manager.
        raise FileFormatError(f"{path}: not a readable .npz archive of plain arrays ({error})") from error


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
    if len(keys) != 1 or not keys <= set(FORECASTS):
        raise FileFormatError(f"keys {found}: expected one of {', '.join(FORECASTS)}, or mean and variance")
    return keys.pop()
