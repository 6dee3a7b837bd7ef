"""Gaussian priors: density against torch, and arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.distributions import Normal

from bayesdl.errors import ArgumentError
from bayesdl.priors import GaussianPrior

THETA = {"w": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.tensor([0.5, -2.0])}
FLAT = torch.cat([value.reshape(-1) for value in THETA.values()]).double()


@pytest.mark.parametrize("mean", [0.0, 0.3, torch.linspace(0, 1, 8)])
@pytest.mark.parametrize("precision", [0.1, torch.linspace(0.5, 3, 8), [0.1] * 8])
def test_density(precision: Any, mean: Any) -> None:
    wide = torch.as_tensor(precision, dtype=torch.float64)
    expected = Normal(torch.as_tensor(mean, dtype=torch.float64), wide.rsqrt()).log_prob(FLAT).sum()
    found = GaussianPrior(precision=precision, mean=mean).log_prob(THETA)
    assert found.shape == () and torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("precision", [0.0, -1.0, float("nan"), float("inf"), [], [1.0, -1.0], [[1.0]]])
def test_precisions_must_be_positive(precision: Any) -> None:
    with pytest.raises(ArgumentError, match="expected a positive finite number, or a vector"):
        GaussianPrior(precision=precision)


@pytest.mark.parametrize("precision", ["a", None, ["a"], object(), [[1.0], [1.0, 2.0]]])
def test_precisions_must_be_numbers(precision: Any) -> None:
    with pytest.raises(ArgumentError, match="precision=.*; expected a number"):
        GaussianPrior(precision=precision)


def test_a_precision_per_layer_is_that_of_its_weights(generator: torch.Generator) -> None:
    theta = {"0.weight": THETA["w"], "2.weight": THETA["w"] + 1, "0.bias": THETA["b"]}
    flat = torch.cat([value.reshape(-1) for value in theta.values()]).double()
    each = torch.tensor([0.5] * 6 + [4.0] * 6 + [0.5] * 2, dtype=torch.float64)
    prior = GaussianPrior(precision=[0.5, 4.0], mean=0.3)
    assert torch.allclose(prior.log_prob(theta), Normal(0.3, each.rsqrt()).log_prob(flat).sum(), rtol=1e-12)
    same, noise = GaussianPrior(precision=each, mean=0.3), generator.get_state()
    drawn = prior.sample(theta, generator)
    expected = same.sample(theta, torch.Generator().set_state(noise))
    assert all(torch.equal(drawn[name], value) for name, value in expected.items())


def test_precisions_that_fit_neither_layers_nor_weights() -> None:
    with pytest.raises(ArgumentError, match="2 precisions for 8 parameters in 1 layers"):
        GaussianPrior(precision=[1.0, 2.0]).log_prob(THETA)
    with pytest.raises(ArgumentError, match="3 precisions for 8 parameters in 1 layers"):
        GaussianPrior(precision=[1.0, 2.0, 3.0]).sample(THETA)


def test_moves() -> None:
    prior = GaussianPrior(precision=torch.ones(3), mean=torch.zeros(3)).map(torch.Tensor.double)
    assert isinstance(prior.precision, torch.Tensor) and prior.precision.dtype is torch.float64
    assert isinstance(prior.mean, torch.Tensor) and prior.mean.dtype is torch.float64
    assert GaussianPrior(precision=2.0).map(torch.Tensor.double) == GaussianPrior(precision=2.0)


def test_named_means(generator: torch.Generator) -> None:
    centres = {"b": torch.tensor([1.0, 2.0]), "w": torch.linspace(0, 1, 6).reshape(2, 3), "other": torch.ones(1)}
    flat = torch.cat([centres["w"].reshape(-1), centres["b"]])
    named, plain = GaussianPrior({"w": 2.0, "b": 0.5}, centres), GaussianPrior([2.0] * 6 + [0.5] * 2, flat)
    assert torch.equal(named.log_prob(THETA), plain.log_prob(THETA))
    again = torch.Generator().set_state(generator.get_state())
    drawn, expected = named.sample(THETA, generator), plain.sample(THETA, again)
    assert all(torch.equal(drawn[name], expected[name]) for name in THETA)
    assert named.map(torch.Tensor.double).mean["b"].dtype is torch.float64
    with pytest.raises(ArgumentError, match="none for 'b'"):
        GaussianPrior(1.0, {"w": centres["w"]}).log_prob(THETA)
    with pytest.raises(ArgumentError, match=r"mean of 'b' has shape \(1,\) and the parameter \(2,\)"):
        GaussianPrior(1.0, {**centres, "b": torch.ones(1)}).log_prob(THETA)
    with pytest.raises(ArgumentError, match="mean of 'b' holds NaN"):
        GaussianPrior(1.0, {"b": torch.tensor([math.nan])})
    with pytest.raises(ArgumentError, match="mean holds NaN"):
        GaussianPrior(1.0, torch.tensor([math.inf, 0.0]))


def test_gradient_and_draws(generator: torch.Generator) -> None:
    prior = GaussianPrior(precision=torch.linspace(0.5, 3, 8), mean=0.3)
    wide = {name: value.double() for name, value in THETA.items()}
    found = torch.cat([value.reshape(-1) for value in prior.grad(wide).values()])
    assert torch.allclose(found, -torch.linspace(0.5, 3, 8).double() * (FLAT - 0.3))
    draws = [prior.sample(wide, generator) for _ in range(4000)]
    flat = torch.stack([torch.cat([value.reshape(-1) for value in draw.values()]) for draw in draws])
    # variances of 4,000 draws have a relative deviation of sqrt(2 / 4000) = 0.022: 8 within 5 of them fails at 5e-6
    assert torch.allclose(flat.var(0) * torch.linspace(0.5, 3, 8).double(), torch.ones(8).double(), atol=0.11)
    assert prior.sample(THETA, generator)["w"].dtype is torch.float32
    with pytest.raises(ArgumentError, match="2 precisions for 8 parameters in 1 layers"):
        GaussianPrior(precision=[1.0, 2.0]).sample(THETA)
