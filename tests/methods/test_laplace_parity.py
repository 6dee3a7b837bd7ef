"""The same numbers as laplace-torch, on the cells where it is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.model import BayesianModel
from bayesdl.posteriors import GaussianPosterior
from tests.cases import real, targets

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]  # the peer's own

# without a bias: the peer treats its positions as independent data, where the library keeps its exact block
CONV = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
DENSE = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
NOISE = 0.7


@pytest.fixture(autouse=True)
def double() -> Any:
    # the peer makes its own tensors in the default dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def problem(name: str, task: str) -> tuple[nn.Module, Tensor, Tensor]:
    net = {"mlp": DENSE, "conv": CONV}[name].eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=g))
    x = real(4)(g) if name == "mlp" else real(1, 3, 3)(g)
    return net, x, targets("categorical" if task == "classification" else "gaussian")


def peer(net: nn.Module, x: Tensor, y: Tensor, task: str, subset: str, structure: str) -> Any:
    laplace = pytest.importorskip("laplace")
    noise = {"sigma_noise": NOISE} if task == "regression" else {}
    fitted = laplace.Laplace(
        net, task, subset_of_weights=subset, hessian_structure=structure, prior_precision=2.0, **noise
    )
    fitted.fit(DataLoader(TensorDataset(x, y), batch_size=3))
    return fitted


def ours(net: nn.Module, x: Tensor, y: Tensor, task: str, subset: str, structure: str) -> BayesianModel:
    likelihood = "categorical" if task == "classification" else bdl.Gaussian(NOISE)
    method = bdl.Laplace(select=subset, structure=structure, bias="separate" if structure == "kron" else "joint")
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    return bdl.wrap(net, method, loader, likelihood=likelihood, prior=bdl.GaussianPrior(2.0), progress=False)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_curvature_evidence_and_predictions(name: str, subset: str, task: str, structure: str) -> None:
    net, x, y = problem(name, task)
    theirs, mine = peer(net, x, y, task, subset, structure), ours(net, x, y, task, subset, structure)
    assert isinstance(mine.posterior, GaussianPosterior)
    torch.testing.assert_close(
        mine.log_evidence(), theirs.log_marginal_likelihood().squeeze().detach(), rtol=1e-8, atol=1e-8
    )
    mean, covariance = theirs._glm_predictive_distribution(x)
    latent = mine(x).latent
    torch.testing.assert_close(latent.mean, mean.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(latent.covariance, covariance.detach(), rtol=1e-6, atol=1e-8)
    if task == "classification":
        probs = theirs(x, pred_type="glm", link_approx="probit")
        torch.testing.assert_close(mine(x).probs, probs.detach(), rtol=1e-8, atol=1e-8)
