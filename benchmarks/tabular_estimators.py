"""The estimators of `bayesdl.integrations.sklearn`, with their defaults, beside those of scikit-learn on small tables.

Mean test NLL over seeds (of data, split and training), with the standard error of the paired difference. Checked first:
the score is the log density of the predictive.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _measure import finish, parser
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine, make_friedman1, make_moons
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bayesdl.integrations.sklearn import BayesianClassifier, BayesianRegressor

Table = tuple[np.ndarray, np.ndarray]


def sine(seed: int) -> Table:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, (530, 1))
    return x, np.sin(2 * x[:, 0]) + 0.2 * rng.normal(size=530)


# name -> data, rows to train on
REGRESSION: dict[str, tuple[Callable[[int], Table], int]] = {
    "noisy sine": (sine, 30),
    "Friedman 1": (lambda seed: make_friedman1(700, noise=1.0, random_state=seed), 200),
    "diabetes": (lambda _: load_diabetes(return_X_y=True), 300),
}
CLASSIFICATION: dict[str, tuple[Callable[[int], Table], int]] = {
    "moons": (lambda seed: make_moons(600, noise=0.25, random_state=seed), 100),
    "wine": (lambda _: load_wine(return_X_y=True), 80),
    "breast cancer": (lambda _: load_breast_cancer(return_X_y=True), 200),
    "digits": (lambda _: load_digits(return_X_y=True), 500),
}


def gaussian_process(x: np.ndarray) -> Any:
    """A length scale per input, learned amplitude and noise; two starts of the optimiser."""
    kernel = ConstantKernel() * RBF(np.ones(x.shape[1])) + WhiteKernel()
    found = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=0)
    return make_pipeline(StandardScaler(), found)


def regression_nll(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    mean, std = model.predict(x, return_std=True)
    return float(np.mean(0.5 * np.log(2 * np.pi * std**2) + 0.5 * ((y - mean) / std) ** 2))


def classification_nll(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    probabilities = model.predict_proba(x)
    assert np.allclose(probabilities.sum(1), 1)
    return float(-np.log(probabilities[np.arange(len(y)), y].clip(1e-300)).mean())


def rivals(task: str, x: np.ndarray, seed: int, steps: int) -> dict[str, Any]:
    options = {"random_state": seed, "steps": steps}
    if task == "regression":
        return {
            "Gaussian process": gaussian_process(x),
            "BayesianRegressor": BayesianRegressor(**options),
        }
    own = MLPClassifier((64, 64), max_iter=500, random_state=seed)
    return {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "MLPClassifier": make_pipeline(StandardScaler(), own),
        "BayesianClassifier": BayesianClassifier(**options),
    }


def check() -> None:
    """The NLL above is that of the predictive."""
    x, y = sine(0)
    model = BayesianRegressor(steps=20, random_state=0).fit(x[:30], y[:30])
    own = -float(model.predictive(x).log_prob(torch.as_tensor(y)).mean())
    assert math.isclose(own, regression_nll(model, x, y), rel_tol=1e-9)


def summary(values: list[float], base: list[float]) -> list[float]:
    """Mean, and mean and standard error of the difference to the first method."""
    gaps = [a - b for a, b in zip(values, base, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return [round(v, 4) for v in (statistics.mean(values), statistics.mean(gaps), error)]


def main() -> None:
    own = parser(__doc__ or "")
    own.add_argument("--seeds", type=int, default=5)
    own.add_argument("--steps", type=int, default=1000)
    own.add_argument("--quick", action="store_true", help="one seed, few steps")
    options = own.parse_args()
    torch.set_num_threads(options.threads)
    options.device = "cpu"  # where the rivals run
    if options.quick:
        options.seeds, options.steps = 1, 100
    warnings.simplefilter("ignore")
    check()
    figures: dict[str, Any] = {"seeds": options.seeds, "steps": options.steps}
    seconds: dict[str, float] = {}
    for task, tables in (("regression", REGRESSION), ("classification", CLASSIFICATION)):
        nll: Any = regression_nll if task == "regression" else classification_nll
        for name, (load, rows) in tables.items():
            found: dict[str, list[float]] = {}
            for seed in range(options.seeds):
                x, y = load(seed)
                x, new_x, y, new_y = train_test_split(x, y, train_size=rows, random_state=seed)
                for method, model in rivals(task, x, seed, options.steps).items():
                    start = time.process_time()
                    found.setdefault(method, []).append(nll(model.fit(x, y), new_x, new_y))
                    seconds[method] = seconds.get(method, 0.0) + time.process_time() - start
            base = next(iter(found.values()))
            figures[name] = {method: summary(values, base) for method, values in found.items()}
    ratio = seconds["BayesianRegressor"] / seconds["Gaussian process"]
    figures["cpu_time_regressor_over_gaussian_process"] = round(ratio, 2)
    finish(figures, options)


if __name__ == "__main__":
    main()
