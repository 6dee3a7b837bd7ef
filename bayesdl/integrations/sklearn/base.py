"""What the classifier and the regressor share: parameters, training, wrapping, prediction, pickling."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from bayesdl.clone import independent_copy, unwrap
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.files import load
from bayesdl.integrations.sklearn.training import ROWS, Chunks, Recipe, Standardize, chunks, perceptron, train
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.methods import ELLA, VBLL, Ensemble, Laplace, Method, StudentT, SubsetGP, Temperature, VaLLA
from bayesdl.methods import resolve as resolve_method
from bayesdl.model import BayesianModel
from bayesdl.predictive import Predictive
from bayesdl.priors import GaussianPrior, Prior
from bayesdl.wrap import wrap

Factory = Callable[[int, int], nn.Module]

# These choose an open noise by something better than training residuals; the others get the one that was learned.
CHOOSE_NOISE = (Laplace, VBLL, StudentT, SubsetGP, ELLA, VaLLA)


class BayesianEstimator(BaseEstimator, ABC):
    """Base of `BayesianClassifier` and `BayesianRegressor`, which say what the parameters are."""

    def __init__(
        self,
        module: nn.Module | Factory | None = None,
        method: str | Method = "laplace",
        *,
        likelihood: str | Likelihood | None = None,
        prior: Prior | None = None,
        hidden: Sequence[int] = (64, 64),
        steps: int = 1000,
        lr: float = 1e-2,
        batch_size: int = 128,
        members: int = 5,
        standardize: bool | None = None,
        random_state: int | np.random.RandomState | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.module = module
        self.method = method
        self.likelihood = likelihood
        self.prior = prior
        self.hidden = hidden
        self.steps = steps
        self.lr = lr
        self.batch_size = batch_size
        self.members = members
        self.standardize = standardize
        self.random_state = random_state
        self.device = device

    @property
    def _standardizes(self) -> bool:
        # a network that somebody else has trained knows the units it was trained in
        return not isinstance(self.module, nn.Module) if self.standardize is None else self.standardize

    def predictive(self, X: Any) -> Predictive:
        """The whole predictive distribution at rows `X` `(B, d)`, in the units of the targets.

        Raises:
            sklearn.exceptions.NotFittedError: before `fit`.
        """
        check_is_fitted(self)
        rows = validate_data(self, X, reset=False, dtype=np.float64)
        found = self.bayes_.predict([(part,) for part in self._tensor(rows).split(ROWS)])
        return self._in_units(found)

    @abstractmethod
    def _in_units(self, found: Predictive) -> Predictive:
        """What the network's predictive says of the user's targets."""

    def _fit(self, X: np.ndarray, y: Tensor, outputs: int, likelihood: Likelihood) -> None:
        method = resolve_method(self.method)
        if isinstance(method, Temperature):
            raise UnsupportedError(
                'method="temperature" needs data that the network was not trained on; use '
                'CalibratedClassifierCV(FrozenEstimator(BayesianClassifier(method="map").fit(...)))'
            )
        recipe = Recipe(self.steps, self.lr, self.batch_size)
        x = self._tensor(X)
        cuda = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.inference_mode(False):
            torch.manual_seed(self._seed())
            networks, learned = [], []
            for _ in range(self.members if isinstance(method, Ensemble) else 1):
                network = self._network(x, outputs)
                x, y = _as_the_network(network, x, y)
                learned.append(train(network, x, y, likelihood, recipe) if recipe.steps else likelihood)
                networks.append(network.eval())
            self.bayes_ = self._wrapped(networks, method, likelihood, learned, chunks(x, y))
        self.module_ = networks[0]

    def _wrapped(
        self,
        networks: list[nn.Module],
        method: Method,
        likelihood: Likelihood,
        learned: list[Likelihood],
        data: Chunks,
    ) -> BayesianModel:
        chosen = likelihood if isinstance(method, CHOOSE_NOISE) else _pooled(learned)
        model = networks if len(networks) > 1 else networks[0]
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        by_evidence = isinstance(method, Laplace) and likelihood.task == "regression" and self.prior is None
        # for a network that was trained on the evidence, its prior and noise are those of the mode
        prior = GaussianPrior(1.0) if by_evidence else self.prior
        options: dict[str, Any] = {"generator": generator, "progress": False}
        bayes = wrap(model, method, data, likelihood=chosen, prior=prior, **options)
        return bayes.tune("evidence", prior="layer") if by_evidence else bayes

    def _network(self, x: Tensor, outputs: int) -> nn.Module:
        if isinstance(self.module, nn.Module):
            network = independent_copy(unwrap(self.module)).to(x.device)
        else:
            built = self._built(x.shape[1], outputs)
            network = built.to(x.device, x.dtype)
        return nn.Sequential(Standardize(x), network) if self._standardizes else network

    def _built(self, inputs: int, outputs: int) -> nn.Module:
        if self.module is None:
            return perceptron(inputs, outputs, self.hidden)
        built = self.module(inputs, outputs) if callable(self.module) else None
        if not isinstance(built, nn.Module):
            raise ArgumentError(
                f"module={self.module!r}; expected None, a torch.nn.Module, or a function of the numbers of inputs and "
                "outputs that makes one"
            )
        return built

    def _tensor(self, values: np.ndarray) -> Tensor:
        device = torch.device("cpu" if self.device is None else self.device)
        wide = torch.float32 if device.type == "mps" else torch.float64
        if isinstance(getattr(self, "module_", None), nn.Module):
            wide = next(self.module_.parameters()).dtype
        return torch.tensor(values, dtype=wide, device=device)  # a copy: arrays of joblib cannot be written to

    def _seed(self) -> int:
        if self.random_state is None:  # NumPy's global state is left alone
            return int(np.random.default_rng().integers(2**31))
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if isinstance(state.get("bayes_"), BayesianModel):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "bayes.safetensors"
                state["bayes_"].save(file)
                state["bayes_"] = file.read_bytes(), state["bayes_"].likelihood
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "bayes_" in state:
            content, likelihood = state["bayes_"]
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "bayes.safetensors"
                file.write_bytes(content)
                state = {**state, "bayes_": load(file, state["module_"], likelihood=likelihood)}
        super().__setstate__(state)


def _as_the_network(network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = next(network.parameters()).dtype
    return x.to(dtype), y.to(dtype) if y.is_floating_point() else y


def _pooled(likelihoods: list[Likelihood]) -> Likelihood:
    """One likelihood for an ensemble: noise variances averaged."""
    first, noises = likelihoods[0], [family.noise for family in likelihoods if isinstance(family, Gaussian)]
    if not isinstance(first, Gaussian) or any(noise is None for noise in noises):
        return first
    return first.with_noise(torch.stack([torch.as_tensor(noise).square() for noise in noises]).mean(0).sqrt())
