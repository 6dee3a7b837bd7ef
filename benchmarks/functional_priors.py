"""Matched weight priors: every distance at the time that the critic-based recipe takes, and the price of one step.

    python benchmarks/functional_priors.py [--steps N] [--json benchmarks/results/functional_priors.json]

Checked first: on one linear layer, whose functions are exactly Gaussian, every distance finds the scale of a linear
kernel. Then a network of three layers of 50 tanh units (the recipe's own example) is matched to RBF processes: the
recipe (Wasserstein-1, a new critic of 200 ascents a step) for `--steps` steps, and every other distance for the same
CPU time. Reported is the relative error of the functions' covariance on fresh points from 2,000 functions.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from _measure import finish, parser
from torch import nn

import bayesdl as bdl
from bayesdl.functional import GP, Measurement

CHEAP = ("energy", "mmd", "gaussian-w2", "moments", "sw")
LENGTHSCALES = (0.6, 1.0, 2.0)
SCALE = 2.5


def main() -> None:
    """Check, measure, print."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=40, help="of the critic-based recipe")
    options.add_argument("--quick", action="store_true", help="few steps, one lengthscale")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    steps, lengthscales = (3, (1.0,)) if options.quick else (options.steps, LENGTHSCALES)
    figures: dict[str, Any] = {"scale found, relative": {name: round(recovered(name), 3) for name in CHEAP}}
    x = torch.linspace(-3, 3, 100).unsqueeze(1)
    for lengthscale in lengthscales:
        figures[f"lengthscale {lengthscale}"] = rivals(x, lengthscale, steps)
    finish(figures, options)


def recovered(distance: str) -> float:
    """Scale found over the true one, for a linear layer; fails where it is off by more than a tenth."""
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    target = GP("linear", lengthscale=math.sqrt(3.0), variance=SCALE**2)
    prior = bdl.functional.match(
        nn.Linear(3, 1, bias=False),
        target,
        x,
        distance=distance,
        steps=250,
        num_functions=256,
        lr=0.03,
        measurement=Measurement(x, num_points=20),
        progress=False,
    )
    ratio = prior.report.parameters["weight"]["std"] / SCALE
    assert abs(ratio - 1.0) < 0.1, (distance, ratio)
    return ratio


def rivals(x: torch.Tensor, lengthscale: float, steps: int) -> dict[str, Any]:
    """Errors and step prices for one target."""
    reference, budget = timed(x, lengthscale, "w1", steps)
    found: dict[str, Any] = {
        "before": round(reference.before.covariance_error, 3),
        "w1": {"steps": steps, "covariance error": round(reference.fit.covariance_error, 3)},
        "floor": round(reference.fit.floor, 3),
    }
    for name in CHEAP:
        _, trial = timed(x, lengthscale, name, 10)
        count = max(1, round(budget / (trial / 10)))
        report, seconds = timed(x, lengthscale, name, min(count, 3000))
        found[name] = {
            "steps": min(count, 3000),
            "of the recipe's time": round(seconds / budget, 2),
            "covariance error": round(report.fit.covariance_error, 3),
            "std over the target's": round(report.fit.std[0] / report.fit.target_std[0], 3),
            "error over the recipe's": round(report.fit.covariance_error / reference.fit.covariance_error, 3),
            "a step, times cheaper": round((budget / steps) / (trial / 10), 1),
        }
    return found


def timed(x: torch.Tensor, lengthscale: float, distance: str, steps: int) -> tuple[Any, float]:
    """The report of a match, and its CPU seconds without the report's own draws."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)
    )
    chosen = bdl.functional.Wasserstein(redraw=False) if distance == "w1" else distance
    target = GP("rbf", lengthscale=lengthscale)
    prepared = time.process_time()
    bdl.functional.match(net, target, x, distance="moments", steps=1, progress=False)
    overhead = time.process_time() - prepared
    start = time.process_time()
    prior = bdl.functional.match(net, target, x, distance=chosen, steps=steps, progress=False)
    return prior.report, max(time.process_time() - start - overhead, 1e-3)


if __name__ == "__main__":
    main()
