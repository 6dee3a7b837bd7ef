"""The curvature core: layer factors, the structures that keep their outer products, and what to ask of them."""

from bayesdl.curvature.accumulator import Accumulator
from bayesdl.curvature.estimate import estimate
from bayesdl.curvature.krylov import Solution
from bayesdl.curvature.operators import CurvatureOperator, operator
from bayesdl.curvature.several import estimate_several
from bayesdl.curvature.spectrum import Spectrum
from bayesdl.curvature.traces import Estimate

__all__ = [
    "Accumulator",
    "CurvatureOperator",
    "Estimate",
    "Solution",
    "Spectrum",
    "estimate",
    "estimate_several",
    "operator",
]
