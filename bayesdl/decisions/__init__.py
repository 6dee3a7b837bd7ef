"""What one does with uncertainty: certified thresholds, decisions of least expected cost, what to label next."""

from bayesdl.decisions.active import bald, epig, epig_gaussian, epig_of, gradient_kernel, select, select_from
from bayesdl.decisions.certify import Certificate, binomial_limit, certify, upper_limit
from bayesdl.decisions.cost import Decision, bayes_threshold, decide, mean_cost
from bayesdl.decisions.thompson import thompson

__all__ = [
    "Certificate",
    "Decision",
    "bald",
    "bayes_threshold",
    "binomial_limit",
    "certify",
    "decide",
    "epig",
    "epig_gaussian",
    "epig_of",
    "gradient_kernel",
    "mean_cost",
    "select",
    "select_from",
    "thompson",
    "upper_limit",
]
