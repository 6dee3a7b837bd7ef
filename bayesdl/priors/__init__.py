"""Priors over the selected weights."""

from bayesdl.priors.base import Prior
from bayesdl.priors.gaussian import GaussianPrior

__all__ = ["GaussianPrior", "Prior"]
