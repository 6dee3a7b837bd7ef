"""Bayesian low-rank adapters: draws of trained peft adapters, text generated under them, cosine scores."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# loaded on first use: posteriors import from this package, and the functions below import posteriors
_PUBLIC = {
    "SearchReport": "bayesdl.lora.report",
    "generate": "bayesdl.lora.text",
    "merge_sample": "bayesdl.lora.merge",
    "search_report": "bayesdl.lora.report",
}

__all__ = ["SearchReport", "generate", "merge_sample", "search_report"]

if TYPE_CHECKING:
    from bayesdl.lora.merge import merge_sample
    from bayesdl.lora.report import SearchReport, search_report
    from bayesdl.lora.text import generate


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'bayesdl.lora' has no attribute {name!r}")
