"""Conjugate Gaussian pairs: theta ~ N(0, I), x = theta + N(0, 1), posterior N(x / 2, 1 / 2).

p-values of right samples are uniform: a threshold of 1e-3 fails once in 1,000, and the seed is fixed.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, NonFiniteError, ShapeError
from bayesdl.evaluation import posterior_coverage

S, N, D = 100, 2000, 3


def pairs(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, theta and S draws of N(x / 2, scale^2 / 2)."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(N, D, generator=generator)
    x = theta + torch.randn(N, D, generator=generator)
    samples = x / 2 + scale * math.sqrt(0.5) * torch.randn(S, N, D, generator=generator)
    return x, theta, samples


@pytest.mark.parametrize("references", ["conditional", "other", "box"])
def test_the_exact_posterior_passes(references: str) -> None:
    x, theta, samples = pairs()
    found = posterior_coverage(samples, theta, x, references)
    assert found.p_value > 1e-3
    assert found.max_gap < 0.06 and abs(found.area) < 0.02
    assert bool((found.low <= found.high).all())


def test_samples_too_close_together_or_too_far_apart_fail() -> None:
    x, theta, samples = pairs(scale=0.5)
    found = posterior_coverage(samples, theta, x)
    assert found.p_value < 1e-60 and found.area < -0.05
    x, theta, samples = pairs(scale=2.0)
    found = posterior_coverage(samples, theta, x)
    assert found.p_value < 1e-30 and found.max_gap > 0.2


def test_the_prior_passes_unless_references_look_at_x() -> None:
    x, theta, _ = pairs()
    prior = torch.randn(S, N, D, generator=torch.Generator().manual_seed(1))
    assert posterior_coverage(prior, theta, x, "other").p_value > 1e-3
    assert posterior_coverage(prior, theta, x, "box").p_value > 1e-3
    assert posterior_coverage(prior, theta, x).p_value < 1e-10


def test_references_follow_the_range_of_the_truths() -> None:
    """Moved and stretched truths give the same distances once rescaled."""
    x, theta, samples = pairs()
    scale, shift = torch.tensor([1e3, 1.0, 1e-2]), torch.tensor([-5e4, 0.0, 3.0])
    for references in ("conditional", "box"):
        first = posterior_coverage(samples, theta, x, references)
        second = posterior_coverage(samples.double() * scale + shift, theta.double() * scale + shift, x, references)
        assert second.max_gap == pytest.approx(first.max_gap, abs=2e-3)
    half = pairs(scale=0.5)
    assert posterior_coverage(half[2] * scale + shift, half[1] * scale + shift, x, "box").p_value < 1e-10


def test_coverage_is_the_share_of_ranks_by_hand() -> None:
    theta = torch.tensor([[0.0], [1.0], [4.0]])
    samples = torch.tensor([[[1.0], [1.0], [0.0]], [[2.0], [3.0], [9.0]]])
    x = torch.zeros(3, 1)  # a constant: references are the truths' mean, 5/3, without noise
    found = posterior_coverage(samples, theta, x, noise=0.0)
    reference = 5 / 3
    shares = [
        sum(abs(float(s[n]) - reference) < abs(float(theta[n]) - reference) for s in samples) / 2 for n in range(3)
    ]
    expected = [sum(f < a for f in shares) / 3 for a in found.level.tolist()]
    assert found.coverage.tolist() == pytest.approx(expected)


def test_bootstrap_replicates_differ_and_seeds_repeat() -> None:
    x, theta, samples = pairs()
    first = posterior_coverage(samples, theta, x, generator=torch.Generator().manual_seed(5))
    again = posterior_coverage(samples, theta, x, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first.low, again.low) and first.p_value == again.p_value
    width = float((first.high - first.low)[50])
    assert width == pytest.approx(2 * 1.96 * math.sqrt(0.25 / N), rel=0.4)


def test_refusals() -> None:
    x, theta, samples = pairs()
    with pytest.raises(ArgumentError, match="needs x"):
        posterior_coverage(samples, theta)
    with pytest.raises(ArgumentError, match="references"):
        posterior_coverage(samples, theta, x, "nearest")
    with pytest.raises(ArgumentError, match="bootstrap"):
        posterior_coverage(samples, theta, x, bootstrap=0)
    with pytest.raises(ShapeError, match="expected"):
        posterior_coverage(samples[0], theta, x)
    with pytest.raises(ShapeError, match="inputs x"):
        posterior_coverage(samples, theta, x[:5])
    with pytest.raises(NonFiniteError):
        posterior_coverage(samples * math.nan, theta, x)
