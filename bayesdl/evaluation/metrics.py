"""METRICS: every metric by name, as a function of `Predictions`, with all that a report must know about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, UnknownNameError
from bayesdl.evaluation import (
    calibration,
    dispersion,
    losses,
    ranking,
    regression,
    selective,
)
from bayesdl.evaluation.binning import STATISTICS, BinSums
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.readers import (
    BINS,
    ause,
    binned,
    calibrated,
    classwise_calibrated,
    classwise_ece,
    error_rank,
    joint_log_loss,
    mean_of,
    of_confidence,
    of_errors,
    of_pit,
    of_probs,
    risk_curve,
    zero_count,
)
from bayesdl.evaluation.validation import UndefinedError

if TYPE_CHECKING:
    from bayesdl.evaluation.streaming import MetricStream

Direction = Literal["min", "max", "target", "none"]
Need = Literal["targets", "members", "components", "samples", "log_prob"]
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
        binned: the statistic, where the value is one of `BINS` equal-width bins of the top label.
        null: ``null(predictions, draws, generator) -> (draws,)``, its law under perfect calibration (labels redrawn).
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
    null: Callable[[Predictions, int, torch.Generator | None], Tensor] | None = None
    binned: Callable[[BinSums], Tensor] | None = None

    @property
    def additive(self) -> bool:
        """The metric is (a monotone function of) a mean of per-example losses."""
        return self.losses is not None

    @property
    def streaming(self) -> Literal["constant", "stored"]:
        """What a stream of batches keeps: sums (of losses, or of equal-width bins), or all scores."""
        return "constant" if self.additive or self.binned is not None else "stored"

    def accumulator(self) -> MetricStream:
        """A fresh `MetricStream` of this metric."""
        from bayesdl.evaluation.streaming import MetricStream  # not at module level: that module reads METRICS

        return MetricStream((self.name,))


@final
@dataclass(frozen=True)
class MetricValue:
    """A value, or NaN with the short reason a table prints as ``n/a (reason)``."""

    value: float
    reason: str = ""


LEVELS = (50, 90, 95)
CLASSES, LABELS, MOMENTS = ("classification",), ("classification", "multilabel"), ("regression", "count")
EVERY = LABELS + MOMENTS


def _mean(
    name: str,
    label: str,
    tasks: tuple[str, ...],
    losses: Callable[[Predictions], Tensor],
    direction: Direction,
    unit: str,
    definition: str,
    *,
    target: float | None = None,
    proper: bool = False,
    needs: tuple[Need, ...] = ("targets",),
    link: Literal["identity", "sqrt"] = "identity",
) -> Metric:
    return Metric(
        name, label, tasks, mean_of(losses, link), direction, unit, definition,
        target=target, proper=proper, needs=needs, losses=losses, link=link, interval="bca",
    )  # fmt: skip


def _at_level(percent: int) -> tuple[Metric, ...]:
    level = percent / 100
    parts: tuple[Need, ...] = ("targets", "components")
    return (
        _mean(
            f"picp_{percent}", f"coverage {percent} %", ("regression",), losses.coverage(level), "target",
            "fraction",
            f"Share of targets between the {50 - percent / 2:g} % and {50 + percent / 2:g} % quantile.",
            target=level, needs=parts,
        ),
        _mean(
            f"mpiw_{percent}", f"width {percent} %", ("regression",), losses.width(level), "none", "target units",
            f"Mean width of the central {percent} % interval; smaller is better at equal coverage.",
            needs=("components",),
        ),
        _mean(
            f"interval_score_{percent}", f"interval score {percent} %", ("regression",),
            losses.interval_score(level), "min", "target units",
            f"Width of the central {percent} % interval plus {2 / (1 - level):g} x the distance of a missed target.",
            proper=True, needs=parts,
        ),
    )  # fmt: skip


def _calibration(name: str, label: str, statistic: str, definition: str, *, mass: bool = False) -> Metric:
    return Metric(
        name, label, CLASSES, binned(statistic, mass=mass), "min", "fraction", definition,
        interval="calibration", null=calibrated(statistic, mass=mass),
        binned=None if mass else STATISTICS[statistic],
    )  # fmt: skip


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _mean(
            "nll", "NLL", EVERY, losses.nll, "min", "nats",
            "Mean of minus the log predictive probability or density of the target, summed over outputs.", proper=True,
        ),
        _mean(
            "brier", "Brier", LABELS, losses.brier, "min", "score",
            "Sum over classes of the squared distance of probability and label, two columns for a binary label.",
            proper=True,
        ),
        _mean(
            "crps", "CRPS", MOMENTS, losses.crps, "min", "target units",
            "Continuous ranked probability score of the predictive's Gaussian mixture; of draws the fair estimator.",
            proper=True, needs=("targets", "components"),
        ),
        _mean(
            "energy_score", "energy score", ("regression",), losses.energy, "min", "target units",
            "Mean distance of draws to the target minus half that between draws (fair), over all outputs together.",
            proper=True, needs=("targets", "samples"),
        ),
        _mean("accuracy", "accuracy", LABELS, losses.accuracy, "max", "fraction", "Share of labels predicted right."),
        _mean(
            "rmse", "RMSE", MOMENTS, losses.squared_errors, "min", "target units", "Root mean squared error.",
            link="sqrt",
        ),
        _mean("mae", "MAE", MOMENTS, losses.absolute_errors, "min", "target units", "Mean absolute error of the mean."),
        _mean(
            "sharpness", "sharpness", MOMENTS, losses.variances, "none", "target units",
            "Root of the mean predictive variance; smaller is better at equal calibration.", needs=(), link="sqrt",
        ),
        Metric(
            "qce", "QCE", ("regression",), of_pit(regression.qce_of), "min", "fraction",
            "Mean over the levels 5 % .. 95 % of |share of targets below the quantile - level|.",
            needs=("targets", "components"),
        ),
        *(metric for percent in LEVELS for metric in _at_level(percent)),
        Metric(
            "miscal_area", "miscalibration area", ("regression",), of_pit(dispersion.miscal_area_of), "min", "fraction",
            "Area between the coverage of central intervals and their level.", needs=("targets", "components"),
        ),
        Metric(
            "ence", "ENCE", MOMENTS, of_errors(dispersion.ence_of, BINS), "min", "fraction",
            f"Mean over {BINS} equal-mass bins of |root mean variance - RMSE| / root mean variance.",
        ),
        Metric(
            "uce", "UCE", MOMENTS, of_errors(dispersion.uce_of, BINS), "min", "target units squared",
            f"Mean gap between squared errors and variances, {BINS} equal-mass bins of the variance.",
        ),
        Metric(
            "ause", "AUSE", MOMENTS, ause, "min", "fraction",
            "Excess error when the most uncertain are removed first, over the mean absolute error.",
        ),
        *(
            _mean(
                f"pinball_{percent}", f"pinball {percent} %", ("regression",), losses.pinball(percent / 100), "min",
                "target units", f"Quantile loss at the predicted {percent} % quantile.", proper=True,
                needs=("targets", "components"),
            )
            for percent in (10, 90)
        ),
        _calibration("ece", "ECE", "ece", f"Top-label expected calibration error, {BINS} equal-width bins."),
        _calibration("mce", "MCE", "mce", f"Largest top-label calibration gap, {BINS} equal-width bins."),
        _calibration("ece_l2", "ECE l2", "l2", f"Root mean squared top-label gap, {BINS} equal-width bins."),
        _calibration("ece_mass", "ECE mass", "ece", f"As ECE, {BINS} equal-mass bins.", mass=True),
        _calibration(
            "ece_unweighted", "ECE unweighted", "unweighted",
            f"Mean top-label gap over non-empty bins, {BINS} equal-width bins.",
        ),
        Metric(
            "classwise_ece", "classwise ECE", CLASSES, classwise_ece, "min", "fraction",
            f"Mean over classes of the one-vs-rest ECE, {BINS} equal-width bins.",
            interval="calibration", null=classwise_calibrated,
        ),
        Metric(
            "ace", "ACE", CLASSES, of_probs(calibration.tace_of, BINS, -1.0), "min", "fraction",
            f"Mean gap over all classes and their {BINS} equal-mass bins.",
        ),
        Metric(
            "tace", "TACE", CLASSES, of_probs(calibration.tace_of, BINS, 0.01), "min", "fraction",
            "As ACE over the probabilities above 1 %.",
        ),
        Metric(
            "ce2_debiased", "debiased CE^2", CLASSES, of_confidence(calibration.ce2_of, BINS), "target", "score",
            f"Squared top-label calibration error without its bias, {BINS} equal-mass bins; may be negative.",
            target=0.0,
        ),
        Metric(
            "smece", "smooth ECE", CLASSES, of_confidence(calibration.smece_of), "min", "fraction",
            "Top-label calibration error smoothed by a reflected Gaussian kernel of its own width.", resampled=False,
        ),
        Metric(
            "skce", "kernel CE^2", CLASSES, of_probs(calibration.skce_of, None), "target", "score",
            "Unbiased squared kernel calibration error over all pairs; may be negative.", target=0.0, resampled=False,
        ),
        Metric(
            "calibration_p", "calibration p", CLASSES, of_confidence(calibration.calibration_p_of), "none", "p-value",
            "p-value of the hypothesis that the confidences are right, by cumulative differences.", resampled=False,
        ),
        Metric(
            "spiegelhalter_z", "Spiegelhalter z", CLASSES, of_confidence(calibration.spiegelhalter_of), "target", "sd",
            "Standard normal where the confidences are right.", target=0.0, resampled=False,
        ),
        Metric(
            "error_ap", "error AP", CLASSES, error_rank(ranking.average_precision), "max", "fraction",
            "Average precision of 1 - confidence for wrong predictions.",
        ),
        Metric(
            "error_fpr95", "error FPR95", CLASSES, error_rank(ranking.fpr_at_recall), "min", "fraction",
            "Share of right predictions flagged at the strictest threshold that flags at least 95 % of the wrong ones.",
        ),
        Metric(
            "joint_nll_10", "joint NLL, 10", ("classification", "regression"), joint_log_loss(10), "min",
            "nats per block", "Joint log-loss of random blocks of 10 examples under coherent members.", proper=True,
            needs=("targets", "members"), resampled=False,
        ),
        Metric(
            "nll_zero_count", "zero probability", CLASSES, zero_count, "none", "count",
            "Number of examples whose label was given probability 0 (NLL is then infinite).", resampled=False,
        ),
        Metric(
            "error_auroc", "error AUROC", CLASSES, error_rank(ranking.auroc), "max", "fraction",
            "Probability that a wrong prediction is less confident than a right one, ties 1/2.",
        ),
        Metric(
            "aurc", "AURC", CLASSES, risk_curve(selective.aurc), "min", "fraction",
            "Mean over coverages of the error rate among the most confident predictions.",
        ),
        Metric(
            "eaurc", "E-AURC", CLASSES, risk_curve(selective.eaurc), "min", "fraction",
            "AURC minus the AURC of the best possible order of the same errors.",
        ),
        Metric(
            "augrc", "AUGRC", CLASSES, risk_curve(selective.augrc), "min", "fraction",
            "Mean over coverages of the share of all examples that are accepted and wrong.",
        ),
        Metric(
            "risk_at_coverage_80", "error at 80 %", CLASSES, risk_curve(selective.risk_at_coverage, coverage=0.8),
            "min",
            "fraction", "Error rate of the 80 % most confident predictions; empirical, no guarantee.",
        ),
        Metric(
            "coverage_at_risk_5", "coverage at 5 %", CLASSES, risk_curve(selective.coverage_at_risk, risk=0.05), "max",
            "fraction", "Largest coverage with an error rate of at most 5 %; empirical, no guarantee.",
        ),
        _mean(
            "disagreement", "disagreement", CLASSES, losses.disagreements, "none", "fraction",
            "Share of unordered member pairs that predict different classes.", needs=("members",),
        ),
    )
}  # fmt: skip
# Beside the headline, among a report's further columns: calibration errors that are not biased as ECE is.
FURTHER: dict[str, tuple[str, ...]] = {"classification": ("ce2_debiased", "smece")}
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


def check_names(names: Sequence[str]) -> Sequence[str]:
    """The names themselves.

    Raises:
        UnknownNameError: one is not in `METRICS`. ArgumentError: a string in place of a list of them.
    """
    if isinstance(names, str):
        raise ArgumentError(f"metrics: expected a list of names such as [{names!r}], got a string")
    if missing := [name for name in names if name not in METRICS]:
        raise UnknownNameError(f"metrics {', '.join(map(repr, missing))} are unknown; available: {', '.join(METRICS)}")
    return names


def metric_values(predictions: Predictions, names: Sequence[str] | None = None) -> dict[str, MetricValue]:
    """Values of the named metrics (default: `HEADLINE` of the task); an undefined one is NaN with its reason.

    Raises:
        UnknownNameError, ArgumentError: see `check_names`.
    """
    names = HEADLINE[predictions.task] if names is None else check_names(names)
    return {name: _value(METRICS[name], predictions) for name in names}


def _value(metric: Metric, predictions: Predictions) -> MetricValue:
    if predictions.task not in metric.tasks:
        return MetricValue(math.nan, f"not defined for {predictions.task}")
    try:
        return MetricValue(float(metric.fn(predictions)))
    except UndefinedError as error:
        return MetricValue(math.nan, error.reason)


def evaluate_metrics(predictions: Predictions, names: Sequence[str] | None = None) -> dict[str, float]:
    """`metric_values` as plain floats."""
    return {name: value.value for name, value in metric_values(predictions, names).items()}
