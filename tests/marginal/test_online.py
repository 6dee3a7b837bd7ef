"""Online evidence training: exact on linear models, no harm on small networks, by one call and in one's own loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NonFiniteError, UnsupportedError
from bayesdl.marginal import EvidenceTrainer
from bayesdl.posteriors import GaussianPosterior
from tests import oracles

G = torch.Generator().manual_seed(0)


def linear_data(outputs: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(30, 4, dtype=torch.float64, generator=g)
    weights = torch.randn(4, outputs, dtype=torch.float64, generator=g)
    noise = torch.tensor([0.3, 0.9], dtype=torch.float64)[:outputs]
    return x, x @ weights + noise * torch.randn(30, outputs, dtype=torch.float64, generator=g)


def best_evidence(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Type-II maximum likelihood of Bayesian linear regression: evidence, precision and noises, by brute force."""
    logs = torch.zeros(1 + y.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def value() -> Tensor:
        design = torch.block_diag(*[x] * y.shape[1])
        level = logs[1:].exp().repeat_interleave(len(x))
        marginal = torch.diag(level**2) + design @ design.T / logs[0].exp()
        centre = torch.zeros(len(marginal), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(centre, marginal).log_prob(y.T.flatten())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -value()
        loss.backward()
        return loss

    optimizer.step(closure)
    return value().detach(), logs.detach()[0].exp(), logs.detach()[1:].exp()


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_linear_model_reaches_the_exact_optimum(outputs: int, structure: str) -> None:
    x, y = linear_data(outputs)
    torch.manual_seed(0)
    net = nn.Linear(4, outputs, bias=False).double()
    fit = bdl.evidence_training(
        net,
        [(x, y)],
        "gaussian",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.5),
        epochs=600,
        burn_in=50,
        every=10,
        structure=structure,
        prior="scalar",
        progress=False,
    )
    value, precision, noise = best_evidence(x, y)
    posterior = fit.bayes.posterior
    assert isinstance(posterior, GaussianPosterior)
    torch.testing.assert_close(fit.bayes.log_evidence(), value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(posterior.precision, precision, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(posterior.noise, noise, rtol=1e-3, atol=0.0)
    oracle = oracles.BayesianLinearRegression(x, y, posterior.precision, posterior.noise)
    weights = torch.cat([p.detach().flatten() for p in fit.model.parameters()])
    torch.testing.assert_close(weights, oracle.mean, rtol=1e-4, atol=1e-5)
    assert fit.history[-1] >= fit.history[0]


def moons(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two noisy arcs beside each other."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (count,), generator=g)
    angle = math.pi * torch.rand(count, generator=g)
    sign = 1.0 - 2.0 * y
    x = torch.stack([sign * angle.cos() + y, sign * angle.sin() + 0.5 * y], 1)
    return x + 0.35 * torch.randn(count, 2, generator=g), y


@pytest.mark.slow
def test_small_networks_gain_evidence_and_lose_nothing_held_out() -> None:
    # wide networks on 80 points of three draws, trained until the plain ones overfit; held-out losses pooled
    differences = []
    for seed in range(3):
        x, y = moons(80, seed)
        test_x, test_y = moons(2000, 1000 + seed)
        loader = [(x[:40], y[:40]), (x[40:], y[40:])]
        torch.manual_seed(seed)
        start = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
        plain = copy.deepcopy(start)
        optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
        for _ in range(500):
            for inputs, target in loader:
                optimizer.zero_grad()
                F.cross_entropy(plain(inputs), target).backward()
                optimizer.step()
        fit = bdl.evidence_training(
            start,
            loader,
            "categorical",
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
            epochs=500,
            burn_in=20,
            every=20,
            progress=False,
        )
        assert fit.history[-1] > fit.history[0] + 1.0
        same = bdl.wrap(plain, "laplace", loader, likelihood="categorical", prior=bdl.GaussianPrior(), progress=False)
        assert fit.history[-1] > float(same.tune("evidence", prior="layer").log_evidence()) + 1.0
        with torch.no_grad():
            ours = F.cross_entropy(fit.model(test_x), test_y, reduction="none")
            differences.append(ours - F.cross_entropy(plain(test_x), test_y, reduction="none"))
    difference = torch.cat(differences)
    assert float(difference.mean()) <= float(difference.std() / len(difference) ** 0.5)


def test_a_loop_of_one_s_own() -> None:
    x, y = moons(80, 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    trainer = EvidenceTrainer(net, [(x, y)], "categorical", precision=0.5, burn_in=3, every=2)
    squares = sum(float(p.detach().square().sum()) for p in net.parameters())
    assert float(trainer.regulariser().detach()) == pytest.approx(0.5 * squares / (2 * 80), rel=1e-5)
    plain = F.cross_entropy(net(x), y) + trainer.regulariser()
    torch.testing.assert_close(trainer.loss(net(x), y), plain)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    tuned = []
    for _ in range(8):
        optimizer.zero_grad()
        trainer.loss(net(x), y).backward()
        optimizer.step()
        tuned.append(trainer.step())
    assert tuned == [False, False, True, False, True, False, True, False]
    assert len(trainer.history) == 3 and trainer.precision.shape == (2,)
    weights = [float(net[i].weight.detach().square().sum() + net[i].bias.detach().square().sum()) for i in (0, 2)]
    truth = sum(float(d) * w for d, w in zip(trainer.precision, weights, strict=True)) / (2 * 80)
    assert float(trainer.regulariser().detach()) == pytest.approx(truth, rel=1e-5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mode, grads = net.training, [p.requires_grad for p in net.parameters()]
    bayes = trainer.fit()
    assert bayes(x).mean.shape == (80, 2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training is mode and [p.requires_grad for p in net.parameters()] == grads


def test_precisions_by_parameter_weigh_each_weight() -> None:
    x, y = moons(60, 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    trainer = EvidenceTrainer(net, [(x, y)], "categorical", structure="diag", prior="parameter", limits=(1e-2, 1e2))
    trainer.fit()
    weights = torch.cat([p.detach().flatten() for p in net.parameters()]).double()
    truth = float((trainer.precision * weights.square()).sum() / (2 * 60))
    assert trainer.precision.shape == (22,) and float(trainer.precision.max()) <= 100.0
    assert float(trainer.regulariser().detach()) == pytest.approx(truth, rel=1e-5)


def test_the_given_network_stays() -> None:
    x, y = moons(40, 0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit = bdl.evidence_training(net, [(x, y)], "categorical", epochs=3, burn_in=1, every=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.equal(fit.model[0].weight, net[0].weight)
    assert len(fit.history) == 4


def test_refusals() -> None:
    x, y = moons(40, 0)
    net, data = nn.Linear(2, 2), [(x, y)]
    for wrong in ({"prior": "keep"}, {"every": 0}, {"burn_in": -1}, {"precision": 0.0}):
        with pytest.raises(ArgumentError):
            EvidenceTrainer(net, data, "categorical", **wrong)
    with pytest.raises(UnsupportedError, match="whole parameters"):
        EvidenceTrainer(net, data, "categorical", select=bdl.select.random(2))
    with pytest.raises(NonFiniteError, match="batch 0"):
        bdl.evidence_training(
            net,
            [(x, y)],
            "categorical",
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e38),
            epochs=4,
            progress=False,
        )
