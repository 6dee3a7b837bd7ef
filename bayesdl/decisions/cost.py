"""Decisions of least expected cost under a predictive distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.evaluation import validation
from bayesdl.evaluation.predictions import Predictions


@final
@dataclass(frozen=True)
class Decision:
    """`action` (N,) int64 of least expected cost, -1 to abstain; `expected` (N,) its expected cost."""

    action: Tensor
    expected: Tensor


def decide(probs: Any, cost: Any, *, abstain: float | None = None) -> Decision:
    """Action of least expected cost for class probabilities (N, C) and costs (A, C) of each action under each class.

    Args:
        abstain: cost of handing an input on to somebody else; None: no such choice. With costs 0 and 1 this is Chow's
            (1970) rule: abstain where the confidence is below 1 - `abstain`.

    Raises:
        ShapeError: costs for another number of classes.
    """
    p = validation.wide(validation.probabilities(probs))
    validation.rank(p, "probs", (2,))
    table = validation.wide(validation.tensor(cost, "cost")).to(p.device)
    validation.finite(table, "cost")
    if table.dim() != 2 or table.shape[1] != p.shape[1]:
        raise ShapeError(f"cost has shape {tuple(table.shape)}, expected (actions, {p.shape[1]})")
    expected, action = (p @ table.T).min(1)
    if abstain is not None:
        declined = expected > float(abstain)
        expected = expected.clamp_max(float(abstain))
        action = action.masked_fill(declined, -1)
    return Decision(action, expected)


def mean_cost(predictions: Predictions, cost: Any, *, abstain: float | None = None) -> float:
    """Mean cost on labelled predictions when every decision is the one of least expected cost."""
    made = decide(predictions.probs, cost, abstain=abstain)
    table = validation.wide(validation.tensor(cost, "cost")).to(made.action.device)
    paid = table[made.action.clamp_min(0), predictions.labelled()]
    if abstain is not None:
        paid = torch.where(made.action < 0, float(abstain), paid)
    return float(paid.mean())


def bayes_threshold(false_alarm: float, miss: float) -> float:
    """Probability of label 1 above which acting costs less: false_alarm / (false_alarm + miss).

    Raises:
        ArgumentError: a cost that is not positive.
    """
    if not (false_alarm > 0 and miss > 0):
        raise ArgumentError(f"costs of {false_alarm!r} and {miss!r}: both must be positive")
    return false_alarm / (false_alarm + miss)
