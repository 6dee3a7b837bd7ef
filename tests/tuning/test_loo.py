"""Leave-one-out without refitting, against explicit refits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.latent import GaussianLatent
from bayesdl.tuning.grid import grid_of, passes
from bayesdl.tuning.loo import _losses, _profiled, cavity

PRECISION, NOISE = 0.7, 0.3


def linear(outputs: int, x: Tensor, y: Tensor) -> nn.Linear:
    """The MAP of Bayesian linear regression with prior precision PRECISION and noise NOISE."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    gram = design.T @ design / NOISE**2 + PRECISION * torch.eye(design.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, design.T @ y / NOISE**2).T
    net = nn.Linear(x.shape[1], outputs).double()
    with torch.no_grad():
        net.weight.copy_(weights[:, :-1])
        net.bias.copy_(weights[:, -1])
    return net


def regression(outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(3, outputs, generator=generator, dtype=torch.float64)
    return x, y + NOISE * torch.randn(12, outputs, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("outputs", [1, 2])
def test_cavity_is_the_refit_without_the_point_on_a_linear_model(outputs: int) -> None:
    x, y = regression(outputs)
    net = linear(outputs, x, y)
    likelihood = bdl.Gaussian(NOISE)
    prior = bdl.GaussianPrior(precision=PRECISION)
    bayes = bdl.wrap(net, bdl.Laplace(structure="full"), [(x, y)], likelihood=likelihood, prior=prior, progress=False)
    latent = bayes(x).latent
    assert isinstance(latent, GaussianLatent) and latent.covariance is not None
    ours = cavity(
        latent.mean, latent.covariance, likelihood.hessian_root(latent.mean), likelihood.score(latent.mean, y)
    )
    assert ours.covariance is not None
    for n in range(len(x)):
        rest = torch.arange(len(x)) != n
        refit = linear(outputs, x[rest], y[rest])
        left_out = bdl.wrap(
            refit,
            bdl.Laplace(structure="full"),
            [(x[rest], y[rest])],
            likelihood=likelihood,
            prior=prior,
            progress=False,
        )(x[n : n + 1]).latent
        assert isinstance(left_out, GaussianLatent) and left_out.covariance is not None
        torch.testing.assert_close(ours.mean[n], left_out.mean[0], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ours.covariance[n], left_out.covariance[0], rtol=1e-8, atol=1e-8)


def test_temperature_multiplies_the_covariance_and_leaves_the_mean() -> None:
    x, y = regression(1)
    likelihood = bdl.Gaussian(NOISE)
    net = linear(1, x, y)
    prior = bdl.GaussianPrior(precision=PRECISION)
    bayes = bdl.wrap(net, bdl.Laplace(structure="full"), [(x, y)], likelihood=likelihood, prior=prior, progress=False)
    latent = bayes(x).latent
    assert isinstance(latent, GaussianLatent) and latent.covariance is not None
    parts = (latent.mean, latent.covariance, likelihood.hessian_root(latent.mean), likelihood.score(latent.mean, y))
    cold, hot = cavity(*parts), cavity(*parts, temperature=2.5)
    torch.testing.assert_close(hot.mean, cold.mean)
    torch.testing.assert_close(hot.variance, 2.5 * cold.variance)


@pytest.mark.parametrize("outputs", [1, 2])
def test_profiled_noise_equals_a_search_over_noise_scales(outputs: int) -> None:
    x, y = regression(outputs)
    net = linear(outputs, x, y)
    open_noise = bdl.wrap(net, bdl.Laplace(structure="full"), [(x, y)], likelihood="gaussian", progress=False)
    posterior = open_noise.posterior
    relative = posterior.noise if posterior.parts else torch.ones(1, dtype=torch.float64)
    candidates = grid_of([0.01, 0.3, 4.0])
    rows = list(passes(open_noise, posterior, [(x, y)], "", False))
    scores, factors = _profiled(posterior, candidates, rows)
    for i, value in enumerate(candidates):
        best = math.inf
        for scale in torch.linspace(0.8, 1.2, 41, dtype=torch.float64) * factors[i]:
            noise = (scale * relative).expand(outputs)
            fixed = posterior.with_prior(value / scale**2, noise)
            total = _losses(bdl.Gaussian(noise), fixed, fixed.precision.reshape(1), rows).mean(1)
            best = min(best, float(total))
        # the profile leaves out the constants of the density and of the relative scales
        constant = outputs * 0.5 * math.log(2 * math.pi) + float(relative.expand(outputs).log().sum())
        assert math.isclose(best, float(scores[i]) + constant, rel_tol=1e-9)


def test_scores_follow_explicit_retraining_of_a_classifier() -> None:
    """One Newton step instead of a refit: the two leave-one-out losses agree in rank (Spearman above 0.9)."""
    torch.manual_seed(0)
    x = torch.randn(24, 2, dtype=torch.float64)
    y = (x[:, 0] + 0.6 * torch.randn(24, dtype=torch.float64) > 0).long()
    precision = 0.5

    def trained(keep: Tensor) -> nn.Linear:
        net = nn.Linear(2, 2).double()
        optimiser = torch.optim.LBFGS(
            net.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(net(x[keep]), y[keep], reduction="sum")
            loss = loss + 0.5 * precision * sum(p.square().sum() for p in net.parameters())
            loss.backward()
            return loss

        optimiser.step(closure)
        return net

    everything = torch.arange(24)
    net = trained(everything)
    likelihood, prior = bdl.Categorical(), bdl.GaussianPrior(precision=precision)
    bayes = bdl.wrap(net, bdl.Laplace(structure="full"), [(x, y)], likelihood=likelihood, prior=prior, progress=False)
    latent = bayes(x).latent
    assert isinstance(latent, GaussianLatent) and latent.covariance is not None
    approximate = cavity(
        latent.mean, latent.covariance, likelihood.hessian_root(latent.mean), likelihood.score(latent.mean, y)
    )
    ours, refitted = [], []
    for n in range(24):
        with torch.no_grad():
            refitted.append(
                nn.functional.cross_entropy(trained(everything[everything != n])(x[n : n + 1]), y[n : n + 1])
            )
        ours.append(nn.functional.cross_entropy(approximate.mean[n : n + 1], y[n : n + 1]))
    a, b = torch.stack(ours), torch.stack(refitted)
    ranks = torch.stack([a.argsort().argsort().double(), b.argsort().argsort().double()])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9
    inside = nn.functional.cross_entropy(latent.mean, y)
    assert inside < a.mean() and inside < b.mean()


def test_uses_the_training_loader_by_itself_and_says_so(tmp_path) -> None:  # type: ignore[no-untyped-def]
    x, y = regression(1)
    bayes = bdl.wrap(linear(1, x, y), "laplace", [(x, y)], likelihood="gaussian", progress=False)
    tuned = bayes.tune("loo")
    assert any("leave-one-out" in f.text for f in tuned.diagnose().findings)
    assert torch.equal(tuned.tune("loo", [(x, y)]).posterior.precision, tuned.posterior.precision)
    bayes.save(tmp_path / "b.safetensors")
    with pytest.raises(ArgumentError, match="training data"):
        bdl.load(tmp_path / "b.safetensors", linear(1, x, y)).tune("loo")


def test_limit_uses_the_first_examples_alone() -> None:
    x, y = regression(1)
    bayes = bdl.wrap(linear(1, x, y), "laplace", [(x, y)], likelihood="gaussian", progress=False)
    first = bayes.tune("loo", [(x[:5], y[:5])])
    assert torch.equal(
        bayes.tune("loo", [(x[:4], y[:4]), (x[4:], y[4:])], limit=5).posterior.precision, first.posterior.precision
    )


def test_refuses_other_posteriors() -> None:
    x, y = regression(1)
    net = linear(1, x, y)
    with pytest.raises(UnsupportedError, match="linearised"):
        bdl.wrap(net, "map", likelihood=bdl.Gaussian(0.1)).tune("loo", [(x, y)])
    empirical = bdl.wrap(net, bdl.Laplace(kind="empirical"), [(x, y)], likelihood="gaussian", progress=False)
    with pytest.raises(UnsupportedError, match="empirical"):
        empirical.tune("loo")
