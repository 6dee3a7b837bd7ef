"""Bayesian last layers: closed forms on the features of a trained network."""

from bayesdl.last_layer.exact import ConjugateRegression
from bayesdl.last_layer.statistics import Statistics

__all__ = ["ConjugateRegression", "Statistics"]
