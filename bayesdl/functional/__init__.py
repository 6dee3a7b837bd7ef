"""Functional priors: say what functions are expected, get a prior over weights that means it."""

from bayesdl.functional import plots
from bayesdl.functional.critic import DistributionalSliced, Wasserstein
from bayesdl.functional.distances import DISTANCES
from bayesdl.functional.families import FAMILIES
from bayesdl.functional.gp import GP, Functions, LogNormal, Target, energy
from bayesdl.functional.kernels import KERNELS, Kernel, constant, periodic
from bayesdl.functional.matching import evaluate, match
from bayesdl.functional.measurement import Fixed, Grid, Measurement
from bayesdl.functional.report import MatchReport

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
