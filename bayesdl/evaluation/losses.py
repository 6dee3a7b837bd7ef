"""Per-example losses (N,) float64 of `Predictions`: a metric that is the mean of one is resampled by one product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.evaluation import classification, regression, validation
from bayesdl.evaluation.decomposition import log_complement, votes_of
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.validation import UndefinedError


def nll(predictions: Predictions) -> Tensor:
    """(N,), -log p(y): from probabilities, from the predictive's own density, or from its Gaussian components."""
    targets = predictions.labelled()
    if predictions.task == "classification":
        return classification.nll_losses(predictions.log_mean_probs, targets)
    if predictions.log_prob is not None:
        return -validation.wide(predictions.log_prob)
    if predictions.task == "multilabel":
        log_probs = predictions.log_mean_probs
        return -torch.where(targets == 1, log_probs, log_complement(log_probs)).sum(-1)
    if predictions.task == "count":
        raise UndefinedError(
            "the likelihood of counts needs log_prob, which these predictions do not hold", "no log_prob"
        )
    return -predictions.law.log_prob(numbers(predictions))


def brier(predictions: Predictions) -> Tensor:
    """(N,), squared distance of the probabilities to the label, two columns for every label of a multilabel task."""
    targets, probs = predictions.labelled(), predictions.probs
    if predictions.task == "multilabel":
        return 2 * (probs - targets).square().mean(-1)
    return classification.brier_losses(probs, targets)


def accuracy(predictions: Predictions) -> Tensor:
    """(N,), 1 where the prediction is right; multilabel: share of the labels that are."""
    if predictions.task == "multilabel":
        return ((predictions.probs > 0.5) == (predictions.labelled() == 1)).double().mean(-1)
    return predictions.correct.double()


def crps(predictions: Predictions) -> Tensor:
    """(N,), closed form, from draws the fair estimator; mean over outputs."""
    return predictions.law.crps(numbers(predictions)).mean(-1)


def energy(predictions: Predictions) -> Tensor:
    """(N,), energy score of draws."""
    law = predictions.law
    if isinstance(law, regression.Mixture):
        raise UndefinedError("the energy score is taken from draws; build Predictions.from_samples", "no draws")
    return law.energy(numbers(predictions))


def squared_errors(predictions: Predictions) -> Tensor:
    """(N,), of the mean, mean over outputs."""
    return (predictions.mean - numbers(predictions)).square().mean(-1)


def absolute_errors(predictions: Predictions) -> Tensor:
    """(N,), of the mean, mean over outputs."""
    return (predictions.mean - numbers(predictions)).abs().mean(-1)


def variances(predictions: Predictions) -> Tensor:
    """(N,), of y, mean over outputs."""
    return predictions.variance.mean(-1)


def disagreements(predictions: Predictions) -> Tensor:
    """(N,), share of member pairs with different predicted class."""
    if predictions.log_probs is None or predictions.num_members < 2:
        raise UndefinedError("disagreement compares members; these predictions hold one", "one member")
    votes, members = votes_of(predictions.log_probs), predictions.num_members
    return 1 - (votes * (votes - 1)).sum(-1) / (members * (members - 1))


def coverage(level: float) -> Callable[[Predictions], Tensor]:
    """Losses of `picp` at a level."""
    return lambda p: regression.coverage_losses(p.law.cdf(numbers(p)), level)


def width(level: float) -> Callable[[Predictions], Tensor]:
    """Losses of `mpiw` at a level."""

    def losses(predictions: Predictions) -> Tensor:
        low, high = predictions.interval(level)
        return (high - low).mean(-1)

    return losses


def interval_score(level: float) -> Callable[[Predictions], Tensor]:
    """Losses of `interval_score` at a level."""
    return lambda p: regression.interval_score_losses(numbers(p), *p.interval(level), level)


def pinball(q: float) -> Callable[[Predictions], Tensor]:
    """Quantile losses."""
    return lambda p: regression.pinball_losses(numbers(p), p.law.quantile(q), q)


def numbers(predictions: Predictions) -> Tensor:
    """(N, D) float64, the targets of regression and count."""
    return validation.wide(predictions.labelled())
