"""Exact regression against dense linear algebra, marginal likelihoods and refits (all float64)."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from bayesdl.errors import ArgumentError
from bayesdl.last_layer import ConjugateRegression, Statistics
from bayesdl.last_layer.search import maximise

N, D, K = 40, 5, 3
NOISE = torch.tensor([0.1, 1.0, 0.4], dtype=torch.float64)
RATIO = torch.tensor([0.3, 2.0, 1e-3], dtype=torch.float64)


def problem(seed=0, n=N):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    phi = randn(n, D) @ randn(D, D) + randn(D)
    return phi, phi @ randn(D, K) + randn(K) + NOISE * randn(n, K)


def fitted(intercept, seed=0):
    phi, y = problem(seed)
    start = ConjugateRegression.decompose(Statistics.of(phi, y), intercept=intercept)
    return phi, y, start.with_hyperparameters(RATIO, NOISE.square())


def dense(phi, y, k, intercept, flat=1e-12):
    """Posterior mean and covariance of [w, b] from the normal equations; a flat prior is one of precision `flat`."""
    ones = phi.new_ones(len(phi), 1)
    design = phi if intercept == "none" else torch.cat([phi, ones], 1)
    prior = torch.full((design.shape[1],), float(RATIO[k] / NOISE[k] ** 2), dtype=phi.dtype)
    if intercept == "flat":
        prior[-1] = flat
    precision = design.mT @ design / NOISE[k] ** 2 + torch.diag(prior)
    covariance = torch.linalg.inv(precision)
    return design, covariance @ (design.mT @ y[:, k]) / NOISE[k] ** 2, covariance, prior


@pytest.mark.parametrize("intercept", ["flat", "proper", "none"])
def test_mean_and_variance_are_those_of_the_normal_equations(intercept):
    phi, y, model = fitted(intercept)
    fresh, _ = problem(1)
    mean, variance = model.latent(fresh)
    weight, bias = model.weights()
    for k in range(K):
        design, expected, covariance, _ = dense(phi, y, k, intercept)
        rows = fresh if intercept == "none" else torch.cat([fresh, fresh.new_ones(N, 1)], 1)
        assert torch.allclose(mean[:, k], rows @ expected, rtol=1e-9, atol=1e-9)
        assert torch.allclose(variance[:, k], torch.einsum("bi,ij,bj->b", rows, covariance, rows), rtol=1e-8)
        assert torch.allclose(weight[k], expected[:D], rtol=1e-8, atol=1e-9)
        assert design.shape[1] == (D if intercept == "none" else D + 1)
    assert torch.allclose(mean, fresh @ weight.mT + bias)


@pytest.mark.parametrize("intercept", ["proper", "none"])
def test_evidence_is_the_marginal_likelihood(intercept):
    phi, y, model = fitted(intercept)
    for k in range(K):
        design, _, _, prior = dense(phi, y, k, intercept)
        marginal = design @ torch.diag(1 / prior) @ design.mT + NOISE[k] ** 2 * torch.eye(N, dtype=phi.dtype)
        expected = MultivariateNormal(torch.zeros(N, dtype=phi.dtype), marginal).log_prob(y[:, k])
        assert torch.allclose(model.evidence(model.ratio, model.noise_variance)[k], expected, rtol=1e-9)


def test_a_flat_intercept_is_the_limit_of_a_wide_prior_per_unit_of_its_density():
    phi, y, model = fitted("flat")
    width = 1e4  # prior sd of the intercept; the marginal likelihood times sqrt(2 pi) width has a limit
    for k in range(K):
        _, _, _, prior = dense(phi, y, k, "none")
        marginal = phi @ torch.diag(1 / prior) @ phi.mT + NOISE[k] ** 2 * torch.eye(N, dtype=phi.dtype) + width**2
        wide = MultivariateNormal(torch.zeros(N, dtype=phi.dtype), marginal).log_prob(y[:, k])
        limit = wide + 0.5 * math.log(2 * math.pi) + math.log(width)
        assert abs(float(model.evidence(model.ratio, model.noise_variance)[k] - limit)) < 1e-5


def test_evidence_gradients():
    _, _, model = fitted("flat")
    ratio, noise = RATIO.clone().requires_grad_(), NOISE.square().requires_grad_()
    assert torch.autograd.gradcheck(lambda r, s: model.evidence(r, s).sum(), (ratio, noise))


@pytest.mark.parametrize("intercept", ["flat", "proper", "none"])
def test_the_optimum_satisfies_mackays_equations(intercept):
    phi, y = problem()
    start = ConjugateRegression.decompose(Statistics.of(phi, y), intercept=intercept)
    best, edge = maximise(start)
    assert not edge.any()
    weight, bias = best.weights()
    slopes = torch.cat([weight, bias.unsqueeze(1)], 1) if intercept == "proper" else weight
    gamma = best.effective_parameters()
    residual = (y - phi @ weight.mT - bias).square().sum(0)
    # comparing values of a smooth maximum places it to the root of the rounding error
    assert torch.allclose(best.prior_precision, gamma / slopes.square().sum(1), rtol=1e-5)
    assert torch.allclose(best.noise_variance, residual / (best.degrees - gamma), rtol=1e-5)


def test_no_two_dimensional_step_raises_the_evidence():
    phi, y = problem()
    best, _ = maximise(ConjugateRegression.decompose(Statistics.of(phi, y)))
    top = best.log_evidence()
    for a in (-0.1, 0.0, 0.1):
        for b in (-0.1, 0.0, 0.1):
            moved = best.evidence(best.ratio * math.exp(a), best.noise_variance * math.exp(b)).sum()
            assert moved <= top + 1e-9


def test_a_shared_prior_is_a_stationary_point_of_the_summed_evidence():
    phi, y = problem()
    start = ConjugateRegression.decompose(Statistics.of(phi, y))
    best, edge = maximise(start, sharing="shared")
    assert not edge.any()
    assert torch.allclose(best.prior_precision, best.prior_precision[0].expand(K))
    precision = best.prior_precision[:1].clone().requires_grad_()
    noise = best.noise_variance.clone().requires_grad_()
    start.evidence(precision * noise, noise).sum().backward()
    assert float((precision.grad * precision).detach().abs()) < 1e-6
    assert float((noise.grad * noise).detach().abs().max()) < 1e-6
    assert best.log_evidence() <= maximise(start)[0].log_evidence()


@pytest.mark.parametrize("sharing", ["output", "shared"])
def test_given_noise_or_prior_is_kept_and_the_other_is_optimal(sharing):
    phi, y = problem()
    start = ConjugateRegression.decompose(Statistics.of(phi, y))
    best, _ = maximise(start, noise_variance=NOISE.square(), sharing=sharing)
    assert torch.equal(best.noise_variance, NOISE.square())
    for factor in (0.9, 1.1):
        moved = start.evidence(best.ratio * factor, best.noise_variance).sum()
        assert moved < best.log_evidence()
    precision = torch.full((K,), 3.0, dtype=torch.float64)
    best, _ = maximise(start, prior_precision=precision, sharing=sharing)
    assert torch.allclose(best.prior_precision, precision)
    for factor in (0.9, 1.1):
        noise = best.noise_variance * factor
        assert start.evidence(precision * noise, noise).sum() < best.log_evidence()
    both, _ = maximise(start, prior_precision=precision, noise_variance=NOISE.square())
    assert torch.allclose(both.prior_precision, precision)
    assert torch.equal(both.noise_variance, NOISE.square())


def test_shifted_and_scaled_targets_shift_and_scale_the_predictions():
    phi, y = problem()
    plain, _ = maximise(ConjugateRegression.decompose(Statistics.of(phi, y)))
    moved, _ = maximise(ConjugateRegression.decompose(Statistics.of(phi, 1000 + 5 * y)))
    mean, variance = plain.latent(phi)
    far, wide = moved.latent(phi)
    assert torch.allclose(far, 1000 + 5 * mean, rtol=1e-7)
    assert torch.allclose(wide, 25 * variance, rtol=1e-5)


def test_updates_equal_a_fit_on_everything():
    phi, y = problem()
    whole = ConjugateRegression.decompose(Statistics.of(phi, y)).with_hyperparameters(RATIO, NOISE.square())
    part = ConjugateRegression.decompose(Statistics.of(phi[:10], y[:10])).with_hyperparameters(RATIO, NOISE.square())
    grown = part.updated(Statistics.of(phi[10:25], y[10:25])).updated(Statistics.of(phi[25:], y[25:]))
    for a, b in zip(grown.latent(phi), whole.latent(phi), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)
    assert torch.allclose(grown.log_evidence(), whole.log_evidence(), rtol=1e-9)


@pytest.mark.parametrize("intercept", ["flat", "proper", "none"])
def test_draws_have_the_moments_of_the_posterior(intercept):
    phi, _, model = fitted(intercept)
    generator = torch.Generator().manual_seed(0)
    count, width = 40_000, model.values.shape[0]
    noise = torch.randn(count, K, width, generator=generator, dtype=torch.float64)
    weight, bias = model.draw(noise, torch.randn(count, K, generator=generator, dtype=torch.float64))
    outputs = torch.einsum("skd,bd->sbk", weight, phi[:4]) + bias.unsqueeze(1)
    mean, variance = model.latent(phi[:4])
    # 24 comparisons at 4.5 standard errors: fails by chance less than once in 5,000 seeds
    assert bool(((outputs.mean(0) - mean).abs() < 4.5 * (variance / count).sqrt()).all())
    assert bool(((outputs.var(0) / variance - 1).abs() < 4.5 * math.sqrt(2 / count)).all())


def test_constant_targets_and_few_points_are_told():
    phi, _ = problem()
    with pytest.raises(ArgumentError, match="at least 3"):
        ConjugateRegression.decompose(Statistics.of(phi[:2], phi[:2]))
    with pytest.raises(ArgumentError, match="choose one of"):
        ConjugateRegression.decompose(Statistics.of(phi, phi), intercept="maybe")
    generator = torch.Generator().manual_seed(0)
    nothing = torch.randn(N, 1, generator=generator, dtype=torch.float64) * 0 + 1.0
    _, edge = maximise(ConjugateRegression.decompose(Statistics.of(phi, nothing)))
    assert bool(edge.all())


@pytest.mark.parametrize("intercept", ["flat", "proper", "none"])
def test_evidence_of_an_unknown_scale_is_a_quadrature_over_it(intercept):
    phi, y = problem()
    y = y[:, 1:2]
    ratio, a0, b0 = torch.tensor([2.0]).double(), 3.0, 0.7
    regression = ConjugateRegression.decompose(Statistics.of(phi, y), intercept=intercept).with_ratio(ratio)
    shape = torch.tensor([a0 + 0.5 * regression.degrees]).double()
    found = regression.scale_evidence(shape, b0 + 0.5 * regression.misfit(ratio))
    logs = torch.linspace(-12, 8, 20001, dtype=torch.float64)
    precision = logs.exp()
    prior = torch.distributions.Gamma(torch.tensor(a0).double(), b0).log_prob(precision)
    values = regression.evidence(ratio, (1 / precision).unsqueeze(1))[:, 0] + prior + logs
    assert torch.allclose(found[0], torch.logsumexp(values, 0) + (logs[1] - logs[0]).log(), rtol=1e-8)
