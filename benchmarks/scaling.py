"""Kronecker fits on two processes against one: what each still computes, and what the reduction adds.

    python benchmarks/scaling.py [--quick] [--json benchmarks/results/scaling.json]

Both processes (gloo, one thread each) hold half of the data. First the two fits must agree with that of one process;
then the fit on one process and the fit on both are timed in turns. The CPU time of the busier process shows how the
work divides, whatever else the machine does; the wall-clock time is that of this machine at this moment. With
`--device cuda` both processes share one GPU, which says nothing about two.
"""

from __future__ import annotations

import datetime
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

PROCESSES, TOLERANCE, BATCH = 2, 1e-4, 128
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


def one_case(name: str, rank: int, options: Any) -> dict[str, Any]:
    make, shape, count = CASES[name]
    if options.quick:
        count //= 16
    torch.manual_seed(0)
    net = make().to(options.device).eval()
    x, y = torch.randn(count, *shape).to(options.device), torch.randint(0, 10, (count,)).to(options.device)
    half = slice(rank * count // PROCESSES, (rank + 1) * count // PROCESSES)
    everything, share = batches(x, y), batches(x[half], y[half])

    def fit(data: Any, distributed: bool) -> Structure:
        return bdl.curvature.estimate(net, data, "categorical", distributed=distributed, progress=False)

    one, two = fit(everything, False), fit(share, True)
    pairs = list(zip(one.tensors().values(), two.tensors().values(), strict=True))
    difference = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)
    if difference > TOLERANCE:
        raise SystemExit(f"{name}: the fits of one and two processes differ by {difference:.1e}")
    alone = (lambda: fit(everything, False)) if rank == 0 else (lambda: None)
    seconds: dict[str, list[tuple[float, float]]] = {"one": [], "two": []}
    for _ in range(options.repeats):
        seconds["one"].append(measured(alone, options.device))
        seconds["two"].append(measured(lambda: fit(share, True), options.device))

    def ratio(kind: int) -> float:
        both = [statistics.median(pair[kind] for pair in seconds[name]) for name in ("two", "one")]
        return round(both[0] / both[1], 2)

    return {
        "examples": count,
        "largest relative difference": difference,
        "reduced, MB": round(sum(b.numel() * b.element_size() for _, b in pairs) / 1e6, 1),
        "CPU time, busier of two / one": ratio(0),
        "wall-clock time, two / one": ratio(1),
    }


def process(rank: int, options: Any, store: str) -> None:
    """One of the processes; the first one reports."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(minutes=10),
    )
    figures = {name: one_case(name, rank, options) for name in CASES}
    if rank == 0:
        finish({"processes": PROCESSES, **figures}, options)
    dist.destroy_process_group()


def main() -> None:
    """Start the processes."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="few examples and repeats")
    options = options.parse_args()
    if options.quick:
        options.repeats = 1
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (options, str(Path(folder) / "store")), PROCESSES)


if __name__ == "__main__":
    main()
