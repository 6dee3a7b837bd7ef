"""Bayesian last layers on Fashion-MNIST with MNIST as the unknown, beside their rivals at equal budget.

    python benchmarks/fashion_last_layer.py --data FOLDER [--train 10000] [--steps 800] [--seeds 3] [--json FILE]

FOLDER holds `fashion_mnist` and `mnist` (`train.npz`, `test.npz` with x, y). Every method trains the same small
convolutional network for the same number of gradient steps (an ensemble of five: a fifth each); nothing sees held-out
data but the row that says so. Out-of-distribution score: the entropy of the predictive.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _measure import finish, parser
from defaults import loader
from torch import Tensor, nn

import bayesdl as bdl

BATCH, MEMBERS, DROPOUT, BINS = 100, 5, 0.2, 15
WIDTH, CLASSES = 64, 10
NAMES = ("accuracy", "NLL", "ECE", "AUROC of MNIST")


def network(dropout: float = 0.0) -> nn.Sequential:
    """Two convolutions and a hidden layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 49, WIDTH),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(WIDTH, CLASSES),
    )


def fit(
    net: nn.Module, x: Tensor, y: Tensor, steps: int, loss: Callable[[Any, Tensor], Tensor], seed: int
) -> nn.Module:
    """Adam on random batches."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimiser.zero_grad()
        loss(net(x[rows]), y[rows]).backward()
        optimiser.step()
    return net.eval()


def metrics(probs: Tensor, y: Tensor, unknown: Tensor) -> list[float]:
    """Accuracy, NLL, ECE with equal bins, AUROC of the entropy."""
    from sklearn.metrics import roc_auc_score

    probs, unknown = probs.double().clamp(min=1e-30), unknown.double().clamp(min=1e-30)
    confidence, guess = probs.max(-1)
    right = (guess == y).double()
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, confidence - right)
    entropy = [-(p * p.log()).sum(-1) for p in (probs, unknown)]
    labels = np.concatenate([np.zeros(len(probs)), np.ones(len(unknown))])
    area = float(roc_auc_score(labels, torch.cat(entropy).numpy()))
    nll = -float(probs.gather(1, y.unsqueeze(1)).log().mean())
    return [float(right.mean()), nll, float(gaps.abs().sum()) / len(y), area]


def images(folder: Path, rows: slice) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] `(N, 1, 28, 28)` and labels: `rows` of the training set, all rows mean the test set."""
    name = "test" if rows.start is None and rows.stop is None else "train"
    with np.load(folder / f"{name}.npz") as archive:
        x, y = archive["x"][rows], archive["y"][rows]
    return torch.as_tensor(x).float().unsqueeze(1) / 255, torch.as_tensor(y).long()


def run(options: Any, seed: int) -> dict[str, list[float]]:
    """All methods from one seed."""
    fashion, mnist = options.data / "fashion_mnist", options.data / "mnist"
    x, y = images(fashion, slice(0, options.train))
    held = images(fashion, slice(-1000, -1))
    test, unknown = images(fashion, slice(None)), images(mnist, slice(None))[0]
    seen, unseen = loader((x, y)), loader(held)
    settings: dict[str, Any] = {"likelihood": "categorical", "progress": False}
    found = {}

    def add(row: str, answer: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            probs = [torch.cat([answer(part) for part in inputs.split(1000)]) for inputs in (test[0], unknown)]
        found[row] = metrics(probs[0], test[1], probs[1])

    def added(row: str, bayes: bdl.BayesianModel) -> None:
        add(row, lambda part: bayes(part, generator=torch.Generator().manual_seed(0)).probs)

    def fresh(number: int, dropout: float = 0.0) -> nn.Sequential:
        torch.manual_seed(number)
        return network(dropout)

    plain = fit(fresh(seed), x, y, options.steps, F.cross_entropy, seed)
    added("plain network", bdl.wrap(plain, "map", **settings))
    added("plain network, temperature held-out", bdl.wrap(plain, "temperature", unseen, **settings))
    added("last-layer Laplace", bdl.wrap(plain, bdl.Laplace(select="last_layer"), seen, **settings))
    added("vbll, post hoc", bdl.wrap(plain, "vbll", seen, **settings))
    head = bdl.last_layer.Classification(WIDTH, CLASSES, num_data=len(x))
    trained = bdl.replace(fresh(seed), "8", head, keep_weights=False)
    fit(trained, x, y, options.steps, lambda out, target: out.loss(target), seed)
    added("vbll, trained", bdl.BayesianModel(trained, head.posterior(), head.likelihood()))
    torch.manual_seed(seed)
    dropped = fit(fresh(seed, DROPOUT), x, y, options.steps, F.cross_entropy, seed)
    added("MC dropout", bdl.wrap(dropped, "dropout", **settings))
    members = [
        fit(fresh(100 * seed + m), x, y, options.steps // MEMBERS, F.cross_entropy, 100 * seed + m)
        for m in range(MEMBERS)
    ]
    added("ensemble of five, equal budget", bdl.wrap(members, "ensemble", **settings))
    if not options.no_peer:
        import vbll

        theirs = fresh(seed)
        theirs[-1] = vbll.DiscClassification(WIDTH, CLASSES, 1.0 / len(x))
        fit(theirs, x, y, options.steps, lambda out, target: out.train_loss_fn(target), seed)
        torch.manual_seed(seed)
        add("package vbll 0.4.9", lambda part: theirs(part).predictive.probs)
    return found


def main() -> None:
    """Train, score, average over seeds."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    options_parser.add_argument("--train", type=int, default=10_000, help="training images")
    options_parser.add_argument("--steps", type=int, default=800)
    options_parser.add_argument("--seeds", type=int, default=3)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    runs = []
    for seed in range(options.seeds):
        runs.append(run(options, seed))
        print(seed, json.dumps({k: [round(v, 4) for v in values] for k, values in runs[-1].items()}), flush=True)
    table = {}
    for row in runs[0]:
        values = np.array([found[row] for found in runs])
        several = len(values) > 1
        errors = values.std(0, ddof=min(1, len(values) - 1)) / len(values) ** 0.5
        table[row] = {
            name: [round(float(values[:, i].mean()), 4), round(float(errors[i]), 4) if several else None]
            for i, name in enumerate(NAMES)
        }
    finish({"seeds": len(runs), "training images": options.train, "steps": options.steps, "scores": table}, options)


if __name__ == "__main__":
    main()
