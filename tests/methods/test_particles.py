"""Weights of particles against their definitions."""

from __future__ import annotations

import pytest
import torch

from bayesdl.methods.particles import effective, largest_rise, systematic


def test_effective_number() -> None:
    assert effective(torch.zeros(7)) == pytest.approx(7.0)
    assert effective(torch.tensor([0.5, 0.25, 0.25]).log() + 3.0) == pytest.approx(1 / 0.375)
    assert effective(torch.tensor([0.0, -torch.inf])) == 1.0


def test_resampling_is_unbiased_and_even() -> None:
    """2,000 draws: each count is floor or ceiling of J w_j, its mean within 4.5 standard errors (of at most 0.5)."""
    weights = torch.tensor([0.13, 0.37, 0.0, 0.05, 0.45], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    counts = torch.stack([torch.bincount(systematic(weights.log(), g), minlength=5) for _ in range(2000)]).double()
    assert bool((counts >= (5 * weights).floor()).all()) and bool((counts <= (5 * weights).ceil()).all())
    assert bool(((counts.mean(0) - 5 * weights).abs() <= 4.5 * 0.5 / 2000**0.5).all())


def test_largest_rise_keeps_half_of_the_particles() -> None:
    increments = torch.linspace(-30, 0, 64, dtype=torch.float64)
    uniform = torch.zeros(64, dtype=torch.float64)
    rise = largest_rise(uniform, increments, 1.0)
    assert 0 < rise < 1 and effective(rise * increments) == pytest.approx(32.0, rel=1e-6)
    assert largest_rise(uniform, 1e-3 * increments, 0.7) == 0.7
    skewed = torch.tensor([0.0] + [-40.0] * 63, dtype=torch.float64)  # fewer than half from the start
    assert 0 < largest_rise(skewed, increments, 1.0) < 1e-8
