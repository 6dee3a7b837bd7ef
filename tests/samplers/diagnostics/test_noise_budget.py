from __future__ import annotations

import math

import pytest
import torch

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.samplers.diagnostics import gradient_variance, noise_budget


def test_variance_of_a_whole_batch_from_its_halves() -> None:
    """Linear model, batches drawn with replacement: the gradient of U over a batch of B has variance N^2 sigma^2 / B.

    100,000 coordinates: the relative standard error of v is sqrt(2 / 1e5) = 0.45 %; 4 of them fail once in 16,000.
    """
    generator = torch.Generator().manual_seed(0)
    size, batch, sigma, width = 50, 8, 0.3, 100_000
    examples = sigma * torch.randn(batch, width, generator=generator, dtype=torch.float64)
    first, second = examples[:4].mean(0), examples[4:].mean(0)
    found = gradient_variance({"net.weight": first[:-7], "net.bias": first[-7:]},
                              {"net.weight": second[:-7], "net.bias": second[-7:]}, size)  # fmt: skip
    assert list(found) == ["net"]
    assert found["net"] == pytest.approx(size**2 * sigma**2 / batch, rel=4 * math.sqrt(2 / width))


def test_share_of_the_sampler_noise() -> None:
    """Variance of h g over that of sqrt(2 f h T) xi: h^2 v / (2 f h T)."""
    h, v, friction, temperature = 0.02, 5.0, 0.1, 0.5
    found = noise_budget({"a": v, "b": 0.0}, lr=h * 200, num_data=200, temperature=temperature, friction=friction)
    assert found == {"a": pytest.approx(h * h * v / (2 * friction * h * temperature)), "b": 0.0}


def test_refusals() -> None:
    one = {"w": torch.zeros(2)}
    with pytest.raises(ShapeError, match="halves"):
        gradient_variance(one, {"v": torch.zeros(2)}, 3)
    with pytest.raises(ShapeError, match="shapes"):
        gradient_variance(one, {"w": torch.zeros(3)}, 3)
    with pytest.raises(ArgumentError, match="positive"):
        noise_budget({"w": 1.0}, lr=0.1, num_data=10, temperature=0.0)
