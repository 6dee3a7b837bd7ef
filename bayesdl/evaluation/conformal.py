"""Split conformal prediction: sets and intervals that hold the target with a chosen probability, whatever the model.

    conformal = Conformal("aps", level=0.9).fit(bayes_val_predictions)
    conformal.sets(bayes_test_predictions)            # (N, C) bool

The guarantee is over calibration and test data together, which must be exchangeable; it is marginal, or within each
group that is given.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, UnknownNameError, UnsupportedError
from bayesdl.evaluation import validation
from bayesdl.evaluation.predictions import Predictions

Score = Literal["lac", "aps", "raps", "absolute", "normalised", "cqr"]
_CLASSES = ("lac", "aps", "raps")
# Scores this close to the quantile are equal to it: sums of the same numbers in another order.
TIE = 1e-12


@final
@dataclass(frozen=True)
class Conformal:
    """A rule for sets or intervals; `fit` returns a fitted one.

    Args:
        score: classes: "lac" 1 - p_y (Sadinle et al. 2019), "aps" the mass of all classes down to y (Romano et al.
            2020), "raps" that plus `penalty` for every rank below `free_ranks` (Angelopoulos et al. 2021). Regression:
            "absolute" |y - mean|, "normalised" by the standard deviation, "cqr" distance outside the predictive's own
            central interval (Romano et al. 2019).
        level: probability with which the target shall be in the set.
        randomised: "aps" and "raps" count a uniform share of y's own mass, for exact coverage.
    """

    score: Score = "lac"
    level: float = 0.9
    randomised: bool = False
    penalty: float = 0.01
    free_ranks: int = 5

    def fit(
        self, predictions: Predictions, *, group: Any = None, generator: torch.Generator | None = None
    ) -> FittedConformal:
        """Take the quantile of the scores of held-out predictions with targets.

        Args:
            group: (N,) integers, for one quantile a group (Mondrian).
            generator: for `randomised`; None is seeded with 0.

        Warns where a group has too few examples for the level: its sets are everything, its intervals infinite.

        Raises:
            ArgumentError: an option out of range. UnsupportedError: a score for another task.
        """
        if self.score not in get_args(Score):
            raise ArgumentError(f"score={self.score!r}: expected one of {', '.join(get_args(Score))}")
        validation.fraction(self.level, "level")
        scores = self._own(predictions, _uniform(len(predictions), self.randomised, generator))
        pooled = self._quantile(scores, "")
        if group is None:
            return FittedConformal(self, pooled, {})
        ids = _groups(group, len(predictions)).to(scores.device)
        quantiles = {int(g): self._quantile(scores[ids == g], f"group {int(g)}: ") for g in ids.unique()}
        return FittedConformal(self, pooled, quantiles)

    def _quantile(self, scores: Tensor, where: str) -> Tensor:
        """(D,) or (), the ceil((n + 1) level)-th smallest score."""
        place = math.ceil((len(scores) + 1) * self.level - 1e-9)
        if place > len(scores):
            needed = math.ceil(self.level / (1 - self.level) - 1e-9)
            warnings.warn(
                f"{where}{len(scores)} examples give no finite quantile at level {self.level:g}: {needed} are needed",
                stacklevel=3,
            )
            return scores.new_full(scores.shape[1:], torch.inf)
        return scores.sort(0).values[place - 1]

    def _own(self, predictions: Predictions, uniform: Tensor | None) -> Tensor:
        """(N,) or (N, D), scores of the targets."""
        y = predictions.labelled()
        if self.score in _CLASSES:
            _need(predictions, "classification", self.score)
            return self._of_classes(predictions, uniform).gather(1, y[:, None])[:, 0]
        _need(predictions, "regression", self.score)
        y = validation.wide(y)
        if self.score == "cqr":
            low, high = predictions.interval(self.level)
            return torch.maximum(low - y, y - high)
        off = (y - predictions.mean).abs()
        return off if self.score == "absolute" else off / predictions.variance.sqrt()

    def _of_classes(self, predictions: Predictions, uniform: Tensor | None) -> Tensor:
        """(N, C), the score that every class would have."""
        p = predictions.probs
        if self.score == "lac":
            return 1 - p
        # Stable: equal probabilities rank by class index.
        ordered, order = p.sort(dim=1, descending=True, stable=True)
        upto = ordered.cumsum(1)
        if uniform is not None:
            upto = upto - uniform.to(p.device)[:, None] * ordered
        if self.score == "raps":
            ranks = torch.arange(1, p.shape[1] + 1, dtype=p.dtype, device=p.device)
            upto = upto + self.penalty * (ranks - self.free_ranks).clamp_min(0)
        return torch.empty_like(upto).scatter_(1, order, upto)


@final
@dataclass(frozen=True, eq=False)
class FittedConformal:
    """Quantiles of the calibration scores: `pooled`, and `groups` by group where they were given."""

    settings: Conformal
    pooled: Tensor
    groups: Mapping[int, Tensor]

    def sets(
        self,
        predictions: Predictions,
        *,
        group: Any = None,
        unseen: Literal["raise", "pooled"] = "raise",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(N, C) bool, the classes of each set; sets may be empty.

        Raises:
            UnknownNameError: a group without a quantile, unless `unseen` is "pooled".
        """
        if self.settings.score not in _CLASSES:
            raise UnsupportedError(f"{self.settings.score!r} gives intervals, not sets")
        _need(predictions, "classification", self.settings.score)
        uniform = _uniform(len(predictions), self.settings.randomised, generator)
        scores = self.settings._of_classes(predictions, uniform)
        limit = self._limits(len(predictions), group, unseen).to(scores.device)
        return scores <= limit[:, None] + TIE

    def intervals(
        self, predictions: Predictions, *, group: Any = None, unseen: Literal["raise", "pooled"] = "raise"
    ) -> Tensor:
        """(N, D, 2), lower and upper ends."""
        settings = self.settings
        if settings.score in _CLASSES:
            raise UnsupportedError(f"{settings.score!r} gives sets, not intervals")
        _need(predictions, "regression", settings.score)
        limit = self._limits(len(predictions), group, unseen).to(predictions.device)
        if settings.score == "cqr":
            low, high = predictions.interval(settings.level)
            return torch.stack([low - limit, torch.maximum(high + limit, low - limit)], -1)
        width = limit if settings.score == "absolute" else limit * predictions.variance.sqrt()
        return torch.stack([predictions.mean - width, predictions.mean + width], -1)

    def _limits(self, size: int, group: Any, unseen: str) -> Tensor:
        if not self.groups:
            if group is not None:
                raise ArgumentError("group= was given, but the quantile was fitted without groups")
            return self.pooled.expand(size, *self.pooled.shape)
        if group is None:
            raise ArgumentError("quantiles were fitted by group: give group= of the examples")
        ids = _groups(group, size)
        unknown = sorted({int(g) for g in ids.unique()} - set(self.groups))
        if unknown and unseen != "pooled":
            raise UnknownNameError(
                f"group {unknown[0]} was not seen in calibration (only {', '.join(map(str, self.groups))}); "
                'unseen="pooled" takes the quantile of all groups'
            )
        return torch.stack([self.groups.get(int(g), self.pooled) for g in ids])


@final
@dataclass(frozen=True)
class SetReport:
    """How sets do: `coverage`, mean `size`, share of `empty` ones, coverage by group and by size."""

    coverage: float
    size: float
    empty: float
    by_group: Mapping[int, float]
    by_size: Mapping[int, float]


def set_report(sets: Any, targets: Any, *, group: Any = None) -> SetReport:
    """Coverage and size of sets (N, C) bool for labels (N,), by `group` (N,) and by size too."""
    held = validation.tensor(sets, "sets").bool()
    validation.rank(held, "sets", (2,))
    y = validation.labels(targets, len(held), held.shape[1]).to(held.device)
    inside = held.gather(1, y[:, None])[:, 0].double()
    sizes = held.sum(1)
    by_group: dict[int, float] = {}
    if group is not None:
        ids = _groups(group, len(held)).to(held.device)
        by_group = {int(g): float(inside[ids == g].mean()) for g in ids.unique()}
    by_size = {int(s): float(inside[sizes == s].mean()) for s in sizes.unique()}
    return SetReport(
        float(inside.mean()), float(sizes.double().mean()), float((sizes == 0).double().mean()), by_group, by_size
    )


def interval_coverage(intervals: Any, targets: Any) -> Tensor:
    """(N, D) bool, whether targets (N, D) lie in intervals (N, D, 2)."""
    ends = validation.wide(validation.tensor(intervals, "intervals"))
    y = validation.wide(validation.real_targets(targets, tuple(ends.shape[:-1]))).to(ends.device)
    return (ends[..., 0] <= y) & (y <= ends[..., 1])


def _groups(group: Any, size: int) -> Tensor:
    ids = validation.vector(group, "group", length=size)
    if ids.is_floating_point():
        raise ArgumentError(f"group has dtype {ids.dtype}; groups are integers")
    return ids.to(torch.int64)


def _uniform(size: int, wanted: bool, generator: torch.Generator | None) -> Tensor | None:
    if not wanted:
        return None
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.rand(size, dtype=torch.float64, generator=generator, device=generator.device)


def _need(predictions: Predictions, task: str, score: str) -> None:
    if predictions.task != task:
        raise UnsupportedError(f"score {score!r} is for {task}, the predictions are of a {predictions.task} task")
