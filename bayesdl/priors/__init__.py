"""Priors over the selected weights."""

from bayesdl.priors.base import Prior
from bayesdl.priors.coupling import CouplingPrior
from bayesdl.priors.gaussian import GaussianPrior
from bayesdl.priors.heavy_tails import CauchyPrior, LaplacePrior, StudentTPrior
from bayesdl.priors.horseshoe import HorseshoePrior
from bayesdl.priors.mixtures import HierarchicalPrior, ScaleMixturePrior
from bayesdl.priors.spline import SplinePrior

__all__ = [
    "CauchyPrior",
    "CouplingPrior",
    "GaussianPrior",
    "HierarchicalPrior",
    "HorseshoePrior",
    "LaplacePrior",
    "Prior",
    "ScaleMixturePrior",
    "SplinePrior",
    "StudentTPrior",
]
