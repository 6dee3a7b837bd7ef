"""Kronecker fits and chains on two and on four processes against one: how the work divides, what sharing adds.

    python benchmarks/scaling.py [--quick] [--json benchmarks/results/scaling.json]

All processes (gloo, one thread each) hold an equal share of the data, or run an equal share of four chains. First the
results must agree with those of one process; then one process alone and all together are timed in turns. The CPU time
of the busiest process shows how the work divides, whatever else the machine does; the wall-clock time is that of this
machine at this moment, and says little where it has fewer cores than there are processes. With `--device cuda` they
share one GPU, which says nothing about several.
"""

from __future__ import annotations

import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _measure import finish, parser
from defaults import LeNet, ResNet20
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature.structure import Structure

PROCESSES, CHAINS, TOLERANCE, BATCH = (2, 4), 4, 1e-4, 128
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 784-256-256-10": (lambda: mlp(), (784,), 8192),
    "LeNet": (LeNet, (1, 28, 28), 1024),
    "ResNet-20": (ResNet20, (3, 32, 32), 64),
}


def mlp() -> nn.Module:
    """The network of laplace_predictive.py."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def measured(work: Callable[[], Any], device: str) -> tuple[float, float]:
    """CPU seconds of the busiest process, and wall-clock seconds until all are done."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    spent = torch.tensor([time.process_time() - cpu, time.perf_counter() - wall], dtype=torch.float64)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent[0]), float(spent[1])


def divided(alone: Callable[[], Any], together: Callable[[], Any], rank: int, options: Any) -> dict[str, float]:
    """CPU time of the busiest process and wall-clock time, all together over one alone; medians of alternating runs."""
    seconds: dict[str, list[tuple[float, float]]] = {"one": [], "all": []}
    for _ in range(options.repeats):
        seconds["one"].append(measured(alone if rank == 0 else lambda: None, options.device))
        seconds["all"].append(measured(together, options.device))
    both = {
        name: [statistics.median(pair[kind] for pair in pairs) for kind in (0, 1)] for name, pairs in seconds.items()
    }
    return {
        "CPU time, busiest / one alone": round(both["all"][0] / both["one"][0], 2),
        "wall-clock time, all / one alone": round(both["all"][1] / both["one"][1], 2),
    }


def fits(name: str, rank: int, size: int, options: Any) -> dict[str, Any]:
    """One network's Kronecker fit, each process with a share of the data."""
    make, shape, count = CASES[name]
    if options.quick:
        count //= 16
    torch.manual_seed(0)
    net = make().to(options.device).eval()
    x, y = torch.randn(count, *shape).to(options.device), torch.randint(0, 10, (count,)).to(options.device)
    mine = slice(rank * count // size, (rank + 1) * count // size)
    everything, share = batches(x, y), batches(x[mine], y[mine])

    def fit(data: Any, distributed: bool) -> Structure:
        return bdl.curvature.estimate(net, data, "categorical", distributed=distributed, progress=False)

    one, shared = fit(everything, False), fit(share, True)
    pairs = list(zip(one.tensors().values(), shared.tensors().values(), strict=True))
    difference = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)
    if difference > TOLERANCE:
        raise SystemExit(f"{name}: the fits of one and of {size} processes differ by {difference:.1e}")
    return {
        "examples": count,
        "largest relative difference": difference,
        "reduced, MB": round(sum(b.numel() * b.element_size() for _, b in pairs) / 1e6, 1),
        **divided(lambda: fit(everything, False), lambda: fit(share, True), rank, options),
    }


def chains(rank: int, size: int, options: Any) -> dict[str, Any]:
    """Four chains of SGHMC, each process with some of them; everybody gets all samples."""
    torch.manual_seed(0)
    net = mlp().to(options.device)
    count = 512 if options.quick else 2048
    data = batches(torch.randn(count, 784).to(options.device), torch.randint(0, 10, (count,)).to(options.device))
    thin = 4 if options.quick else 32
    # one after another: chains in one pass have the bits of the process that they share it in
    method = bdl.SGMCMC("sghmc", lr=1e-3, chains=CHAINS, num_samples=8, thin=thin, burn_in=8, parallel="sequential")

    def run(distributed: bool) -> bdl.BayesianModel:
        generator = torch.Generator().manual_seed(1)
        return bdl.wrap(
            net,
            method,
            data,
            likelihood="categorical",
            generator=generator,
            distributed=distributed,
            progress=False,
        )

    one, shared = run(False).posterior.tensors(), run(True).posterior.tensors()
    if not all(torch.equal(one[name], shared[name]) for name in one):
        raise SystemExit(f"chains of one and of {size} processes differ")
    return {"chains": CHAINS, **divided(lambda: run(False), lambda: run(True), rank, options)}


def process(rank: int, size: int, options: Any, folder: str) -> None:
    """One of the processes; the first one reports."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{size}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(minutes=10),
    )
    figures = {} if options.chains else {name: fits(name, rank, size, options) for name in CASES}
    figures["chains of MLP 784-256-256-10"] = chains(rank, size, options)
    if rank == 0:
        Path(folder, f"{size}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def main() -> None:
    """Start the processes."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="few examples and repeats")
    options.add_argument("--chains", action="store_true", help="the chains alone")
    options = options.parse_args()
    if options.quick:
        options.repeats = 1
    with tempfile.TemporaryDirectory() as folder:
        for size in PROCESSES:
            torch.multiprocessing.spawn(process, (size, options, folder), size)
        found = {f"{size} processes": json.loads(Path(folder, f"{size}.json").read_text()) for size in PROCESSES}
    finish(found, options)


if __name__ == "__main__":
    main()
