"""How the entries of `METRICS` read `Predictions`: adapters from pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.evaluation import binning, classification, dispersion, joint, losses, validation, weighting
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.validation import UndefinedError

BINS = 15


def mean_of(losses: Callable[[Predictions], Tensor], link: str = "identity") -> Callable[..., float | Tensor]:
    """The metric that is `link` of the mean of per-example losses."""

    def value(predictions: Predictions, weights: Any = None) -> float | Tensor:
        checked = validation.example_weights(weights, len(predictions))
        result = weighting.mean(losses(predictions), checked)
        return result if link == "identity" else result**0.5

    return value


def binned(statistic: str, *, mass: bool = False) -> Callable[..., float | Tensor]:
    """A top-label calibration error."""
    read = binning.STATISTICS[statistic]

    def value(predictions: Predictions, weights: Any = None) -> float | Tensor:
        checked = validation.example_weights(weights, len(predictions))
        sums = binning.bin_sums(predictions.confidence, predictions.correct, BINS, mass=mass, weights=checked)
        return weighting.finish(read(sums), checked)

    return value


def calibrated(statistic: str, *, mass: bool = False) -> Callable[[Predictions, int, torch.Generator | None], Tensor]:
    """The law (draws,) of a top-label calibration error when every forecast is right."""
    read = binning.STATISTICS[statistic]

    def draw(predictions: Predictions, draws: int, generator: torch.Generator | None) -> Tensor:
        confidence = predictions.confidence
        chunks = classification.redraw_hits(confidence, draws, generator)
        return torch.cat([read(binning.redrawn_sums(confidence, hits, BINS, mass=mass)) for hits in chunks]).cpu()

    return draw


def classwise_ece(predictions: Predictions, weights: Any = None) -> float | Tensor:
    """Mean over classes of the one-vs-rest calibration error."""
    checked = validation.example_weights(weights, len(predictions))
    sums = classification.class_sums(predictions.probs, predictions.labelled(), BINS, mass=False, weights=checked)
    return weighting.finish(torch.stack([part.ece() for part in sums]).mean(0), checked)


def classwise_calibrated(predictions: Predictions, draws: int, generator: torch.Generator | None) -> Tensor:
    """The law (draws,) of `classwise_ece` when every forecast is right."""
    probs = predictions.probs
    found = []
    for labels in classification.redraw_labels(probs, draws, generator):
        parts = [binning.redrawn_sums(probs[:, c], labels == c, BINS).ece() for c in range(probs.shape[1])]
        found.append(torch.stack(parts).mean(0))
    return torch.cat(found).cpu()


def zero_count(predictions: Predictions, weights: Any = None) -> float | Tensor:
    """Examples whose target was given probability 0."""
    zero = losses.nll(predictions).isinf().double()
    return weighting.total(zero, validation.example_weights(weights, len(zero)))


def error_rank(read: Callable[..., float | Tensor]) -> Callable[..., float | Tensor]:
    """A rank metric of 1 - confidence for wrong predictions."""
    return lambda p, weights=None: read(-p.confidence, ~p.correct, weights=weights)


def of_confidence(read: Callable[..., float | Tensor], *options: Any) -> Callable[..., float | Tensor]:
    """A function of top-label confidences and hits."""
    return lambda p, weights=None: read(p.confidence, p.correct, *options, weights)


def of_probs(read: Callable[..., float | Tensor], *options: Any) -> Callable[..., float | Tensor]:
    """A function of probabilities and labels."""
    return lambda p, weights=None: read(p.probs, p.labelled(), *options, weights)


def risk_curve(function: Callable[..., float | Tensor], **options: float) -> Callable[..., float | Tensor]:
    """A function of the risk-coverage curve of 0/1 errors by confidence."""

    def value(predictions: Predictions, weights: Any = None) -> float | Tensor:
        return function(predictions.confidence, ~predictions.correct, weights=weights, **options)

    return value


def of_pit(read: Callable[..., float | Tensor]) -> Callable[..., float | Tensor]:
    """A function of the PIT values."""

    def value(predictions: Predictions, weights: Any = None) -> float | Tensor:
        checked = validation.example_weights(weights, len(predictions))
        return read(predictions.law.cdf(losses.numbers(predictions)), checked)

    return value


def of_errors(read: Callable[..., float | Tensor], *options: Any) -> Callable[..., float | Tensor]:
    """A function of variances and errors."""

    def value(predictions: Predictions, weights: Any = None) -> float | Tensor:
        checked = validation.example_weights(weights, len(predictions))
        error = losses.numbers(predictions) - predictions.mean
        return read(predictions.variance, error, *options, checked)

    return value


def ause(predictions: Predictions, weights: Any = None) -> float | Tensor:
    """Sparsification error."""
    return dispersion.ause_of(predictions.variance.mean(-1).sqrt(), losses.absolute_errors(predictions), weights)


def joint_log_loss(tau: int) -> Callable[..., float | Tensor]:
    """Joint log-loss of random blocks; integer weights are copies of examples, as blocks have no other meaning."""

    def one(predictions: Predictions) -> float:
        if len(predictions) < tau:
            raise UndefinedError(f"{len(predictions)} examples make no block of {tau}", "too few examples")
        return joint.joint_nll(predictions, tau=tau)

    def value(predictions: Predictions, weights: Any = None) -> float | Tensor:
        checked = validation.example_weights(weights, len(predictions))
        if checked is None:
            return one(predictions)
        if bool((checked != checked.round()).any()):
            raise ArgumentError("a joint log-loss takes whole weights alone: its blocks hold whole examples")
        rows = checked[None] if checked.dim() == 1 else checked
        places = torch.arange(len(predictions))
        copies = [predictions.subset(places.repeat_interleave(row.long().cpu())) for row in rows]
        return weighting.finish(torch.tensor([one(found) for found in copies], dtype=torch.float64), checked)

    return value
