"""What every process of a group checks of its chains; `tests/methods/test_chains.py` starts them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.methods import parallel


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def loader() -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(30, 2, generator=g)
    data = TensorDataset(x, x.sum(1, keepdim=True) + 0.3 * torch.randn(30, 1, generator=g))
    return DataLoader(data, batch_size=16, shuffle=True)


def fitted(distributed: bool | None) -> bdl.BayesianModel:
    method = bdl.SGMCMC("sghmc", num_samples=3, thin=2, chains=3)
    arguments: dict[str, Any] = {"likelihood": bdl.Gaussian(noise=0.3), "progress": False, "distributed": distributed}
    generator = torch.Generator().manual_seed(7)
    return bdl.wrap(network(), method, loader(), generator=generator, **arguments)


def chains_are_those_of_one_process(rank: int, size: int) -> None:
    """Bit for bit, on every process, with more processes than chains too."""
    torch.manual_seed(100 + rank)  # what the processes' global generators hold must not matter
    together, alone = fitted(True), fitted(None)
    assert set(together.posterior.snapshots) == set(alone.posterior.snapshots)
    for name, value in alone.posterior.snapshots.items():
        mine = together.posterior.snapshots[name]
        assert mine.dtype is value.dtype and torch.equal(mine, value), name
        theirs = mine.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(theirs, mine)
    assert torch.equal(together.posterior.weights, alone.posterior.weights)


def the_first_process_decides_how_chains_run(rank: int, size: int) -> None:
    """Clocks differ between processes, and the way that chains run must not."""
    asked = []

    def steered(jobs: Any) -> tuple[float, float]:
        asked.append(len(jobs))
        return 2.0, 1.0

    parallel.seconds_a_step = steered
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    method = bdl.SGMCMC("sghmc", num_samples=3, thin=2, chains=3, parallel="fastest")
    arguments: dict[str, Any] = {"likelihood": bdl.Gaussian(noise=0.3), "progress": False}
    fit = [
        bdl.wrap(plain, one, loader(), generator=torch.Generator().manual_seed(7), distributed=across, **arguments)
        for one, across in ((method, True), (replace(method, parallel="sequential"), None))
    ]
    assert asked == ([2] if rank == 0 else [])  # chains 0 and 2 are the first process's
    for name, value in fit[1].posterior.snapshots.items():
        assert torch.allclose(fit[0].posterior.snapshots[name], value, atol=1e-5), name
