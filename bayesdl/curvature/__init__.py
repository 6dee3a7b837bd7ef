"""The curvature core: layer factors, the structures that keep their outer products, and what to ask of them."""

from bayesdl.curvature.estimate import estimate
from bayesdl.curvature.krylov import Solution
from bayesdl.curvature.operators import CurvatureOperator, operator
from bayesdl.curvature.spectrum import Spectrum
from bayesdl.curvature.traces import Estimate

__all__ = ["CurvatureOperator", "Estimate", "Solution", "Spectrum", "estimate", "operator"]
