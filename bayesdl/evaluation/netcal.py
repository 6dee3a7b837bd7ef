"""netcal behind this library's interface, inputs checked beforehand and nothing printed.

Recalibrators of classes (one against the rest) and of deviations (Gaussian processes), and calibration of detectors.
Calibration errors as a second opinion on those of this library.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, LabelError, require
from bayesdl.evaluation import validation

_CLASSES = {
    "platt": ("netcal.scaling", "LogisticCalibration"),
    "beta": ("netcal.scaling", "BetaCalibration"),
    "bbq": ("netcal.binning", "BBQ"),
    "enir": ("netcal.binning", "ENIR"),
}
_CONFIDENCE = {"ece": "ECE", "mce": "MCE", "unweighted": "ACE"}
# Quantiles of a bent Gaussian are sought within so many deviations, where its distribution function is a float64 still.
_REACH, _HALVINGS = 37.0, 30
_NARROW = 1e-9  # relative spread of deviations below which netcal's bin edges would coincide


def fit_columns(method: str, probs: Tensor, labels: Tensor) -> tuple[Callable[[Tensor], Tensor], ...]:
    """One map (N,) -> (N,) for each class, fitted to its probability against the rest.

    Raises:
        LabelError: a class does not occur among the labels, so that netcal could not fit it.
        MissingDependencyError: netcal is not installed.
    """
    module, name = _CLASSES[method]
    kind = getattr(require(module), name)
    present = torch.bincount(labels, minlength=probs.shape[1]) > 0
    if not bool(present.all()):
        raise LabelError(
            f"{method!r} needs examples of every class; class {int((~present).nonzero()[0])} has none. "
            "temperature, vector, matrix and dirichlet do not"
        )
    columns = []
    for c in range(probs.shape[1]):
        calibrator = kind()
        # Integer labels, because one of its methods fails on booleans; and it prints.
        _quiet(calibrator.fit, probs[:, c].cpu().numpy(), (labels == c).long().cpu().numpy())
        columns.append(_column(calibrator))
    return tuple(columns)


@final
@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law of one output given the mean and deviation (N,) of its Gaussian forecast.

    `cdf(mean, deviation, y)` and `quantile(mean, deviation, q)` are (N,).
    """

    cdf: Callable[[Tensor, Tensor, Tensor], Tensor]
    quantile: Callable[[Tensor, Tensor, float], Tensor]


def fit_deviations(
    mean: Tensor, deviation: Tensor, y: Tensor, *, epochs: int, generator: torch.Generator | None
) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
    """One map (mean, deviation) (N,) -> deviation (N,) for each output, by netcal's GP-Normal (Kueppers et al. 2022).

    A Gaussian process over means and deviations gives the factor of each deviation. Raises `MissingDependencyError`.
    """
    fitted = _processes("GPNormal", mean, deviation, y, epochs, generator)
    return tuple(_deviation(process, seed) for process, seed in fitted)


def fit_laws(
    kind: str, mean: Tensor, deviation: Tensor, y: Tensor, *, epochs: int, generator: torch.Generator | None
) -> tuple[Law, ...]:
    """A law for each output, by netcal's "GPBeta" (Song et al. 2019) or "GPCauchy" (Kueppers et al. 2022).

    GPBeta bends the Gaussian distribution function by a beta map, GPCauchy replaces the Gaussian by a Cauchy law around
    its mean; a Gaussian process over means and deviations gives their parameters. Raises `MissingDependencyError`.
    """
    made = _beta_law if kind == "GPBeta" else _cauchy_law
    return tuple(made(process, seed) for process, seed in _processes(kind, mean, deviation, y, epochs, generator))


def _processes(
    kind: str, mean: Tensor, deviation: Tensor, y: Tensor, epochs: int, generator: torch.Generator | None
) -> Iterator[tuple[Any, int]]:
    """A fitted process for each output, and the seed that it is sampled with."""
    require("gpytorch")
    make = getattr(require("netcal.regression"), kind)
    seed = int(torch.randint(1 << 31, (), generator=generator or torch.Generator().manual_seed(0)))
    for d in range(mean.shape[1]):
        process = make(n_inducing_points=min(12, len(mean)), n_epochs=epochs)
        parts = (mean[:, d].cpu().numpy(), deviation[:, d].cpu().numpy()), y[:, d].cpu().numpy()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + d)
            _quiet(process.fit, *parts)
        yield process, seed + d


def _transformed(process: Any, seed: int, mean: Tensor, deviation: Tensor, *more: Any) -> Any:
    # The process is sampled: the same forecasts get the same answer.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _quiet(process.transform, (mean.cpu().numpy(), deviation.cpu().numpy()), *more)


def _deviation(process: Any, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    def transform(mean: Tensor, deviation: Tensor) -> Tensor:
        moved = _transformed(process, seed, mean, deviation)
        return torch.as_tensor(moved).to(deviation).reshape(deviation.shape)

    return transform


def _beta_law(process: Any, seed: int) -> Law:
    def cdf(mean: Tensor, deviation: Tensor, y: Tensor) -> Tensor:
        levels = _transformed(process, seed, mean, deviation, y.cpu().numpy()[None])[2]
        return torch.as_tensor(levels).to(y).reshape(y.shape).clamp(0.0, 1.0)

    def quantile(mean: Tensor, deviation: Tensor, q: float) -> Tensor:
        low, high = torch.full_like(mean, -_REACH), torch.full_like(mean, _REACH)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            below = cdf(mean, deviation, mean + middle * deviation) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return mean + (low + high) / 2 * deviation

    return Law(cdf, quantile)


def _cauchy_law(process: Any, seed: int) -> Law:
    scale = _deviation(process, seed)

    def cdf(mean: Tensor, deviation: Tensor, y: Tensor) -> Tensor:
        return 0.5 + ((y - mean) / scale(mean, deviation)).atan() / math.pi

    def quantile(mean: Tensor, deviation: Tensor, q: float) -> Tensor:
        return mean + scale(mean, deviation) * math.tan(math.pi * (q - 0.5))

    return Law(cdf, quantile)


def detection_ece(matched: Any, confidence: Any, boxes: Any = None, *, bins: int = 20) -> float:
    """Calibration error of a detector: confidence against precision, by confidence and box (netcal's D-ECE).

    Kueppers et al. 2020. Its bins close on the right, unlike those of this library.

    Args:
        matched: (N,) 0 or 1, whether each detection found an object. confidence: (N,) in [0, 1].
        boxes: (N, k) in [0, 1], relative position and size, for errors that depend on where; None for none.
        bins: of the confidence; with `boxes` every axis has bins^(1 / (k + 1)) of them, at least 2.

    Raises:
        LabelError, ShapeError, NonFiniteError, ArgumentError: bad input. MissingDependencyError: no netcal.
    """
    scores = validation.probabilities(confidence, "confidence")
    validation.rank(scores, "confidence", (1,))
    hits = validation.binary_targets(matched, tuple(scores.shape), "matched")
    count, columns = validation.bin_count(bins), [validation.wide(scores)[:, None]]
    if boxes is not None:
        places = validation.tensor(boxes, "boxes")
        validation.rank(places, "boxes", (2,))
        validation.finite(places, "boxes")
        if len(places) != len(scores) or bool(((places < 0) | (places > 1)).any()):
            raise ArgumentError(f"boxes of shape {tuple(places.shape)}: expected ({len(scores)}, k) values in [0, 1]")
        columns.append(validation.wide(places).to(columns[0].device))
    whole = torch.cat(columns, 1)
    axes = [count] if whole.shape[1] == 1 else [max(2, round(count ** (1 / whole.shape[1])))] * whole.shape[1]
    measure = require("netcal.metrics").ECE(axes if len(axes) > 1 else axes[0], detection=True)
    return float(_quiet(measure.measure, whole.cpu().numpy(), hits.cpu().numpy()))


def confidence_error(statistic: str, confidence: Tensor, hits: Tensor, bins: int) -> float:
    """netcal's "ece", "mce" or "unweighted" of confidences (N,) against what happened (N,), over equal-width bins.

    One event at a time: netcal would guess from the labels how many classes there are. Raises `MissingDependencyError`.
    """
    kind = getattr(require("netcal.metrics"), _CONFIDENCE[statistic])
    p, y = validation.wide(confidence).cpu().numpy(), hits.long().cpu().numpy()
    return float(_quiet(kind(bins, detection=True).measure, p, y))


def deviation_error(
    statistic: str, mean: Tensor, variance: Tensor, y: Tensor, bins: int = 1, levels: Sequence[float] = ()
) -> float:
    """netcal's "ence", "uce" or "qce" of means, variances and targets (N, D), averaged over outputs.

    Raises:
        UndefinedError: equal deviations, between which no bins can lie. MissingDependencyError: no netcal.
    """
    deviation = validation.wide(variance).sqrt()
    if statistic != "qce" and bool((deviation.amax(0) - deviation.amin(0) <= _NARROW * deviation.amax(0)).any()):
        raise validation.UndefinedError("netcal makes no bins of equal deviations", "equal deviations")
    measure = getattr(require("netcal.metrics"), statistic.upper())(bins).measure
    found = []
    for d in range(y.shape[1]):
        parts = (mean[:, d].cpu().numpy(), deviation[:, d].cpu().numpy()), y[:, d].cpu().numpy()
        extra = (np.asarray(levels),) if statistic == "qce" else ()
        found.append(float(np.mean(_quiet(measure, *parts, *extra))))
    return sum(found) / len(found)


def _column(calibrator: Any) -> Callable[[Tensor], Tensor]:
    def transform(p: Tensor) -> Tensor:
        moved = torch.as_tensor(_quiet(calibrator.transform, p.cpu().numpy()), dtype=p.dtype)
        return moved.reshape(p.shape).clamp(0.0, 1.0)

    return transform


def _quiet(function: Callable[..., Any], *arguments: Any) -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.INFO)
        try:
            return function(*arguments)
        finally:
            logging.disable(before)
