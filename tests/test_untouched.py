"""The snapshot that other tests rely on must notice each kind of write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.untouched import untouched


def _grad(net: nn.Sequential) -> None:
    net[0].weight.grad = torch.ones_like(net[0].weight)


def _nan_to_same(net: nn.Sequential) -> None:
    with torch.no_grad():
        net[0].weight.add_(0.0)  # the same values: the version tells


WRITES: dict[str, Callable[[nn.Sequential], object]] = {
    "parameter": _nan_to_same,
    "grad": _grad,
    "buffer": lambda net: net[1].running_mean.add_(1.0),
    "mode": lambda net: net.train(not net.training),
    "hook": lambda net: net[0].register_forward_hook(lambda *_: None),
    "attribute": lambda net: setattr(net, "seen", 1),
    "requires_grad": lambda net: net[0].bias.requires_grad_(False),
    "random state": lambda net: torch.rand(1),
    "class": lambda net: setattr(net[0], "__class__", nn.Bilinear),
    "replaced": lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach().clone())),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_write_is_noticed(write: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(AssertionError), untouched(net):
        WRITES[write](net)


def test_reading_is_not_a_write() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    x = torch.ones(3, 2)
    with untouched(net):
        net(x)
