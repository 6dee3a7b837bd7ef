"""Splines and the weight law they make: one map in both directions."""

import math

import pytest
import torch

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.priors import SplinePrior
from bayesdl.priors.spline import EDGE, Spline


def raw(seed=0, bins=8):
    return 1.5 * torch.randn(3 * bins, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior(seed=0):
    return SplinePrior({"weight": 1.7}, {"weight": raw(seed).tolist()})


POINTS = torch.linspace(-6, 6, 1001, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_the_inverse_undoes_the_map(seed):
    spline = Spline.of(raw(seed))
    there, stretch = spline.forward(POINTS)
    back, again = spline.inverse(there)
    assert torch.allclose(back, POINTS, atol=1e-9)
    assert torch.allclose(stretch, again, atol=1e-7)
    assert bool((there[1:] > there[:-1]).all())
    assert torch.allclose(there, -there.flip(0))  # odd: the law has mean zero
    assert torch.equal(there[POINTS.abs() >= EDGE], POINTS[POINTS.abs() >= EDGE])


def test_log_derivatives_are_those_of_autograd():
    spline = Spline.of(raw())
    x = POINTS[::7].clone().requires_grad_()
    value, stretch = spline.forward(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert torch.allclose(stretch, slope.log(), atol=1e-8)


def test_zeros_are_the_identity():
    value, stretch = Spline.of(torch.zeros(24, dtype=torch.float64)).forward(POINTS)
    assert torch.allclose(value, POINTS, atol=1e-9) and torch.allclose(stretch, torch.zeros_like(POINTS), atol=1e-9)


def test_gradients_in_the_splines_own_numbers():
    x = torch.linspace(-3.3, 3.1, 9, dtype=torch.float64)
    numbers = raw().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: Spline.of(r).forward(x), (numbers,))
    assert torch.autograd.gradcheck(lambda r: Spline.of(r).inverse(x), (numbers,))


def test_the_density_integrates_to_one_and_is_that_of_the_samples():
    law = prior()
    weight = torch.zeros(1, 4, dtype=torch.float64)  # fan-in 4
    grid = torch.linspace(-6, 6, 8001, dtype=torch.float64)
    # one weight at a time: the other three stay at a point whose density divides out
    centre = law.log_prob({"weight": weight})
    logs = torch.stack([law.log_prob({"weight": torch.tensor([[g, 0.0, 0.0, 0.0]]).double()}) for g in grid])
    density = (logs - 0.75 * centre).exp()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=5e-4)
    drawn = law.sample({"weight": torch.zeros(100_000, 4, dtype=torch.float64)}, torch.Generator().manual_seed(1))
    values = drawn["weight"].flatten()
    mass = torch.cumulative_trapezoid(density, grid)
    for i in range(400, 7800, 800):
        share = float((values < grid[i + 1]).double().mean())
        # 400,000 draws: five binomial standard errors
        assert abs(share - float(mass[i])) < 5 * math.sqrt(0.25 / 400_000) + 5e-4


def test_gradient_of_the_density_in_the_weights():
    law = prior()
    weight = torch.tensor([[0.3, -0.8, 1.1, 0.02]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: law.log_prob({"weight": w}), (weight,))
    assert torch.allclose(
        law.grad({"weight": weight})["weight"], torch.autograd.grad(law.log_prob({"weight": weight}), weight)[0]
    )


def test_refusals():
    with pytest.raises(ShapeError, match="3 numbers a bin"):
        Spline.of(torch.zeros(7))
    with pytest.raises(ArgumentError, match="none for 'bias'"):
        prior().log_prob({"bias": torch.zeros(3)})
