"""scikit-learn: a Bayesian network as a classifier or a regressor, and networks that skorch has trained."""

from bayesdl.integrations.sklearn.classifier import BayesianClassifier
from bayesdl.integrations.sklearn.regressor import BayesianRegressor
from bayesdl.integrations.sklearn.skorch import from_skorch

__all__ = ["BayesianClassifier", "BayesianRegressor", "from_skorch"]
