"""Which rule should choose prior and noise of a Bayesian last layer when nobody says anything? A study.

    python benchmarks/last_layer_defaults.py --data FOLDER [--splits 3] [--only 'uci/*'] [--json FILE]

Networks, data and splits are those of `defaults.py`: overfitted on purpose, trained without looking at any rule. Every
rule sees the training loader alone, but those named "held-out". Differences to the plain network whose noise or
temperature was chosen on the same held-out data are paired over the splits.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import finish, parser
from defaults import PLAIN, Problem, loader, mean_and_error, problems

import bayesdl as bdl

REGRESSION = ("evidence", "loo", "training")
Rows = Iterator[tuple[str, Callable[[], bdl.BayesianModel]]]


def regression_rows(problem: Problem) -> Rows:
    """Exact last layers by rule, and the peers among the methods."""
    seen, held = loader(problem.train), loader(problem.held_out)
    options: dict[str, Any] = {"likelihood": "gaussian", "progress": False}
    yield "map, training", lambda: bdl.wrap(problem.net, "map", seen, **options)
    yield PLAIN, lambda: bdl.wrap(problem.net, "map", held, **options)
    for rule in REGRESSION:
        yield f"vbll, {rule}", lambda rule=rule: bdl.wrap(problem.net, bdl.VBLL(tuning=rule), seen, **options)
    for name, rule, source in (("training", "training", seen), ("held-out", "heldout", held)):
        yield (
            f"vbll, evidence, noise {name}",
            lambda rule=rule, source=source: bdl.wrap(problem.net, bdl.VBLL(tuning="evidence"), seen, **options).tune(
                rule, source, prior="keep"
            ),
        )
    yield "vbll, held-out", lambda: bdl.wrap(problem.net, "vbll", seen, validation=held, **options)


def classification_rows(problem: Problem) -> Rows:
    """Variational last layers by prior, the means refitted or kept."""
    seen, held = loader(problem.train), loader(problem.held_out)
    options: dict[str, Any] = {"likelihood": "categorical", "progress": False}
    yield "map, training", lambda: bdl.wrap(problem.net, "map", seen, **options)
    yield PLAIN, lambda: bdl.wrap(problem.net, "temperature", held, **options)
    for mean, rule in (("refit", "evidence"), ("keep", "evidence"), ("keep", "training")):
        yield (
            f"vbll, {rule}" + (", means refitted" if mean == "refit" else ""),
            lambda mean=mean, rule=rule: bdl.wrap(problem.net, bdl.VBLL(mean=mean, tuning=rule), seen, **options),
        )
    yield (
        "vbll, training, temperature held-out",
        lambda: bdl.wrap(problem.net, "vbll", seen, validation=held, **options),
    )


def losses(problem: Problem) -> dict[str, np.ndarray]:
    """Test NLL of every point for every row."""
    rows = regression_rows if problem.likelihood == "gaussian" else classification_rows
    found = {}
    for name, make in rows(problem):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make()
            parts = [model(x).log_prob(y) for x, y in loader(problem.test)]
        found[name] = -torch.cat(parts).double().detach().numpy()
    return found


def main() -> None:
    """Run the study, average over splits, print a table and JSON."""
    options_parser = parser(__doc__.splitlines()[0])
    options_parser.add_argument("--data", type=Path, default=None, help="folder of data sets")
    options_parser.add_argument("--splits", type=int, default=3)
    options_parser.add_argument("--only", default="*", help="pattern of problem names")
    options = options_parser.parse_args()
    torch.set_num_threads(options.threads)
    runs: dict[str, list[dict[str, np.ndarray]]] = {}
    for name, make in problems(options):
        if fnmatch(name, options.only):
            runs.setdefault(name, []).append(losses(make()))
            print(name, json.dumps({row: round(float(v.mean()), 3) for row, v in runs[name][-1].items()}), flush=True)
    table, gaps = {}, {}
    for name, found in runs.items():
        table[name] = {row: mean_and_error([run[row] for run in found]) for row in found[0]}
        gaps[name] = {row: mean_and_error([run[row] - run[PLAIN] for run in found]) for row in found[0] if row != PLAIN}
    figures = {
        "splits": {name: len(found) for name, found in runs.items()},
        "test NLL, mean and standard error": table,
        f"difference to {PLAIN!r}, mean and standard error": gaps,
    }
    finish(figures, options)


if __name__ == "__main__":
    main()
