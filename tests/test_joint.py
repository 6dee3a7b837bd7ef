"""Joint beliefs over several inputs: against dense Jacobians, exact regression, and the samples themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.joint import Joint
from bayesdl.linalg import JitterWarning
from bayesdl.model import BayesianModel
from bayesdl.posteriors import GaussianPosterior
from tests import oracles
from tests.cases import mlp, targets


def points(count: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)).double()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return mlp(outputs=3).double()


def wrapped(method: Any, likelihood: Any = "categorical", **options: Any) -> BayesianModel:
    x, y = points(8, 2), targets(likelihood if isinstance(likelihood, str) else likelihood.name, 3)
    arguments = {"prior": bdl.GaussianPrior(2.0), "progress": False, **options}
    return bdl.wrap(network(), method, [(x, y)], likelihood=likelihood, **arguments)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "lowrank"])
@pytest.mark.parametrize("chunk", [2, 100])
def test_covariance_is_that_of_the_linearised_network(
    structure: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bayes = wrapped(bdl.Laplace(structure=structure))
    posterior = bayes.posterior
    assert isinstance(posterior, GaussianPosterior)
    precision = posterior.structure.to_dense() + 2.0 * torch.eye(posterior.layout.numel, dtype=torch.float64)
    x, other = points(5), points(3, 7)
    jac, second = (oracles.jacobian(network(), p, posterior.layout.names) for p in (x, other))
    monkeypatch.setattr("bayesdl.posteriors.gaussian.chunk_size", lambda *_, **__: chunk)
    joint = bayes.joint(x)
    inverse = torch.linalg.inv(precision)
    close(joint.mean, oracles.outputs(network(), x))
    close(joint.covariance, torch.einsum("bcp,pq,deq->bcde", jac, inverse, jac))
    close(bayes.covariance(x, other), torch.einsum("bcp,pq,deq->bcde", jac, inverse, second))
    assert torch.equal(joint.matrix, joint.matrix.T)
    latent = bayes(x).latent
    close(joint.marginal.covariance, latent.covariance)
    close(joint.marginal.variance, latent.variance)


def test_regression_adds_noise_on_the_diagonal() -> None:
    noise = [0.3, 0.5, 0.7]
    bayes, x = wrapped("laplace", bdl.Gaussian(noise)), points()
    joint, alone = bayes.joint(x), bayes(x)
    expected = joint.matrix + torch.diag(torch.tensor(noise * 5, dtype=torch.float64) ** 2)
    close(joint.distribution.covariance_matrix, expected)
    close(joint.distribution.mean.view(5, 3), alone.mean)
    close(joint.distribution.variance.view(5, 3), alone.variance)


def test_latent_distribution_and_its_draws() -> None:
    # a single hidden-layer network: 15 outputs of 5 points have a covariance of full rank
    joint = wrapped(bdl.Laplace(structure="full")).joint(points())
    close(joint.latent.covariance_matrix, joint.matrix)
    close(joint.latent.mean, joint.mean.flatten())
    draws = joint.sample(20000, generator=torch.Generator().manual_seed(0)).flatten(1)
    # entries of an empirical correlation from 20,000 draws have standard deviation below 0.0071 sqrt(2): 0.06 is six
    # of them (failure rate below 2e-9 an entry over seeds; the seed is fixed)
    scale = joint.matrix.diagonal().sqrt()
    assert float(((torch.cov(draws.T) - joint.matrix) / scale / scale.unsqueeze(1)).abs().max()) < 0.06
    assert bool(((draws.mean(0) - joint.mean.flatten()).abs() < 6 * scale / 20000**0.5).all())


def test_singular_covariances_can_be_sampled() -> None:
    x = points(2).repeat(2, 1)  # every point twice
    joint = wrapped("laplace").joint(x)
    draws = joint.sample(3)
    # a root of the covariance at zero eigenvalues is exact to the square root of rounding
    torch.testing.assert_close(draws[:, :2], draws[:, 2:], rtol=1e-6, atol=1e-6)
    with pytest.warns(JitterWarning):
        assert bool(torch.isfinite(joint.latent.log_prob(joint.mean.flatten())))


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_drawn_functions_have_the_joint_moments(structure: str) -> None:
    # correlations as above: 2,000 draws have a standard deviation below 0.0224 sqrt(2), of which 0.19 is six
    # (failure rate below 2e-9 an entry over seeds; the seed is fixed)
    bayes, x = wrapped(bdl.Laplace(structure=structure)), points(3)
    joint = bayes.joint(x)
    functions = bayes.draw(2000, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([function(x) for function in functions]).flatten(1)
    scale = joint.matrix.diagonal().sqrt()
    assert float(((torch.cov(draws.T) - joint.matrix) / scale / scale.unsqueeze(1)).abs().max()) < 0.19
    assert bool(((draws.mean(0) - joint.mean.flatten()).abs() < 6 * scale / 2000**0.5).all())


def test_samples_have_their_empirical_joint() -> None:
    bayes, x = wrapped(bdl.Laplace(structure="diag", predictive="samples")), points()
    joint = bayes.joint(x, num_samples=7)
    samples = bayes(x, num_samples=7).latent.samples
    flat = (samples - samples.mean(0)).flatten(1)
    close(joint.matrix, flat.T @ flat / 7)
    other = points(3, 9)
    close(bayes.covariance(x, torch.cat([x, other]), num_samples=7)[:, :, :5], joint.covariance)
    ensemble = bdl.wrap([network(0), network(1)], "ensemble", likelihood="categorical")
    assert ensemble.joint(x).covariance.shape == (5, 3, 5, 3)
    point = bdl.wrap(network(), "map", likelihood="categorical").joint(x)
    assert not bool(point.covariance.any())


@pytest.mark.parametrize("intercept", ["flat", "proper", "none"])
def test_last_layer_regression_has_the_conjugate_joint(intercept: str) -> None:
    x, y = points(40, 2), torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    method = bdl.VBLL(intercept=intercept, tuning="evidence")
    bayes = bdl.wrap(network(), method, [(x, y)], likelihood="gaussian", progress=False)
    belief = bayes.posterior.belief
    trunk = network()[:-1]

    def design(inputs: Tensor) -> Tensor:
        phi = trunk(inputs).detach()
        return phi if intercept == "none" else torch.cat([phi, phi.new_ones(len(phi), 1)], 1)

    new, other, phi = points(5), points(3, 9), design(x)
    found = bayes.covariance(new, other)
    for k, (ratio, noise) in enumerate(zip(belief.regression.ratio, belief.regression.noise_variance, strict=True)):
        prior = ratio.expand(phi.shape[1]).clone()
        if intercept == "flat":
            prior[-1] = 0.0
        inverse = torch.linalg.inv(phi.mT @ phi + torch.diag(prior)) * noise
        close(found[:, k, :, k], design(new) @ inverse @ design(other).mT)
        found[:, k, :, k] = 0.0
    assert not bool(found.any())  # nothing between outputs
    joint = bayes.joint(new)
    close(joint.marginal.variance, bayes(new).latent.variance)
    inputs = new[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: bayes.joint(a).covariance, (inputs,), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("covariance", ["full", "diag", "shared", "precision"])
def test_last_layer_classifiers_have_a_joint(covariance: str) -> None:
    bayes = wrapped(bdl.VBLL(covariance=covariance))
    belief, x = bayes.posterior.belief, points()
    phi = network()[:-1](x).detach()
    phi = torch.cat([phi, phi.new_ones(5, 1)], 1) if belief.bias else phi
    joint = bayes.joint(x)
    dense = belief.covariance.dense().expand(3, -1, -1)
    for k in range(3):
        close(joint.covariance[:, k, :, k], belief.scale[1, k] * phi @ dense[k].to(phi) @ phi.mT)
    close(joint.marginal.variance, bayes(x).latent.variance)


def test_a_temperature_on_the_outputs_divides_twice() -> None:
    bayes = wrapped(bdl.Laplace(structure="diag", predictive="samples"))
    tuned, x = bayes.tune("heldout", [(points(8, 2), targets("categorical", 3))]), points()
    temperature = tuned.posterior.tensors()["temperature"]
    close(tuned.joint(x).covariance, bayes.joint(x).covariance / temperature**2)


def test_gradients_in_the_inputs() -> None:
    bayes = wrapped("laplace")
    x, other = points(3).requires_grad_(), points(2, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: bayes.joint(a).covariance, (x,), atol=1e-6, rtol=1e-4)
    assert torch.autograd.gradcheck(bayes.covariance, (x, other), atol=1e-6, rtol=1e-4)
    assert not bayes.joint(x.detach()).covariance.requires_grad


def test_moves_and_refusals() -> None:
    joint: Joint = wrapped("laplace").joint(points())
    assert joint.map(lambda t: t.float()).covariance.dtype is torch.float32
    with pytest.raises(UnsupportedError, match="categorical likelihood has no closed form; use .latent"):
        _ = joint.distribution
    with pytest.raises(ArgumentError, match="at least 1"):
        joint.sample(0)
