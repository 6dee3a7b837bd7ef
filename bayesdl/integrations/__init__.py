"""Bridges to other libraries: one file each, and the library itself is imported when it is used."""

from __future__ import annotations

import importlib
from types import ModuleType

BRIDGES = ("arviz", "backpack", "botorch", "export", "laplace_torch", "lightning", "pyro", "sklearn", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in BRIDGES:
        return importlib.import_module(f"bayesdl.integrations.{name}")
    raise AttributeError(f"module 'bayesdl.integrations' has no attribute {name!r}; there are {', '.join(BRIDGES)}")
