"""Bayesian low-rank adapters: draws of trained peft adapters, text generated under them, embeddings, cosine scores."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# loaded on first use: posteriors import from this package, and the functions below import posteriors
_PUBLIC = {
    "Embedder": "bayesdl.lora.embedding",
    "SearchReport": "bayesdl.lora.report",
    "cosine_moments": "bayesdl.lora.cosine",
    "embed": "bayesdl.lora.embedding",
    "generate": "bayesdl.lora.text",
    "merge_sample": "bayesdl.lora.merge",
    "score": "bayesdl.lora.text",
    "search_report": "bayesdl.lora.report",
    "SequenceScores": "bayesdl.lora.text",
}

__all__ = [
    "Embedder",
    "SearchReport",
    "SequenceScores",
    "cosine_moments",
    "embed",
    "generate",
    "merge_sample",
    "score",
    "search_report",
]

if TYPE_CHECKING:
    from bayesdl.lora.cosine import cosine_moments
    from bayesdl.lora.embedding import Embedder, embed
    from bayesdl.lora.merge import merge_sample
    from bayesdl.lora.report import SearchReport, search_report
    from bayesdl.lora.text import SequenceScores, generate, score


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'bayesdl.lora' has no attribute {name!r}")
