"""Steps of several chains: one chain after another, or all in one vectorised pass a step (bdl.SGMCMC(parallel=...)).

SGHMC chains on perceptrons, convolutional networks and transformers, at three batch sizes, each with its own batches;
then eight chains of every sampler, moved all in one step and each by a step of its own. Steps of both ways alternate,
so that a noisy minute hits both. Checked first: at T = 0 both ways end in the same weights.

    python benchmarks/many_chains.py [--quick] [--device cuda] [--json benchmarks/results/many_chains.json]

The bounds of `parallel="auto"` on a CPU are read off this table; cells where its choice is the slower way are listed.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from _measure import finish, now, parser
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.methods import batched, parallel, sgmcmc
from bayesdl.methods.chains import Job, advance, start

LR, BATCHES_A_PASS = 1e-4, 2
STEPS, SECONDS = (6, 40), 1.5  # fewest and most timed steps of each way, and the seconds after which they are enough
CHAINS, MORE = 8, (2, 4, 32)
BATCHES = (1, 16, 128)
SAMPLERS = ("sgld", "sghmc", "baoab", "sgnht", "psgld", "sa-sgld", "entropy-mcmc")
WRONG = 0.95  # share of the other way's speed below which a choice is listed


def toy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10))


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv(first: int, second: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * 36, 10),
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class Residual(nn.Module):
    """Two convolutions with group norm around which the input goes too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = partial(nn.Conv2d, channels, channels, 3, padding=1)
        self.inner = nn.Sequential(wide(), nn.GroupNorm(4, channels), nn.ReLU(), wide(), nn.GroupNorm(4, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inner(x))


def residual(channels: int) -> nn.Module:
    first = nn.Conv2d(1, channels, 3, stride=2, padding=1)
    head = (nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, 10))
    return nn.Sequential(first, Residual(channels), Residual(channels), *head)


class Block(nn.Module):
    """A transformer's block, of operations that torch vectorises."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.outputs, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.outputs(found.transpose(1, 2).flatten(2))
        return x + self.wide(self.between(x))


class Transformer(nn.Module):
    """Two blocks over the 28 rows of an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows, self.blocks = nn.Linear(28, width), nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.rows(x.reshape(-1, 28, 28))).mean(1))


IMAGE = (1, 28, 28)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 8-50-50-10": (toy, (8,)),
    "MLP 64-(64 x 6)-10": (partial(mlp, *[64] * 7, 10), (64,)),
    "MLP 784-256-10": (partial(mlp, 784, 256, 10), IMAGE),
    "MLP 64-(512 x 4)-10": (partial(mlp, 64, *[512] * 4, 10), (64,)),
    "MLP 784-1200-1200-10": (partial(mlp, 784, 1200, 1200, 10), IMAGE),
    "convolutions of 8 and 16 channels": (partial(conv, 8, 16), IMAGE),
    "convolutions of 32 and 64 channels": (partial(conv, 32, 64), IMAGE),
    "LeNet": (lenet, IMAGE),
    "residual, 16 channels, group norm": (partial(residual, 16), IMAGE),
    "transformer of width 32": (partial(Transformer, 32), IMAGE),
    "transformer of width 128": (partial(Transformer, 128), IMAGE),
}
# other numbers of chains: (network, batch)
COUNTED = (("MLP 8-50-50-10", 16), ("MLP 784-256-10", 16), ("LeNet", 16), ("transformer of width 32", 16))


def sampled(
    net: nn.Module,
    data: Any,
    parallel: str,
    steps: int,
    temperature: float = 1.0,
    chains: int = CHAINS,
    kind: str = "sghmc",
) -> bdl.BayesianModel:
    """Chains of some steps, of which two samples are kept."""
    method = bdl.SGMCMC(
        kind,
        lr=LR if kind != "psgld" else LR / 100,
        temperature=temperature,
        burn_in=steps - 2,
        thin=1,
        num_samples=2,
        chains=chains,
        parallel=parallel,
    )
    generator = torch.Generator().manual_seed(0)
    return bdl.wrap(
        net,
        method,
        data,
        likelihood="categorical",
        prior=bdl.GaussianPrior(1.0),
        generator=generator,
        progress=False,
    )


def gap(net: nn.Module, data: Any) -> float:
    """Largest difference of a weight between the two ways at T = 0."""
    one, all_ = (sampled(net, data, way, 6, 0.0).posterior.snapshots for way in ("sequential", "batched"))
    return max(float((all_[name] - value).abs().max()) for name, value in one.items())


def setting(name: str, size: int, device: str) -> tuple[nn.Module, Any]:
    """A network and its batches."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make().to(device)
    return net, [
        (torch.rand(size, *shape, device=device), torch.randint(10, (size,), device=device))
        for _ in range(BATCHES_A_PASS)
    ]


class Captured(Exception):
    """The chains are ready to run."""


def chains_of(net: nn.Module, data: Any, chains: int, kind: str = "sghmc") -> list[Job]:
    """The chains that `wrap` would run."""
    held: list[Job] = []

    def capture(jobs: list[Job], group: None) -> None:
        held.extend(jobs)
        raise Captured

    with mock.patch.object(sgmcmc, "share_passes", capture), contextlib.suppress(Captured):
        sampled(net, data, "auto", 10**6, chains=chains, kind=kind)
    return held


def relative(jobs: list[Job], options: Any) -> float:
    """Median time of a step of all chains one after another over that in one pass, in alternating steps."""
    lives = [start(job) for job in jobs]
    fewest, most = (2, 2) if options.quick else STEPS
    spent: list[tuple[float, float]] = []
    begun = now(options.device)
    with batched.quiet():
        together = batched.start_together(jobs)
        for step in range(most + 1):
            times = [now(options.device)]
            for job, live in zip(jobs, lives, strict=True):
                advance(job, live, step)
            times.append(now(options.device))
            batched.step_together(together, step)
            times.append(now(options.device))
            spent.append((times[1] - times[0], times[2] - times[1]))
            if step >= fewest and times[2] - begun > SECONDS:
                break
    apart, shared = (statistics.median(pair[way] for pair in spent[1:]) for way in (0, 1))
    return round(apart / shared, 2)


def main() -> None:
    """Check, measure, print."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    cells: dict[str, float] = {}
    figures: dict[str, Any] = {"relative_speed_of_batched": cells, "auto_batches": [], "auto_is_slower": {}}
    figures["largest_difference"] = 0.0
    plan = [(name, size, CHAINS) for name in NETWORKS for size in BATCHES]
    plan += [(name, size, chains) for name, size in COUNTED for chains in MORE]
    for name, size, chains in plan:
        net, data = setting(name, size, options.device)
        if chains == CHAINS:
            found = gap(net, data)
            assert found < 1e-5, f"the two ways differ by {found}"
            figures["largest_difference"] = max(found, figures["largest_difference"])
        label = f"{name}, batch {size}, {chains} chains"
        jobs = chains_of(net, data, chains)
        cells[label] = relative(jobs, options)
        together = parallel.share_passes(jobs, None)[0]
        if together:
            figures["auto_batches"].append(label)
        gain = cells[label] if together else 1 / cells[label]
        if gain < WRONG:
            figures["auto_is_slower"][label] = round(gain, 2)
        print(label, cells[label], "batched" if together else "apart", flush=True)
    net, data = setting("MLP 8-50-50-10", 16, options.device)
    figures["samplers, MLP 8-50-50-10, batch 16"] = kinds = {}
    for kind in SAMPLERS:
        jobs = chains_of(net, data, CHAINS, kind)
        kinds[kind] = {"one step of one matrix": relative(jobs, options)}
        with mock.patch.object(batched, "_stacked_sampler", lambda chains: None):
            kinds[kind]["a step for each chain"] = relative(jobs, options)
        print(kind, kinds[kind], flush=True)
    finish(figures, options)


if __name__ == "__main__":
    main()
