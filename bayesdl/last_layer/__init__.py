"""Bayesian last layers: heads with a loss, closed forms on the features of a trained network."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# name -> module; loaded on first use: posteriors need the closed forms here, and the heads need the posteriors
_PUBLIC = {
    "Bars": "bars",
    "Classification": "heads",
    "ConjugateRegression": "exact",
    "ClassStatistics": "class_statistics",
    "Evidential": "evidential",
    "Generative": "generative",
    "Head": "head",
    "Heteroscedastic": "heteroscedastic",
    "HeadOutput": "output",
    "Prototype": "prototype",
    "PseudoCounts": "densities",
    "RecursiveRegression": "online",
    "Regression": "heads",
    "Statistics": "statistics",
    "parameter_groups": "surgery",
    "replace": "surgery",
}

__all__ = [
    "Bars",
    "ClassStatistics",
    "Classification",
    "ConjugateRegression",
    "Evidential",
    "Generative",
    "Head",
    "HeadOutput",
    "Heteroscedastic",
    "Prototype",
    "PseudoCounts",
    "RecursiveRegression",
    "Regression",
    "Statistics",
    "parameter_groups",
    "replace",
]

if TYPE_CHECKING:
    from bayesdl.last_layer.bars import Bars
    from bayesdl.last_layer.class_statistics import ClassStatistics
    from bayesdl.last_layer.densities import PseudoCounts
    from bayesdl.last_layer.evidential import Evidential
    from bayesdl.last_layer.exact import ConjugateRegression
    from bayesdl.last_layer.generative import Generative
    from bayesdl.last_layer.head import Head
    from bayesdl.last_layer.heads import Classification, Regression
    from bayesdl.last_layer.heteroscedastic import Heteroscedastic
    from bayesdl.last_layer.online import RecursiveRegression
    from bayesdl.last_layer.output import HeadOutput
    from bayesdl.last_layer.prototype import Prototype
    from bayesdl.last_layer.statistics import Statistics
    from bayesdl.last_layer.surgery import parameter_groups, replace


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bayesdl.last_layer' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"bayesdl.last_layer.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
