"""Predictions are differentiable in the inputs: against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.linalg import symmetric_root
from bayesdl.model import BayesianModel
from tests.cases import BY_NAME, real, targets

STRUCTURES: dict[str, Any] = {
    "full": "full",
    "diag": "diag",
    "kron": "kron",
    "ekfac": "ekfac",
    "lowrank": "lowrank",
    "mixed": {"0": "full", "*": "kron"},
}


def smooth(conv: bool = False) -> nn.Module:
    """Without kinks, which finite differences would meet."""
    torch.manual_seed(0)
    if conv:
        layers = [nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(), nn.BatchNorm2d(2), nn.AvgPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(8, 3)).double()
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)
    ).double()


def points(conv: bool, count: int = 6) -> Tensor:
    return torch.randn(count, *((1, 3, 3) if conv else (3,)), generator=torch.Generator().manual_seed(1)).double()


def wrapped(conv: bool, method: Any, likelihood: Any = "categorical", **options: Any) -> BayesianModel:
    x = points(conv, 12)
    y = targets(likelihood if isinstance(likelihood, str) else likelihood.name, 3, 12)
    arguments = {"prior": bdl.GaussianPrior(2.0), "progress": False, **options}
    return bdl.wrap(smooth(conv), method, [(x, y)], likelihood=likelihood, **arguments)


def check(function: Callable[[Tensor], Any], x: Tensor) -> None:
    assert torch.autograd.gradcheck(function, (x.clone().requires_grad_(),), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
@pytest.mark.parametrize("conv", [False, True])
def test_mean_and_covariance_of_the_outputs(structure: str, conv: bool) -> None:
    bayes = wrapped(conv, bdl.Laplace(structure=STRUCTURES[structure]))
    check(lambda x: (bayes(x).latent.mean, bayes(x).latent.covariance), points(conv, 2))


@pytest.mark.parametrize("link", ["probit", "mean_field", "bridge", "mc"])
def test_everything_a_classification_predictive_says(link: str) -> None:
    bayes = wrapped(True, "laplace", bdl.Categorical(link=link))
    check(lambda x: (bayes(x).mean, bayes(x).variance, bayes(x).entropy), points(True, 2))
    check(lambda x: (bayes(x).total, bayes(x).aleatoric, bayes(x).epistemic), points(True, 2))


def test_everything_a_regression_predictive_says() -> None:
    bayes = wrapped(False, bdl.Laplace(structure="full"), bdl.Gaussian(noise=[0.5, 0.4, 0.3]))
    check(lambda x: (bayes(x).mean, bayes(x).variance, bayes(x).entropy, bayes(x).epistemic), points(False, 2))
    check(lambda x: bayes(x).log_prob(torch.zeros(2, 3).double()), points(False, 2))


@pytest.mark.parametrize("samples", [1, 3])
def test_quantiles_of_a_regression(samples: int) -> None:
    method = bdl.SWAG(epochs=2, lr=0.01, rank=2, num_samples=samples)
    bayes = wrapped(False, method, bdl.Gaussian(noise=0.5), generator=torch.Generator().manual_seed(0))
    check(lambda x: (bayes(x).quantile(0.1), bayes(x).interval(0.8)), points(False, 2))


@pytest.mark.parametrize("select", ["last_layer", "0"])
def test_parts_of_a_network(select: str) -> None:
    bayes = wrapped(False, "laplace", select=select)
    check(lambda x: bayes(x).latent.covariance, points(False, 2))


@pytest.mark.parametrize("name", ["attention", "encoder_layer", "bare_parameters", "layer_norm", "instance_norm"])
def test_other_layers(name: str) -> None:
    case = BY_NAME[name]
    data = case.data()
    bayes = bdl.wrap(
        case.network(),
        bdl.Laplace(structure="diag"),
        [(data, targets("categorical"))],
        likelihood="categorical",
        prior=bdl.GaussianPrior(2.0),
        progress=False,
    )
    check(lambda x: bayes(x).latent.covariance, data[:2])


@pytest.mark.parametrize(
    "method",
    [
        bdl.MAP(),
        bdl.SWAG(epochs=2, lr=0.01, rank=2, num_samples=3),
        bdl.Laplace(structure="diag", predictive="samples"),
    ],
)
def test_methods_that_run_the_network(method: Any) -> None:
    bayes = wrapped(True, method, generator=torch.Generator().manual_seed(0))
    check(lambda x: (bayes(x).mean, bayes(x).entropy), points(True, 2))


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_drawn_functions(name: str) -> None:
    # the second has no forward mode for its fused attention: its products come from the layer factors
    case = BY_NAME[name]
    data = case.data()
    bayes = bdl.wrap(
        case.network(), "laplace", [(data, targets("categorical"))], likelihood="categorical", progress=False
    )
    check(bayes.draw(1)[0], data[:2] + 0.01)


def test_nothing_is_recorded_unless_asked() -> None:
    bayes, x = wrapped(False, "laplace"), points(False, 2)
    assert bayes(x).latent.covariance.grad_fn is None and not bayes(x).mean.requires_grad
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert not bayes(leaf).mean.requires_grad
    torch.testing.assert_close(bayes(leaf).variance, bayes(x).variance, rtol=1e-12, atol=1e-14)
    assert bayes(leaf).variance.requires_grad and not bayes.predict([leaf]).mean.requires_grad


def test_chunks_of_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    bayes, x = wrapped(False, "laplace"), points(False, 5)

    def slope() -> Tensor:
        leaf = x.clone().requires_grad_()
        bayes(leaf).epistemic.sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    whole = slope()
    monkeypatch.setattr("bayesdl.posteriors.gaussian.chunk_size", lambda *_, **__: 2)
    torch.testing.assert_close(slope(), whole, rtol=1e-10, atol=1e-12)


def test_symmetric_root_at_equal_and_zero_eigenvalues() -> None:
    # where a derivative through eigenvectors is infinite
    matrix = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    check(lambda a: symmetric_root(0.5 * (a + a.mT)), matrix)
    singular = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    symmetric_root(singular).sum().backward()
    assert singular.grad is not None and bool(torch.isfinite(singular.grad).all())


def test_real_valued_cases_are_what_they_say() -> None:
    assert real(4)(torch.Generator().manual_seed(1)).dtype is torch.float64
