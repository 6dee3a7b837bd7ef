"""bayesdl: turns trained PyTorch networks into Bayesian ones."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# bound here, not on first use: importing the module `bayesdl.wrap` elsewhere would put the module under this name
from bayesdl.wrap import wrap

__version__ = "0.1.0"

# name -> module; loaded on first use, so that `import bayesdl` costs little more than `import torch`
_PUBLIC = {
    "BayesVLM": "bayesdl.methods",
    "BayesianModel": "bayesdl.model",
    "Bernoulli": "bayesdl.likelihoods",
    "Categorical": "bayesdl.likelihoods",
    "CauchyPrior": "bayesdl.priors",
    "Chain": "bayesdl.samplers.chain",
    "ELLA": "bayesdl.methods",
    "Ensemble": "bayesdl.methods",
    "EvidenceTrainer": "bayesdl.marginal",
    "FSPLaplace": "bayesdl.methods",
    "Gaussian": "bayesdl.likelihoods",
    "GaussianPrior": "bayesdl.priors",
    "Heteroscedastic": "bayesdl.likelihoods",
    "HierarchicalPrior": "bayesdl.priors",
    "HorseshoePrior": "bayesdl.priors",
    "Laplace": "bayesdl.methods",
    "LaplacePrior": "bayesdl.priors",
    "Likelihood": "bayesdl.likelihoods",
    "MAP": "bayesdl.methods",
    "MCDropout": "bayesdl.methods",
    "MinibatchEvidence": "bayesdl.marginal",
    "NUTS": "bayesdl.methods",
    "Poisson": "bayesdl.likelihoods",
    "Predictive": "bayesdl.predictive",
    "Prior": "bayesdl.priors",
    "Report": "bayesdl.evaluation.report",
    "SGMCMC": "bayesdl.methods",
    "SMC": "bayesdl.methods",
    "SWAG": "bayesdl.methods",
    "TFB": "bayesdl.methods",
    "SubsetGP": "bayesdl.methods",
    "StudentT": "bayesdl.methods",
    "StudentTPrior": "bayesdl.priors",
    "Temperature": "bayesdl.methods",
    "VaLLA": "bayesdl.methods",
    "VBLL": "bayesdl.methods",
    "as_module": "bayesdl.functions",
    "compare": "bayesdl.evaluation.compare",
    "evaluate": "bayesdl.evaluation.compare",
    "evidence_training": "bayesdl.marginal",
    "gathered": "bayesdl.sharded",
    "load": "bayesdl.files",
    "load_prior": "bayesdl.priors.files",
    "replace": "bayesdl.last_layer",
}
_MODULES = (
    *("curvature", "decisions", "demo", "errors", "evaluation", "functional", "last_layer", "likelihoods"),
    *("lora", "methods", "posteriors", "samplers", "select", "variational"),
)

__all__ = [
    "ELLA",
    "MAP",
    "NUTS",
    "SGMCMC",
    "SMC",
    "SWAG",
    "TFB",
    "VBLL",
    "BayesVLM",
    "BayesianModel",
    "Bernoulli",
    "Categorical",
    "CauchyPrior",
    "Chain",
    "Ensemble",
    "EvidenceTrainer",
    "FSPLaplace",
    "Gaussian",
    "GaussianPrior",
    "Heteroscedastic",
    "HierarchicalPrior",
    "HorseshoePrior",
    "Laplace",
    "LaplacePrior",
    "Likelihood",
    "MCDropout",
    "MinibatchEvidence",
    "Poisson",
    "Predictive",
    "Prior",
    "Report",
    "StudentT",
    "StudentTPrior",
    "SubsetGP",
    "Temperature",
    "VaLLA",
    "__version__",
    "as_module",
    "compare",
    "evaluate",
    "evidence_training",
    "gathered",
    "load",
    "load_prior",
    "replace",
    "wrap",
]

if TYPE_CHECKING:
    from bayesdl.evaluation.compare import compare, evaluate
    from bayesdl.evaluation.report import Report
    from bayesdl.files import load
    from bayesdl.functions import as_module
    from bayesdl.last_layer import replace
    from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian, Heteroscedastic, Likelihood, Poisson
    from bayesdl.marginal import EvidenceTrainer, MinibatchEvidence, evidence_training
    from bayesdl.methods import (
        ELLA,
        MAP,
        NUTS,
        SGMCMC,
        SMC,
        SWAG,
        TFB,
        VBLL,
        BayesVLM,
        Ensemble,
        FSPLaplace,
        Laplace,
        MCDropout,
        StudentT,
        SubsetGP,
        Temperature,
        VaLLA,
    )
    from bayesdl.model import BayesianModel
    from bayesdl.predictive import Predictive
    from bayesdl.priors import (
        CauchyPrior,
        GaussianPrior,
        HierarchicalPrior,
        HorseshoePrior,
        LaplacePrior,
        Prior,
        StudentTPrior,
    )
    from bayesdl.priors.files import load_prior
    from bayesdl.samplers.chain import Chain
    from bayesdl.sharded import gathered


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
