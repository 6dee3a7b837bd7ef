"""Quantiles, entropies and draws of mixtures, against their own CDF, sums and integrals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Gamma, Independent, MixtureSameFamily, MultivariateNormal, Normal, Poisson

from bayesdl import mixtures
from bayesdl.errors import UnsupportedError

WEIGHTS = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.9, 0.1]]).double()
LOC = torch.tensor([[[-3.0], [0.0], [4.0]], [[9.0], [1.0], [1.1]]]).double()
SCALE = torch.tensor([[[0.1], [1.0], [0.5]], [[2.0], [1e-3], [3.0]]]).double()


def normals(loc: Tensor = LOC, scale: Tensor = SCALE) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(WEIGHTS), Independent(Normal(loc, scale), 1))


@pytest.mark.parametrize("q", [1e-6, 0.05, 0.2, 0.5, 0.9, 1 - 1e-6])
def test_normal_quantiles_invert_the_cdf(q: float) -> None:
    found = mixtures.quantile(normals(), q)
    cdf = (WEIGHTS.unsqueeze(-1) * Normal(LOC, SCALE).cdf(found.unsqueeze(1))).sum(1)
    assert found.shape == (2, 1)
    assert torch.allclose(cdf, torch.full_like(cdf, q), rtol=1e-6, atol=1e-12)


def test_a_quantile_at_zero_is_found() -> None:
    symmetric = MixtureSameFamily(
        Categorical(torch.tensor([[0.5, 0.5]]).double()),
        Independent(Normal(torch.tensor([[[-1.0], [1.0]]]).double(), torch.ones(1, 2, 1).double()), 1),
    )
    assert abs(float(mixtures.quantile(symmetric, 0.5))) < 1e-12


@pytest.mark.parametrize("q", [0.01, 0.5, 0.99])
def test_poisson_mixture_quantiles_by_summation(q: float) -> None:
    rate = torch.tensor([[[0.5], [10.0], [200.0]], [[0.0], [3.0], [1.0]]]).double()
    mixture = MixtureSameFamily(Categorical(WEIGHTS), Independent(Poisson(rate), 1))
    counts = torch.arange(400).double()
    pmf = torch.where(counts == 0, 1.0, 0.0).expand(2, 3, -1).clone().double()
    log_p = counts * rate.clamp(min=1e-300).log() - rate - torch.lgamma(counts + 1)
    pmf = torch.where(rate > 0, log_p.exp(), pmf)
    cdf = (WEIGHTS.unsqueeze(-1) * pmf).sum(1).cumsum(-1)
    expected = (cdf < q).sum(-1, keepdim=True).double()
    assert torch.equal(mixtures.quantile(mixture, q), expected)


def test_plain_families() -> None:
    normal = Normal(LOC[:, 0], SCALE[:, 0])
    assert torch.allclose(mixtures.quantile(normal, 0.9), normal.icdf(torch.tensor(0.9).double()))
    assert torch.equal(mixtures.quantile(Independent(normal, 1), 0.9), mixtures.quantile(normal, 0.9))
    covariance = torch.tensor([[4.0, 1.0], [1.0, 9.0]]).double()
    joint = MultivariateNormal(torch.zeros(1, 2).double(), covariance)
    expected = Normal(0.0, 1.0).icdf(torch.tensor(0.9).double()) * torch.tensor([[2.0, 3.0]]).double()
    assert torch.allclose(mixtures.quantile(joint, 0.9), expected)
    with pytest.raises(UnsupportedError, match="Gamma has no quantile"):
        mixtures.quantile(Gamma(torch.ones(1, 1), torch.ones(1, 1)), 0.5)


def test_mixture_draws_have_its_moments() -> None:
    # 50000 draws; 5 standard errors of mean and (normal theory, kurtosis up to 10) variance: false alarm < 1e-5
    draws = mixtures.sample(normals(), 50_000, torch.Generator().manual_seed(0))
    assert draws.shape == (50_000, 2, 1)
    mean, variance = normals().mean, normals().variance
    assert bool(((draws.mean(0) - mean).abs() < 5 * (variance / 50_000).sqrt()).all())
    assert torch.allclose(draws.var(0), variance, rtol=5 * (9 / 50_000) ** 0.5)


def test_multivariate_draws_have_its_covariance() -> None:
    covariance = torch.tensor([[4.0, 1.5], [1.5, 1.0]]).double()
    draws = mixtures.sample(
        MultivariateNormal(torch.ones(1, 2).double(), covariance), 50_000, torch.Generator().manual_seed(0)
    )
    seen = torch.cov(draws[:, 0].T)
    assert torch.allclose(seen, covariance, atol=5 * (2 * 16 / 50_000) ** 0.5)  # 5 standard errors of the widest


def test_unknown_families_draw_from_the_generator_alone() -> None:
    gamma = Gamma(torch.ones(3, 1), torch.ones(3, 1))
    state = torch.get_rng_state()
    first = mixtures.sample(gamma, 4, torch.Generator().manual_seed(0))
    torch.rand(3)
    second = mixtures.sample(gamma, 4, torch.Generator().manual_seed(0))
    other = mixtures.sample(gamma, 4, torch.Generator().manual_seed(1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    torch.set_rng_state(state)


def test_entropy_of_a_normal_mixture_by_integration() -> None:
    grid = np.linspace(-20, 25, 900_001)
    y = torch.as_tensor(grid).view(-1, 1, 1).expand(-1, 2, 1)
    log_p = normals().log_prob(y).numpy()
    expected = np.trapezoid(-np.exp(log_p) * log_p, grid, axis=0)
    found = mixtures.entropy(normals()).numpy()
    assert np.allclose(found, expected, atol=0.02)  # 170 quasi-random points a component


def test_entropy_of_equal_components_is_that_of_one() -> None:
    same = normals(torch.ones(2, 3, 4).double(), torch.full((2, 3, 4), 2.0).double())
    exact = Normal(1.0, 2.0).entropy() * 4
    assert torch.allclose(mixtures.entropy(same), exact.double().expand(2), atol=0.05)


def test_densities_add_over_outputs() -> None:
    normal = Normal(torch.zeros(2, 3), torch.ones(2, 3))
    value = torch.ones(5, 2, 3)
    assert torch.allclose(mixtures.per_example(normal, normal.log_prob(value)), normal.log_prob(value).sum(-1))
    joint = Independent(normal, 1)
    assert torch.equal(mixtures.per_example(joint, joint.log_prob(value)), joint.log_prob(value))
