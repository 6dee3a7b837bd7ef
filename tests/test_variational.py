"""The data-emphasised bound: its divergence, its stationary prior, and its optimum on linear models in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NonFiniteError, SelectionError
from bayesdl.variational import DataEmphasizedELBO, fit
from tests.untouched import untouched

NOISE = 0.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(orthogonal=False):
    g = generator(1)
    x = torch.randn(24, 4, generator=g, dtype=torch.float64)
    if orthogonal:
        x = torch.linalg.qr(x).Q * torch.tensor([3.0, 2.0, 5.0, 1.0])
    y = x @ torch.tensor([[1.0], [-0.5], [0.0], [2.0]]).double() + NOISE * torch.randn(24, 1, generator=g).double()
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False).double(), x, y


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def elbo(net, x, y, **options):
    return DataEmphasizedELBO(net, bdl.Gaussian(NOISE), num_data=len(x), **options)


def expected_nll(x, y, mean, std):
    """E_q of the mean loss of a linear model, in closed form."""
    squares = (y[:, 0] - x @ mean).square() + (x.square() * std.square()).sum(1)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi * NOISE**2, dtype=torch.float64))
    return (squares / (2 * NOISE**2) + constant).mean()


def test_the_divergence_is_torchs_and_the_loss_is_stationary_in_the_prior():
    net = small()
    objective = elbo(net, range(50), None, prior={"head": "zero", "backbone": "pretrained"}, example=torch.zeros(1, 3))
    with torch.no_grad():
        for mean in objective.means:
            mean.add_(0.3 * torch.randn(mean.shape, generator=generator(2)).double())
        objective.log_stds[0].fill_(-1.0)
    objective.update_prior()
    own = dict(net.named_parameters())
    std = torch.exp(torch.tensor(-1.0).double())
    for group, names in (("head", ("2.weight", "2.bias")), ("backbone", ("0.weight", "0.bias"))):
        total = 0.0
        for name, mean in zip(own, objective.means, strict=True):
            if name in names:
                centre = own[name] if group == "backbone" else torch.zeros_like(mean)
                q = torch.distributions.Normal(mean, std)
                p = torch.distributions.Normal(centre, objective.variances[group].sqrt())
                total = total + torch.distributions.kl_divergence(q, p).sum()
        torch.testing.assert_close(objective.kl()[group], total)
        objective.variances[group].requires_grad_()
        (slope,) = torch.autograd.grad(objective.kl()[group], objective.variances[group])
        assert abs(float(slope)) < 1e-10


def test_with_a_diagonal_posterior_the_bound_is_the_evidence():
    """Orthogonal inputs: the exact posterior is diagonal, so that at kappa = 1 nothing is lost; away from it, much."""
    net, x, y = linear(orthogonal=True)
    objective = elbo(net, x, y, emphasis=1.0, diagonal=True)
    tau = torch.tensor(0.7).double()
    objective.variances["rest"] = tau
    precision = x.mT @ x / NOISE**2 + torch.eye(4).double() / tau
    mean, std = torch.linalg.solve(precision, x.mT @ y / NOISE**2)[:, 0], precision.diagonal().rsqrt()

    def bound():
        return -24 * expected_nll(x, y, objective.means[0][0], objective.log_stds[0][0].exp()) - objective.kl()["rest"]

    marginal = NOISE**2 * torch.eye(24).double() + tau * x @ x.mT
    evidence = torch.distributions.MultivariateNormal(torch.zeros(24).double(), marginal).log_prob(y[:, 0])
    with torch.no_grad():
        assert float(bound()) < float(evidence)
        objective.means[0].copy_(mean.unsqueeze(0))
        objective.log_stds[0].copy_(std.log().unsqueeze(0))
        torch.testing.assert_close(bound(), evidence, rtol=1e-10, atol=0)
        # and the loss is that bound, from one draw
        losses = torch.stack([objective.loss(x, y, generator(seed)) for seed in range(400)])
    error = float(losses.std()) / 20
    assert abs(float(losses.mean()) + float(evidence) / 24) < 5 * error


@pytest.mark.parametrize("kappa", [1.0, 5.0])
def test_the_optimum_of_a_linear_model(kappa):
    """mu, sigma and tau solve three equations; each has a closed form given the others."""
    net, x, y = linear()
    objective, size = elbo(net, x, y, start=0.1, emphasis=kappa), 4
    tau, gram = torch.tensor(1.0).double(), x.mT @ x / NOISE**2
    for _ in range(500):
        mean = torch.linalg.solve(kappa * gram + torch.eye(4).double() / tau, kappa * x.mT @ y / NOISE**2)[:, 0]
        variance = size / (kappa * gram.trace() + size / tau)
        tau = variance + mean.square().mean()
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    source = generator(3)
    for _ in range(1500):
        optimizer.zero_grad()
        objective.loss(x, y, source).backward()
        optimizer.step()
        schedule.step()
        objective.update_prior()
    torch.testing.assert_close(objective.means[0].detach()[0], mean, rtol=0, atol=0.03)
    assert float(objective.log_stds[0].detach().exp()) == pytest.approx(float(variance.sqrt()), rel=0.03)
    assert float(objective.variances["rest"]) == pytest.approx(float(tau), rel=0.02)
    assert objective.weight_decay["rest"] == pytest.approx(1 / (kappa * 24 * float(tau)), rel=0.02)
    # plain training with that decay, by its closed form, has the same weights
    decay = objective.weight_decay["rest"]
    plain = torch.linalg.solve(gram / 24 + decay * torch.eye(4).double(), x.mT @ y / NOISE**2 / 24)[:, 0]
    torch.testing.assert_close(plain, mean, rtol=0, atol=0.01)


def test_twice_the_data_is_the_same_loss():
    net, x = small(), torch.randn(8, 3, generator=generator()).double()
    y = x[:, :2].sin()
    once, twice = elbo(net, x, y), elbo(net, torch.cat([x, x]), torch.cat([y, y]))
    assert once.likelihood_power == 2 * twice.likelihood_power == 32 / 8
    one = once.loss(x, y, generator())
    torch.testing.assert_close(twice.loss(torch.cat([x, x]), torch.cat([y, y]), generator()), one)


def test_fine_tuning_with_emphasis_learns_where_the_plain_bound_does_not():
    """A network trained on sin(x), 30 points of 1.5 sin(x) + 0.5: without emphasis the bound keeps to its prior."""
    torch.manual_seed(0)
    grid = torch.linspace(-3, 3, 100).unsqueeze(1)
    net = nn.Sequential(nn.Linear(1, 60), nn.Tanh(), nn.Dropout(0.1), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 1))
    net.eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        (net(grid) - grid.sin()).square().mean().backward()
        optimizer.step()
    x = 6 * torch.rand(30, 1, generator=generator(4)) - 3
    y = 1.5 * x.sin() + 0.5 + 0.1 * torch.randn(30, 1, generator=generator(5))
    options = {"prior": {"backbone": "pretrained", "head": "zero"}, "epochs": 400, "lr": 0.01, "progress": False}
    with untouched(net):
        found = fit(net, [(x[:15], y[:15]), (x[15:], y[15:])], "gaussian", **options)
    plain = fit(net, [(x, y)], "gaussian", emphasis=1.0, **options)
    wrong = [float((f.model(grid) - 1.5 * grid.sin() - 0.5).square().mean().detach()) for f in (found, plain)]
    assert wrong[0] < 0.02 < 0.5 < wrong[1]
    assert float(found.likelihood.noise) == pytest.approx(0.1, rel=0.5)
    assert found.weight_decay["backbone"] > 100 * found.weight_decay["head"]  # learned: only the head has to move far
    assert found.likelihood_power == pytest.approx(sum(p.numel() for p in net.parameters()) / 30)
    bayes = bdl.wrap(
        found.model,
        bdl.Laplace(bias="separate"),
        [(x, y)],
        likelihood=found.likelihood,
        prior=found.prior,
        progress=False,
    )
    assert bool((bayes(x).epistemic > 0).all())
    short = {**options, "epochs": 2}
    again = [fit(net, [(x, y)], "gaussian", generator=generator(), **short).history for _ in range(2)]
    assert again[0] == again[1]


def test_the_prior_is_centred_where_the_group_was():
    net, x = small(), torch.randn(30, 3, generator=generator()).double()
    objective = DataEmphasizedELBO(
        net, "categorical", num_data=30, prior={"2": "zero", "rest": "pretrained"}, example=x[:1]
    )
    objective.loss(x, torch.arange(30) % 2).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in objective.parameters())
    prior, own = objective.prior(), dict(net.named_parameters())
    score = prior.grad(own)
    assert all(bool((score[name] == 0).all()) for name in ("0.weight", "0.bias"))
    torch.testing.assert_close(score["2.bias"].double(), -prior.precision["2.bias"] * own["2.bias"].detach())
    drawn = prior.sample(own, generator())
    assert set(drawn) == set(own)


def test_refusals():
    net, x, y = linear()
    with pytest.raises(ArgumentError, match="num_data=0"):
        elbo(net, [], y)
    with pytest.raises(ArgumentError, match="choose one of"):
        elbo(net, x, y, prior={"rest": "one"})
    with pytest.raises(SelectionError, match="is in no group"):
        elbo(small(), x, y, prior={"2": "zero"})
    with pytest.raises(SelectionError, match="earlier group"):
        elbo(small(), x, y, prior={"2": "zero", "last_layer": "zero", "rest": "zero"}, example=torch.zeros(1, 3))
    with pytest.raises(NonFiniteError):
        fit(net, [(x, y)], bdl.Gaussian(NOISE), epochs=300, lr=1e200, progress=False)
