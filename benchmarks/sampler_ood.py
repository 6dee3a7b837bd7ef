"""Fashion-MNIST against MNIST and notMNIST: the plain network and four samplers at one budget of gradient steps.

    python benchmarks/sampler_ood.py --data FOLDER [--quick] [--json benchmarks/results/sampler_ood.json]

FOLDER holds `fashion_mnist/train.npz` and `test.npz`, `mnist/test.npz`, `notmnist/test.npz`. A multilayer perceptron
784-256-256-10 on 10,000 images, batch 128; every method takes the same number of steps from the same random weights on
the same batches, has the same Gaussian prior (for the plain network: weight decay) and temperature 1. Each method's
learning rate is that of the lowest NLL on 5,000 other images in one run apart; the figures are means over three seeds
on the 10,000 test images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _images import BATCH, Pair, batches, images, perceptron, train
from _measure import finish, parser

import bayesdl as bdl

PRECISION, SAMPLES, CYCLES = 10.0, 20, 4
OUTSIDE = ("mnist", "notmnist")
KEYS = (
    "nll",
    "accuracy",
    "ece",
    *(f"ood/{name}/{score}/auroc" for name in OUTSIDE for score in ("entropy", "epistemic")),
)
RATES = {
    "MAP": (0.02, 0.05, 0.1),
    "SGLD": (0.1, 0.2, 0.4),
    "cSGLD": (0.2, 0.4, 0.8),
    "SA-SGLD": (0.02, 0.05, 0.1),
    "Entropy-MCMC": (0.1, 0.2, 0.4),
}


class Cosine:
    """The usual schedule of the plain network: lr falls along half a cosine."""

    def __init__(self, optimizer: Any, steps: int) -> None:
        self._group, self._start, self._steps, self._step = optimizer.param_groups[0], 0.0, steps, 0
        self._start = self._group["lr"]

    def step(self) -> None:
        self._step += 1
        self._group["lr"] = 0.5 * self._start * (1 + math.cos(math.pi * self._step / self._steps))


def fitted(method: str, lr: float, data: Pair, steps: int, seed: int) -> bdl.BayesianModel | None:
    """The method's model, or None where it diverged."""
    net, size = perceptron(256, 2, seed).to(data[0].device), len(data[0])
    parameters = net.parameters()
    if method == "MAP":
        sgd = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=PRECISION / size)
        fine = train(net, sgd, data, steps, seed, schedule=Cosine(sgd, steps))
        return bdl.wrap(net, "map", likelihood="categorical") if fine else None
    make: Callable[..., Any] = {
        "SGLD": bdl.samplers.SGLD,
        "cSGLD": bdl.samplers.SGLD,
        "SA-SGLD": bdl.samplers.SASGLD,
        "Entropy-MCMC": bdl.samplers.EntropyMCMC,
    }[method]
    generator = torch.Generator().manual_seed(seed)
    sampler = make(parameters, lr=lr, num_data=size, prior_precision=PRECISION, generator=generator)
    if method == "cSGLD":
        schedule = bdl.samplers.Cyclical(sampler, cycle=steps // CYCLES, cycles=CYCLES, explore=0.8)
        thin = steps // 5 // SAMPLES
        chain = bdl.Chain(net, thin=thin, sampler=schedule)
    else:
        schedule, chain = None, bdl.Chain(net, burn_in=steps // 2, thin=steps // 2 // SAMPLES, sampler=sampler)
    if not train(net, sampler, data, steps, seed, schedule=schedule, chain=chain):
        return None
    return bdl.BayesianModel(net, chain.posterior(), "categorical")


def scored(model: bdl.BayesianModel | None, test: Pair, outside: dict[str, Pair]) -> dict[str, float]:
    """NLL, accuracy, ECE, and AUROC of the predictive entropy and of the mutual information."""
    if model is None:
        return {"nll": math.inf}
    found = bdl.evaluate(model, batches(test), ood={name: batches(pair) for name, pair in outside.items()})
    return {key: found[key] for key in KEYS if key in found}


def main() -> None:
    """Choose learning rates, run the seeds, average."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, default=None, help="folder; without one nothing is run")
    options_parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs")
    options_parser.add_argument("--seeds", type=int, default=3)
    options_parser.add_argument("--epochs", type=int, default=60)
    options = options_parser.parse_args()
    if options.data is None:
        print("nothing to measure without --data FOLDER")
        return
    torch.set_num_threads(options.threads)
    count = 1000 if options.quick else 10_000
    steps = (4 if options.quick else options.epochs) * (count // BATCH) // 20 * 20
    steps = max(steps, 400)
    data = images(options, "fashion_mnist", "train", slice(0, count))
    held = images(options, "fashion_mnist", "train", slice(50_000, 55_000))
    test = images(options, "fashion_mnist", "test", slice(None))
    outside = {name: images(options, name, "test", slice(0, 5000)) for name in OUTSIDE}
    chosen: dict[str, float] = {}
    trials: dict[str, dict[str, float]] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    for method, rates in RATES.items():
        found = {lr: scored(fitted(method, lr, data, steps, seed=100), held, {})["nll"] for lr in rates}
        trials[method] = {f"{lr:g}": round(nll, 4) for lr, nll in found.items()}
        chosen[method] = min(found, key=lambda lr: found[lr])
        print(method, trials[method], flush=True)
        rows[method] = [
            scored(fitted(method, chosen[method], data, steps, seed), test, outside) for seed in range(options.seeds)
        ]
        print(method, rows[method], flush=True)
    figures: dict[str, Any] = {
        "training images": count,
        "gradient steps": steps,
        "held-out NLL by learning rate": trials,
        "learning rate": chosen,
        "mean and standard error over seeds": {
            method: {key: mean_and_error([run[key] for run in runs if key in run]) for key in runs[0]}
            for method, runs in rows.items()
        },
    }
    finish(figures, options)


def mean_and_error(values: list[float]) -> list[float]:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return [round(statistics.mean(values), 4), round(error, 4)]


if __name__ == "__main__":
    main()
