"""Mixtures of training inputs: what they are, and that a network which knows its labels by heart is widened by them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError
from bayesdl.network import Network
from bayesdl.posteriors import GaussianPosterior
from bayesdl.tuning.mixing import SHARE, mixed

METHOD = bdl.Laplace(select="last_layer", structure="full")


def overfitted() -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained on its first 60 points until it knows their labels, a fifth of them wrong, by heart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long()
    y = torch.where(torch.rand(400, generator=generator) < 0.2, 1 - y, y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 2))
    optimiser = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x[:60]), y[:60]).backward()
        optimiser.step()
    return net, x, y


def nll(model: bdl.BayesianModel, x: Tensor, y: Tensor) -> float:
    return -float(model(x).log_prob(y).double().mean())


def precision_of(model: bdl.BayesianModel) -> float:
    assert isinstance(model.posterior, GaussianPosterior)
    return float(model.posterior.precision)


def test_each_is_two_inputs_with_the_label_of_the_greater() -> None:
    x, y = torch.eye(7, dtype=torch.float64), torch.arange(7)
    found = mixed(Network(nn.Linear(7, 7).double()), [(x[:4], y[:4]), (x[4:], y[4:])], 6)
    assert found is not None
    inputs, targets = found
    assert torch.equal(targets, torch.arange(6))
    rest = inputs - SHARE * x[:6]
    assert torch.allclose(inputs[range(6), range(6)], torch.full((6,), SHARE, dtype=torch.float64))  # never with itself
    partner = rest.argmax(1)
    assert torch.allclose(rest, (1.0 - SHARE) * x[partner])
    assert sorted(partner.tolist()) == list(range(6))  # each takes part once


def test_inputs_that_cannot_be_mixed() -> None:
    network, y = Network(nn.Linear(3, 2)), torch.zeros(2, dtype=torch.long)
    x = torch.zeros(2, 3)
    cases: list[list[Any]] = [
        [(x.long(), y)],
        [((x, x), y)],
        [({"x": x}, y)],
        [(x, y), (torch.zeros(2, 4), y)],
        [(x[:1], y[:1])],
    ]
    assert all(mixed(network, data, 10) is None for data in cases)
    assert mixed(network, [(x, y)], 10) is not None


def test_the_precision_is_the_best_for_mixtures_where_they_want_a_wider_posterior() -> None:
    net, x, y = overfitted()
    data = [(x[:60], y[:60])]
    grid = [10.0 ** (k / 2) for k in range(-6, 13)]
    bayes = bdl.wrap(net, METHOD, data, likelihood="categorical", prior=bdl.GaussianPrior(1.0), progress=False)
    alone, both = (bayes.tune("training", grid=grid, harm=0.002, mix=share) for share in (1.0, 0.8))
    pair = mixed(bayes.network, data, 60)
    assert pair is not None

    def loss(precision: float) -> float:
        prior = bdl.GaussianPrior(precision=precision)
        return nll(bdl.wrap(net, METHOD, data, likelihood="categorical", prior=prior, progress=False), *pair)

    best = min(grid, key=loss)
    assert precision_of(both) < precision_of(alone)
    assert math.isclose(precision_of(both), best, rel_tol=1e-6)
    assert any("mixtures" in finding.text for finding in both.diagnose().findings)
    # for points that the network has not seen, too
    assert nll(both, x[60:], y[60:]) < nll(alone, x[60:], y[60:]) - 0.1
    # and by default
    assert precision_of(bayes.tune("training", mix=1.0)) >= precision_of(bayes.tune("training", mix=0.75))
    assert precision_of(bayes.tune("training")) == precision_of(bayes.tune("training", mix=SHARE))


def test_never_narrower_than_what_does_no_harm_nor_where_harm_is_given() -> None:
    net, x, y = overfitted()
    with torch.no_grad():  # a network that is far less sure of itself than it should be
        net[2].weight.mul_(1e-3)
        net[2].bias.zero_()
    data = [(x[:60], y[:60])]
    bayes = bdl.wrap(net, METHOD, data, likelihood="categorical", prior=bdl.GaussianPrior(1.0), progress=False)
    assert precision_of(bayes.tune("training")) == precision_of(bayes.tune("training", mix=1.0))
    sure = bdl.wrap(overfitted()[0], METHOD, data, likelihood="categorical", progress=False)
    assert precision_of(sure.tune("training", harm=0.01)) == precision_of(sure.tune("training", harm=0.01, mix=1.0))
    assert precision_of(sure.tune("training", harm=0.01, mix=0.8)) < precision_of(sure.tune("training", harm=0.01))


@pytest.mark.parametrize("share", [0.5, 1.1, math.nan])
def test_a_share_that_leaves_the_label_open_is_refused(share: float) -> None:
    net, x, y = overfitted()
    bayes = bdl.wrap(net, METHOD, [(x[:60], y[:60])], likelihood="categorical", progress=False)
    with pytest.raises(ArgumentError, match=r"mix=.*above 0\.5"):
        bayes.tune("training", mix=share)
