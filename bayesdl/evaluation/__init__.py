"""Evaluation: calibration, out-of-distribution detection, selective prediction, decomposition, error bars.

Two layers: pure functions of arrays (`classification`, `regression`, `ranking`, `ood`, `selective`, `decomposition`), and
`METRICS`, which applies them to `Predictions` by name. `nll` exists for classes and for regression: reach it through its
module.
"""

from bayesdl.evaluation import bootstrap, classification, decomposition, ood, ranking, regression, selective
from bayesdl.evaluation.bootstrap import Interval, Resamples, resample, resample_ood
from bayesdl.evaluation.classification import (
    Reliability,
    accuracy,
    brier,
    classwise_ece,
    ece,
    ece_l2,
    ece_mass,
    ece_unweighted,
    error_auroc,
    mce,
    nll_zero_count,
    reliability,
)
from bayesdl.evaluation.decomposition import Split, disagreement, split, variation_ratio
from bayesdl.evaluation.metrics import (
    HEADLINE,
    METRICS,
    Metric,
    MetricValue,
    evaluate_metrics,
    metric_values,
    metrics_for,
)
from bayesdl.evaluation.ood import DEFAULT_SCORE, OOD_METRICS, SCORES, ood_metrics, ood_score, score_metrics
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.ranking import auroc, average_precision, fpr_at_recall
from bayesdl.evaluation.regression import (
    crps,
    interval_score,
    mae,
    mixture_cdf,
    mixture_quantile,
    mpiw,
    picp,
    pit,
    qce,
    rmse,
    sharpness,
)
from bayesdl.evaluation.selective import (
    RiskCoverage,
    augrc,
    aurc,
    coverage_at_risk,
    eaurc,
    risk_at_coverage,
    risk_coverage,
)
from bayesdl.evaluation.validation import UndefinedError

__all__ = [
    "DEFAULT_SCORE",
    "HEADLINE",
    "METRICS",
    "OOD_METRICS",
    "SCORES",
    "Interval",
    "Metric",
    "MetricValue",
    "Predictions",
    "Reliability",
    "Resamples",
    "RiskCoverage",
    "Split",
    "UndefinedError",
    "accuracy",
    "augrc",
    "aurc",
    "auroc",
    "average_precision",
    "bootstrap",
    "brier",
    "classification",
    "classwise_ece",
    "coverage_at_risk",
    "crps",
    "decomposition",
    "disagreement",
    "eaurc",
    "ece",
    "ece_l2",
    "ece_mass",
    "ece_unweighted",
    "error_auroc",
    "evaluate_metrics",
    "fpr_at_recall",
    "interval_score",
    "mae",
    "mce",
    "metric_values",
    "metrics_for",
    "mixture_cdf",
    "mixture_quantile",
    "mpiw",
    "nll_zero_count",
    "ood",
    "ood_metrics",
    "ood_score",
    "picp",
    "pit",
    "qce",
    "ranking",
    "regression",
    "reliability",
    "resample",
    "resample_ood",
    "risk_at_coverage",
    "risk_coverage",
    "rmse",
    "score_metrics",
    "selective",
    "sharpness",
    "split",
    "variation_ratio",
]
