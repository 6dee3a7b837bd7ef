"""Gaussian and heteroscedastic predictives: exact convolutions, moments, noise as given."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MixtureSameFamily, MultivariateNormal, Normal

from bayesdl.errors import ArgumentError, NonFiniteError, NotFittedError, NumericalError, ShapeError
from bayesdl.latent import GaussianLatent, point_latent
from bayesdl.likelihoods import Gaussian, Heteroscedastic
from bayesdl.posteriors.base import standard_normal
from tests.conformance.test_likelihoods import gaussian_latent, sample_latent

NOISE = torch.tensor([0.5, 2.0, 1.0, 0.3]).double()


def test_gaussian_latents_convolve_exactly() -> None:
    latent = gaussian_latent()
    found = Gaussian(NOISE).marginal(latent, torch.zeros(1, 4))
    assert isinstance(found, MultivariateNormal)
    assert torch.equal(found.mean, latent.mean)
    assert torch.allclose(found.covariance_matrix, latent.covariance + torch.diag(NOISE.square()))
    alone = Gaussian(NOISE).marginal(GaussianLatent(latent.mean, latent.variance), torch.zeros(1, 4))
    assert isinstance(alone, Normal)
    assert torch.allclose(alone.variance, latent.variance + NOISE.square())


def test_density_of_a_gaussian_latent_against_its_mixture_over_draws() -> None:
    latent = gaussian_latent(width=0.3)
    y = latent.mean + 0.1
    likelihood = Gaussian(NOISE)
    weights, draws = latent.draws(standard_normal((50_000, 4), latent.mean, None))
    mixed = likelihood.mixture(weights, draws).log_prob(y)
    # the density of each draw varies by less than its mean: the log of a mean of 50000 errs by about 0.005
    assert torch.allclose(mixed, likelihood.predictive(latent, torch.zeros(1, 4)).log_prob(y), atol=0.02)


def test_split_of_a_gaussian_latent() -> None:
    latent = gaussian_latent()
    pred = Gaussian(NOISE).predictive(latent, torch.zeros(1, 4))
    assert torch.equal(pred.epistemic, latent.variance)
    assert torch.equal(pred.aleatoric, NOISE.square().expand(6, 4))
    assert torch.allclose(pred.total, pred.variance)


def test_sampled_latents_are_mixtures() -> None:
    latent = sample_latent()
    pred = Gaussian(NOISE).predictive(latent, torch.zeros(1, 4))
    assert isinstance(pred.distribution, MixtureSameFamily)
    assert torch.allclose(pred.mean, torch.einsum("s,sbc->bc", latent.weights, latent.samples))
    assert torch.allclose(pred.epistemic, latent.variance)


def test_python_noise_is_exact_in_double_precision() -> None:
    f = torch.zeros(3, 2).double()
    assert float(Gaussian(0.1).scale(f)[0]) == 0.1
    assert Gaussian(0.1).config() == {"noise": 0.1}
    assert Gaussian([0.1, 0.7]).config() == {"noise": [0.1, 0.7]}
    assert Gaussian(torch.tensor(0.5)).config() == {"noise": 0.5}


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf"), [1.0, 0.0], [], [[1.0]]])
def test_noise_must_be_positive(noise: object) -> None:
    with pytest.raises(ArgumentError, match="expected a positive finite standard deviation"):
        Gaussian(noise)  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", ["a", ["a"], object()])
def test_noise_must_be_numbers(noise: object) -> None:
    with pytest.raises(ArgumentError, match="noise=.*; expected a number"):
        Gaussian(noise)  # type: ignore[arg-type]


def test_noise_must_fit_the_outputs() -> None:
    with pytest.raises(ShapeError, match="noise has 3 entries and the network 2 outputs"):
        Gaussian([1.0, 1.0, 1.0]).distribution(torch.zeros(5, 2))


def test_open_noise_says_so() -> None:
    with pytest.raises(NotFittedError, match="has no noise yet"):
        Gaussian().distribution(torch.zeros(5, 2))


def test_with_noise_leaves_the_original_alone() -> None:
    first = Gaussian(1.0)
    assert first.with_noise(2.0).noise == 2.0 and first.noise == 1.0
    moved = Gaussian(NOISE).map(lambda t: t.float()).noise
    assert isinstance(moved, torch.Tensor) and moved.dtype is torch.float32


def test_nearly_singular_covariances_are_scored() -> None:
    # rank one in single precision with a noise far below its rounding
    mean = torch.zeros(1, 3)
    covariance = 1e4 * torch.ones(1, 3, 3)
    latent = GaussianLatent(mean, covariance.diagonal(dim1=-2, dim2=-1), covariance)
    pred = Gaussian(1e-3).predictive(latent, torch.zeros(1, 3))
    with pytest.warns(UserWarning, match="covariance of the predictive: jitter"):
        assert bool(torch.isfinite(pred.log_prob(torch.zeros(1, 3))))


def test_covariances_that_are_none_raise_by_name() -> None:
    covariance = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    latent = GaussianLatent(torch.zeros(1, 2), torch.ones(1, 2), covariance)
    with pytest.raises(NumericalError, match="covariance of the predictive"):
        _ = Gaussian(0.1).predictive(latent, torch.zeros(1, 2)).distribution
    with pytest.raises(NonFiniteError, match="covariance of the predictive"):
        _ = Gaussian(0.1).marginal(GaussianLatent(latent.mean, latent.variance, covariance * torch.nan), latent.mean)


def test_heteroscedastic_moments_of_a_gaussian_latent() -> None:
    # y = m + exp(s/2) e: mean m, variance var(m) + E[exp(s)] = var(m) + exp(mean + var/2) (log-normal mean)
    latent = gaussian_latent()
    pred = Heteroscedastic().predictive(latent, torch.zeros(1, 4))
    assert torch.equal(pred.mean, latent.mean[:, :2])
    expected = torch.exp(latent.mean[:, 2:] + latent.variance[:, 2:] / 2)
    assert torch.allclose(pred.aleatoric, expected)
    assert torch.equal(pred.epistemic, latent.variance[:, :2])
    # 100000 draws: exp(s) has finite fourth moments here; its mean is within 3% by far
    _, draws = latent.draws(standard_normal((100_000, 4), latent.mean, None))
    assert torch.allclose(draws[..., 2:].exp().mean(0), expected, rtol=0.03)


def test_heteroscedastic_fisher_in_closed_form() -> None:
    f = torch.tensor([[0.3, 1.0], [-2.0, -1.0]]).double()
    root = Heteroscedastic().hessian_root(f)
    fisher = torch.einsum("kbi,kbj->bij", root, root)
    expected = torch.diag_embed(torch.stack([torch.exp(-f[:, 1]), torch.full((2,), 0.5).double()], -1))
    assert torch.allclose(fisher, expected)


def test_heteroscedastic_outputs_and_targets() -> None:
    with pytest.raises(ShapeError, match=r'\(2, 3\).*even number.*use likelihood="gaussian"'):
        Heteroscedastic().check_outputs(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"\(2, 4\).*expects targets of shape \(2, 2\)"):
        Heteroscedastic().check_targets(torch.zeros(2, 4), torch.zeros(2, 4))
    assert Heteroscedastic().check_targets(torch.zeros(2, 2), torch.zeros(2)).shape == (2, 1)


def test_heteroscedastic_point_is_a_normal() -> None:
    f = torch.tensor([[1.0, 2.0]]).double()
    pred = Heteroscedastic().predictive(point_latent(f), torch.zeros(1, 2))
    assert float(pred.mean) == 1.0
    assert float(pred.variance) == pytest.approx(float(torch.exp(f[0, 1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_variances_stay_numbers(dtype: torch.dtype) -> None:
    likelihood, y = Heteroscedastic(), torch.zeros(2, 1, dtype=dtype)
    f = torch.tensor([[1.0, 1e5], [1.0, -1e5]], dtype=dtype)
    scale = likelihood.distribution(f).scale
    assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
    assert bool(torch.isfinite(likelihood.hessian_root(f)).all())
    wide = GaussianLatent(f, torch.full_like(f, 1e6))
    marginal = likelihood.marginal(wide, standard_normal((8, 2), f, None))
    assert bool(torch.isfinite(marginal.variance).all()) and bool(torch.isfinite(marginal.log_prob(y)).all())
    near = torch.tensor([[1.0, 3.0]], dtype=dtype)  # untouched between
    assert torch.equal(likelihood.distribution(near).scale, near[:, 1:].exp().sqrt())


@pytest.mark.parametrize("noise", [0.3, torch.tensor([0.2, 1.5, 4.0], dtype=torch.float64)])
def test_log_probability_is_that_of_the_normal_also_inside_vmap(noise: float | torch.Tensor) -> None:
    g = torch.Generator().manual_seed(5)
    f, y = (torch.randn(6, 3, dtype=torch.float64, generator=g) for _ in range(2))
    likelihood = Gaussian(noise)
    expected = Normal(f, noise).log_prob(y).sum(-1)
    torch.testing.assert_close(likelihood.log_prob(f, y), expected, rtol=1e-13, atol=0.0)
    slopes = torch.func.vmap(torch.func.grad(lambda one: likelihood.log_prob(one[None], y[:1]).sum()))(f)
    torch.testing.assert_close(
        slopes, (y[:1] - f) / torch.as_tensor(noise, dtype=torch.float64).square(), rtol=1e-13, atol=0.0
    )
