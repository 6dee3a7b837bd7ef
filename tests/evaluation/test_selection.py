"""Selection of members: greedy steps against exhaustive search, the optimum's conditions, duplicates, monotonicity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesdl.evaluation import select_members
from bayesdl.evaluation.validation import UndefinedError


def four_gaussians(n: int = 300) -> Tensor:
    """Log-likelihoods (4, N) of four Gaussian candidates on a mixture of two of them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(n, dtype=torch.float64, generator=generator)
    y = torch.where(torch.rand(n, generator=generator) < 0.6, y - 1.0, 0.7 * y + 1.5)
    centres, spreads = torch.tensor([[-1.0, 1.5, 0.0, 3.0], [1.0, 0.7, 2.0, 1.0]], dtype=torch.float64)
    z = (y - centres[:, None]) / spreads[:, None]
    return -0.5 * z.square() - spreads[:, None].log() - 0.5 * math.log(2 * math.pi)


def mixture_nll(table: Tensor, weights: Tensor) -> float:
    return float(-(weights @ table.exp()).log().mean())


def test_every_greedy_step_is_the_exhaustive_best() -> None:
    table = four_gaussians()
    found = select_members(table, max_picks=6)
    assert len(found.path) > 2
    counts = torch.zeros(4, dtype=torch.float64)
    for value in found.path:
        options = [mixture_nll(table, (counts + torch.eye(4).double()[k]) / (counts.sum() + 1)) for k in range(4)]
        counts[min(range(4), key=lambda k: options[k])] += 1
        assert value == pytest.approx(min(options), rel=1e-12)
    assert found.weights.tolist() == pytest.approx((counts / counts.sum()).tolist())
    assert found.nll == pytest.approx(mixture_nll(table, found.weights)) == found.path[-1]


def test_greedy_nears_the_optimum_which_meets_its_conditions() -> None:
    table = four_gaussians()
    greedy, optimal = select_members(table), select_members(table, rule="optimal", max_picks=1000)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(optimal.path, optimal.path[1:], strict=False))
    assert greedy.nll == pytest.approx(min(greedy.path)) and greedy.path[0] > greedy.nll
    ratio = (table - (optimal.weights @ table.exp()).log()).exp().mean(1)
    assert float(ratio.amax()) < 1 + 1e-5
    assert ratio[list(optimal.members)].tolist() == pytest.approx([1.0] * len(optimal.members), abs=1e-4)
    assert optimal.nll - 1e-9 <= greedy.nll < optimal.nll + 2e-3
    assert greedy.nll < float(-table.mean(1).amax())


def test_a_duplicate_leaves_the_mixture_as_it_is() -> None:
    table = four_gaussians()
    doubled = torch.cat([table, table[:1]])
    for rule in ("greedy", "optimal"):
        one, two = select_members(table, rule=rule), select_members(doubled, rule=rule)  # type: ignore[arg-type]
        merged = two.weights[:4] + torch.nn.functional.pad(two.weights[4:], (0, 3))
        assert merged.tolist() == pytest.approx(one.weights.tolist(), abs=1e-3)
    assert select_members(doubled).weights[4] == 0  # ties go to the lowest index


def test_limits_and_the_best_few() -> None:
    table = four_gaussians()
    assert len(select_members(table, max_members=1).members) == 1
    top = select_members(table, rule="top", max_members=2)
    assert top.members == tuple(sorted((-table.mean(1)).argsort()[:2].tolist()))
    assert top.weights[list(top.members)].tolist() == [0.5, 0.5]


def test_members_that_cover_each_other() -> None:
    # Each candidate rules out an example that the other knows: only together do they have a finite NLL.
    table = torch.tensor([[0.0, -torch.inf, -1.0], [-torch.inf, 0.0, -1.0], [-9.0, -torch.inf, -9.0]])
    for rule in ("greedy", "optimal"):
        found = select_members(table, rule=rule)  # type: ignore[arg-type]
        assert {0, 1} <= set(found.members) and math.isfinite(found.nll)
    with pytest.raises(UndefinedError, match="likelihood 0"):
        select_members(torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]]))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="NaN or"):
        select_members([[0.0, math.nan]])
    with pytest.raises(ValueError, match="expected 2-D"):
        select_members([0.0])
    with pytest.raises(ValueError, match="expected 'greedy'"):
        select_members([[0.0]], rule="best")  # type: ignore[arg-type]
