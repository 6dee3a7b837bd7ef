"""What it costs to collect a sample of 11 million parameters and to have it on disk, in units of a training step.

ResNet-18 for 32x32 images (11.2 M parameters), batch 128, SGLD. A sample is collected before the update, written with
its checksum and fsync, entered into the index, and followed by the resume file (parameters, buffers, counters).
Collecting and storing is wall-clock time, for waiting for the disk counts; the training step it is divided by is CPU
time on a CPU, which other processes do not lengthen: the ratios are upper bounds. Checked first: a stored sample is the
network's weights bit for bit, and a chain that is interrupted and resumed ends where the unbroken one does.

    python benchmarks/chain_store.py [--quick] [--device cuda] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import finish, parser, peak_bytes
from torch import Tensor, nn

import bayesdl as bdl

BATCH, DATA, CLASSES = 128, 50_000, 10


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.second, self.norm2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.second(torch.relu(self.norm1(self.first(x)))))
        return torch.relu(out + self.short(x))


def resnet18(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    blocks, inside = [], 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(inside, width, stride), Block(width, width, 1)]
        inside = width
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


def sampler_of(net: nn.Module, device: str) -> bdl.samplers.SGLD:
    return bdl.samplers.SGLD(net.parameters(), 1e-4, DATA, generator=torch.Generator().manual_seed(0))


def backward(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    net.zero_grad()
    nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()


def check(folder: Path, batch: tuple[Tensor, Tensor], device: str) -> None:
    """The samples are theta_k bit for bit, and a resumed chain goes on as an unbroken one."""
    small = (batch[0][:4], batch[1][:4])

    def run(steps: int, store: Path | None, resume: bool = False) -> tuple[nn.Module, bdl.Chain, list[Tensor]]:
        net = resnet18(int(resume)).to(device)
        sampler = sampler_of(net, device)
        chain = bdl.Chain(net, sampler=sampler, store=store)
        if resume and not chain.resume():
            raise SystemExit("the chain did not resume")
        left = []
        while chain.steps < steps:
            backward(net, small)
            left.append(net[0].weight.detach().clone())
            sampler.step()
            chain.step()
        chain.close()
        return net, chain, left

    net, memory, left = run(4, None)
    run(2, folder / "check")
    again, stored, _ = run(4, folder / "check", resume=True)
    same = all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    one, two = memory.posterior().snapshots, stored.posterior().snapshots
    same = same and all(torch.equal(value, two[name]) for name, value in one.items())
    if not same or not torch.equal(two["0.weight"], torch.stack(left)):
        raise SystemExit("the stored chain is not the chain that was run")


def turns(work: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, tuple[float, float]]:
    """Median wall-clock and CPU seconds of each, in turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for number in range(repeats + 1):
        for name, function in work.items():
            start, busy = now(device), time.process_time()
            function()
            if number:  # the first round warms up
                seconds[name].append((now(device) - start, time.process_time() - busy))
    return {
        name: (statistics.median(v[0] for v in values), statistics.median(v[1] for v in values))
        for name, values in seconds.items()
    }


def now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def write_plain(folder: Path, payload: bytes) -> None:
    with open(folder / "plain", "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    options_parser = parser(__doc__ or "")
    options_parser.add_argument("--quick", action="store_true")
    options_parser.add_argument(
        "--folder", type=Path, default=None, help="disk to measure; a temporary one if left out"
    )
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", bdl.samplers.StochasticForwardWarning)
    repeats, batch_size = (2, 16) if options.quick else (options.repeats, BATCH)
    source = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 3, 32, 32, generator=source).to(options.device)
    batch = (x, torch.randint(CLASSES, (batch_size,), generator=source).to(options.device))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        check(folder, batch, options.device)
        net = resnet18().to(options.device)
        count = sum(p.numel() for p in net.parameters())
        sampler = sampler_of(net, options.device)
        backward(net, batch)
        chains = {
            "store": bdl.Chain(net, store=folder / "float32", max_samples=2),
            "store, bfloat16-delta": bdl.Chain(net, store=folder / "bfloat16", max_samples=2, dtype="bfloat16-delta"),
            "memory": bdl.Chain(net, max_samples=2),
        }
        payload = bytes(4 * count)

        def training() -> None:
            backward(net, batch)
            sampler.step()

        work: dict[str, Callable[[], Any]] = {"training step": training, "sampler's step": sampler.step}
        work |= {name: chain.step for name, chain in chains.items()}
        work["writing as many bytes, fsync"] = lambda: write_plain(folder, payload)
        seconds = turns(work, repeats, options.device)
        sizes = {
            dtype: (folder / dtype / chains[name].kept[-1].file).stat().st_size / count  # type: ignore[operator]
            for dtype, name in (("float32", "store"), ("bfloat16", "store, bfloat16-delta"))
        }
        memory = peak_bytes(chains["store"].step, options.device) / (4 * count)
    wall, busy = seconds.pop("training step")
    step = wall if options.device.startswith("cuda") else busy
    finish(
        {
            "parameters": count,
            "batch": batch_size,
            "seconds of a training step": round(step, 4),
            "in training steps": {name: round(value / step, 3) for name, (value, _) in seconds.items()},
            "bytes per parameter on disk": {name: round(size, 3) for name, size in sizes.items()},
            "peak memory of collecting and storing, in copies of the weights": round(memory, 2),
        },
        options,
    )


if __name__ == "__main__":
    main()
