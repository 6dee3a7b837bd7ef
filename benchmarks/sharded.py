"""A model that FSDP2 has sharded: what a Laplace fit and a prediction hold and cost, against whole weights.

    python benchmarks/sharded.py [--processes 2] [--quick] [--json FILE]

Starts that many processes on this machine, with gloo between them. On each: a perceptron of equal layers, sharded layer
by layer. A kron fit with the exact GGN, and predictive covariances, with the weights sharded and on a plain copy that
`bdl.gathered` makes; beside them one forward and backward pass of torch's own sharded module. The covariances are
compared first. Figures are of the first process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _measure import alternate, finish, parser
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import bayesdl as bdl
from bayesdl.streaming import Exchange

RANK, STORE = "BENCHMARK_RANK", "BENCHMARK_STORE"


def main() -> None:
    """Start the processes, or be one of them."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--processes", type=int, default=2)
    options_parser.add_argument("--quick", action="store_true", help="small layers and few repeats")
    options = options_parser.parse_args()
    if RANK in os.environ:
        work(options, int(os.environ[RANK]))
        return
    with tempfile.TemporaryDirectory() as folder:
        shared = {**os.environ, STORE: str(Path(folder) / "store")}
        started = [
            subprocess.Popen([sys.executable, *sys.argv], env={**shared, RANK: str(rank)})
            for rank in range(options.processes)
        ]
        codes = [process.wait() for process in started]
    sys.exit(max(codes))


def work(options: Any, rank: int) -> None:
    """What every process does; the first one reports."""
    torch.set_num_threads(options.threads)
    store = f"file://{os.environ[STORE]}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.processes)
    width, depth, count, repeats = (64, 4, 64, 2) if options.quick else (512, 12, 256, options.repeats)
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    net = nn.Sequential(*hidden, nn.Linear(width, 10))
    x, y = torch.randn(count, width), torch.randint(10, (count,))
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(net)
    data = list(zip(x.split(64), y.split(64), strict=True))
    plain = bdl.gathered(net)
    prior = bdl.GaussianPrior(precision=1.0)

    def fitted(model: nn.Module) -> bdl.BayesianModel:
        return bdl.wrap(model, "laplace", data, likelihood="categorical", prior=prior, progress=False)

    whole, sharded = fitted(plain), fitted(net)
    a, b = (model(x[:32]).latent.covariance for model in (whole, sharded))
    error = float((a - b).abs().max() / a.abs().max())
    assert error < 1e-5, error

    def fit_only(model: nn.Module) -> Callable[[], object]:
        return lambda: bdl.curvature.estimate(model, data, "categorical", progress=False)

    def step() -> None:
        for inputs, target in data:
            F.cross_entropy(net(inputs), target).backward()
        for parameter in net.parameters():
            parameter.grad = None

    actions: dict[str, Callable[[], object]] = {
        "fit, whole": fit_only(plain),
        "fit, sharded": fit_only(net),
        "predict, whole": lambda: whole(x[:32]),
        "predict, sharded": lambda: sharded(x[:32]),
        "torch's own pass": step,
    }
    seconds = alternate(actions, repeats, options.device)
    with held() as most:
        fitted(net)(x[:32])
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    fit, predict = (seconds[f"{what}, sharded"] for what in ("fit", "predict"))
    figures = {
        "covariance, relative error": error,
        "processes": options.processes,
        "whole weights alive at once, share of the model": round(most[0] / size, 4),
        "share of one layer": round(width * width * 4 / size, 4),
        "CPU time": {
            "fit, sharded / whole": round(fit / seconds["fit, whole"], 2),
            "predict, sharded / whole": round(predict / seconds["predict, whole"], 2),
            "fit, sharded / torch's forward and backward": round(fit / seconds["torch's own pass"], 2),
        },
    }
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        finish(figures, options)


@contextmanager
def held() -> Iterator[list[int]]:
    """The most bytes of gathered weights that were alive at once."""
    now, most, gather = [0], [0], Exchange.gather

    def forget(size: int) -> None:
        now[0] -= size

    def counting(self: Exchange, number: int) -> Tensor:
        found = gather(self, number)
        size = found.numel() * found.element_size()
        now[0] += size
        most[0] = max(most[0], now[0])
        weakref.finalize(found, forget, size)
        return found

    Exchange.gather = counting  # type: ignore[method-assign]
    try:
        yield most
    finally:
        Exchange.gather = gather  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
