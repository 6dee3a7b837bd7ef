"""How the chains of a store run, kept beside them: what goes on from there has to round as it began."""

from __future__ import annotations

from pathlib import Path

import torch

from bayesdl.errors import FileFormatError
from bayesdl.tensorfile import read_described, write_described

FILE = "passes.safetensors"
KIND = "passes"


def recall(store: str | Path | None) -> bool | None:
    """Whether the chains of a store share their passes; None where there are none yet.

    Raises:
        FileFormatError: the file is damaged, or another.
    """
    if store is None:
        return None
    path = Path(store) / FILE
    if not path.exists():
        # chains of a time when they always ran one after another
        return False if any(Path(store).glob("chain-*")) else None
    header = read_described(path)[0]
    if header.get("kind") != KIND or not isinstance(header.get("together"), bool):
        raise FileFormatError(f"{path} is a file of kind {str(header.get('kind'))[:80]!r}; expected {KIND!r}")
    together: bool = header["together"]
    return together


def remember(store: str | Path | None, together: bool) -> None:
    """Keep the choice for those who go on from the store."""
    if store is not None:
        Path(store).mkdir(parents=True, exist_ok=True)
        write_described(Path(store) / FILE, {"kind": KIND, "together": together}, {"empty": torch.zeros(1)})
