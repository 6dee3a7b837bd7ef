"""Models that torch has spread over processes: what every process checks (see `tests/test_sharded.py`)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import bayesdl as bdl
from bayesdl.errors import StaleModelError, UnsupportedError
from bayesdl.network import Network
from tests.together import COUNT, close, examples, in_batches, network, padded, same_everywhere, sharded


def _placements(net: nn.Module) -> dict[str, Any]:
    return {name: (p.placements, p.to_local().clone(), p._version) for name, p in net.named_parameters()}


def fsdp(rank: int, size: int) -> None:
    """Before and after a step of training; sharded as a whole, layer by layer, and in a group of layers."""
    inputs = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    x, y = examples("categorical")
    for trained in (False, True):
        for form in ("whole", "layers", "group"):
            net = network()
            if form == "layers":
                for layer in (net[0], net[3]):
                    fully_shard(layer)
            if form == "group":
                fully_shard([net[0], net[3]])
            fully_shard(net)
            plain = network()
            if trained:
                step(net, x, y)
                step(plain, x, y)
            before = _placements(net)
            for select in ("all", "last_layer"):
                options: dict[str, Any] = {
                    "likelihood": "categorical",
                    "select": select,
                    "prior": bdl.GaussianPrior(precision=1.0),
                    "progress": False,
                }
                alone = bdl.wrap(plain, "laplace", in_batches(x, y), **options)
                whole = bdl.wrap(net, "laplace", padded(x, y, rank, size), distributed=True, **options)
                close(whole(inputs).latent.covariance, alone(inputs).latent.covariance)
                close(whole(inputs).mean, alone(inputs).mean)
                close(whole.log_evidence(), alone.log_evidence())
                same_everywhere(whole(inputs).mean)
                assert whole.network.fingerprint() == alone.network.fingerprint() or trained
                assert list(whole.network.parameters) == list(alone.network.parameters)
                plain_copy = bdl.wrap(bdl.gathered(net), "laplace", in_batches(x, y), **options)
                close(plain_copy(inputs).latent.covariance, alone(inputs).latent.covariance)
                assert not any(isinstance(part, FSDPModule) for part in whole.network.template.modules())
            after = _placements(net)
            assert isinstance(net, FSDPModule)
            for name, (places, local, version) in before.items():
                assert after[name][0] == places and after[name][2] == version and torch.equal(after[name][1], local)
            step(net, x, y)  # and it trains on, which is noticed
            with pytest.raises(StaleModelError):
                whole(inputs)


def step(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """The same data on every process, so that the mean gradient is that of one process."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    if isinstance(net, FSDPModule):
        for part in net.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def wrappers_in_either_nesting(rank: int, size: int) -> None:
    x, y = examples("categorical")
    inner = network()
    options: dict[str, Any] = {"progress": False, "structure": "diag"}
    alone = bdl.curvature.estimate(inner, in_batches(x, y), "categorical", **options).to_dense()
    for form in (
        DistributedDataParallel(torch.compile(inner)),
        torch.compile(DistributedDataParallel(inner)),
        nn.DataParallel(inner),
    ):
        for share in (padded(x, y, rank, size), sharded(x, y, rank, size)):  # the latter uneven
            found = bdl.curvature.estimate(form, share, "categorical", distributed=True, **options)
            close(found.to_dense(), alone)
        uneven = in_batches(x, y)[rank :: size + 1] if rank else in_batches(x, y)
        bdl.curvature.estimate(form, uneven, "categorical", **options)  # each on its own: nobody waits


def what_is_refused(rank: int, size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own advice
        old = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="FSDP1.*fully_shard"):
        Network(old)
    mesh = init_device_mesh("cpu", (size,))
    split = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    parallel = parallelize_module(split, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with pytest.raises(UnsupportedError, match="tensor parallel.*full_tensor"):
        Network(parallel)
    zero = nn.Linear(3, 2)
    zero.weight.ds_id = 0
    with pytest.raises(UnsupportedError, match="ZeRO"):
        Network(zero)
    from torch.distributed.tensor import Shard, distribute_tensor

    bare = nn.Linear(4, 4)
    bare.weight = nn.Parameter(distribute_tensor(bare.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(UnsupportedError, match="DTensors of no FSDP module"):
        Network(bare)


def everything(rank: int, size: int) -> None:
    assert COUNT % size
    for check in (fsdp, wrappers_in_either_nesting, what_is_refused):
        check(rank, size)
