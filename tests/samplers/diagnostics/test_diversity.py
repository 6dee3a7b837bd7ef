from __future__ import annotations

import itertools
import math

import pytest
import torch

from bayesdl.errors import NonFiniteError, ShapeError
from bayesdl.samplers.diagnostics import diversity


def test_equals_the_pairs_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(6, 11, 3, generator=generator, dtype=torch.float64)
    probs = probs / probs.sum(-1, keepdim=True)
    groups = torch.tensor([0, 0, 1, 1, 1, 7])
    kl: dict[bool, list[float]] = {True: [], False: []}
    differ: dict[bool, list[float]] = {True: [], False: []}
    for i, j in itertools.permutations(range(6), 2):
        same = bool(groups[i] == groups[j])
        kl[same].append(float((probs[i] * (probs[i] / probs[j]).log()).sum(-1).mean()))
        differ[same].append(float((probs[i].argmax(-1) != probs[j].argmax(-1)).double().mean()))
    found = diversity(probs, groups)
    assert found.kl_within == pytest.approx(sum(kl[True]) / len(kl[True]))
    assert found.kl_between == pytest.approx(sum(kl[False]) / len(kl[False]))
    assert found.disagreement_within == pytest.approx(sum(differ[True]) / len(differ[True]))
    assert found.disagreement_between == pytest.approx(sum(differ[False]) / len(differ[False]))


def test_certain_predictions_and_missing_pairs() -> None:
    probs = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    found = diversity(probs, torch.tensor([0, 1]))
    assert found.disagreement_between == 1.0 and 80 < found.kl_between < 90
    assert math.isnan(found.kl_within) and math.isnan(found.disagreement_within)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="expected"):
        diversity(torch.ones(2, 3), torch.zeros(2))
    with pytest.raises(NonFiniteError):
        diversity(torch.full((2, 1, 2), math.nan), torch.zeros(2))
