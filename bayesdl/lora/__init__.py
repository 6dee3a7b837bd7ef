"""Bayesian low-rank adapters: draws of trained peft adapters, text generated under them, embeddings, cosine scores."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# loaded on first use: posteriors import from this package, and the functions below import posteriors
_PUBLIC = {
    "Embedder": "bayesdl.lora.embedding",
    "SearchReport": "bayesdl.lora.report",
    "Towers": "bayesdl.lora.towers",
    "cosine_moments": "bayesdl.lora.cosine",
    "embed": "bayesdl.lora.embedding",
    "generate": "bayesdl.lora.text",
    "image_features": "bayesdl.lora.towers",
    "merge_sample": "bayesdl.lora.merge",
    "score": "bayesdl.lora.text",
    "search_report": "bayesdl.lora.report",
    "text_features": "bayesdl.lora.towers",
    "SequenceScores": "bayesdl.lora.text",
}

__all__ = [
    "Embedder",
    "SearchReport",
    "SequenceScores",
    "Towers",
    "cosine_moments",
    "embed",
    "generate",
    "image_features",
    "merge_sample",
    "score",
    "search_report",
    "text_features",
]

if TYPE_CHECKING:
    from bayesdl.lora.cosine import cosine_moments
    from bayesdl.lora.embedding import Embedder, embed
    from bayesdl.lora.merge import merge_sample
    from bayesdl.lora.report import SearchReport, search_report
    from bayesdl.lora.text import SequenceScores, generate, score
    from bayesdl.lora.towers import Towers, image_features, text_features


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'bayesdl.lora' has no attribute {name!r}")
