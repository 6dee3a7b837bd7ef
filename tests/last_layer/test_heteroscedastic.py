"""Input-dependent noise: the bound's terms and the predictive against quadrature, and what fitting it is good for."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import bayesdl as bdl
from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.last_layer import Heteroscedastic, Regression

D, N = 3, 200


def nodes(count):
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.as_tensor(points), torch.as_tensor(weights / weights.sum())


def head(outputs=2, **options):
    made = Heteroscedastic(D, outputs, num_data=N, init_scale=0.5, **options).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.mean.copy_(0.5 * torch.randn(2 * outputs, D + 1, generator=generator, dtype=torch.float64))
    return made


def features(count=7):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("covariance", ["full", "diag", "shared", "lowrank"])
def test_the_expected_log_likelihood_is_a_quadrature(covariance):
    made, phi = head(covariance=covariance), features()
    y = torch.randn(7, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean, variance = made.moments(phi)
    points, weights = nodes(40)
    f = mean[:, :2, None] + variance[:, :2, None].sqrt() * points
    s = mean[:, 2:, None] + variance[:, 2:, None].sqrt() * points
    logs = Normal(f.unsqueeze(-1), (0.5 * s).exp().unsqueeze(-2)).log_prob(y[..., None, None])
    expected = torch.einsum("bkij,i,j->b", logs, weights, weights)
    assert torch.allclose(made.expected_log_likelihood(mean, variance, y), expected, rtol=1e-8)


def test_predictive_density_is_a_fine_quadrature_and_its_parts_agree():
    made, phi = head(), features()
    pred = made(phi).predictive
    y = torch.randn(7, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean, variance = made.moments(phi)
    points, weights = nodes(80)
    levels = (mean[:, 2:, None] + variance[:, 2:, None].sqrt() * points).exp()
    fine = Normal(mean[:, :2, None], (variance[:, :2, None] + levels).sqrt()).log_prob(y.unsqueeze(-1))
    assert torch.allclose(pred.log_prob(y), torch.logsumexp(fine + weights.log(), -1).sum(-1), atol=1e-3)
    assert torch.allclose(pred.aleatoric, (levels * weights).sum(-1), rtol=1e-4)
    assert torch.allclose(pred.epistemic, variance[:, :2])
    assert torch.allclose(pred.total, pred.variance)
    assert torch.allclose(pred.mean, mean[:, :2])
    # quantiles invert the distribution function of each output's own mixture
    quantile = pred.quantile(0.8)
    shares = pred.components[0]
    cdf = torch.einsum("s,sbc->bc", shares, Normal(pred.components[1], pred.components[2].sqrt()).cdf(quantile))
    assert torch.allclose(cdf, torch.full_like(cdf, 0.8))
    draws = pred.sample(40000, generator=torch.Generator().manual_seed(0))
    # 28 comparisons, each within 5 standard errors: fails once in 60,000 seeds
    assert bool(((draws.mean(0) - pred.mean).abs() < 5 * (pred.variance / 40000).sqrt()).all())
    entropies = torch.stack([-pred.log_prob(one) for one in draws[:4000]]).mean(0)
    assert torch.allclose(pred.entropy, entropies, atol=0.1)
    assert torch.equal(made.train()(phi).predictive.log_prob(y), pred.log_prob(y))


def test_certain_log_variances_give_the_loss_of_known_noise():
    made, phi = head(1), features()
    plain = Regression(D, 1, num_data=N, init_noise=0.4, noise_prior=None).double()
    with torch.no_grad():
        made.mean[1] = 0.0
        made.mean[1, -1] = 2 * math.log(0.4)
        made.covariance.log_diagonal[1] = -20.0
        plain.mean.copy_(made.mean[:1])
    mean, variance = made.moments(phi)
    y = torch.ones(7, 1, dtype=torch.float64)
    expected = plain.expected_log_likelihood(mean[:, :1], variance[:, :1], y)
    # the noise of the plain head is stored in single precision
    assert torch.allclose(made.expected_log_likelihood(mean, variance, y), expected, rtol=1e-5)


def noisy(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(count, 1, generator=generator) - 1
    return x, x.sin() + (0.05 + 0.5 * x.clamp(min=0)) * torch.randn(count, 1, generator=generator)


def trunk():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_wrap_learns_where_the_noise_is(mode, tmp_path):
    x, y = noisy(300, 0)
    loader = list(zip(x.split(50), y.split(50), strict=True))
    options = {} if mode == "frozen" else {"epochs": 40, "lr": 2e-2}
    bayes = bdl.wrap(trunk(), bdl.VBLL(mode=mode, **options), loader, likelihood="heteroscedastic", progress=False)
    fresh, target = noisy(400, 1)
    pred = bayes(fresh)
    assert pred.mean.shape == (400, 1)
    left, right = fresh[:, 0] < -0.3, fresh[:, 0] > 0.5
    assert float(pred.aleatoric[left].sqrt().mean()) < 0.12 < 0.25 < float(pred.aleatoric[right].sqrt().mean())
    one = nn.Sequential(trunk()[:2], nn.Linear(8, 1))
    even = bdl.wrap(one, "vbll", loader, likelihood="gaussian", progress=False)
    assert float(pred.log_prob(target).mean()) > float(even(fresh).log_prob(target).mean()) + 0.2
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", trunk())
    assert torch.equal(again(fresh).log_prob(target), pred.log_prob(target))
    if mode == "frozen":
        assert float(bayes.log_evidence()) == pytest.approx(bayes.cost["bound"])
        given = bdl.GaussianPrior(precision=2.0)
        fixed = bdl.wrap(trunk(), "vbll", loader, likelihood="heteroscedastic", prior=given, progress=False)
        assert fixed.cost["bound"] < bayes.cost["bound"]  # whose prior was chosen by it


def test_replace_takes_layers_of_means_or_of_both():
    net = trunk()
    x = torch.randn(5, 1)
    both = bdl.replace(net, "2", Heteroscedastic(8, 1, num_data=N))
    assert torch.allclose(both(x).mean, net(x), atol=1e-6)
    alone = nn.Sequential(*net[:2], nn.Linear(8, 1))
    means = bdl.replace(alone, "2", Heteroscedastic(8, 1, num_data=N, init_noise=0.3))
    assert torch.allclose(means(x).mean[:, :1], alone(x), atol=1e-6)
    assert torch.allclose(means(x).predictive.aleatoric, torch.tensor(0.09), rtol=0.1)
    loss = means(x).loss(torch.zeros(5))
    assert torch.allclose(loss, means(x).loss(torch.zeros(5, 1)))
    with pytest.raises(ShapeError, match="maps 8 features to 1"):
        bdl.replace(alone, "2", Heteroscedastic(8, 3, num_data=N))
    with pytest.raises(ShapeError, match="targets have shape"):
        means(x).loss(torch.zeros(4))
    with pytest.raises(ArgumentError, match="bias=True"):
        Heteroscedastic(8, 1, num_data=N, bias=False)
    with pytest.raises(ArgumentError, match="nodes=0"):
        bdl.Heteroscedastic(nodes=0)
