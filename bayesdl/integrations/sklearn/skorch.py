"""Networks that skorch has trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bayesdl.batch import resolve_adapter
from bayesdl.errors import NotFittedError, UnsupportedError
from bayesdl.likelihoods import Likelihood, resolve
from bayesdl.methods import Method
from bayesdl.model import BayesianModel
from bayesdl.network import Network, first_inputs
from bayesdl.wrap import wrap

# criterion -> the likelihood whose negative log density it is, but for constants
CRITERIA: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "categorical",
    nn.NLLLoss: "categorical",
    nn.BCEWithLogitsLoss: "bernoulli",
    nn.MSELoss: "gaussian",
    nn.PoissonNLLLoss: "poisson",
}


def from_skorch(
    net: Any,
    X: Any,
    y: Any,
    method: str | Method = "laplace",
    *,
    likelihood: str | Likelihood | None = None,
    **options: Any,
) -> BayesianModel:
    """Make a trained skorch net Bayesian, on the batches that it makes of `X` and `y`.

        net = NeuralNetClassifier(Module, criterion=torch.nn.CrossEntropyLoss).fit(X, y)
        bayes = from_skorch(net, X, y)

    Args:
        net: a fitted `skorch.NeuralNet`; its module stays as it is.
        X, y: the data it was trained on, as they were given to its `fit`.
        method: as in `bdl.wrap`.
        likelihood: None: that of the net's criterion.
        options: of `bdl.wrap`, `validation=` and `prior=` among them.

    Raises:
        NotFittedError: the net has no module yet.
        UnsupportedError: the module gives probabilities instead of logits, or its criterion belongs to no likelihood.
    """
    if not getattr(net, "initialized_", False):
        raise NotFittedError("this skorch net has no module yet; call its fit first")
    family = _of_criterion(net) if likelihood is None else resolve(likelihood)
    loader = net.get_iterator(net.get_dataset(X, y), training=True)
    if family.task == "classification":
        _refuse_probabilities(net.module_, loader)
    return wrap(net.module_, method, loader, likelihood=family, **options)


def _of_criterion(net: Any) -> Likelihood:
    name = CRITERIA.get(type(net.criterion_))
    if name is None:
        raise UnsupportedError(
            f"the criterion {type(net.criterion_).__name__} belongs to no likelihood that is known; pass likelihood="
        )
    return resolve(name)


def _refuse_probabilities(module: nn.Module, loader: Iterable[Any]) -> None:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a shuffling iterator draws an order
        outputs = Network(module)(first_inputs(loader, resolve_adapter(None)))
    sums = outputs.sum(-1)
    if bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise UnsupportedError(
            "the module's outputs are probabilities, and logits are needed: take the softmax off its end and train it "
            "with criterion=torch.nn.CrossEntropyLoss"
        )
