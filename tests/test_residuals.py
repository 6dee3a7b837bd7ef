"""Findings that need data: each fires where it should, with the right number, and not on a healthy model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature.registry import STRUCTURES
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.model import BayesianModel
from bayesdl.posteriors import GaussianPosterior
from bayesdl.residuals import observe
from tests import oracles

NOISE, PRECISION = 0.4, 0.8


def regression(count: int = 40, degree: int = 3) -> tuple[Tensor, Tensor]:
    """Powers of one input, and a cubic with noise."""
    g = torch.Generator().manual_seed(0)
    t = torch.linspace(-1, 1, count, dtype=torch.float64)
    x = torch.stack([t**k for k in range(degree + 1)], 1)
    return x, (1.0 - t + 2.0 * t**3 + NOISE * torch.randn(count, dtype=torch.float64, generator=g)).unsqueeze(1)


def mode(x: Tensor, y: Tensor, precision: float = PRECISION) -> nn.Module:
    """The linear network at the mode of its log joint."""
    net = nn.Linear(x.shape[1], 1, bias=False).double()
    oracle = oracles.BayesianLinearRegression(x, y, precision, torch.tensor([NOISE], dtype=torch.float64))
    with torch.no_grad():
        net.weight.copy_(oracle.mean.unsqueeze(0))
    return net


def wrapped(net: nn.Module, data: Any, precision: float = PRECISION, **options: Any) -> BayesianModel:
    prior = bdl.GaussianPrior(precision=precision)
    method = bdl.Laplace(**options)
    return bdl.wrap(net, method, data, likelihood=bdl.Gaussian(NOISE), prior=prior, progress=False)


def observed(model: BayesianModel, data: Any) -> Any:
    assert isinstance(model.posterior, GaussianPosterior)
    return observe(model, model.posterior, data, progress=False)


def warned(model: BayesianModel, data: Any, text: str) -> bool:
    found = [finding for finding in model.diagnose(data).warnings if text in finding.text]
    assert all(finding.action for finding in found)
    return bool(found)


def classification(count: int = 60) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, dtype=torch.float64, generator=g)
    return x, (x[:, 0] + 0.5 * torch.randn(count, dtype=torch.float64, generator=g) > 0).long()


def trained(net: nn.Module, x: Tensor, y: Tensor, decay: float, steps: int = 300) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.requires_grad_(False)


def mlp(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)).double()


def test_a_healthy_regression() -> None:
    x, y = regression()
    data = [(x[:15], y[:15]), (x[15:], y[15:])]
    for structure in ("full", "kron", "lowrank"):
        assert wrapped(mode(x, y), data, structure=structure).diagnose(data).warnings == ()
    seen = observed(wrapped(mode(x, y), data, structure="full"), data)
    assert seen.step < 1e-9 and seen.count == 40


def test_a_healthy_classifier() -> None:
    x, y = classification()
    net = trained(mlp(3), x, y, decay=1.0 / 60)
    prior = bdl.GaussianPrior(precision=1.0)
    bayes = bdl.wrap(net, "laplace", [(x, y)], likelihood="categorical", prior=prior, progress=False)
    diagnosis = bayes.diagnose([(x, y)])
    assert diagnosis.warnings == ()
    texts = [finding.text for finding in diagnosis.findings]
    assert any(text.startswith("the mode lies") for text in texts)
    assert any(text.startswith("loss per observation") for text in texts)
    assert any(text.startswith("variance of the outputs") for text in texts)


def test_weights_that_are_not_the_mode() -> None:
    x, y = regression()
    net = mode(x, y)
    with torch.no_grad():
        net.weight.add_(1.0)
    bayes = wrapped(net, [(x, y)], structure="full")
    assert warned(bayes, [(x, y)], "the mode lies") and not bayes.diagnose().warnings
    # a quadratic log joint: the Newton step's gain is exact
    oracle = oracles.BayesianLinearRegression(x, y, PRECISION, torch.tensor([NOISE], dtype=torch.float64))
    off = net.weight.detach().flatten() - oracle.mean
    gain = 0.5 * float(off @ oracle.posterior_precision @ off)
    seen = observed(bayes, [(x, y)])
    assert seen.gain == pytest.approx(gain, rel=1e-8)
    assert seen.step == pytest.approx((2 * gain / len(off)) ** 0.5, rel=1e-8)


def test_a_prior_chosen_as_a_width_says_so() -> None:
    # classifiers trained without a prior: the default rule narrows the posterior around the weights on purpose
    x, y = classification(200)
    net = trained(mlp(8), x, y, decay=0.0)
    bayes = bdl.wrap(net, "laplace", [(x, y)], likelihood="categorical", progress=False)
    posterior = bayes.posterior
    assert isinstance(posterior, GaussianPosterior)
    narrow = bayes.replaced(posterior=posterior.with_prior(torch.tensor(1e3, dtype=torch.float64)))
    assert not warned(narrow, [(x, y)], "the mode lies")
    assert any("a width around the weights" in finding.text for finding in narrow.diagnose([(x, y)]).findings)
    given = bdl.GaussianPrior(precision=1e3)
    plain = bdl.wrap(net, "laplace", [(x, y)], likelihood="categorical", prior=given, progress=False)
    assert warned(plain, [(x, y)], "the mode lies")


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("elements", [False, True])
def test_gradient_of_a_convolutional_network(elements: bool, temperature: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double()
    x, y = torch.randn(9, 1, 5, 5, dtype=torch.float64), torch.randint(0, 3, (9,))
    marks = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in net.named_parameters()}
    if elements:
        marks["3.weight"] = torch.rand(3, 18) < 0.4
    method = bdl.Laplace(select=bdl.select.mask(marks), structure="full", temperature=temperature)
    prior = bdl.GaussianPrior(precision=0.7)
    bayes = bdl.wrap(net, method, [(x, y)], likelihood="categorical", prior=prior, progress=False)
    joint = -F.cross_entropy(net(x), y, reduction="sum") - 0.35 * sum(p.square().sum() for p in net.parameters())
    gradients = torch.autograd.grad(joint, list(net.parameters()))
    flat = torch.cat([g[marks[n]] for g, (n, _) in zip(gradients, net.named_parameters(), strict=True)]) / temperature
    posterior = bayes.posterior
    assert isinstance(posterior, GaussianPosterior)
    size = len(flat)
    precision = (posterior.curvature.to_dense() + 0.7 * torch.eye(size, dtype=torch.float64)) / temperature
    truth = 0.5 * float(flat @ torch.linalg.solve(precision, flat))
    seen = observed(bayes, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert seen.gain == pytest.approx(truth, rel=1e-8)
    torch.testing.assert_close(seen.variance, bayes(x).latent.variance.mean(-1), rtol=1e-8, atol=1e-12)


def test_training_and_left_out_residuals() -> None:
    x, y = regression(15, 12)
    data, weak = [(x, y)], 3e-3
    bayes = wrapped(mode(x, y, weak), data, weak, structure="full")
    seen = observed(bayes, data)
    noise = torch.tensor([NOISE], dtype=torch.float64)
    left_out = []
    for i in range(len(x)):
        keep = torch.arange(len(x)) != i
        refit = oracles.BayesianLinearRegression(x[keep], y[keep], weak, noise)
        left_out.append(float((y[i] - x[i] @ refit.mean) / NOISE) ** 2)
    torch.testing.assert_close(seen.left_out, torch.tensor(left_out, dtype=torch.float64), rtol=1e-5, atol=1e-8)
    trained_residual = (y - mode(x, y, weak)(x).detach()) / NOISE
    torch.testing.assert_close(seen.trained, trained_residual.square().squeeze(1), rtol=1e-6, atol=1e-9)
    assert warned(bayes, data, "with each point left out")


def test_an_overfitted_classifier() -> None:
    x = classification(30)[0]
    labels = torch.randint(0, 2, (30,), generator=torch.Generator().manual_seed(1))
    net = trained(mlp(30), x, labels, 0.0, 600)
    prior = bdl.GaussianPrior(precision=1e-2)
    method = bdl.Laplace(structure="full")
    bayes = bdl.wrap(net, method, [(x, labels)], likelihood="categorical", prior=prior, progress=False)
    assert warned(bayes, [(x, labels)], "with each point left out")


def test_variances_that_tell_nothing_apart() -> None:
    x, y = classification()
    net = trained(mlp(3), x, y, decay=1.0 / 60)
    prior = bdl.GaussianPrior(precision=1.0)
    method = bdl.Laplace(select="2.bias", structure="full")
    bayes = bdl.wrap(net, method, [(x, y)], likelihood="categorical", prior=prior, progress=False)
    assert warned(bayes, [(x, y)], "variance of the outputs")


@pytest.mark.parametrize("structure", [*sorted(STRUCTURES), {"0": "diag", "*": "full"}])
def test_layers_without_curvature(structure: Any) -> None:
    x, y = classification()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    prior = bdl.GaussianPrior(precision=1.0)
    method = bdl.Laplace(structure=structure)
    alive = bdl.wrap(net, method, [(x, y)], likelihood="categorical", prior=prior, progress=False)
    assert not any("the data say nothing" in finding.text for finding in alive.diagnose().warnings)
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    dead = bdl.wrap(net, method, [(x, y)], likelihood="categorical", prior=prior, progress=False)
    (found,) = [finding for finding in dead.diagnose().warnings if "the data say nothing" in finding.text]
    assert "about '0':" in found.text and "select=" in found.action


def test_a_network_that_can_fit_everything() -> None:
    x, y = regression(6, 5)
    assert any("observed numbers" in f.text for f in wrapped(mode(x, y, 1e-6), [(x, y)], 1e-6).diagnose().warnings)


def test_a_prior_at_its_bound() -> None:
    x, y = regression()
    bayes = wrapped(mode(x, y), [(x, y)], structure="full").tune("evidence")
    assert not bayes.diagnose().warnings
    posterior = bayes.posterior
    assert isinstance(posterior, GaussianPosterior)
    moved = bayes.replaced(posterior=posterior.with_prior(torch.tensor(18.0, dtype=torch.float64).exp()))
    assert any("bound" in finding.text and finding.action for finding in moved.diagnose().warnings)


def test_nan() -> None:
    x, y = regression()
    bayes = wrapped(mode(x, y), [(x, y)], structure="full")
    posterior = bayes.posterior
    assert isinstance(posterior, GaussianPosterior)
    broken = bayes.replaced(posterior=posterior.with_prior(torch.tensor(float("nan"), dtype=torch.float64)))
    (found,) = broken.diagnose().warnings
    assert "precision of the posterior holds NaN" in found.text and found.action


def test_refusals() -> None:
    x, y = regression()
    bayes = wrapped(mode(x, y), [(x, y)])
    with pytest.raises(ArgumentError, match="Pass the training loader"):
        bayes.diagnose([(x[:7], y[:7])])
    plain = bdl.wrap(mode(x, y), "map", likelihood=bdl.Gaussian(NOISE))
    assert plain.diagnose().warnings == ()
    with pytest.raises(UnsupportedError, match="nothing that a loader could check"):
        plain.diagnose([(x, y)])
