"""Bounds are bounds, ordered, and their iteration converges where the plain one does not."""

import numpy as np
import pytest
import torch
from torch import nn

from bayesdl.errors import UnknownNameError
from bayesdl.last_layer import bounds


def moments(scale, k=10, n=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(n, k, generator=generator, dtype=torch.float64)
    return mean, 2 * scale * torch.rand(n, k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.5, 5.0, 50.0])
def test_above_monte_carlo_and_ordered(scale):
    mean, variance = moments(scale)
    generator = torch.Generator().manual_seed(1)
    draws = mean + variance.sqrt() * torch.randn(20_000, *mean.shape, generator=generator, dtype=torch.float64)
    value = torch.logsumexp(draws, -1)
    error = value.std(0) / 20_000**0.5
    # 48 one-sided comparisons at four standard errors: fails by chance once in 650 seeds if a bound were exact
    assert bool((bounds.km(mean, variance) > value.mean(0) - 4 * error).all())
    assert bool((bounds.km(mean, variance) <= bounds.jensen(mean, variance) + 1e-12).all())
    generator.manual_seed(2)
    tilt = torch.rand(mean.shape, generator=generator, dtype=torch.float64)
    assert bool((bounds.tilted(mean, variance, tilt) > value.mean(0) - 4 * error).all())


@pytest.mark.parametrize("scale", [0.5, 5.0, 50.0])
def test_the_damped_iteration_is_monotone_and_reaches_the_fixed_point(scale):
    mean, variance = moments(scale)
    before = bounds.tilted(mean, variance, bounds.best_tilt(mean, variance, 0))
    for steps in (1, 2, 5, 10, 20, 200):
        after = bounds.tilted(mean, variance, bounds.best_tilt(mean, variance, steps))
        assert bool((after <= before + 1e-12).all())
        before = after
    tilt = bounds.best_tilt(mean, variance, 1000)
    assert torch.allclose(tilt, torch.softmax(mean + (0.5 - tilt) * variance, -1), atol=1e-9)


def test_the_plain_iteration_diverges_where_the_damped_one_converges():
    mean, variance = moments(5.0)
    tilt = torch.softmax(mean, -1)
    for _ in range(1000):
        tilt = torch.softmax(mean + (0.5 - tilt) * variance, -1)
    residual = (tilt - torch.softmax(mean + (0.5 - tilt) * variance, -1)).abs().max()
    assert float(residual) > 0.1  # why the damping is there


def test_special_cases():
    mean, variance = moments(1.0)
    zero = torch.zeros_like(mean)
    assert torch.allclose(bounds.tilted(mean, variance, zero), bounds.jensen(mean, variance))
    assert torch.allclose(bounds.km(mean, zero), torch.logsumexp(mean, -1))
    noise = torch.rand(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    alpha = torch.tensor(0.1, dtype=torch.float64)
    spread = variance / noise
    expected = bounds.tilted(mean, variance, (0.5 - alpha / noise).expand_as(mean))
    assert torch.allclose(bounds.km_reduced(mean, spread, noise, alpha), expected)


def test_gradients():
    mean, variance = moments(1.0, k=3, n=2)
    inputs = (mean.requires_grad_(), variance.requires_grad_())
    assert torch.autograd.gradcheck(bounds.jensen, inputs)
    # at the optimum the derivative through a vanishes; 1,000 steps put it there
    tilt = bounds.best_tilt(mean, variance, 1000)
    held = torch.autograd.grad(bounds.tilted(mean, variance, tilt).sum(), inputs)
    step = 1e-6
    for which in range(2):
        moved = [mean.detach().clone(), variance.detach().clone()]
        moved[which][0, 1] += step
        up = bounds.tilted(*moved, bounds.best_tilt(*moved, 1000)).sum()
        moved[which][0, 1] -= 2 * step
        down = bounds.tilted(*moved, bounds.best_tilt(*moved, 1000)).sum()
        assert abs(float((up - down) / (2 * step) - held[which][0, 1])) < 1e-6


def test_names():
    assert bounds.check_bound("km") == "km"
    with pytest.raises(UnknownNameError, match="choose one of"):
        bounds.check_bound("taylor")


@pytest.mark.parametrize("bound", ["km", "jensen"])
def test_two_class_bounds_are_above_a_quadrature_of_the_softplus(bound):
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(80))
    mean = torch.linspace(-4, 4, 9, dtype=torch.float64).unsqueeze(1).expand(9, 2)
    variance = torch.tensor([0.3, 6.0], dtype=torch.float64).expand(9, 2)
    points = mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * nodes
    expected = (nn.functional.softplus(points) * weights).sum(-1).sum(-1) / weights.sum()
    found = bounds.Normaliser(bound, True).upper(mean, variance)
    assert bool((found > expected).all())
    certain = bounds.Normaliser(bound, True).upper(mean, torch.zeros_like(variance))
    assert torch.allclose(certain, nn.functional.softplus(mean).sum(-1))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("bound", ["km", "jensen"])
def test_gradients_of_the_normaliser(bound, binary):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    variance = torch.rand(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    normaliser = bounds.Normaliser(bound, binary)
    slope, spread = torch.autograd.grad(normaliser.upper(mean, variance).sum(), [mean, variance])
    found = normaliser.gradients(mean.detach(), variance.detach())
    assert torch.allclose(found[0], slope, atol=1e-6) and torch.allclose(found[1], 2 * spread, atol=1e-6)
