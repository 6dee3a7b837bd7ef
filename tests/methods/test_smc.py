"""Sequential Monte Carlo against the closed forms of linear-Gaussian models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.methods.potential import full_potential
from bayesdl.methods.smc import Cloud
from bayesdl.network import Network
from tests.untouched import untouched

NOISE, PRECISION, RUNS = 0.5, 2.0, 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def examples(count: int = 24) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 2, dtype=torch.float64, generator=seeded(1))
    return x, x.sin().sum(1, keepdim=True) + NOISE * torch.randn(count, 1, dtype=torch.float64, generator=seeded(2))


def options(seed: int = 0) -> dict[str, Any]:
    prior, likelihood = bdl.GaussianPrior(PRECISION), bdl.Gaussian(noise=NOISE)
    return {"prior": prior, "likelihood": likelihood, "generator": seeded(seed), "progress": False}


def closed_form(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and covariance of the last layer's four weights, and log p(y)."""
    phi = torch.cat([net[1](net[0](x)).detach(), torch.ones(len(x), 1)], 1)  # type: ignore[index]
    covariance = torch.linalg.inv(phi.T @ phi / NOISE**2 + PRECISION * torch.eye(4))
    marginal = NOISE**2 * torch.eye(len(x)).double() + phi @ phi.T / PRECISION
    law = torch.distributions.MultivariateNormal(torch.zeros(len(x)).double(), marginal)
    return covariance @ phi.T @ y.flatten() / NOISE**2, covariance, float(law.log_prob(y.flatten()))


def test_evidence_and_moments_of_a_last_layer() -> None:
    """Eight seeds: the mean of Z over its truth, and of means and variances, within 4 standard errors of the eight
    (Student's t with 7 degrees of freedom exceeds 4 once in 190; ten numbers; seeds fixed)."""
    x, y = examples()
    net = network()
    mean, covariance, truth = closed_form(net, x, y)
    ratios, offsets, spreads = [], [], []
    data = list(zip(x.split(9), y.split(9), strict=True))
    for seed in range(RUNS):
        with untouched(net):
            bayes = bdl.wrap(net, bdl.SMC(particles=256, moves=5), data, **options(seed))
        held, weights = bayes.posterior.snapshots, bayes.posterior.weights.double().unsqueeze(1)
        flat = torch.cat([held["2.weight"].flatten(1), held["2.bias"]], 1)
        ratios.append(math.exp(bayes.cost["log_evidence"] - truth))
        centre = (weights * flat).sum(0)
        offsets.append((centre - mean) / covariance.diagonal().sqrt())
        spreads.append((weights * (flat - mean).square()).sum(0) / covariance.diagonal())
    for found, expected, most in (
        (torch.tensor(ratios, dtype=torch.float64).unsqueeze(1), 1.0, 0.15),
        (torch.stack(offsets), 0.0, 0.1),
        (torch.stack(spreads), 1.0, 0.1),
    ):
        error = found.std(0) / RUNS**0.5
        assert bool((error < most).all()), error
        assert bool(((found.mean(0) - expected).abs() < 4 * error).all()), (found.mean(0), error)


def test_moves_leave_the_posterior_as_it_is() -> None:
    """From 4,000 exact draws: variances after 30 moves within 4.5 standard errors, sqrt(2 / 4000) each; seeds fixed."""
    x, y = examples()
    net = network()
    mean, covariance, _ = closed_form(net, x, y)
    view = Network(net, select="last_layer", example=x)
    potential = full_potential(view, bdl.Gaussian(noise=NOISE), bdl.GaussianPrior(PRECISION), [(x, y)])
    draws = torch.randn(4000, 4, dtype=torch.float64, generator=seeded(4)) @ torch.linalg.cholesky(covariance).T
    cloud = Cloud(potential, mean + draws, seeded(5))
    cloud._renew([(potential.held[0], 1.0)], 30)
    assert 0.3 < cloud.acceptance[0] < 0.8
    spread = (cloud.thetas - mean).square().mean(0) / covariance.diagonal()
    assert bool(((spread - 1).abs() < 4.5 * (2 / 4000) ** 0.5).all()), spread


@pytest.mark.parametrize("select", ["last_layer", "all"])
@pytest.mark.parametrize("prior", [bdl.GaussianPrior(PRECISION), bdl.StudentTPrior(df=4.0, scale=0.5)])
def test_many_particles_at_once_have_the_potential_of_each(select: str, prior: bdl.Prior) -> None:
    x, y = examples()
    view = Network(network(), select=select, example=x)
    data = [(x[:10], y[:10]), (x[10:], y[10:])]
    potential = full_potential(view, bdl.Gaussian(noise=NOISE), prior, data, join=False)
    thetas = torch.randn(5, len(potential.start), dtype=torch.float64, generator=seeded())
    together = sum(potential.log_likelihoods(thetas, batch) for batch in potential.held) + potential.log_priors(thetas)
    assert len(potential.held) == 2
    for theta, value in zip(thetas, together, strict=True):
        assert float(-potential(theta)) == pytest.approx(float(value), rel=1e-12)
    thetas[1, 0] = torch.inf
    broken = potential.log_likelihoods(thetas, potential.held[0]) + potential.log_priors(thetas)
    assert float(broken[1]) == -torch.inf and bool(torch.isfinite(broken[[0, 2, 3, 4]]).all())


def test_a_network_with_all_weights_stochastic() -> None:
    x, y = examples()
    bayes = bdl.wrap(network(), bdl.SMC(particles=16, moves=2, select="all"), [(x, y)], **options())
    assert len(bayes.posterior.snapshots) == 4 and len(bayes.posterior.weights) == 16
    assert bool(torch.isfinite(bayes(x).total).all())
    assert "log evidence" in str(bayes.diagnose())


@pytest.mark.parametrize(
    ("prior", "same"),
    [
        (bdl.GaussianPrior([PRECISION, 0.5]), bdl.GaussianPrior(torch.tensor([PRECISION] * 9 + [0.5] * 4))),
        (bdl.GaussianPrior({"0.weight": 1.0, "0.bias": 1.0, "2.weight": 3.0, "2.bias": 0.1}),
         bdl.GaussianPrior(torch.tensor([1.0] * 9 + [3.0] * 3 + [0.1]))),
    ],
)  # fmt: skip
def test_precisions_of_layers_and_names(prior: bdl.Prior, same: bdl.Prior) -> None:
    x, y = examples()
    method = bdl.SMC(particles=8, moves=1, select="all")
    one, other = (bdl.wrap(network(), method, [(x, y)], **{**options(), "prior": p}) for p in (prior, same))
    assert one.cost["log_evidence"] == pytest.approx(other.cost["log_evidence"], rel=1e-12)
    for name, value in one.posterior.snapshots.items():
        assert torch.allclose(value, other.posterior.snapshots[name], rtol=1e-9), name


@pytest.mark.parametrize("prior", [bdl.HierarchicalPrior(), bdl.LaplacePrior(0.5), bdl.CauchyPrior(0.3)])
def test_other_priors(prior: bdl.Prior) -> None:
    x, y = examples()
    bayes = bdl.wrap(network(), bdl.SMC(particles=16, moves=2), [(x, y)], **{**options(), "prior": prior})
    assert bool(torch.isfinite(bayes(x).mean).all()) and math.isfinite(bayes.cost["log_evidence"])


class Unsampled(bdl.Prior):
    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return -torch.stack([p.square().sum() for p in parameters.values()]).sum()


def test_a_prior_without_draws_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="Unsampled has a density and no way to draw from it"):
        bdl.wrap(network(), "smc", [examples()], **{**options(), "prior": Unsampled()})


def test_refusals() -> None:
    for bad, message in ((bdl.SMC(particles=3), "particles=3"), (bdl.SMC(moves=0), "moves=0")):
        with pytest.raises(ArgumentError, match=message):
            bdl.wrap(network(), bad, [examples()], **options())
