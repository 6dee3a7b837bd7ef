"""The cached input of every report: what a method predicted for N examples, with or without their targets."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from bayesdl.errors import BayesDLError, FileFormatError, ShapeError, UnsupportedError
from bayesdl.evaluation import validation
from bayesdl.evaluation.decomposition import Split, split_bernoulli, split_categorical, split_moments

Task = Literal["classification", "multilabel", "regression", "count"]
FORMAT = "bayesdl-predictions-1"
# Members that reproduce the predictive's own mean to this are the predictive's members; a link in between makes them something else.
MEMBER_TOLERANCE = 1e-4


@final
@dataclass(frozen=True, eq=False)
class Predictions:
    """What one method predicts for N examples: S members (S = 1: one network or a closed form), C classes or D outputs.

    Attributes:
        task: "classification" (C classes, binary always as two columns), "multilabel", "regression" or "count".
        targets: classification (N,) int64; multilabel (N, C) of 0 and 1; regression and count (N, D). None: unlabelled,
            which is enough for an out-of-distribution set.
        log_probs: (S, N, C), normalised log-probabilities in nats; multilabel: log P(label c is 1).
        means, variances: (S, N, D), moments of the Gaussian components of y, noise included.
        member_weights: (S,) float64 summing to 1; None means equal.
        total, aleatoric, epistemic: uncertainty in nats, (N,), for classification and multilabel; variances (N, D) else.
        log_prob: (N,), the predictive's own log-density of the targets, where it was built from a `Predictive`.
        max_logit, energy: (N,), OOD scores (higher is more OOD) of the raw outputs, where those are known.
        group: (N,) int64 cluster or subject of each example. name: of the data set. meta: JSON-serialisable notes.

    Raises:
        ShapeError, LabelError, NonFiniteError, ArgumentError: the arrays do not fit the task or each other.
    """

    task: Task
    targets: Tensor | None = None
    log_probs: Tensor | None = None
    means: Tensor | None = None
    variances: Tensor | None = None
    member_weights: Tensor | None = None
    total: Tensor | None = None
    aleatoric: Tensor | None = None
    epistemic: Tensor | None = None
    log_prob: Tensor | None = None
    max_logit: Tensor | None = None
    energy: Tensor | None = None
    group: Tensor | None = None
    name: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value in validation.check_predictions(self).items():
            object.__setattr__(self, key, value)
        if self.total is None:
            split = self._split()
            for part in ("total", "aleatoric", "epistemic"):
                object.__setattr__(self, part, getattr(split, part))

    # -- construction ------------------------------------------------------------------------------------------------

    @classmethod
    def from_predictive(
        cls, predictive: Any, targets: Any = None, *, group: Any = None, name: str = "", meta: Mapping[str, Any] | None = None
    ) -> Predictions:
        """Read a `Predictive` through its public attributes; `targets` (N, ...) as its likelihood takes them, or None.

        A Bernoulli with one output becomes two-class classification, so that every classification metric applies to it.
        """
        raise NotImplementedError

    @classmethod
    def from_logits(cls, logits: Any, targets: Any = None, **rest: Any) -> Predictions:
        """Classification from raw outputs (N, C), or (S, N, C) for S members; `rest` are further fields."""
        raise NotImplementedError

    @classmethod
    def from_probs(cls, probs: Any, targets: Any = None, **rest: Any) -> Predictions:
        """Classification from probabilities (N, C) or (S, N, C); (N,) is the probability of label 1 of two."""
        raise NotImplementedError

    @classmethod
    def from_gaussian(cls, mean: Any, variance: Any, targets: Any = None, **rest: Any) -> Predictions:
        """Regression from Gaussian moments (N,), (N, D) or, for a mixture of S, (S, N, D), noise included."""
        raise NotImplementedError

    # -- views -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of examples N."""
        raise NotImplementedError

    @property
    def num_members(self) -> int:
        """S."""
        raise NotImplementedError

    @property
    def num_outputs(self) -> int:
        """C or D."""
        raise NotImplementedError

    @cached_property
    def log_mean_probs(self) -> Tensor:
        """(N, C) float64, log of the members' mean probability."""
        raise NotImplementedError

    @cached_property
    def probs(self) -> Tensor:
        """(N, C) float64, mean probability."""
        raise NotImplementedError

    @cached_property
    def confidence(self) -> Tensor:
        """(N,) float64, maximal mean probability; classification only."""
        raise NotImplementedError

    @cached_property
    def predicted(self) -> Tensor:
        """(N,) int64, lowest index among the maximal mean probabilities; classification only."""
        raise NotImplementedError

    @cached_property
    def correct(self) -> Tensor:
        """(N,) bool, predicted == targets; classification only."""
        raise NotImplementedError

    @property
    def num_tied(self) -> int:
        """Number of rows in which several classes share the maximal mean probability."""
        raise NotImplementedError

    @cached_property
    def mean(self) -> Tensor:
        """(N, D) float64, mean of y; regression and count."""
        raise NotImplementedError

    @cached_property
    def variance(self) -> Tensor:
        """(N, D) float64, variance of y, noise included; regression and count."""
        raise NotImplementedError

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Central interval (lower (N, D), upper (N, D)) of the Gaussian mixture; computed once per level."""
        raise NotImplementedError

    # -- values ------------------------------------------------------------------------------------------------------

    def map(self, fn: Callable[[Tensor], Tensor]) -> Predictions:
        """Apply `fn` to every tensor, for instance ``lambda t: t.cpu()``."""
        raise NotImplementedError

    def subset(self, index: Tensor) -> Predictions:
        """The examples chosen by a boolean mask (N,) or by positions."""
        raise NotImplementedError

    def without_targets(self) -> Predictions:
        """The same forecasts unlabelled, as an OOD set whose labels mean nothing here."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one `.npz`, atomically (temporary file, fsync, rename); the name is kept as given."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Predictions:
        """Read what `save` wrote, or a hand-made `.npz` with `logits|log_probs|probs`, or `mean` and `variance`,
        plus `targets` and `group` where known. Pickled content is refused.

        Raises:
            FileFormatError: the file is no such archive; the message names the key that is wrong.
        """
        raise NotImplementedError
