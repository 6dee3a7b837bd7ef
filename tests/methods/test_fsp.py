"""FSP-Laplace against Gaussian-process regression and dense precisions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError
from bayesdl.functional import GP, Fixed, LogNormal, energy
from bayesdl.functional.gp import function_root
from bayesdl.posteriors import SpannedPosterior
from tests import oracles
from tests.untouched import untouched

NOISE, JITTER = 0.3, 1e-4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(width=30, outputs=2, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, outputs)).to(dtype)


def points(count, seed=0):
    """Spread out, so that the kernel has full rank."""
    return (torch.linspace(-3, 3, count) + 0.1 * torch.rand(count, generator=generator(seed))).unsqueeze(1).double()


def wrapped(net, context, data, likelihood=None, **options):
    likelihood = bdl.Gaussian(NOISE) if likelihood is None else likelihood
    outputs = net(context[:1]).shape[1]
    target = options.pop("target", GP("matern32", lengthscale=1.5, variance=2.0, outputs=outputs))
    method = bdl.FSPLaplace(target, context, jitter=JITTER, **{"widest": math.inf, **options})
    return bdl.wrap(net, method, data, likelihood=likelihood, progress=False)


def regression(x, outputs=2):
    noise = torch.randn(len(x), outputs, generator=generator(5), dtype=torch.float64)
    return torch.cat([x.sin(), x.cos()], 1)[:, :outputs] + NOISE * noise


def dense_prior(net, context, target):
    """J_C^T K^-1 J_C `(P, P)`, and J_C."""
    names = list(dict(net.named_parameters()))
    jac = oracles.jacobian(net, context, names)  # (M, C, P)
    root = function_root(target, context, JITTER)
    kernel = root @ root.mT
    return torch.einsum("mcp,mn,ncq->pq", jac, torch.linalg.inv(kernel), jac), jac


def test_at_the_context_points_it_is_gaussian_process_regression():
    """Where the network has the weights for it (here 152 for 14 values), whatever the network is."""
    net, context = network(), points(7)
    target = GP("matern32", lengthscale=1.5, variance=2.0, outputs=2)
    chosen = torch.tensor([0, 2, 5])
    x = context[chosen]
    with untouched(net):
        bayes = wrapped(net, context, [(x[:2], regression(x)[:2]), (x[2:], regression(x)[2:])])
    root = function_root(target, context, JITTER)
    kernel = root @ root.mT
    across, inner = kernel[:, chosen], kernel[chosen][:, chosen] + NOISE**2 * torch.eye(3).double()
    expected = kernel - across @ torch.linalg.solve(inner, across.mT)
    joint = bayes.covariance(context, context)
    for c in range(2):
        torch.testing.assert_close(joint[:, c, :, c], expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(joint[:, 0, :, 1], torch.zeros_like(expected), rtol=0, atol=1e-8)
    torch.testing.assert_close(bayes(context).latent.variance, expected.diagonal()[:, None].expand(-1, 2))
    torch.testing.assert_close(bayes(context).latent.mean, net(context).detach())
    # the evidence's determinant is that of the regression: log|I + K / noise^2|, both outputs
    posterior = bayes.posterior
    assert isinstance(posterior, SpannedPosterior)
    determinant = 2 * torch.logdet(inner / NOISE**2)
    torch.testing.assert_close(torch.log1p(posterior.gains).sum(), determinant, rtol=1e-8, atol=0)


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_against_the_dense_precision(likelihood):
    """Fewer weights than values at the context points; directions wider than 30 under the prior are left out."""
    net, context, x = network(3), points(20), points(12, 1)
    new = torch.tensor([[-4.0], [0.2], [2.7]]).double()
    if likelihood == "categorical":
        y, given = torch.arange(12) % 2, "categorical"
    else:
        y, given = regression(x), bdl.Gaussian(NOISE)
    bayes = wrapped(net, context, [(x[:8], y[:8]), (x[8:], y[8:])], given, widest=30.0)
    target = GP("matern32", lengthscale=1.5, variance=2.0, outputs=2)
    prior, _ = dense_prior(net, context, target)
    names = list(dict(net.named_parameters()))
    jac = oracles.jacobian(net, x, names)
    data = oracles.ggn(jac, oracles.lambda_formula(likelihood, net(x).detach(), NOISE))
    values, vectors = torch.linalg.eigh(prior)
    basis = vectors[:, values > 30.0**-2]
    assert len(bayes.posterior.gains) == basis.shape[1] < len(prior)
    rows, precision = oracles.jacobian(net, new, names) @ basis, basis.mT @ (prior + data) @ basis
    expected = oracles.linearized_covariance(rows, precision)
    torch.testing.assert_close(bayes(new).latent.covariance, expected, rtol=1e-7, atol=1e-9)


def test_more_weights_than_values_stay_in_the_span():
    net, context, x = network(30), points(6), points(9, 1)
    bayes = wrapped(net, context, [(x, regression(x))])
    prior, jac = dense_prior(net, context, GP("matern32", lengthscale=1.5, variance=2.0, outputs=2))
    names = list(dict(net.named_parameters()))
    basis = torch.linalg.qr(jac.flatten(0, 1).mT).Q
    precision = (
        basis.mT
        @ (prior + oracles.ggn(oracles.jacobian(net, x, names), (torch.eye(2) / NOISE**2).double().expand(9, 2, 2)))
        @ basis
    )
    new = torch.tensor([[-4.0], [0.2]]).double()
    rows = oracles.jacobian(net, new, names) @ basis
    torch.testing.assert_close(
        bayes(new).latent.covariance, oracles.linearized_covariance(rows, precision), rtol=1e-6, atol=1e-9
    )


class Features(nn.Module):
    """A model that is linear in its weights."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 1, bias=False).double()

    def forward(self, x):
        return self.head(torch.cat([x, x.square(), x.sin(), torch.ones_like(x)], 1))


def test_the_evidence_of_a_linear_model_is_exact():
    net, context, x = Features(), points(12), points(9, 1)
    y = regression(x, 1)
    target = GP("matern32", lengthscale=1.5, variance=2.0)
    prior, _ = dense_prior(net, context, target)
    rows = oracles.jacobian(net, x, ["head.weight"])[:, 0]

    def mode(noise):
        return torch.linalg.solve(prior + rows.mT @ rows / noise**2, rows.mT @ y / noise**2)[:, 0]

    with torch.no_grad():
        net.head.weight.copy_(mode(NOISE).unsqueeze(0))
    covariance = rows @ torch.linalg.solve(prior, rows.mT) + NOISE**2 * torch.eye(9).double()
    exact = torch.distributions.MultivariateNormal(torch.zeros(9).double(), covariance).log_prob(y[:, 0])
    bayes = wrapped(net, context, [(x, y)])
    torch.testing.assert_close(bayes.log_evidence(), exact, rtol=1e-8, atol=0)
    free = wrapped(net, context, [(x, y)], "gaussian")
    level = free.posterior.noise.clone().requires_grad_()
    (slope,) = torch.autograd.grad(free.posterior.log_evidence(level), level)
    assert abs(float(slope)) < 1e-4
    assert float(free.likelihood.noise) == float(free.posterior.noise)
    for factor in (0.8, 1.25):
        assert float(free.posterior.log_evidence(factor * free.posterior.noise)) < float(free.log_evidence())


def test_draws_have_the_posterior_covariance_and_are_functions():
    net, context, x = network(12, 1), points(6), points(9, 1)
    bayes = wrapped(net, context, [(x, regression(x, 1))])
    new = points(4, 2)
    functions = bayes.draw(3000, generator=generator(1))
    values = torch.stack([f(new)[:, 0] for f in functions])
    assert torch.equal(functions[0](new), functions[0](new))
    torch.testing.assert_close(functions[0](new[:2]), functions[0](new)[:2])
    expected = bayes.covariance(new, new)[:, 0, :, 0]
    centred = values - net(new).detach()[:, 0]
    error = ((expected.diagonal()[:, None] * expected.diagonal() + expected.square()) / 3000).sqrt()
    # ten entries at five standard errors: fails by chance less than once in 100,000 seeds
    assert bool(((centred.mT @ centred / 3000 - expected).abs() < 5 * error).all())


def test_batches_files_and_dtypes(tmp_path):
    net, context, x = network(10, dtype=torch.float32), points(15).float(), points(20, 1).float()
    data = [(x, regression(x.double()).float())]
    bayes = wrapped(net, context, data)
    whole = bayes(x)
    parts = [bayes(x[:7]), bayes(x[7:])]
    torch.testing.assert_close(torch.cat([p.latent.variance for p in parts]), whole.latent.variance)
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", net)
    assert torch.equal(again(x).latent.variance, whole.latent.variance)
    assert float(again.log_evidence()) == float(bayes.log_evidence())
    exact = wrapped(network(10), context.double(), [(x.double(), data[0][1].double())])
    assert whole.latent.variance.dtype == torch.float32
    torch.testing.assert_close(whole.latent.variance.double(), exact(x.double()).latent.variance, rtol=1e-3, atol=1e-6)
    leaf = x[:3].clone().requires_grad_()
    (slope,) = torch.autograd.grad(bayes(leaf).latent.variance.sum(), leaf)
    step = torch.full_like(leaf, 1e-3)
    numeric = (bayes(x[:3] + step).latent.variance.sum(1) - bayes(x[:3] - step).latent.variance.sum(1)) / 2e-3
    torch.testing.assert_close(slope[:, 0], numeric, rtol=2e-2, atol=1e-3)


def test_chosen_points_and_images():
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)).double()
    images = torch.randn(12, 1, 6, 6, generator=generator()).double()
    target = GP(lengthscale=5.0, outputs=2)
    bayes = bdl.wrap(
        conv, bdl.FSPLaplace(target), [(images, torch.arange(12) % 2)], likelihood="categorical", progress=False
    )
    assert "12 context points" in str(bayes.diagnose())
    variance = bayes(images).latent.variance
    assert bool((variance > 0).all()) and bool((variance <= 1.0 + 1e-5).all())  # never above the process's own


def test_energy_is_the_negative_log_density_of_the_process():
    target, x = GP("matern52", lengthscale=0.7, variance=1.3, outputs=2), points(5)
    values = torch.randn(5, 2, generator=generator(2)).double().requires_grad_()
    root = function_root(target, x, 1e-3)
    normal = torch.distributions.MultivariateNormal(torch.zeros(5).double(), scale_tril=root)
    zero = torch.zeros(5).double()
    expected = sum(normal.log_prob(zero) - normal.log_prob(values[:, c]) for c in range(2))
    torch.testing.assert_close(energy(target, x, values, 1e-3), expected)
    (slope,) = torch.autograd.grad(energy(target, x, values, 1e-3), values)
    torch.testing.assert_close(slope, torch.linalg.inv(root @ root.mT) @ values.detach())


def test_refusals():
    net, x = network(4, 1), points(6)
    data = [(x, regression(x, 1))]
    options = {"likelihood": bdl.Gaussian(NOISE), "progress": False}
    with pytest.raises(ArgumentError, match="target=None"):
        bdl.wrap(net, bdl.FSPLaplace(), data, **options)
    with pytest.raises(ArgumentError, match="numbers for lengthscale"):
        bdl.wrap(net, bdl.FSPLaplace(GP(lengthscale=LogNormal(0.0, 1.0))), data, **options)
    with pytest.raises(ArgumentError, match="prior=GaussianPrior"):
        bdl.wrap(net, bdl.FSPLaplace(GP()), data, prior=bdl.GaussianPrior(1.0), **options)
    with pytest.raises(ShapeError, match="the target 2"):
        bdl.wrap(net, bdl.FSPLaplace(GP(outputs=2), x), data, **options)
    with pytest.raises(ArgumentError, match="widest=0"):
        bdl.wrap(net, bdl.FSPLaplace(GP(), Fixed(x), widest=0), data, **options)
    with pytest.raises(ArgumentError, match="jitter=-1"):
        energy(GP(), x, torch.zeros(6, 1), -1.0)
    with pytest.raises(ShapeError, match="points, outputs"):
        energy(GP(outputs=2), x, torch.zeros(6, 1))
    bayes = bdl.wrap(net, bdl.FSPLaplace(GP(), x), data, **options)
    with pytest.raises(UnsupportedError):
        bayes.tune("evidence")
