"""Hierarchical priors: Gibbs conditionals against their closed forms, tempered ones against a grid, the marginal."""

from __future__ import annotations

import math

import pytest
import torch

from bayesdl.errors import ArgumentError
from bayesdl.priors import HierarchicalPrior, Prior
from bayesdl.priors.mixtures import inverse_gamma

W = {"w": torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(2, 3), "b": torch.tensor([0.3, -0.4]).double()}


@pytest.mark.parametrize("t", [1.0, 0.6, 1.3])
def test_tempered_inverse_gamma_against_a_grid(t: float, generator: torch.Generator) -> None:
    shape, rate = 3.0, 2.0
    grid = torch.logspace(-3, 4, 200_001, dtype=torch.float64)
    density = torch.exp((-(shape + 1) * grid.log() - rate / grid) / t)
    mass = torch.trapezoid(density, grid)
    exact = [float(torch.trapezoid(density * grid**-k, grid) / mass) for k in (1, 2)]
    draws = inverse_gamma(torch.full((200_000,), shape).double(), torch.full((200_000,), rate).double(), t, generator)
    for k, expected in zip((1, 2), exact, strict=True):
        values = draws**-k  # reciprocals have all moments
        error = float(values.std() / 200_000**0.5)
        assert abs(float(values.mean()) - expected) < 5 * error < 0.02 * expected  # failure 6e-7 each


def test_extreme_temperatures() -> None:
    shape, rate = torch.tensor(3.0), torch.tensor(2.0)
    assert float(inverse_gamma(shape, rate, 0.0)) == 0.5
    with pytest.raises(ArgumentError, match="must stay below 4"):
        inverse_gamma(shape, rate, 4.0)


@pytest.mark.parametrize("fan_in", [False, True])
@pytest.mark.parametrize("t", [1.0, 0.7])
def test_conditional(fan_in: bool, t: float, generator: torch.Generator) -> None:
    prior = HierarchicalPrior(3.0, 1.5, fan_in=fan_in)
    draws = [prior.gibbs(W, {}, t, generator) for _ in range(6000)]
    for name, fan in (("w", 3 if fan_in else 1), ("b", 1)):
        v = torch.stack([draw[name] for draw in draws])
        shape = (3.0 + W[name].numel() / 2 + 1) / t - 1
        rate = (1.5 + fan * float(W[name].square().sum()) / 2) / t
        mean, variance = rate / (shape - 1), rate**2 / (shape - 1) ** 2 / (shape - 2)
        assert abs(float(v.mean()) - mean) < 5 * math.sqrt(variance / 6000)  # eight checks, failure 5e-6
        assert float(v.var()) == pytest.approx(variance, rel=0.4)
        assert prior.variance(W, {n: torch.tensor(2.0, dtype=torch.float64) for n in W})[name] == 2.0 / fan


def test_marginal_density() -> None:
    # against quadrature over v
    prior = HierarchicalPrior(2.5, 0.8, fan_in=True)
    v = torch.logspace(-4, 5, 400_001, dtype=torch.float64)
    log_v = 2.5 * math.log(0.8) - math.lgamma(2.5) - 3.5 * v.log() - 0.8 / v
    total = 0.0
    for name, fan in (("w", 3), ("b", 1)):
        n, square = W[name].numel(), float(W[name].square().sum())
        inner = log_v - n / 2 * torch.log(2 * math.pi * v / fan) - fan * square / (2 * v)
        total += math.log(float(torch.trapezoid(inner.exp(), v)))
    assert float(prior.log_prob(W)) == pytest.approx(total, rel=1e-6)
    for found, exact in zip(prior.grad(W).values(), Prior.grad(prior, W).values(), strict=True):
        assert torch.allclose(found, exact, rtol=1e-10)


def test_draws_have_the_marginal(generator: torch.Generator) -> None:
    prior = HierarchicalPrior(4.0, 2.0)
    many = {str(i): torch.empty(3) for i in range(8000)}
    squares = torch.stack([v.double().square().mean() for v in prior.sample(many, generator).values()])
    error = float(squares.std() / 8000**0.5)
    assert abs(float(squares.mean()) - 2.0 / 3.0) < 5 * error < 0.1


@pytest.mark.parametrize("own", [{"shape": 0.0}, {"rate": -1.0}, {"step_cap": 0.0}])
def test_arguments(own: dict[str, float]) -> None:
    with pytest.raises(ArgumentError):
        HierarchicalPrior(**own)
