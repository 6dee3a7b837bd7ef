"""Pairs that stand for held-out data: the right rows, at the network's left-out distance."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bayesdl.last_layer import leftout
from bayesdl.last_layer.leftout import left_out_pairs, misfit
from bayesdl.likelihoods import Gaussian
from bayesdl.network import Network
from bayesdl.tuning import training


def problem(n=60):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    y = torch.stack([x.sin().sum(1), x[:, 0]], 1) + torch.randn(n, 2, generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return net, Network(net, select="all"), x, y


def test_misfit_is_the_root_mean_squared_residual():
    net, _, x, y = problem()
    with torch.no_grad():
        wanted = (y - net(x)).double().square().mean(0).sqrt()
        assert torch.allclose(misfit(net[2], net[:2](x), y), wanted, rtol=1e-6)


def test_distances_are_those_of_function_space_scaled_to_all_points():
    net, network, x, y = problem()
    phi = net[:2](x).detach()
    level = misfit(net[2], phi, y)
    features, targets = left_out_pairs(network, "2", Gaussian(1.0), [(x[:50], y[:50]), (x[50:], y[50:])], level, 80)
    assert features.shape == (40, 5) and targets.shape == (40, 2)
    assert torch.allclose(features, phi[:40])
    found, own = training.network_residuals(
        network, Gaussian(1.0), [(x[:40], y[:40])], 40, level=level, prior_mean=torch.zeros(())
    )
    scale = level / own.square().mean(0).sqrt()
    assert torch.allclose(targets - net(x[:40]).double(), found * scale, rtol=1e-5, atol=1e-6)
    # left out, a point is predicted worse than left in
    assert float(found.square().mean()) > float(own.square().mean())


def test_a_shuffling_loader_keeps_rows_together(monkeypatch):
    net, network, x, y = problem()

    def residuals(network, likelihood, data, count, *, level, prior_mean):
        own = torch.cat([b - net(a).detach() for a, b in data])[:count].double()
        return own, own

    monkeypatch.setattr(training, "network_residuals", residuals)
    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    level = misfit(net[2], net[:2](x).detach(), y)
    features, targets = left_out_pairs(network, "2", Gaussian(1.0), loader, level, limit=200)
    place = torch.cdist(features, net[:2](x).detach()).argmin(1)
    assert len(place.unique()) == 60
    assert torch.allclose(targets, y[place].double(), atol=1e-5)


def test_a_single_example_is_too_few():
    _, network, x, y = problem()
    with pytest.raises(ValueError, match="at least 2"):
        left_out_pairs(network, "2", Gaussian(1.0), [(x[:1], y[:1])], torch.ones(2))
    assert leftout.LIMIT == 1500
