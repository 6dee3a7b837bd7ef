"""Posteriors cross over to laplace-torch and back with the same covariances, evidence and probabilities."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.errors import ArgumentError, StaleModelError, UnsupportedError
from bayesdl.integrations.laplace_torch import from_laplace, to_laplace
from bayesdl.model import BayesianModel
from bayesdl.posteriors import GaussianPosterior
from tests.untouched import untouched

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]  # the peer's own
STRUCTURES = ["full", "diag", "kron"]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    # the peer makes its own tensors in the default dtype
    pytest.importorskip("laplace", exc_type=ImportError)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    ).eval()


def data(task: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(12, 1, 3, 3, generator=g)
    y = torch.randint(0, 3, (12,), generator=g) if task == "classification" else torch.randn(12, 3, generator=g)
    return x, y


def loader(task: str) -> Any:
    return DataLoader(TensorDataset(*data(task)), batch_size=5)


def peer(net: nn.Module, task: str, subset: str, structure: str, **options: Any) -> Any:
    from laplace import Laplace

    extra = {"sigma_noise": 0.7} if task == "regression" else {}
    la = Laplace(net, task, subset, structure, **{"prior_precision": 2.0, **extra, **options})
    la.fit(loader(task))
    return la


def same(bayes: BayesianModel, la: Any, task: str) -> None:
    x = data(task)[0]
    mean, covariance = la._glm_predictive_distribution(x)
    latent = bayes(x).latent
    torch.testing.assert_close(latent.mean, mean.detach())
    torch.testing.assert_close(latent.covariance, covariance.detach(), rtol=1e-9, atol=1e-12)
    if task == "classification":
        torch.testing.assert_close(bayes(x).probs, la(x, pred_type="glm", link_approx="probit").detach())
    if la.temperature == 1.0:
        torch.testing.assert_close(bayes.log_evidence(), la.log_marginal_likelihood().detach().squeeze())


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_there_and_back(task: str, subset: str, structure: str, temperature: float) -> None:
    la = peer(network(), task, subset, structure, temperature=temperature, prior_mean=0.1)
    with untouched(la.model):
        bayes = from_laplace(la, loader(task))
    same(bayes, la, task)
    assert bayes.method_name == "laplace" and bayes.posterior.over_weights
    back = to_laplace(bayes)
    same(bayes, back, task)
    torch.testing.assert_close(back.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_prior_precision_per_layer_or_parameter_keeps_its_places(structure: str) -> None:
    net = network()
    sizes = [len(list(net.parameters())) if structure == "kron" else sum(p.numel() for p in net.parameters())]
    if structure != "kron":
        sizes.append(len(list(net.parameters())))
    for size in sizes:
        la = peer(network(), "classification", "all", structure, prior_precision=torch.linspace(0.5, 9.0, size))
        bayes = from_laplace(la, loader("classification"))
        same(bayes, la, "classification")
        same(bayes, to_laplace(bayes), "classification")


def test_a_prior_mean_per_parameter_keeps_its_places() -> None:
    size = sum(p.numel() for p in network().parameters())
    la = peer(network(), "classification", "all", "diag", prior_mean=torch.linspace(-1.0, 1.0, size))
    bayes = from_laplace(la, loader("classification"))
    same(bayes, la, "classification")
    same(bayes, to_laplace(bayes), "classification")


def test_frozen_parameters_stay_out() -> None:
    net = network()
    net[0].requires_grad_(False)
    la = peer(net, "classification", "all", "kron")
    bayes = from_laplace(la, loader("classification"))
    assert list(bayes.network.names) == ["3.weight", "3.bias", "5.weight", "5.bias"]
    same(bayes, la, "classification")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_was_fitted_here_is_the_same_there(structure: str) -> None:
    net = network()
    method = bdl.Laplace(structure=structure, bias="separate")
    bayes = bdl.wrap(net, method, loader("regression"), likelihood=bdl.Gaussian(0.3), prior=bdl.GaussianPrior(0.8))
    la = to_laplace(bayes)
    same(bayes, la, "regression")
    assert type(la).__name__.lower() == f"{structure}laplace"
    with torch.no_grad():
        la.model[5].weight.add_(1.0)  # a copy: neither the user's network nor the model's own is written to
    assert torch.equal(network()[5].weight, net[5].weight)
    same(bayes, to_laplace(bayes), "regression")


def test_the_empirical_fisher_of_a_regression_keeps_the_peers_scale() -> None:
    from laplace.curvature import CurvlinopsEF

    la = peer(network(), "regression", "all", "full", backend=CurvlinopsEF)
    bayes = from_laplace(la, loader("regression"))
    same(bayes, la, "regression")


def test_imported_models_can_be_tuned_and_saved(tmp_path: Any) -> None:
    net = network()
    bayes = from_laplace(peer(copy.deepcopy(net), "regression", "all", "kron"), loader("regression"))
    for rule in ("evidence", "loo", "training"):
        tuned = bayes.tune(rule)
        assert isinstance(tuned.posterior, GaussianPosterior)
        assert float(tuned.posterior.precision) != 2.0
    bayes.save(tmp_path / "b.safetensors")
    x = data("regression")[0]
    torch.testing.assert_close(bdl.load(tmp_path / "b.safetensors", net)(x).variance, bayes(x).variance)


def test_refusals() -> None:
    from laplace import Laplace

    every = loader("classification")
    with pytest.raises(ArgumentError, match="not fitted"):
        from_laplace(Laplace(network(), "classification", "all", "diag"), every)
    with pytest.raises(UnsupportedError, match="damping"):
        from_laplace(peer(network(), "classification", "all", "kron", damping=True), every)
    with pytest.raises(UnsupportedError, match="Sequential"):
        from_laplace(network(), every)
    la = peer(network(), "classification", "all", "diag")
    with torch.no_grad():
        la.model[5].weight.add_(1.0)
    with pytest.raises(StaleModelError, match="fit it again"):
        from_laplace(la, every)
    options = {"prior": bdl.GaussianPrior(1.0), "progress": False}
    joint = bdl.wrap(network(), "laplace", every, likelihood="categorical", **options)
    with pytest.raises(UnsupportedError, match='bias="separate"'):
        to_laplace(joint)
    mixed = bdl.wrap(network(), bdl.Laplace(structure="lowrank"), every, likelihood="categorical", **options)
    with pytest.raises(UnsupportedError, match="'lowrank' has no counterpart"):
        to_laplace(mixed)
    with pytest.raises(UnsupportedError, match="linearised"):
        to_laplace(bdl.wrap(network(), "map", likelihood="categorical"))
    noises = bdl.Gaussian(torch.tensor([0.1, 0.2, 0.3]))
    several = bdl.wrap(network(), bdl.Laplace(structure="diag"), loader("regression"), likelihood=noises, **options)
    with pytest.raises(UnsupportedError, match="one noise"):
        to_laplace(several)
