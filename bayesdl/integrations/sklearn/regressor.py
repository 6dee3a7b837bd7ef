"""BayesianRegressor: a mean and a standard deviation from a Bayesian network, in the manners of scikit-learn."""

from __future__ import annotations

from typing import Any, Self, final

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import validate_data

from bayesdl.errors import UnsupportedError
from bayesdl.integrations.sklearn.base import BayesianEstimator
from bayesdl.integrations.sklearn.targets import Units
from bayesdl.likelihoods import Heteroscedastic, resolve
from bayesdl.predictive import Predictive


@final
class BayesianRegressor(RegressorMixin, BayesianEstimator):
    """A network for tables that is trained, made Bayesian and asked like a Gaussian-process regressor of scikit-learn.

        regressor = BayesianRegressor(random_state=0).fit(X, y)
        mean, std = regressor.predict(X_new, return_std=True)   # noise included
        regressor.predictive(X_new).epistemic                   # variance of the mean alone

    The network is trained on the evidence, which chooses its weight decay layer by layer, and the noise, from the
    training data alone (`bdl.EvidenceTrainer`). A Laplace posterior keeps what the evidence chose; other methods choose
    by their own defaults, or take the noise that was learned.

    Args:
        module: None for a perceptron of smooth units in float64; a function of the numbers of inputs and outputs that
            returns a network; or a network, copied and trained on from its weights (`steps=0`: as it is).
        method: name or object, as in `bdl.wrap`; "ensemble" trains `members` networks.
        likelihood: None is gaussian with a noise that is learned; "heteroscedastic", "poisson" (for counts), or an
            object such as `bdl.Gaussian(noise=...)`, in the units of y.
        prior: of the method; None lets it choose.
        hidden: widths of the perceptron's layers.
        steps, lr, batch_size: of Adam, whose rate falls to zero as a cosine.
        members: of an ensemble.
        standardize: whether the columns of X, and y under a Gaussian likelihood, are centred and scaled inside; None:
            for networks that are built here.
        random_state: of initialisation, batches and draws; no global state is touched.
        device: of training and prediction; None is the CPU.

    Attributes:
        bayes_: the `bdl.BayesianModel`, of rows as they come, and of targets in the units of `units_`.
        units_: mean and scale of the targets that the network learned.
        module_: the network, trained.
        n_features_in_, feature_names_in_: as everywhere.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train, and make Bayesian.

        Args:
            X: `(N, d)`, at least two rows.
            y: `(N,)` or `(N, D)`.

        Raises:
            BayesDLError: a parameter that is not accepted, or targets that the likelihood cannot produce.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2)
        likelihood = resolve("gaussian" if self.likelihood is None else self.likelihood)
        if likelihood.task not in ("regression", "count"):
            raise UnsupportedError(f"a {likelihood.name} likelihood is for classes; use BayesianClassifier")
        self._flat = y.ndim == 1
        targets = self._tensor(y.reshape(len(y), -1))
        self.units_ = Units.of(targets, likelihood, self._standardizes)
        outputs = targets.shape[1] * (2 if isinstance(likelihood, Heteroscedastic) else 1)
        self._fit(X, self.units_.standard(targets), outputs, self.units_.likelihood_in(likelihood))
        return self

    def predict(self, X: Any, return_std: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """The predictive mean, and with `return_std` its standard deviation, observation noise included.

        Returns:
            `(B,)` or `(B, D)` float64, as y was in `fit`; with `return_std` two of them.
        """
        found = self.predictive(X)
        mean = self._array(found.mean)
        return (mean, self._array(found.variance.sqrt())) if return_std else mean

    def _in_units(self, found: Predictive) -> Predictive:
        return self.units_.predictive(found)

    def _array(self, values: Any) -> np.ndarray:
        array = values.double().cpu().numpy()
        return array[:, 0] if self._flat else array

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
