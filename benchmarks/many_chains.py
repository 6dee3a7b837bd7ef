"""Steps of several chains: one chain after another, or all in one vectorised pass a step (bdl.SGMCMC(parallel=...)).

Eight SGHMC chains on perceptrons and convolutional networks, at three batch sizes, each with its own batches.
The time of a step is that of a long run less that of a short one. Checked first: at T = 0 both ways end in
the same weights.

    python benchmarks/many_chains.py [--quick] [--device cuda] [--json benchmarks/results/many_chains.json]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _measure import alternate, finish, parser
from torch import nn

import bayesdl as bdl

CHAINS, LR, BATCHES_A_PASS = 8, 1e-4, 2
SHORT, LONG = 4, 34  # steps of a run
BATCHES = (1, 16, 128)


def toy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def conv(first: int, second: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * 36, 10),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 8-50-50-10": (toy, (8,)),
    "MLP 784-256-10": (mlp, (1, 28, 28)),
    "convolutions of 8 and 16 channels": (partial(conv, 8, 16), (1, 28, 28)),
    "convolutions of 32 and 64 channels": (partial(conv, 32, 64), (1, 28, 28)),
}


def sampled(net: nn.Module, data: Any, parallel: str, steps: int, temperature: float = 1.0) -> bdl.BayesianModel:
    """Chains of some steps, of which two samples are kept."""
    method = bdl.SGMCMC(
        "sghmc",
        lr=LR,
        temperature=temperature,
        burn_in=steps - 2,
        thin=1,
        num_samples=2,
        chains=CHAINS,
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


def main() -> None:
    """Check, measure, print."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    long, repeats = (SHORT + 2, 2) if options.quick else (LONG, options.repeats)
    figures: dict[str, Any] = {"chains": CHAINS, "relative_speed_of_batched": {}, "largest_difference": 0.0}
    for name, (make, shape) in NETWORKS.items():
        for size in BATCHES:
            torch.manual_seed(0)
            net = make().to(options.device)
            data = [
                (torch.rand(size, *shape, device=options.device), torch.randint(10, (size,), device=options.device))
                for _ in range(BATCHES_A_PASS)
            ]
            found = gap(net, data)
            assert found < 1e-5, f"the two ways differ by {found}"
            figures["largest_difference"] = max(found, figures["largest_difference"])
            work: dict[str, Callable[[], Any]] = {
                f"{way} {steps}": partial(sampled, net, data, way, steps)
                for way in ("sequential", "batched")
                for steps in (SHORT, long)
            }
            seconds = alternate(work, repeats, options.device)
            apart, shared = (seconds[f"{way} {long}"] - seconds[f"{way} {SHORT}"] for way in ("sequential", "batched"))
            figures["relative_speed_of_batched"][f"{name}, batch {size}"] = round(apart / shared, 2)
    finish(figures, options)


if __name__ == "__main__":
    main()
