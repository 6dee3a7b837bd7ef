from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import NotFittedError, UnsupportedError
from bayesdl.integrations.sklearn import from_skorch
from tests.untouched import untouched

X = np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32)
LABELS = (X[:, 0] > X[:, 1]).astype(np.int64)


@pytest.fixture(scope="module")
def skorch() -> Any:
    return pytest.importorskip("skorch", reason="the package whose nets are taken")


def fitted(kind: Any, module: nn.Module, y: np.ndarray, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(module, max_epochs=3, verbose=0, train_split=None, **options).fit(X, y)


def test_a_classifier(skorch: Any) -> None:
    net = fitted(skorch.NeuralNetClassifier, nn.Linear(3, 2), LABELS, criterion=nn.CrossEntropyLoss, batch_size=16)
    with untouched(net.module_):
        bayes = from_skorch(net, X, LABELS, bdl.Laplace(structure="full"), prior=bdl.GaussianPrior(1.0), progress=False)
    x, y = torch.as_tensor(X), torch.as_tensor(LABELS)
    ours = bdl.wrap(
        net.module_,
        bdl.Laplace(structure="full"),
        [(x, y)],
        likelihood="categorical",
        prior=bdl.GaussianPrior(1.0),
        progress=False,
    )
    torch.testing.assert_close(bayes(x).probs, ours(x).probs)
    torch.testing.assert_close(bayes(x).latent.variance, ours(x).latent.variance)


def test_a_regressor_that_shuffles(skorch: Any) -> None:
    y = X[:, :1] - X[:, 1:2]
    net = fitted(skorch.NeuralNetRegressor, nn.Linear(3, 1), y, iterator_train__shuffle=True)
    bayes = from_skorch(net, X, y, "vbll", progress=False)
    assert bayes.likelihood.name == "gaussian"
    assert bayes(torch.as_tensor(X)).mean.shape == (48, 1)


def test_refusals(skorch: Any) -> None:
    with pytest.raises(NotFittedError, match="call its fit"):
        from_skorch(skorch.NeuralNetClassifier(nn.Linear(3, 2)), X, LABELS)
    ends = nn.Sequential(nn.Linear(3, 2), nn.Softmax(-1))
    with pytest.raises(UnsupportedError, match="logits are needed"):
        from_skorch(fitted(skorch.NeuralNetClassifier, ends, LABELS), X, LABELS)
    odd = fitted(skorch.NeuralNetRegressor, nn.Linear(3, 1), X[:, :1], criterion=nn.HuberLoss)
    with pytest.raises(UnsupportedError, match="HuberLoss"):
        from_skorch(odd, X, X[:, :1])
