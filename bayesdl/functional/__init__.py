"""Functional priors: say what functions are expected, get a prior over weights that means it."""

import importlib
from typing import TYPE_CHECKING, Any

from bayesdl.functional.critic import DistributionalSliced, Wasserstein
from bayesdl.functional.distances import DISTANCES
from bayesdl.functional.families import FAMILIES
from bayesdl.functional.gp import GP, Functions, LogNormal, Target, energy
from bayesdl.functional.kernels import KERNELS, Kernel, constant, periodic
from bayesdl.functional.matching import evaluate, match
from bayesdl.functional.measurement import Fixed, Grid, Measurement
from bayesdl.functional.report import MatchReport

if TYPE_CHECKING:
    from bayesdl.functional import plots

__all__ = [
    "DISTANCES",
    "FAMILIES",
    "GP",
    "KERNELS",
    "DistributionalSliced",
    "Fixed",
    "Functions",
    "Grid",
    "Kernel",
    "LogNormal",
    "MatchReport",
    "Measurement",
    "Target",
    "Wasserstein",
    "constant",
    "energy",
    "evaluate",
    "match",
    "periodic",
    "plots",
]


def __getattr__(name: str) -> Any:
    if name == "plots":  # drawing imports all of bayesdl.evaluation
        return importlib.import_module("bayesdl.functional.plots")
    raise AttributeError(f"module 'bayesdl.functional' has no attribute {name!r}")
