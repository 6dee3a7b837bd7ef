"""Models whose weights stay sharded: what every process checks (see `tests/test_streaming.py`)."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import bayesdl as bdl
from bayesdl.distributed import resolve_group
from bayesdl.errors import DistributedError, NonFiniteError, UnsupportedError
from bayesdl.network import Network
from bayesdl.streaming import Exchange
from tests.together import close, in_batches, same_everywhere, sharded
from tests.untouched import untouched

COUNT = 11


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.group = nn.GroupNorm(1, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x)).relu()
        hidden = self.group(self.up(hidden)).tanh()
        return self.head(hidden.mean((2, 3)))


class Attending(nn.Module):
    """Tokens, a position table that no layer holds, packed projections, a recurrent layer, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.places = nn.Parameter(torch.randn(1, 3, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.memory = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.block(self.embedding(tokens) + self.places)
        return self.head(self.memory(hidden)[0].mean(1))[:, :3]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


def made(make: Callable[[], nn.Module], units: tuple[str, ...] = ()) -> tuple[nn.Module, nn.Module]:
    """The same network plain, and sharded: the named units, and the rest as a whole."""
    nets = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            nets.append(make().double())
    for name in units:
        fully_shard(nets[1].get_submodule(name))
    fully_shard(nets[1])
    return nets[0], nets[1]


def data_for(make: Callable[[], nn.Module], count: int = COUNT) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    if make is Attending:
        x = torch.randint(6, (count, 3), generator=g)
    else:
        x = torch.randn(count, *((2, 3, 3) if make is Convolutions else (3,)), dtype=torch.float64, generator=g)
    return x, torch.randint(3, (count,), generator=g)


CASES: tuple[tuple[Callable[[], nn.Module], tuple[str, ...]], ...] = (
    (perceptron, ("0", "3", "5")),
    (Convolutions, ("first", "up")),
    (Attending, ("block",)),
)


@contextmanager
def watched() -> Iterator[list[int]]:
    """How many whole weights are alive whenever one more has been gathered."""
    counts: list[int] = []
    alive: set[int] = set()
    gather = Exchange.gather

    def counting(self: Exchange, number: int) -> Tensor:
        whole = gather(self, number)
        key = id(whole)
        alive.add(key)
        weakref.finalize(whole, alive.discard, key)
        counts.append(len(alive))
        return whole

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "gather", counting)
        yield counts
    assert not alive


def factors_are_those_of_one_process(rank: int, size: int) -> None:
    """Every layer and kind on uneven shares; no process ever holds more than a few whole weights."""
    for make, units in CASES:
        plain, net = made(make, units)
        x, y = data_for(make)
        mine = sharded(x, y, rank, size)
        options: dict[str, Any] = {"progress": False}
        for structure, kind in (("kron", "ggn"), ("diag", "ggn"), ("kron", "empirical"), ("ekfac", "ggn")):
            options |= {"structure": structure, "kind": kind}
            alone = bdl.curvature.estimate(plain, in_batches(x, y), "categorical", **options)
            with untouched(net), watched() as counts:
                whole = bdl.curvature.estimate(net, mine, "categorical", distributed=True, **options)
            assert whole.layout == alone.layout
            close(whole.to_dense(), alone.to_dense())
            same_everywhere(*whole.tensors().values())
            assert max(counts) <= 2, max(counts)  # of up to eight


def predictions_and_rules_are_those_of_one_process(rank: int, size: int) -> None:
    """Loaders of different lengths, rules that the first process alone decides by, files written by one process."""
    plain, net = made(perceptron, ("0", "3", "5"))
    x, y = data_for(perceptron, 24)
    options: dict[str, Any] = {"likelihood": "categorical", "progress": False}
    prior = bdl.GaussianPrior(precision=1.0)
    with untouched(net):
        alone = bdl.wrap(plain, "laplace", in_batches(x, y), prior=prior, **options)
        whole = bdl.wrap(net, "laplace", sharded(x, y, rank, size), prior=prior, distributed=True, **options)
        some = x[: rank + 2]  # another number on every process
        with watched() as counts:
            close(whole(some).latent.covariance, alone(some).latent.covariance)
            mine = sharded(x, y, rank, size)
            close(whole.predict(mine).mean, alone.predict(mine).mean)
            assert max(counts) == 1
        close(whole.log_evidence(), alone.log_evidence())
        close(whole.covariance(x[:3], x[3:5]), alone.covariance(x[:3], x[3:5]))
        pairs = zip(whole.draw(2), alone.draw(2), strict=True)
        assert all(torch.allclose(a(x), b(x), atol=1e-9) for a, b in pairs)
        tuned = whole.tune("heldout", in_batches(x, y) if rank == 0 else None, distributed=True)
        close(tuned(x).mean, alone.tune("heldout", in_batches(x, y))(x).mean)
        everywhere = bdl.wrap(net, "laplace", in_batches(x, y), **options)  # the same data on each: no sum
        close(everywhere(x).mean, bdl.wrap(plain, "laplace", in_batches(x, y), **options)(x).mean)
    with shared_folder(rank) as folder:
        if rank == 0:
            whole.save(folder / "bayes.safetensors")
        dist.barrier()
        close(bdl.load(folder / "bayes.safetensors", net)(x).variance, alone(x).variance)
        close(bdl.load(folder / "bayes.safetensors", plain)(x).variance, alone(x).variance)


def methods_are_those_of_one_process(rank: int, size: int) -> None:
    """Whatever reads weights where they are used; the others say what to do instead."""
    plain, net = made(perceptron, ("0", "3"))
    x, y = data_for(perceptron, 24)
    data, prior = in_batches(x, y), bdl.GaussianPrior(precision=100.0)
    options: dict[str, Any] = {"likelihood": "categorical", "progress": False}
    for method in (
        *("map", "temperature", "vbll", "gp", "ella"),
        bdl.Laplace(structure="full", kind="hessian"),
        bdl.Laplace(structure="lowrank", rank=5),
        bdl.Laplace(predictive="samples"),
        bdl.Laplace(select="last_layer"),
        bdl.Laplace(select=bdl.select.largest_magnitude(20), structure="full"),
    ):
        given = {**options, "prior": prior} if isinstance(method, bdl.Laplace) else options
        alone, whole = (bdl.wrap(model, method, data, **given) for model in (plain, net))
        close(whole(x).mean, alone(x).mean)
    for method in ("swag", "sghmc", "nuts", bdl.VBLL(mode="full")):
        with pytest.raises(UnsupportedError, match="sharded.*bdl.gathered"):
            bdl.wrap(net, method, data, **options)
    close(
        bdl.wrap(bdl.gathered(net), "swag", data, **options)(x).mean, bdl.wrap(plain, "swag", data, **options)(x).mean
    )
    heads = made(lambda: nn.Sequential(nn.Linear(3, 7), nn.Tanh(), bdl.last_layer.Classification(7, 3, num_data=24)))
    alone, whole = (bdl.BayesianModel(head, head[2].posterior(), "categorical") for head in heads)
    close(whole(x).mean, alone(x).mean)


def adapters_are_those_of_one_process(rank: int, size: int) -> None:
    peft = pytest.importorskip("peft")

    def make() -> nn.Module:
        adapted = peft.get_peft_model(perceptron(), peft.LoraConfig(r=2, target_modules=["0", "3"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        return adapted

    plain, net = made(make)
    x, y = data_for(perceptron, 24)
    for method in ("tfb", bdl.Laplace(select="lora")):
        alone, whole = (
            bdl.wrap(model, method, in_batches(x, y), likelihood="categorical", progress=False)
            for model in (plain, net)
        )
        close(whole(x).mean, alone(x).mean)


def an_error_on_one_process_leaves_none_waiting(rank: int, size: int) -> None:
    net = made(perceptron, ("0", "3"))[1]
    x, y = data_for(perceptron)
    bad = x.clone()
    bad[5:] = torch.nan
    data = in_batches(bad if rank == size - 1 else x, y)
    expected = NonFiniteError if rank == size - 1 else DistributedError
    with pytest.raises(expected):
        bdl.wrap(net, "laplace", data, likelihood="categorical", distributed=True, progress=False)
    bayes = bdl.wrap(net, "map", likelihood="categorical", progress=False)
    if rank == size - 1:
        with pytest.raises(NonFiniteError):
            bayes.predict(data)
    else:
        bayes.predict(data)


def what_torch_keeps_whole_and_what_it_cuts_otherwise(rank: int, size: int) -> None:
    """The outermost group behind a forward pass; weights cut along another axis; copies over groups of processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    x, y = data_for(perceptron)
    plain, net = made(perceptron, ("0",))
    with torch.no_grad():
        net(x)
    other = made(perceptron)[0]
    fully_shard(other, shard_placement_fn=lambda p: Shard(int(p.dim() > 1 and p.shape[1] % size == 0)))
    copied = made(perceptron)[0]
    fully_shard(copied, mesh=init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("copies", "shards")))
    apart = made(perceptron)[0]
    pairs = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("other", "pair"))
    fully_shard(apart[0], mesh=pairs["pair"])
    alone = bdl.curvature.estimate(plain, in_batches(x, y), "categorical", progress=False).to_dense()
    for model in (net, other, copied):
        close(bdl.curvature.estimate(model, in_batches(x, y), "categorical", progress=False).to_dense(), alone)
    fully_shard(apart)
    if size > 2:
        with pytest.raises(UnsupportedError, match=r"different groups.*bdl\.gathered"):
            Network(apart)


@contextmanager
def shared_folder(rank: int) -> Iterator[Path]:
    """A folder of the first process, known to all of them."""
    group = resolve_group(True)
    assert group is not None
    with tempfile.TemporaryDirectory() as mine:
        yield Path(group.message(mine.encode()).decode())
        dist.barrier()


def everything(rank: int, size: int) -> None:
    for check in (
        factors_are_those_of_one_process,
        predictions_and_rules_are_those_of_one_process,
        methods_are_those_of_one_process,
        adapters_are_those_of_one_process,
        an_error_on_one_process_leaves_none_waiting,
        what_torch_keeps_whole_and_what_it_cuts_otherwise,
    ):
        try:
            check(rank, size)
        except BaseException as error:
            error.add_note(f"in {check.__name__}, process {rank} of {size}")
            raise
        dist.barrier()


def a_little(rank: int, size: int) -> None:
    """The checks that the default suite can afford."""
    an_error_on_one_process_leaves_none_waiting(rank, size)
    plain, net = made(perceptron, ("0", "3"))
    x, y = data_for(perceptron)
    alone = bdl.curvature.estimate(plain, in_batches(x, y), "categorical", progress=False)
    mine = sharded(x, y, rank, size)
    whole = bdl.curvature.estimate(net, mine, "categorical", distributed=True, progress=False)
    close(whole.to_dense(), alone.to_dense())
