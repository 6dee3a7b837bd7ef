"""bayesdl: turns trained PyTorch networks into Bayesian ones."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# bound here, not on first use: importing the module `bayesdl.wrap` elsewhere would put the module under this name
from bayesdl.wrap import wrap

__version__ = "0.1.0"

# name -> module; loaded on first use, so that `import bayesdl` costs little more than `import torch`
_PUBLIC = {
    "BayesianModel": "bayesdl.model",
    "Bernoulli": "bayesdl.likelihoods",
    "Categorical": "bayesdl.likelihoods",
    "Ensemble": "bayesdl.methods",
    "Gaussian": "bayesdl.likelihoods",
    "GaussianPrior": "bayesdl.priors",
    "Heteroscedastic": "bayesdl.likelihoods",
    "Laplace": "bayesdl.methods",
    "Likelihood": "bayesdl.likelihoods",
    "MAP": "bayesdl.methods",
    "MCDropout": "bayesdl.methods",
    "Poisson": "bayesdl.likelihoods",
    "Predictive": "bayesdl.predictive",
    "Prior": "bayesdl.priors",
    "Report": "bayesdl.evaluation.report",
    "SWAG": "bayesdl.methods",
    "Temperature": "bayesdl.methods",
    "VBLL": "bayesdl.methods",
    "compare": "bayesdl.evaluation.compare",
    "evaluate": "bayesdl.evaluation.compare",
    "load": "bayesdl.files",
    "replace": "bayesdl.last_layer",
}
_MODULES = ("curvature", "demo", "errors", "evaluation", "last_layer", "likelihoods", "methods", "posteriors")

__all__ = [
    "MAP",
    "SWAG",
    "VBLL",
    "BayesianModel",
    "Bernoulli",
    "Categorical",
    "Ensemble",
    "Gaussian",
    "GaussianPrior",
    "Heteroscedastic",
    "Laplace",
    "Likelihood",
    "MCDropout",
    "Poisson",
    "Predictive",
    "Prior",
    "Report",
    "Temperature",
    "__version__",
    "compare",
    "evaluate",
    "load",
    "replace",
    "wrap",
]

if TYPE_CHECKING:
    from bayesdl.evaluation.compare import compare, evaluate
    from bayesdl.evaluation.report import Report
    from bayesdl.files import load
    from bayesdl.last_layer import replace
    from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian, Heteroscedastic, Likelihood, Poisson
    from bayesdl.methods import MAP, SWAG, VBLL, Ensemble, Laplace, MCDropout, Temperature
    from bayesdl.model import BayesianModel
    from bayesdl.predictive import Predictive
    from bayesdl.priors import GaussianPrior, Prior


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"bayesdl.{name}")
    raise AttributeError(f"module 'bayesdl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
