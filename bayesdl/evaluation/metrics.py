"""METRICS: every metric of the library by name, as a function of `Predictions`, with what a report must know about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from bayesdl.evaluation.predictions import Predictions

Direction = Literal["min", "max", "target", "none"]
Need = Literal["targets", "members", "components", "log_prob"]
IntervalRule = Literal["bca", "percentile", "calibration"]


@final
@dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`.

    Attributes:
        name: key and column name. label: what a table heads the column with.
        tasks: the tasks for which it is defined.
        fn: ``fn(predictions, weights=None)``; weights None or (N,) gives a float, (R, N) a float64 tensor (R,).
        direction: "min", "max", "target" (best is nearest to `target`), "none" (never ranked).
        unit: "nats", "fraction", "target units", "count", ... definition: one sentence, printed as a table note.
        proper: a proper scoring rule. needs: parts of `Predictions` without which it is undefined.
        losses: ``losses(predictions) -> (N,)`` float64 where the value is `link` of the mean of per-example losses.
        link: "identity" or "sqrt". resampled: False where a bootstrap says nothing. interval: rule for its interval.
    """

    name: str
    label: str
    tasks: tuple[str, ...]
    fn: Callable[..., float | Tensor]
    direction: Direction
    unit: str
    definition: str
    target: float | None = None
    proper: bool = False
    needs: tuple[Need, ...] = ("targets",)
    losses: Callable[[Predictions], Tensor] | None = None
    link: Literal["identity", "sqrt"] = "identity"
    resampled: bool = True
    interval: IntervalRule = "percentile"

    @property
    def additive(self) -> bool:
        """The metric is (a monotone function of) a mean of per-example losses."""
        return self.losses is not None


@final
@dataclass(frozen=True)
class MetricValue:
    """A value, or NaN with the short reason a table prints as ``n/a (reason)``."""

    value: float
    reason: str = ""


METRICS: dict[str, Metric] = {}
# Default columns of a report, in order (proper scores first).
HEADLINE: dict[str, tuple[str, ...]] = {
    "classification": ("nll", "brier", "accuracy", "ece", "aurc", "error_auroc"),
    "multilabel": ("nll", "brier", "accuracy"),
    "regression": ("nll", "crps", "rmse", "picp_90", "mpiw_90", "interval_score_90"),
    "count": ("nll", "rmse", "mae"),
}


def metrics_for(task: str) -> dict[str, Metric]:
    """The entries of `METRICS` that are defined for `task`."""
    return {name: metric for name, metric in METRICS.items() if task in metric.tasks}


def metric_values(predictions: Predictions, names: Sequence[str] | None = None) -> dict[str, MetricValue]:
    """Values of the named metrics (default: `HEADLINE` of the task); an undefined one is NaN with its reason.

    Raises:
        UnknownNameError: a name is not in `METRICS`.
    """
    raise NotImplementedError


def evaluate_metrics(predictions: Predictions, names: Sequence[str] | None = None) -> dict[str, float]:
    """`metric_values` as plain floats."""
    return {name: value.value for name, value in metric_values(predictions, names).items()}
