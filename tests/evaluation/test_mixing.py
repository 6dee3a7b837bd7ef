"""Mixtures of several methods' predictions: probabilities, densities and splits by hand, members and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, LabelError, ShapeError, UnsupportedError
from bayesdl.evaluation import Predictions, mix, select_members
from bayesdl.evaluation.compare import compare
from bayesdl.evaluation.losses import nll
from tests.evaluation.made_up import classes

WEIGHTS = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)


def candidates(n: int = 200, seed: int = 0) -> list[Predictions]:
    """Four forecasters of the same labels, of one to three members."""
    return [
        classes(n, sharpness=s, seed=seed, members=members) for s, members in ((1.0, 1), (3.0, 2), (0.3, 3), (2.0, 1))
    ]


def entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.log()).sum(-1)


def test_classes_by_hand() -> None:
    given = candidates()
    made = mix(given, 4 * WEIGHTS)
    probs = sum(w * one.probs for w, one in zip(WEIGHTS.tolist(), given, strict=True))
    assert isinstance(probs, Tensor) and made.num_members == 1 + 3 + 1
    torch.testing.assert_close(made.probs, probs, rtol=1e-12, atol=0)
    parts = {name: getattr(made, name) for name in ("total", "aleatoric", "epistemic", "energy")}
    mean = {name: sum(w * getattr(one, name) for w, one in zip(WEIGHTS.tolist(), given, strict=True)) for name in parts}
    torch.testing.assert_close(parts["total"], entropy(probs), rtol=1e-9, atol=1e-12)
    for name in ("aleatoric", "energy"):
        torch.testing.assert_close(parts[name], mean[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts["epistemic"], entropy(probs) - mean["aleatoric"], rtol=1e-9, atol=1e-12)
    assert bool((parts["epistemic"] >= mean["epistemic"] - 1e-9).all())  # they differ among each other too


def test_regression_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    means = torch.randn(3, 50, 2, generator=generator, dtype=torch.float64)
    variances = 0.5 + torch.rand(3, 50, 2, generator=generator, dtype=torch.float64)
    both = [Predictions.from_gaussian(means[part], variances[part], y) for part in (slice(2), 2)]
    made = mix(both, [0.6, 0.4])
    share = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    logs = torch.distributions.Normal(means, variances.sqrt()).log_prob(y).sum(-1)
    torch.testing.assert_close(nll(made), -(share.log()[:, None] + logs).logsumexp(0))
    mean = torch.einsum("s,snd->nd", share, means)
    noise = torch.einsum("s,snd->nd", share, variances)
    spread = torch.einsum("s,snd->nd", share, (means - mean).square())
    assert made.aleatoric is not None and made.epistemic is not None
    torch.testing.assert_close(made.aleatoric, noise)
    torch.testing.assert_close(made.epistemic, spread)
    torch.testing.assert_close(made.variance, noise + spread)


def test_a_closed_form_keeps_its_epistemic_part_and_its_density() -> None:
    y, one = torch.zeros(3, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    split = {"total": 4 * one, "aleatoric": one, "epistemic": 3 * one}
    density = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)  # of a Student-t, say
    closed = Predictions.from_gaussian(0 * one, 4 * one, y, **split, log_prob=density)
    made = mix([closed, closed], [0.7, 0.3])
    assert made.epistemic is not None
    torch.testing.assert_close(made.epistemic, 3 * one)
    torch.testing.assert_close(nll(made), -density)


def test_what_cannot_be_mixed() -> None:
    given = candidates()
    with pytest.raises(ArgumentError, match="at least one"):
        mix([], [])
    with pytest.raises(ShapeError, match="candidate 1 holds 10 examples"):
        mix([given[0], candidates(10)[0]], [0.5, 0.5])
    with pytest.raises(LabelError, match="candidate 1 has other targets"):
        mix([given[0], candidates(seed=3)[0]], [0.5, 0.5])
    with pytest.raises(ArgumentError, match="regression"):
        mix([given[0], Predictions.from_gaussian(torch.zeros(200), torch.ones(200))], [0.5, 0.5])
    with pytest.raises(ShapeError):
        mix(given, [1.0, 1.0])
    with pytest.raises(ArgumentError, match="negative"):
        mix(given, [1.0, -1.0, 1.0, 1.0])
    draws = Predictions.from_samples(torch.randn(5, 20, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(UnsupportedError, match="draws"):
        mix([draws], [1.0])


def test_selection_from_predictions_and_its_memory() -> None:
    held, test = candidates(500, seed=1), candidates(400, seed=2)
    found = select_members(held)
    same = select_members(torch.stack([-nll(one) for one in held]))
    assert torch.equal(found.weights, same.weights) and found.nll == same.nll and found.data and not same.data
    made = found.mixture(test)
    torch.testing.assert_close(made.probs, mix(test, found.weights).probs)
    quiet = compare({"mixture": made, "first": test[0]}, bootstrap=0, progress=False)
    assert not any("flatters" in note for note in quiet.details["notes"])
    again = found.mixture(held)
    assert float(nll(again).mean()) == pytest.approx(found.nll, abs=1e-12)
    with pytest.warns(UserWarning, match="mixture: members were selected on these very test data"):
        rep = compare({"mixture": again, "first": held[0]}, bootstrap=0, progress=False)
    assert any("flatters" in note for note in rep.details["notes"])


def test_few_points_are_told() -> None:
    # Candidates that differ by noise alone: a gain on few points is chance, and is told in at least 45 of 50 data sets.
    told = 0
    for seed in range(50):
        table = -1 + 0.01 * torch.randn(4, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        try:
            select_members(table, rule="optimal")
        except UserWarning as warning:
            assert "on 20 examples the mixture of" in str(warning)
            told += 1
    assert told >= 45
    # Two that each know half of the examples: the gain is log 2 - log(1 + e^-4) for one, far beyond chance.
    halves = torch.zeros(2, 400, dtype=torch.float64)
    halves[0, :200], halves[1, 200:] = -4.0, -4.0
    assert select_members(halves).nll == pytest.approx(math.log(2) - math.log1p(math.exp(-4.0)))
