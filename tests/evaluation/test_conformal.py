"""Conformal sets and intervals: coverage over repeated splits, definitions written out, groups, too few examples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bayesdl.errors import ArgumentError, UnknownNameError, UnsupportedError
from bayesdl.evaluation.conformal import Conformal, interval_coverage, set_report
from bayesdl.evaluation.predictions import Predictions
from tests.evaluation.made_up import classes, numbers


def spread(n: int, *, seed: int) -> Predictions:
    """Forecasts whose stated deviations are half of the true ones, which differ between examples."""
    generator = torch.Generator().manual_seed(seed)
    deviation = 0.2 + torch.rand(n, 1, dtype=torch.float64, generator=generator)
    y = deviation * torch.randn(n, 1, dtype=torch.float64, generator=generator)
    return Predictions.from_gaussian(torch.zeros_like(y), (deviation / 2).square(), y)


@pytest.mark.parametrize(
    ("score", "randomised"),
    [("lac", False), ("aps", True), ("raps", True), ("absolute", False), ("normalised", False), ("cqr", False)],
)
def test_coverage_lies_between_its_bounds(score: Any, randomised: bool) -> None:
    # 150 splits of 99 + 200 examples: mean coverage lies in [0.9, 0.91]; its standard error is below
    # sqrt(0.9 0.1 (1/100 + 1/200) / 150) = 0.003, so that 5 of them fail for one seed in a million.
    total = 0.0
    for seed in range(150):
        make = classes if score in ("lac", "aps", "raps") else spread
        options: dict[str, Any] = {"sharpness": 2.0, "members": 1} if make is classes else {}
        whole = make(299, seed=seed, **options)  # type: ignore[operator]
        held, fresh = whole.subset(torch.arange(99)), whole.subset(torch.arange(99, 299))
        fitted = Conformal(score, 0.9, randomised=randomised).fit(held, generator=torch.Generator().manual_seed(seed))
        if make is classes:
            draw = torch.Generator().manual_seed(1000 + seed)
            total += set_report(fitted.sets(fresh, generator=draw), fresh.labelled()).coverage
        else:
            total += float(interval_coverage(fitted.intervals(fresh), fresh.labelled()).double().mean())
    assert 0.9 - 0.015 < total / 150 < 0.91 + 0.015


def test_scores_written_out() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]], dtype=torch.float64)
    found = Predictions.from_probs(p, [2, 1])
    assert Conformal("lac")._of_classes(found, None).tolist() == (1 - p).tolist()
    # Equal probabilities rank by index.
    assert Conformal("aps")._of_classes(found, None).flatten().tolist() == pytest.approx([0.5, 0.8, 1.0, 0.4, 0.8, 1.0])
    raps = Conformal("raps", penalty=0.1, free_ranks=1)._of_classes(found, None)
    assert raps.flatten().tolist() == pytest.approx([0.5, 0.9, 1.2, 0.4, 0.9, 1.2])
    half = Conformal("aps")._of_classes(found, torch.full((2,), 0.5))
    assert half[0].tolist() == pytest.approx([0.25, 0.65, 0.9])


def test_quantile_is_the_right_order_statistic() -> None:
    y = torch.arange(1.0, 10.0, dtype=torch.float64)[:, None]
    found = Predictions.from_gaussian(torch.zeros_like(y), torch.ones_like(y), y)
    # n = 9, level 0.8: ceil(10 * 0.8) = 8th smallest.
    assert Conformal("absolute", 0.8).fit(found).pooled.tolist() == [8.0]
    fitted = Conformal("absolute", 0.9).fit(found)
    assert fitted.intervals(found)[0].tolist() == [[-9.0, 9.0]]
    with pytest.warns(UserWarning, match="19 are needed"):
        wide = Conformal("absolute", 0.95).fit(found)
    assert wide.intervals(found)[0].tolist() == [[-math.inf, math.inf]]


def test_too_few_examples_give_full_sets() -> None:
    found = classes(5, sharpness=1.0)
    with pytest.warns(UserWarning, match="9 are needed"):
        fitted = Conformal("lac", 0.9).fit(found)
    assert bool(fitted.sets(found).all())


def test_groups_have_quantiles_of_their_own() -> None:
    # Group 1 has deviations three times as large; 5 standard errors of a group's coverage are below 0.06.
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(8000) % 2
    y = (1.0 + 2 * group)[:, None] * torch.randn(8000, 1, dtype=torch.float64, generator=generator)
    whole = Predictions.from_gaussian(torch.zeros_like(y), torch.ones_like(y), y)
    held, fresh = torch.arange(4000), torch.arange(4000, 8000)
    fitted = Conformal("absolute").fit(whole.subset(held), group=group[held])
    pooled = Conformal("absolute").fit(whole.subset(held))
    inside = interval_coverage(fitted.intervals(whole.subset(fresh), group=group[fresh]), y[fresh])[:, 0]
    before = interval_coverage(pooled.intervals(whole.subset(fresh)), y[fresh])[:, 0]
    for g in (0, 1):
        assert float(inside[group[fresh] == g].double().mean()) == pytest.approx(0.9, abs=0.06)
    assert float(before[group[fresh] == 1].double().mean()) < 0.85
    with pytest.raises(UnknownNameError, match="group 7"):
        fitted.intervals(whole.subset(torch.tensor([0])), group=[7])
    assert fitted.intervals(whole.subset(torch.tensor([0])), group=[7], unseen="pooled").shape == (1, 1, 2)
    with pytest.raises(ArgumentError, match="group="):
        fitted.intervals(whole)
    with pytest.raises(ArgumentError, match="without groups"):
        pooled.intervals(whole, group=group)


def test_report_of_sets() -> None:
    sets = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0]]).bool()
    found = set_report(sets, [0, 2, 1, 1], group=[5, 5, 6, 6])
    assert (found.coverage, found.size, found.empty) == (0.5, 1.25, 0.25)
    assert found.by_group == {5: 0.5, 6: 0.5} and found.by_size == {0: 0.0, 1: 1.0, 2: 0.5}


def test_wrong_tasks_and_options() -> None:
    found, moments = classes(30, sharpness=1.0), numbers(30, scale=1.0)
    for score, data in (("absolute", found), ("lac", moments)):
        with pytest.raises(UnsupportedError, match=f"score '{score}'"):
            Conformal(score).fit(data)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="gives sets"):
        Conformal("lac").fit(found).intervals(found)
    with pytest.raises(UnsupportedError, match="gives intervals"):
        Conformal("absolute").fit(moments).sets(moments)
    with pytest.raises(ArgumentError, match="score="):
        Conformal("best").fit(found)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="level="):
        Conformal("lac", 1.0).fit(found)
    with pytest.raises(ArgumentError, match="groups are integers"):
        Conformal("lac").fit(found, group=torch.rand(30))
