"""MNIST with a sharp prior: the largest steps of SGLD and of SA-SGLD, and what they predict.

    python benchmarks/sampler_sharp_priors.py --data FOLDER [--quick] [--json FILE]

FOLDER holds `mnist/train.npz` and `test.npz`. A multilayer perceptron 784-1200-1200-10 (2.4 million parameters) with
Cauchy priors of scale 0.02 on all weights, 10,000 images, batch 128, temperature 1, random starting weights. First SGLD
at rising learning rates, until the loss is not finite or ends above chance; then SA-SGLD at that rate, at three and at
ten times it. Learning rates are judged by the NLL of 5,000 other images in one run apart. The figures are means over
three seeds on the 10,000 test images.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from _images import BATCH, Pair, batches, images, perceptron, train
from _measure import finish, parser

import bayesdl as bdl

SCALE, SAMPLES = 0.02, 20
RATES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
MULTIPLES = (1, 3, 10)
ADAPTIVE = {"smallest": 0.01, "largest": 1.0}


def scored(adaptive: bool, lr: float, data: Pair, scored_on: Pair, steps: int, seed: int) -> dict[str, float]:
    """NLL and accuracy of the second half of a chain; an infinite NLL where it diverged."""
    net, generator = perceptron(1200, 2, seed).to(data[0].device), torch.Generator().manual_seed(seed)
    prior, size = bdl.CauchyPrior(scale=SCALE), len(data[0])
    sampler: Any
    if adaptive:
        sampler = bdl.samplers.SASGLD(net.parameters(), lr, size, prior=prior, generator=generator, **ADAPTIVE)
    else:
        sampler = bdl.samplers.SGLD(net.parameters(), lr, size, prior=prior, generator=generator)
    chain = bdl.Chain(net, burn_in=steps // 2, thin=steps // 2 // SAMPLES, sampler=sampler)
    if not train(net, sampler, data, steps, seed, chain=chain):
        return {"nll": math.inf}
    found = bdl.evaluate(bdl.BayesianModel(net, chain.posterior(), "categorical"), batches(scored_on))
    return {**{key: found[key] for key in ("nll", "accuracy", "ece")}, "psi": sampler.record.psi}


def mean_and_error(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and standard error over seeds of every figure."""
    found = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
        found[key] = [round(statistics.mean(values), 4), round(error, 4)]
    return found


def main() -> None:
    """Raise the rate until SGLD diverges, then compare."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, default=None, help="folder; without one nothing is run")
    options_parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    options_parser.add_argument("--seeds", type=int, default=3)
    options_parser.add_argument("--epochs", type=int, default=10)
    options = options_parser.parse_args()
    if options.data is None:
        print("nothing to measure without --data FOLDER")
        return
    torch.set_num_threads(options.threads)
    count = 1000 if options.quick else 10_000
    steps = 60 if options.quick else options.epochs * (count // BATCH)
    data = images(options, "mnist", "train", slice(0, count))
    held = images(options, "mnist", "train", slice(50_000, 55_000))
    test = images(options, "mnist", "test", slice(None))
    plain: dict[float, float] = {}
    for lr in RATES:
        plain[lr] = scored(False, lr, data, held, steps, seed=100)["nll"]
        print("SGLD", lr, plain[lr], flush=True)
        if plain[lr] == math.inf:
            break
    diverges, best = max(plain), min(plain, key=lambda lr: plain[lr])
    assert plain[diverges] == math.inf, f"SGLD is stable up to lr={diverges}: raise RATES"
    adaptive = {lr: scored(True, lr, data, held, steps, seed=100)["nll"] for lr in (n * diverges for n in MULTIPLES)}
    print("SA-SGLD", adaptive, flush=True)
    largest = MULTIPLES[-1] * diverges
    assert math.isfinite(adaptive[largest]), "SA-SGLD diverged at ten times the step where SGLD does"
    runs = {
        name: [scored(kind, lr, data, test, steps, seed) for seed in range(options.seeds)]
        for name, kind, lr in (("SGLD", False, best), ("SA-SGLD", True, largest))
    }
    figures: dict[str, Any] = {
        "training images": count,
        "gradient steps": steps,
        "SGLD: held-out NLL by learning rate (null: diverged)": {f"{k:g}": finite(v) for k, v in plain.items()},
        "SA-SGLD: held-out NLL by learning rate (null: diverged)": {f"{k:g}": finite(v) for k, v in adaptive.items()},
        "SGLD diverges at": diverges,
        "learning rate": {"SGLD, best": best, "SA-SGLD, ten times where SGLD diverges": largest},
        "mean and standard error over seeds": {name: mean_and_error(found) for name, found in runs.items()},
    }
    finish(figures, options)


def finite(value: float) -> float | None:
    """Rounded; JSON has no infinity."""
    return round(value, 4) if math.isfinite(value) else None


if __name__ == "__main__":
    main()
