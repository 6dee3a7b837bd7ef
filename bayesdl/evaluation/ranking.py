"""Rank metrics of a score that should be high for positives: AUROC, average precision, FPR at a fixed recall.

Curves step only at distinct scores, so ties need no order; scores enter as they are, never squashed into [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import ShapeError
from bayesdl.evaluation import sorted_sets, validation, weighting
from bayesdl.evaluation.binning import tie_groups


@final
@dataclass(frozen=True)
class Counts:
    """Weights of positives and negatives at or above each distinct score, descending, both (R, G) float64."""

    positive: Tensor
    negative: Tensor

    def _shares(self, values: Tensor) -> Tensor:
        # A resample without one of the classes has no value: NaN, which `defined` turns into an error for a single one.
        both = (self.positive[:, -1] > 0) & (self.negative[:, -1] > 0)
        return torch.where(both, values, torch.nan)

    def auroc(self) -> Tensor:
        """(R,), P(score of a positive > score of a negative) + P(equal) / 2."""
        above = shifted(self.positive)
        area = ((self.positive + above) / 2 * (self.negative - shifted(self.negative))).sum(1)
        return self._shares(area / (self.positive[:, -1] * self.negative[:, -1]))

    def average_precision(self) -> Tensor:
        """(R,), sum over distinct thresholds of the step in recall times the precision reached."""
        flagged = (self.positive + self.negative).clamp_min(torch.finfo(torch.float64).tiny)
        steps = (self.positive - shifted(self.positive)) * self.positive / flagged
        return self._shares(steps.sum(1) / self.positive[:, -1])

    def fpr(self, recall: float) -> Tensor:
        """(R,), share of negatives flagged at the strictest threshold that flags at least `recall` of the positives."""
        reached = self.positive >= recall * self.positive[:, -1:] - 1e-9
        first = reached.to(torch.int8).argmax(1, keepdim=True)
        return self._shares(self.negative.gather(1, first)[:, 0] / self.negative[:, -1])


def shifted(cumulative: Tensor) -> Tensor:
    """Cumulative sums (R, G) before each step: 0 first, the last dropped."""
    return torch.cat([cumulative.new_zeros(len(cumulative), 1), cumulative[:, :-1]], 1)


def counts(scores: Tensor, positive: Tensor, weights: Tensor | None) -> Counts:
    """`Counts` of scores (N,) and labels (N,) bool under validated weights."""
    order, _, ends = tie_groups(-scores if scores.is_floating_point() else -scores.to(torch.float64))
    table = weighting.rows(weights, len(scores), scores.device)[:, order]
    share = validation.wide(positive[order])
    flagged = (table * share).cumsum(1)[:, ends]
    return Counts(flagged, table.cumsum(1)[:, ends] - flagged)


def auroc(scores: Any, positive: Any, *, weights: Any = None) -> float | Tensor:
    """Area under the ROC curve as a rank statistic; a tie counts 1/2 (Mann-Whitney).

    Args:
        scores: (N,) finite, higher for positives, on any scale. positive: (N,) labels 0 and 1.
        weights: (N,), or (R, N) for R resamples, which gives (R,) with NaN where a class is missing.

    Raises:
        UndefinedError: only one class is present. ShapeError, NonFiniteError, LabelError, ArgumentError: bad input.
    """
    return _checked("auroc", scores, positive, weights, lambda c: c.auroc(), _auroc)


def average_precision(scores: Any, positive: Any, *, weights: Any = None) -> float | Tensor:
    """Step-sum average precision over distinct thresholds (no interpolation); arguments and errors as in `auroc`."""
    return _checked("average_precision", scores, positive, weights, lambda c: c.average_precision())


def fpr_at_recall(scores: Any, positive: Any, *, recall: float = 0.95, weights: Any = None) -> float | Tensor:
    """Share of negatives flagged at the strictest threshold that flags at least `recall` of the positives."""
    recall = validation.fraction(recall, "recall", closed=True)
    return _checked("fpr_at_recall", scores, positive, weights, lambda c: c.fpr(recall))


def _auroc(scores: Tensor, positive: Tensor, count: int) -> float:
    """`auroc` of `count` positives (N,) bool without weights, in integers: each set is sorted for itself."""
    few, many = sorted_sets.ascending(scores[positive]), sorted_sets.ascending(scores[~positive])
    swapped = len(few) > len(many)
    few, many = (many, few) if swapped else (few, many)
    below, upto = sorted_sets.places(few, many)
    # A number beats those below it and half of those equal to it.
    pairs = int(below.sum() + upto.sum())
    whole = 2 * count * (len(scores) - count)
    return (whole - pairs if swapped else pairs) / whole


def _checked(name: str, scores: Any, positive: Any, weights: Any, read: Any, plain: Any = None) -> float | Tensor:
    scores = validation.vector(scores, "scores")
    positive = validation.binary_targets(positive, tuple(scores.shape), "positive").to(scores.device, torch.bool)
    weights = validation.example_weights(weights, len(scores))
    count = int(positive.sum())
    validation.two_classes(count, len(positive) - count, name)
    if weights is None and plain is not None:
        return plain(scores, positive, count)
    values = read(counts(scores, positive, weights))
    return weighting.defined(values, weights, f"{name}: all weight lies on one class", "one class")


def separated(
    negatives: Any, positives: Any, negative_weights: Any = None, positive_weights: Any = None
) -> tuple[Counts, Tensor | None]:
    """`Counts` of two sets of scores, each with its own weights (none, (N,) or (R, N)), and the joint weights."""
    negatives, positives = (
        validation.vector(negatives, "negative scores"),
        validation.vector(positives, "positive scores"),
    )
    left = validation.example_weights(negative_weights, len(negatives))
    right = validation.example_weights(positive_weights, len(positives))
    weights = _joint(left, right, len(negatives), len(positives), negatives.device)
    scores = torch.cat([validation.wide(negatives), validation.wide(positives).to(negatives.device)])
    labels = torch.cat([scores.new_zeros(len(negatives)), scores.new_ones(len(positives))])
    return counts(scores, labels, weights), weights


def _joint(left: Tensor | None, right: Tensor | None, n: int, m: int, device: torch.device) -> Tensor | None:
    if left is None and right is None:
        return None
    first, second = weighting.rows(left, n, device), weighting.rows(right, m, device)
    length = max(len(first), len(second))
    if {len(first), len(second)} - {1, length}:
        raise ShapeError(
            f"weights of the two sets have {len(first)} and {len(second)} resamples; both need the same number"
        )
    joint = torch.cat([first.expand(length, -1), second.expand(length, -1)], 1)
    return joint if any(w is not None and w.dim() == 2 for w in (left, right)) else joint[0]
