"""BayesianClassifier: class probabilities from a Bayesian network, in the manners of scikit-learn."""

from __future__ import annotations

from typing import Any, Self, final

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.integrations.sklearn.base import BayesianEstimator
from bayesdl.likelihoods import resolve
from bayesdl.predictive import Predictive


@final
class BayesianClassifier(ClassifierMixin, BayesianEstimator):
    """A network for tables that is trained, made Bayesian and asked like any classifier of scikit-learn.

        classifier = BayesianClassifier(random_state=0).fit(X, y)
        classifier.predict_proba(X_new)
        classifier.predictive(X_new).epistemic   # nats

    The network is trained on the evidence, which chooses its weight decay layer by layer from the training data alone
    (`bdl.EvidenceTrainer`); the method then makes it Bayesian with its own defaults.

    Args:
        module: None for a perceptron of smooth units in float64; a function of the numbers of inputs and outputs that
            returns a network with logits; or a network, copied and trained on from its weights (`steps=0`: as it is).
        method: name or object, as in `bdl.wrap`; "ensemble" trains `members` networks.
        likelihood: None is categorical; an object chooses another link.
        prior: of the method; None lets it choose.
        hidden: widths of the perceptron's layers.
        steps, lr, batch_size: of Adam, whose rate falls to zero as a cosine.
        members: of an ensemble.
        standardize: whether the columns of X are centred and scaled inside; None: of networks that are built here.
        random_state: of initialisation, batches and draws; no global state is touched.
        device: of training and prediction; None is the CPU.

    Attributes:
        classes_: labels, in the order of the columns of `predict_proba`.
        bayes_: the `bdl.BayesianModel`, of rows as they come.
        module_: the network, trained.
        n_features_in_, feature_names_in_: as everywhere.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train, and make Bayesian.

        Args:
            X: `(N, d)`.
            y: `(N,)` labels of any kind, of at least two classes.

        Raises:
            ArgumentError: fewer than two classes, or a parameter that is not accepted.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ArgumentError("y holds 1 class; a classifier needs at least two")
        likelihood = resolve("categorical" if self.likelihood is None else self.likelihood)
        if likelihood.task != "classification":
            raise UnsupportedError(
                f"a {likelihood.name} likelihood is for no classes; pass None or bdl.Categorical(...)"
            )
        self._fit(X, self._labels(labels), len(self.classes_), likelihood)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """`(B, C)` float64, rows that sum to one, columns as in `classes_`."""
        probabilities = self.predictive(X).probs.double()
        return (probabilities / probabilities.sum(1, keepdim=True)).cpu().numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Logarithm of `predict_proba`."""
        return np.log(self.predict_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """`(B,)`: the most probable label."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def _in_units(self, found: Predictive) -> Predictive:
        return found

    def _labels(self, labels: np.ndarray) -> torch.Tensor:
        return torch.tensor(labels, dtype=torch.long, device=self.device)
