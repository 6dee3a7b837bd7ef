"""Is a chain to be trusted? Convergence in function space, temperatures, noise of minibatches, diversity, steps."""

from bayesdl.samplers.diagnostics.convergence import Convergence, by_chain, convergence, ess, mcse, quantities, rhat
from bayesdl.samplers.diagnostics.diversity import Diversity, diversity
from bayesdl.samplers.diagnostics.noise_budget import gradient_variance, noise_budget
from bayesdl.samplers.diagnostics.stability import Stability, stability
from bayesdl.samplers.diagnostics.summary import summary
from bayesdl.samplers.diagnostics.temperatures import Thermometer, expected_kinetic
from bayesdl.samplers.diagnostics.weights import StepTrace, step_trace, weighted_ess

__all__ = [
    "Convergence",
    "Diversity",
    "Stability",
    "StepTrace",
    "Thermometer",
    "by_chain",
    "convergence",
    "diversity",
    "ess",
    "expected_kinetic",
    "gradient_variance",
    "mcse",
    "noise_budget",
    "quantities",
    "rhat",
    "stability",
    "step_trace",
    "summary",
    "weighted_ess",
]
