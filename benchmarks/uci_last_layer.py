"""Bayesian last layers on the UCI regression sets with their published splits, beside their rivals at equal budget.

    python benchmarks/uci_last_layer.py --data FOLDER [--sets yacht,boston] [--splits 20] [--steps 2000] [--json FILE]

FOLDER holds `uci/*.npz` (x, y, train_idx, test_idx). Every method trains a 2 x 50 ReLU network on nine tenths of the
training rows with the same number of gradient steps (an ensemble of five: a fifth each) and has the same last tenth to
choose its noise and prior with; "alone" rows have not. vbll learns its noise by its bound, and has nothing else to
choose. NLL and RMSE in units of the targets as published.
"""

from __future__ import annotations

import json
import math
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

BATCH, MEMBERS, DROPOUT = 64, 5, 0.05
Pair = tuple[Tensor, Tensor]
Scores = dict[str, tuple[float, float]]


def network(inputs: int, dropout: float = 0.0) -> nn.Sequential:
    """2 x 50 ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, 50):
        layers += [nn.Linear(width, 50), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
    return nn.Sequential(*layers, nn.Linear(50, 1))


def fit(net: nn.Module, pair: Pair, steps: int, loss: Callable[[Any, Tensor], Tensor], seed: int) -> nn.Module:
    """AdamW on random batches; no weight decay on what has a prior of its own."""
    generator = torch.Generator().manual_seed(seed)
    heads = [m for m in net.modules() if isinstance(m, bdl.last_layer.Head) or hasattr(m, "W_mean")]
    kept = {id(p) for head in heads for p in head.parameters()}
    groups = [
        {"params": [p for p in net.parameters() if id(p) not in kept], "weight_decay": 1e-4},
        {"params": [p for p in net.parameters() if id(p) in kept], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(pair[0]), (BATCH,), generator=generator)
        optimiser.zero_grad()
        loss(net(pair[0][rows]), pair[1][rows]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
    return net.eval()


def score(mean: Tensor, log_prob: Tensor, y: Tensor, spread: float) -> tuple[float, float]:
    """NLL and RMSE in the units of the targets."""
    nll = -float(log_prob.double().mean()) + math.log(spread)
    return nll, spread * float((mean - y).double().square().mean().sqrt())


def split_scores(folder: Path, name: str, split: int, steps: int, peer: bool) -> Scores:
    """NLL and RMSE of every method on one split."""
    with np.load(folder / "uci" / f"{name}.npz") as archive:
        x, y = archive["x"], archive["y"]
        rows, tests = archive["train_idx"][split], archive["test_idx"][split]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(split)).numpy()
    held_rows, rows = rows[order[: len(rows) // 10]], rows[order[len(rows) // 10 :]]
    centre, spread = x[rows].mean(0), x[rows].std(0)
    x = (x - centre) / np.where(spread < 1e-8, 1.0, spread)
    unit = float(y[rows].std())
    y = (y - y[rows].mean()) / unit

    def pick(index: np.ndarray) -> Pair:
        return torch.as_tensor(x[index]).float(), torch.as_tensor(y[index]).float().unsqueeze(1)

    train, held, test = pick(rows), pick(held_rows), pick(tests)
    seen, unseen = loader(train), loader(held)
    options: dict[str, Any] = {"likelihood": "gaussian", "progress": False}
    found: Scores = {}

    def add(row: str, bayes: bdl.BayesianModel) -> None:
        with torch.no_grad():
            prediction = bayes(test[0], generator=torch.Generator().manual_seed(0))
            found[row] = score(prediction.mean, prediction.log_prob(test[1]), test[1], unit)

    def fresh(seed: int, dropout: float = 0.0) -> nn.Sequential:
        torch.manual_seed(seed)
        return network(x.shape[1], dropout)

    plain = fit(fresh(split), train, steps, F.mse_loss, split)
    add("plain network", bdl.wrap(plain, "map", unseen, **options))
    add("last-layer Laplace", bdl.wrap(plain, bdl.Laplace(select="last_layer"), seen, validation=unseen, **options))
    add("last-layer Laplace, alone", bdl.wrap(plain, bdl.Laplace(select="last_layer"), seen, **options))
    add("vbll, post hoc", bdl.wrap(plain, "vbll", seen, validation=unseen, **options))
    add("vbll, post hoc, alone", bdl.wrap(plain, "vbll", seen, **options))
    head = bdl.last_layer.Regression(50, 1, num_data=len(rows))
    trained = bdl.replace(fresh(split), "4", head, keep_weights=False)
    fit(trained, train, steps, lambda out, target: out.loss(target), split)
    bayes = bdl.BayesianModel(trained, head.posterior(), head.likelihood())
    add("vbll, trained, alone", bayes)
    add("vbll, trained", bayes.tune("heldout", unseen))
    dropped = fit(fresh(split, DROPOUT).train(), train, steps, F.mse_loss, split)
    add("MC dropout", bdl.wrap(dropped, "dropout", unseen, **options))
    members = [
        fit(fresh(100 * split + m), train, steps // MEMBERS, F.mse_loss, 100 * split + m) for m in range(MEMBERS)
    ]
    add("ensemble of five, equal budget", bdl.wrap(members, "ensemble", unseen, **options))
    if peer:
        import vbll

        torch.manual_seed(split)
        theirs = network(x.shape[1])
        theirs[-1] = vbll.Regression(50, 1, 1.0 / len(rows))
        fit(theirs, train, steps, lambda out, target: out.train_loss_fn(target), split)
        with torch.no_grad():
            normal = theirs(test[0]).predictive
            density = torch.distributions.Normal(normal.mean, normal.covariance_diagonal.sqrt())
            found["package vbll 0.4.9, alone"] = score(normal.mean, density.log_prob(test[1]), test[1], unit)
    return found


def summary(runs: list[Scores], column: int) -> dict[str, list[float | None]]:
    """Mean over splits and its standard error, per method."""
    rows = {}
    for name in runs[0]:
        values = np.array([run[name][column] for run in runs])
        error = round(float(values.std(ddof=1) / len(values) ** 0.5), 4) if len(values) > 1 else None
        rows[name] = [round(float(values.mean()), 4), error]
    return rows


def main() -> None:
    """Train, score, average."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    options_parser.add_argument("--sets", default="boston,concrete,energy,wine,yacht")
    options_parser.add_argument("--splits", type=int, default=20)
    options_parser.add_argument("--steps", type=int, default=2000)
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    runs: dict[str, list[Scores]] = {}
    for split in range(options.splits):
        for name in options.sets.split(","):
            with np.load(options.data / "uci" / f"{name}.npz") as archive:
                if split >= len(archive["train_idx"]):
                    continue
            runs.setdefault(name, []).append(
                split_scores(options.data, name, split, options.steps, not options.no_peer)
            )
            print(name, split, json.dumps({k: [round(v, 3) for v in s] for k, s in runs[name][-1].items()}), flush=True)
    figures = {
        "steps": options.steps,
        "splits": {name: len(found) for name, found in runs.items()},
        "NLL, mean and standard error": {name: summary(found, 0) for name, found in runs.items()},
        "RMSE, mean and standard error": {name: summary(found, 1) for name, found in runs.items()},
    }
    finish(figures, options)


if __name__ == "__main__":
    main()
