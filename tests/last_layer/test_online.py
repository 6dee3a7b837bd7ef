"""Online regression equals batch regression, and its prequential densities add up to the evidence."""

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError
from bayesdl.last_layer import ConjugateRegression, Statistics
from bayesdl.last_layer.online import RecursiveRegression

N, D, K = 40, 4, 2


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(N, D, generator=generator, dtype=torch.float64)
    truth = torch.randn(D, K, generator=generator, dtype=torch.float64)
    return phi, phi @ truth + 1.0 + 0.3 * torch.randn(N, K, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("intercept", ["flat", "proper", "none"])
@pytest.mark.parametrize("ratio", [[0.5, 0.5], [0.5, 3.0]])
def test_recursion_is_the_batch_posterior(intercept, ratio):
    phi, y = data()
    hyper = torch.tensor(ratio, dtype=torch.float64), torch.tensor([0.1, 0.2], dtype=torch.float64)

    def fit(rows):
        start = ConjugateRegression.decompose(Statistics.of(phi[rows], y[rows]), intercept=intercept)
        return start.with_hyperparameters(*hyper)

    online = RecursiveRegression.of(fit(slice(0, 15)))
    assert len(online.inverse) == (1 if ratio[0] == ratio[1] else 2)
    for a, b in zip(online.latent(phi), fit(slice(0, 15)).latent(phi), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)
    online, _ = online.observe(phi[15:], y[15:])
    for a, b in zip(online.latent(phi), fit(slice(0, N)).latent(phi), strict=True):
        assert torch.allclose(a, b, rtol=1e-8)


def test_prequential_densities_sum_to_the_evidence_in_any_order():
    phi, y = data()
    start = RecursiveRegression.start(D, K, prior_precision=2.0, noise=0.3, bias=False)
    _, densities = start.observe(phi, y)
    exact = ConjugateRegression.decompose(Statistics.of(phi, y), intercept="none")
    ratio = torch.full((K,), 2.0 * 0.09, dtype=torch.float64)
    exact = exact.with_hyperparameters(ratio, torch.full((K,), 0.09, dtype=torch.float64))
    assert torch.allclose(densities.sum(), exact.log_evidence(), rtol=1e-10)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    _, others = start.observe(phi[shuffled], y[shuffled])
    assert torch.allclose(others.sum(), densities.sum(), rtol=1e-10)


def test_forgetting_is_weighted_least_squares():
    phi, y = data()
    keep = 0.9
    online, _ = RecursiveRegression.start(D, K, prior_precision=2.0, noise=0.3, bias=False, forgetting=keep).observe(
        phi, y
    )
    weight = keep ** torch.arange(N - 1, -1, -1, dtype=torch.float64)
    # the prior fades as every old point does
    inner = phi.mT @ (weight.unsqueeze(1) * phi) + 2.0 * 0.09 * keep**N * torch.eye(D, dtype=torch.float64)
    expected = torch.linalg.solve(inner, phi.mT @ (weight.unsqueeze(1) * y))
    assert torch.allclose(online.weights.mT, expected, rtol=1e-8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, K))


@pytest.mark.parametrize("noise", ["point", "gamma"])
def test_updating_a_model_equals_fitting_it_on_everything(noise):
    phi, y = (t.float() for t in data())
    net = network()
    prior = bdl.GaussianPrior(precision=1.0) if noise == "point" else None
    likelihood = bdl.Gaussian(0.3) if noise == "point" else "gaussian"

    def fit(rows):
        options = {"likelihood": likelihood, "prior": prior, "progress": False}
        return bdl.wrap(net, bdl.VBLL(noise=noise, tuning="evidence"), [(phi[rows], y[rows])], **options)

    part, whole = fit(slice(0, 15)), fit(slice(0, N))
    grown = part.update([(phi[15:30], y[15:30]), (phi[30:], y[30:])])
    assert grown is not part and "updated with 25 examples, 40 in all" in str(grown.diagnose())
    if noise == "point":
        assert torch.allclose(grown(phi).mean, whole(phi).mean, atol=1e-5)
        assert torch.allclose(grown(phi).variance, whole(phi).variance, rtol=1e-5)
    again = part.update([(phi[15:], y[15:])], retune=True)
    best = bdl.wrap(net, bdl.VBLL(tuning="evidence"), [(phi, y)], likelihood="gaussian", progress=False)
    assert torch.allclose(again(phi).mean, best(phi).mean, atol=1e-4)


def test_an_unknown_noise_learns_from_new_residuals():
    phi, y = (t.float() for t in data())
    net = network()
    part = bdl.wrap(
        net, bdl.VBLL(noise="gamma", tuning="evidence"), [(phi[:15], y[:15])], likelihood="gaussian", progress=False
    )
    grown = part.update([(phi[15:], y[15:])])
    regression = grown.posterior.belief.regression
    # the normal-gamma posterior of all data at that ratio: shape (n - 1) / 2, rate R / 2
    assert torch.allclose(grown.likelihood.parameters(regression.ratio)[0], torch.full((K,), 19.5, dtype=torch.float64))
    rate = 0.5 * regression.misfit(regression.ratio)
    assert torch.allclose(grown.likelihood.parameters(regression.ratio)[1], rate, rtol=1e-6)


def test_refusals():
    phi, y = (t.float() for t in data())
    net = network()
    with pytest.raises(UnsupportedError, match="no exact update"):
        bdl.wrap(net, "map", [(phi, y)], likelihood="gaussian", progress=False).update([(phi, y)])
    with pytest.raises(ArgumentError, match="forgetting"):
        RecursiveRegression.start(D, K, prior_precision=1.0, noise=0.1, forgetting=1.5)
    start = RecursiveRegression.start(D, K, prior_precision=1.0, noise=0.1)
    with pytest.raises(ShapeError, match=r"expected \(B, 4\)"):
        start.observe(phi[:, :2], y)
    with pytest.raises(ShapeError, match=r"expected \(40, 2\)"):
        start.observe(phi, y[:, :1])
