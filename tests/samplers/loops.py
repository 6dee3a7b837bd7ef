"""A small network, its batches, and a training loop that samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.samplers import SGLD

N = 40


def network(seed: int = 0, norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(6)] if norm else []
        return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


def batch(k: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(k)
    return torch.randn(8, 4, generator=source), torch.randint(3, (8,), generator=source)


def source_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sgld(net: nn.Module, seed: int = 1, **own: Any) -> SGLD:
    return SGLD(net.named_parameters(), **{"lr": 0.05, "num_data": N, "generator": source_of(seed), **own})


def backward(net: nn.Module, k: int) -> Tensor:
    net.zero_grad()
    x, y = batch(k)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    return loss


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def assert_equal(posterior: bdl.posteriors.SamplePosterior, expected: list[dict[str, Tensor]]) -> None:
    assert len(posterior) == len(expected)
    for name, values in posterior.snapshots.items():
        assert torch.equal(values, torch.stack([one[name] for one in expected])), name


def run_sgld(net: nn.Module, steps: int, **options: Any) -> tuple[bdl.Chain, list[dict[str, Tensor]]]:
    sampler = sgld(net)
    chain = bdl.Chain(net, sampler=sampler, **options)
    left = []
    for k in range(steps):
        backward(net, k)
        left.append(state(net))
        sampler.step()
        chain.step()
    return chain, left
