"""Predictive: argument checks, concatenation, moves."""

from __future__ import annotations

import pytest
import torch

from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError
from bayesdl.latent import GaussianLatent, SampleLatent, cat_latents, point_latent
from bayesdl.likelihoods import Categorical, Gaussian
from bayesdl.predictive import Predictive
from tests.conformance.test_likelihoods import gaussian_latent, sample_latent


def regression() -> Predictive:
    return Gaussian(0.5).predictive(sample_latent(), torch.zeros(2, 4).double())


@pytest.mark.parametrize("q", [0.0, 1.0, -0.1, 2.0])
def test_quantile_levels(q: float) -> None:
    with pytest.raises(ArgumentError, match="strictly between 0 and 1"):
        regression().quantile(q)


@pytest.mark.parametrize("level", [0.0, 1.0, 90.0])
def test_interval_levels(level: float) -> None:
    with pytest.raises(ArgumentError, match=rf"level={level} was given"):
        regression().interval(level)


def test_interval_holds_its_level() -> None:
    interval = regression().interval(0.8)
    assert interval.shape == (6, 4, 2)
    latent = sample_latent()
    cdf = torch.distributions.Normal(latent.samples.unsqueeze(-1), 0.5).cdf(interval)
    mass = torch.einsum("s,sbcd->bcd", latent.weights, cdf)
    assert torch.allclose(mass[..., 1] - mass[..., 0], torch.full((6, 4), 0.8).double(), atol=1e-8)


def test_number_of_draws() -> None:
    with pytest.raises(ArgumentError, match="n=0 draws"):
        regression().sample(0)
    assert regression().sample(3).shape == (3, 6, 4)


def test_regression_has_no_probabilities() -> None:
    with pytest.raises(UnsupportedError, match="gaussian predictive has no class probabilities; use .mean"):
        _ = regression().probs


def test_shapes_of_classification() -> None:
    pred = Categorical().predictive(gaussian_latent(), torch.zeros(2, 4).double())
    assert pred.probs.shape == pred.variance.shape == (6, 4)
    assert pred.entropy.shape == pred.total.shape == (6,)
    assert pred.sample(5).shape == (5, 6)
    assert pred.batch_size == 6 and pred.task == "classification"


def test_nothing_to_concatenate() -> None:
    with pytest.raises(ArgumentError, match="yielded no batch"):
        Predictive.cat([])


def test_moves() -> None:
    single = regression().map(torch.Tensor.float)
    assert single.mean.dtype is torch.float32
    assert torch.allclose(single.mean.double(), regression().mean, atol=1e-6)


def test_latents_check_their_shapes() -> None:
    with pytest.raises(ShapeError, match=r"mean \(2, 3\) and variance \(2, 4\)"):
        GaussianLatent(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"\(S, B, C\) and weights \(2,\)"):
        SampleLatent(torch.zeros(3, 2, 1), torch.zeros(2))


def test_concatenated_latents() -> None:
    latent = gaussian_latent()
    joined = cat_latents([latent.map(lambda t: t[:2]), latent.map(lambda t: t[2:])])
    assert torch.equal(joined.mean, latent.mean) and torch.equal(joined.covariance, latent.covariance)
    marginal = GaussianLatent.cat([latent, GaussianLatent(latent.mean, latent.variance)])
    assert marginal.covariance is None  # a part without one leaves the whole without one
    point = point_latent(latent.mean)
    assert torch.equal(cat_latents([point, point]).mean, torch.cat([latent.mean, latent.mean]))


def test_weighted_moments_of_samples() -> None:
    latent = sample_latent()
    mean = sum(w * s for w, s in zip(latent.weights, latent.samples, strict=True))
    square = sum(w * s.square() for w, s in zip(latent.weights, latent.samples, strict=True))
    assert torch.allclose(latent.mean, mean)
    assert torch.allclose(latent.variance, square - mean.square())


def test_a_short_description() -> None:
    assert repr(regression()) == "Predictive(gaussian, outputs (6, 4), samples=5, torch.float64, cpu)"
