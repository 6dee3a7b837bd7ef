"""Rank metrics against scikit-learn, enumeration and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from bayesdl.evaluation import ranking
from bayesdl.evaluation.validation import UndefinedError

ALL = [ranking.auroc, ranking.average_precision, ranking.fpr_at_recall]
repeatable = settings(derandomize=True, deadline=None, max_examples=50)


def draw(n: int, seed: int, levels: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores, optionally with ties, and labels of both classes."""
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(n, generator=generator) < 0.4
    positive[0], positive[1] = True, False
    scores = torch.randn(n, dtype=torch.float64, generator=generator) + positive
    return (scores if levels is None else (scores * levels).round()), positive


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_example(dtype: torch.dtype) -> None:
    scores, positive = torch.tensor([0.1, 0.4, 0.35, 0.8], dtype=dtype), [0, 0, 1, 1]
    assert ranking.auroc(scores, positive) == 0.75
    assert ranking.average_precision(scores, positive) == pytest.approx(0.833333, abs=1e-6)


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 40.0])
def test_against_scikit_learn_on_any_scale(levels: int | None, scale: float) -> None:
    # Entropies, energies of 30 to 50 and distances are ranked as they are.
    scores, positive = draw(700, 0, levels)
    scores = scores * scale + scale
    s, y = scores.numpy(), positive.numpy()
    assert ranking.auroc(scores, positive) == pytest.approx(roc_auc_score(y, s), rel=1e-12)
    assert ranking.average_precision(scores, positive) == pytest.approx(average_precision_score(y, s), rel=1e-12)
    fpr, tpr, _ = roc_curve(y, s, drop_intermediate=False)
    assert ranking.fpr_at_recall(scores, positive) == pytest.approx(fpr[(tpr >= 0.95).argmax()], rel=1e-12)


@repeatable
@given(st.integers(2, 60), st.integers(0, 10_000))
def test_ties_permutation_weights_and_monotone_maps(n: int, seed: int) -> None:
    scores, positive = draw(n, seed, levels=2)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    weights = torch.randint(0, 3, (3, n), generator=generator)
    weights[:, :2] = 1
    for metric in ALL:
        value = metric(scores, positive)
        assert metric(scores[order], positive[order]) == pytest.approx(value, abs=1e-12)
        assert metric(torch.exp(scores / 4) * 1e3, positive) == pytest.approx(value, abs=1e-12)
        for row, found in zip(weights, metric(scores, positive, weights=weights), strict=True):
            copies = torch.repeat_interleave(torch.arange(n), row)
            assert metric(scores[copies], positive[copies]) == pytest.approx(float(found), abs=1e-12)


@repeatable
@given(st.integers(2, 60), st.integers(0, 10_000))
def test_auroc_counts_pairs_and_flips_with_the_sign(n: int, seed: int) -> None:
    scores, positive = draw(n, seed, levels=1)
    difference = scores[positive][:, None] - scores[~positive]
    pairs = float(((difference > 0).double() + (difference == 0).double() / 2).mean())
    assert ranking.auroc(scores, positive) == pytest.approx(pairs, abs=1e-12)
    assert ranking.auroc(-scores, positive) == pytest.approx(1 - pairs, abs=1e-12)


@pytest.mark.parametrize("metric", ALL)
def test_one_class_only(metric: object) -> None:
    assert callable(metric)
    for labels in ([0, 0, 0], [1, 1, 1]):
        with pytest.raises(UndefinedError) as caught:
            metric([0.1, 0.2, 0.3], labels)
        assert caught.value.reason == "one class"
    with pytest.raises(UndefinedError, match="all weight"):
        metric([0.1, 0.2, 0.3], [0, 1, 1], weights=[1.0, 0.0, 0.0])
    found = metric([0.1, 0.2, 0.3], [0, 1, 1], weights=[[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert math.isnan(found[0]) and math.isfinite(found[1])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, math.nan], [0, 1], "NaN"),
        ([0.1, math.inf], [0, 1], "infinite"),
        ([[0.1], [0.2]], [0, 1], "expected 1-D"),
        ([0.1, 0.2], [[0], [1]], "nothing is broadcast"),
        ([0.1, 0.2], [0, 2], "neither 0 nor 1"),
        ([], [], "empty"),
    ],
)
def test_bad_input(scores: list[float], labels: list[int], message: str) -> None:
    for metric in ALL:
        with pytest.raises(ValueError, match=message):
            metric(scores, labels)
