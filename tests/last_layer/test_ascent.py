"""Coordinate ascent on the bound: it rises, its covariances are stationary, and it ends where gradients vanish."""

import pytest
import torch
from torch import nn

from bayesdl.errors import ArgumentError
from bayesdl.last_layer import bounds
from bayesdl.last_layer.ascent import ascend
from bayesdl.last_layer.parameterisation import make

N, D, K = 80, 4, 3


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(N, D, generator=generator, dtype=torch.float64)
    phi = torch.cat([phi, phi.new_ones(N, 1)], 1)
    truth = torch.randn(K, D + 1, generator=generator, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=2 * phi @ truth.mT).probs.argmax(1)
    flipped = torch.randint(K, (N,), generator=generator)
    labels = torch.where(torch.rand(N, generator=generator) < 0.15, flipped, labels)
    return phi, nn.functional.one_hot(labels, K).double()


def lower_bound(phi, y, mean, covariance, precision, bound):
    logits, variance = phi @ mean.mT, covariance.quad(phi)
    upper = bounds.km(logits, variance) if bound == "km" else bounds.jensen(logits, variance)
    fit = ((y * logits).sum(-1) - upper).sum()
    spread = (precision * (mean.square() + covariance.diagonal())).sum()
    return fit - 0.5 * (spread - K * precision.log().sum() - covariance.logdet().sum() - K * (D + 1))


@pytest.mark.parametrize("bound", ["km", "jensen"])
@pytest.mark.parametrize("name", ["full", "precision", "diag", "shared"])
def test_ends_at_a_stationary_point(name, bound):
    phi, y = problem()
    covariance = make(name, D + 1, K).double()
    found = ascend(phi, y, torch.zeros(K, D + 1).double(), covariance, prior_precision=1.0, bound=bound, rounds=3000)
    assert found.converged
    trace = torch.tensor(found.bounds)
    assert bool((trace[1:] >= trace[:-1] - 1e-9).all()) or name in ("diag", "shared")
    mean = found.mean.clone().requires_grad_()
    parameters = [p.requires_grad_() for p in covariance.parameters()]
    value = lower_bound(phi, y, mean, covariance, found.prior_precision, bound)
    assert torch.allclose(value.detach(), trace[-1].double(), rtol=1e-6)
    gradients = torch.autograd.grad(value, [mean, *parameters])
    # a change of the bound of 1e-6 relative ends the ascent: gradients are small beside the bound, not zero
    assert max(float(g.abs().max()) for g in gradients) < 0.15


def test_perturbing_the_covariance_never_raises_the_bound():
    phi, y = problem()
    covariance = make("full", D + 1, K).double()
    found = ascend(phi, y, torch.zeros(K, D + 1).double(), covariance, prior_precision=1.0, rounds=3000)
    best = lower_bound(phi, y, found.mean, covariance, found.prior_precision, "km")
    generator = torch.Generator().manual_seed(0)
    kept = covariance.dense().clone()
    for _ in range(20):
        noise = 0.1 * torch.randn(K, D + 1, D + 1, generator=generator, dtype=torch.float64)
        moved = make("full", D + 1, K).double()
        root = torch.linalg.cholesky(kept) @ (torch.eye(D + 1).double() + noise)
        moved.set_precision(torch.linalg.inv(root @ root.mT))
        assert lower_bound(phi, y, found.mean, moved, found.prior_precision, "km") <= best + 1e-4


def test_kept_means_stay_and_the_prior_is_estimated_without_the_intercept():
    phi, y = problem()
    mean = torch.randn(K, D + 1, generator=torch.Generator().manual_seed(0)).double()
    covariance = make("full", D + 1, K).double()
    counted = torch.tensor([True] * D + [False])
    found = ascend(phi, y, mean, covariance, keep_mean=True, penalised=counted)
    assert torch.equal(found.mean, mean)
    spread = (mean.square() + covariance.diagonal())[:, :D].sum()
    assert torch.allclose(found.prior_precision, (K * D / spread).expand(D + 1), rtol=1e-3)


def test_refusals():
    phi, y = problem()
    with pytest.raises(ArgumentError, match="no logit noise"):
        ascend(phi, y, torch.zeros(K, D + 1).double(), make("full", D + 1, K).double(), bound="km_reduced")
    with pytest.raises(ArgumentError, match="no closed stationary point"):
        ascend(phi, y, torch.zeros(K, D + 1).double(), make("lowrank", D + 1, K).double())


@pytest.mark.parametrize("bound", ["km", "jensen"])
def test_two_class_problems_are_fitted_each_for_itself_and_end_where_gradients_vanish(bound):
    phi, y = problem()
    labels = torch.stack([y[:, 0], y[:, 1]], 1)
    together = make("full", D + 1, 2).double()
    options = {"prior_precision": 1.0, "bound": bound, "binary": True, "rounds": 3000}
    found = ascend(phi, labels, torch.zeros(2, D + 1).double(), together, **options)
    for k in range(2):
        alone = make("full", D + 1, 1).double()
        single = ascend(phi, labels[:, k : k + 1], torch.zeros(1, D + 1).double(), alone, **options)
        assert torch.allclose(single.mean[0], found.mean[k], atol=2e-2)
        assert torch.allclose(alone.dense()[0], together.dense()[k], atol=2e-2)
    mean = found.mean.clone().requires_grad_()
    logits, variance = phi @ mean.mT, together.quad(phi)
    fit = ((labels * logits).sum(-1) - bounds.Normaliser(bound, True).upper(logits, variance)).sum()
    gradient = torch.autograd.grad(fit - 0.5 * mean.square().sum(), mean)[0]
    assert float(gradient.abs().max()) < 0.15
