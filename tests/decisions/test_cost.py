"""Least expected cost by enumeration, Chow's rule, and the binary threshold."""

from __future__ import annotations

import pytest
import torch

from bayesdl.decisions import bayes_threshold, decide, mean_cost
from tests.evaluation.made_up import classes


def test_enumeration() -> None:
    found = classes(40, sharpness=1.0)
    cost = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = decide(found.probs, cost)
    for p, action, expected in zip(found.probs, made.action, made.expected, strict=True):
        each = [float(sum(p[c] * cost[a, c] for c in range(4))) for a in range(3)]
        assert int(action) == each.index(min(each)) and float(expected) == pytest.approx(min(each))
    paid = cost[made.action, found.labelled()]
    assert mean_cost(found, cost) == pytest.approx(float(paid.mean()))


def test_abstention_is_chows_rule() -> None:
    found = classes(200, sharpness=1.0)
    made = decide(found.probs, 1 - torch.eye(4), abstain=0.3)
    assert (made.action < 0).equal(found.confidence < 0.7)
    kept = made.action >= 0
    assert made.action[kept].equal(found.predicted[kept])
    loss = torch.where(kept, (~found.correct).double(), 0.3)
    assert mean_cost(found, 1 - torch.eye(4), abstain=0.3) == pytest.approx(float(loss.mean()))


def test_binary_threshold() -> None:
    t = bayes_threshold(false_alarm=1.0, miss=4.0)
    p = torch.tensor([t - 0.01, t + 0.01], dtype=torch.float64)
    cost = torch.tensor([[0.0, 4.0], [1.0, 0.0]])
    assert t == 0.2 and decide(torch.stack([1 - p, p], 1), cost).action.tolist() == [0, 1]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected \\(actions, 2\\)"):
        decide([[0.5, 0.5]], [[1.0, 0.0, 2.0]])
    with pytest.raises(ValueError, match="both must be positive"):
        bayes_threshold(0.0, 1.0)
    with pytest.raises(ValueError, match="did you pass logits"):
        decide([[2.0, 0.5]], [[1.0, 0.0]])
