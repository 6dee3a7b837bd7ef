"""What one does with uncertainty: certified thresholds, decisions of least expected cost, what to label next."""

from bayesdl.decisions.certify import Certificate, binomial_limit, certify, upper_limit
from bayesdl.decisions.cost import Decision, bayes_threshold, decide, mean_cost

__all__ = [
    "Certificate",
    "Decision",
    "bayes_threshold",
    "binomial_limit",
    "certify",
    "decide",
    "mean_cost",
    "upper_limit",
]
