"""Counts on log-rates."""

from __future__ import annotations

import math

import pytest
import torch

from bayesdl.errors import LabelError
from bayesdl.latent import GaussianLatent, point_latent
from bayesdl.likelihoods import Poisson
from bayesdl.posteriors.base import standard_normal


def test_mean_and_variance_of_a_gaussian_log_rate() -> None:
    # y | f ~ Poisson(exp f): mean exp(m + v/2), variance mean + (exp(v) - 1) mean^2
    mean, variance = torch.tensor([[0.5], [2.0]]).double(), torch.tensor([[0.1], [0.2]]).double()
    pred = Poisson().predictive(GaussianLatent(mean, variance), standard_normal((200_000, 1), mean, None))
    rate = torch.exp(mean + variance / 2)
    # standard errors: below 0.15% of the mean, below 0.5% of the epistemic variance
    assert torch.allclose(pred.mean, rate, rtol=0.01)
    assert torch.allclose(pred.aleatoric, rate, rtol=0.01)
    assert torch.allclose(pred.epistemic, (variance.exp() - 1) * rate.square(), rtol=0.03)


def test_log_probability_of_rates_that_underflow() -> None:
    f = torch.tensor([[-200.0]])
    assert float(Poisson().log_prob(f, torch.tensor([[1.0]]))) == pytest.approx(-200.0)
    assert float(Poisson().log_prob(f, torch.tensor([[0.0]]))) == pytest.approx(0.0)


def test_entropy_by_summation() -> None:
    rates = torch.tensor([0.2, 3.0, 40.0]).double()
    counts = torch.arange(200).double()
    log_p = counts * rates.log().unsqueeze(1) - rates.unsqueeze(1) - torch.lgamma(counts + 1)
    expected = -(log_p.exp() * log_p).sum(1)
    pred = Poisson().predictive(point_latent(rates.log().unsqueeze(1)), torch.zeros(1, 1).double())
    assert torch.allclose(pred.entropy, expected, rtol=0.01)  # 512 quasi-random points


def test_quantiles_and_interval() -> None:
    from scipy.stats import poisson

    rates = torch.tensor([0.2, 3.0, 40.0]).double()
    pred = Poisson().predictive(point_latent(rates.log().unsqueeze(1)), torch.zeros(1, 1).double())
    for q in (0.001, 0.05, 0.5, 0.95, 0.999):
        assert pred.quantile(q).squeeze(1).tolist() == poisson.ppf(q, rates.numpy()).tolist()
    assert torch.equal(pred.interval(0.9)[..., 0], pred.quantile(0.05))


def test_targets() -> None:
    for bad in (-1.0, 0.5):
        with pytest.raises(LabelError, match=rf"target {bad} at index \(1, 0\); poisson targets are counts"):
            Poisson().check_targets(torch.zeros(2, 1), torch.tensor([1.0, bad]))


def test_score_of_a_known_case() -> None:
    f = torch.tensor([[math.log(3.0)]])
    assert float(Poisson().score(f, torch.tensor([[5.0]]))) == pytest.approx(-2.0)


def test_rates_beyond_the_largest_number_are_unlikely_and_not_undefined() -> None:
    likelihood, f = Poisson(), torch.tensor([[200.0], [3.0]])
    predictive = likelihood.predictive(GaussianLatent(f, torch.full_like(f, 1e4)), torch.randn(64, 1))
    found = predictive.log_prob(torch.tensor([[2.0], [20.0]]))
    assert bool(torch.isfinite(found).all())
    assert not bool(torch.isnan(likelihood.distribution(f).log_prob(torch.tensor([[0.0], [1.0]]))).any())
