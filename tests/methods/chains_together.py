"""What every process of a group checks of its chains; `tests/methods/test_chains.py` starts them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.curvature.operators import CurvatureOperator
from bayesdl.methods import parallel
from bayesdl.methods.energy import Energy


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


def the_search_for_the_step_is_divided(rank: int, size: int) -> None:
    """Each process takes its share of the products and of the gradients; steps and chains are those of one process."""
    products, gradients = [0], [0]
    times, loss = CurvatureOperator.matmat, Energy.loss

    def counted(self: CurvatureOperator, v: Tensor) -> Tensor:
        products[0] += 1
        return times(self, v)

    def noted(self: Energy, *arguments: Any) -> Tensor:
        gradients[0] += 1
        return loss(self, *arguments)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    with mock.patch.object(CurvatureOperator, "matmat", counted), mock.patch.object(Energy, "loss", noted):
        for kind in ("sghmc", "psgld"):
            found: dict[bool, tuple[list[int], bdl.BayesianModel]] = {}
            for across in (True, False):
                products[0] = gradients[0] = 0
                method = bdl.SGMCMC(kind, num_samples=2, thin=1, chains=2, burn_in=1, parallel="sequential")
                arguments: dict[str, Any] = {"likelihood": bdl.Gaussian(noise=0.3), "progress": False}
                data = DataLoader(loader().dataset, batch_size=3, shuffle=True)  # 10 batches, in 8 pieces
                generator = torch.Generator().manual_seed(7)
                bayes = bdl.wrap(plain, method, data, generator=generator, distributed=across, **arguments)
                found[across] = [products[0], gradients[0]], bayes
            (mine, together), (all_, alone) = found[True], found[False]
            pieces = len(range(rank, 8, size))
            assert (mine[0], all_[0]) == (pieces * 8, 64), (mine, all_)  # 8 steps of the search
            steps, own = 3, len(range(rank, 2, size))
            assert all_[1] == 2 * steps + (0 if kind == "sghmc" else 10)
            share = 0 if kind == "sghmc" else sum(b * 8 // 10 in range(rank, 8, size) for b in range(10))
            assert mine[1] == own * steps + share, mine
            assert dict(together.record.cost)["lr"] == dict(alone.record.cost)["lr"]
            for name, value in alone.posterior.snapshots.items():
                assert torch.equal(together.posterior.snapshots[name], value), name
