"""How near the predictions of one posterior are to those of a reference, such as NUTS on a small network.

Both measures are those of Izmailov et al. (2021), "What are Bayesian neural network posteriors really like?".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError, UnsupportedError
from bayesdl.evaluation import validation

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel
    from bayesdl.predictive import Predictive

    Forecast = BayesianModel | Predictive | Tensor


def agreement(first: Forecast, reference: Forecast, data: Iterable[Any] | None = None) -> float:
    """Share of the inputs at which both name the same most probable class.

    Args:
        first, reference: `BayesianModel` (with `data`), `Predictive`, or class probabilities `(N, C)`; probabilities of
            label 1 `(N,)` are compared with 1/2, and labels `(N, C)` of a multilabel `Predictive` one by one.
        data: loader that models predict on.

    Raises:
        UnsupportedError: predictions that are not of classes or labels.
        ShapeError: predictions for different inputs or classes.
    """
    p, q, labels = _pair(first, reference, data)
    if labels:
        return float(((p > 0.5) == (q > 0.5)).double().mean())
    return float((p.argmax(-1) == q.argmax(-1)).double().mean())


def total_variation(first: Forecast, reference: Forecast, data: Iterable[Any] | None = None) -> float:
    """Mean over the inputs of `sum_c |p_c - q_c| / 2`: 0 where predictions are equal, 1 where they exclude each other.

    Args and Raises: as `agreement`.
    """
    p, q, labels = _pair(first, reference, data)
    difference = (p - q).abs()
    return float(difference.mean() if labels else difference.sum(-1).mean() / 2)


def _pair(first: Forecast, reference: Forecast, data: Iterable[Any] | None) -> tuple[Tensor, Tensor, bool]:
    """Probabilities in float64, and whether they are of separate labels."""
    if data is not None and iter(data) is data:
        raise ArgumentError("data can be read once only, and two models read it: pass a loader or a list of batches")
    (p, labels), (q, others) = (_probabilities(given, data) for given in (first, reference))
    if p.shape != q.shape or labels != others:
        raise ShapeError(
            f"predictions of shapes {tuple(p.shape)} and {tuple(q.shape)} are not of the same kind and inputs"
        )
    return p, q.to(p.device), labels


def _probabilities(given: Forecast, data: Iterable[Any] | None) -> tuple[Tensor, bool]:
    from bayesdl.model import BayesianModel

    if isinstance(given, Tensor):
        probs = validation.probabilities(given)
        validation.rank(probs, "probs", (1, 2))
        return validation.wide(probs), probs.dim() == 1
    if isinstance(given, BayesianModel):
        if data is None:
            raise ArgumentError("data=None: models need a loader to predict on, agreement(first, reference, loader)")
        given = given.predict(data)
    if given.task not in ("classification", "multilabel"):
        raise UnsupportedError(f"predictions of a {given.likelihood.name} likelihood have no class probabilities")
    return validation.wide(torch.as_tensor(given.probs).detach()), given.task == "multilabel"
