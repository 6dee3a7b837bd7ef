"""Thompson draws: probability matching on a case with a closed form, batches without repeats, seeds, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.decisions import thompson
from tests.untouched import untouched


def line() -> tuple[bdl.BayesianModel, nn.Module]:
    """A Bayesian line through the origin whose slope is N(0, 1/2)."""
    net = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        net.weight.zero_()
    x = torch.ones(1, 1, dtype=torch.float64)
    bayes = bdl.wrap(
        net,
        bdl.Laplace(structure="full"),
        [(x, 0 * x)],
        likelihood=bdl.Gaussian(noise=1.0),
        prior=bdl.GaussianPrior(precision=1.0),
        progress=False,
    )
    return bayes, net


def test_candidates_are_taken_as_often_as_they_are_the_best() -> None:
    # Best is the largest x for a positive slope, the smallest for a negative one: 1/2 each, the middle never.
    bayes, net = line()
    x = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with untouched(net):
        picks = torch.cat([thompson(bayes, x, generator=generator) for _ in range(200)])
    counts = torch.bincount(picks, minlength=3)
    assert counts[1] == 0
    # 200 fair tosses: outside 100 +- 28 in one of 13,000 runs.
    assert abs(int(counts[0]) - 100) < 28


def test_batches_hold_no_candidate_twice_and_follow_the_generator() -> None:
    bayes, _ = line()
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    first, again = (thompson(bayes, x, batch=6, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert sorted(first.tolist()) == list(range(6)) and first.equal(again)
    # Each draw takes an end, and the next of the same end once it is taken.
    few = thompson(bayes, x, batch=3, generator=torch.Generator().manual_seed(1))
    assert set(few.tolist()) <= {0, 1, 2, 3, 4, 5} - ({2, 3} if {0, 5} <= set(few.tolist()) else set())


def test_a_functional_says_what_is_to_be_large() -> None:
    bayes, _ = line()
    x = torch.tensor([[-1.0], [0.1], [2.0]], dtype=torch.float64)
    found = thompson(bayes, x, lambda f: -f[:, 0].abs(), generator=torch.Generator().manual_seed(0))
    assert found.tolist() == [1]


def test_bad_input() -> None:
    bayes, _ = line()
    x = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="batch=3 of 2"):
        thompson(bayes, x, batch=3)
    with pytest.raises(ValueError, match="batch=0"):
        thompson(bayes, x, batch=0)
    with pytest.raises(ValueError, match="one number each"):
        thompson(bayes, x, lambda f: f)
    with pytest.raises(ValueError, match="NaN or infinite at candidate 0"):
        thompson(bayes, x, lambda f: f[:, 0] / 0)
    wide = bdl.wrap(nn.Linear(1, 2).double(), "map", likelihood=bdl.Gaussian(noise=1.0))
    draws: list[Tensor] = []
    with pytest.raises(ValueError, match="functional="):
        draws.append(thompson(wide, x))
