"""NUTS through Pyro: the potential it is given, the generators it must leave alone, the law it samples."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, NonFiniteError
from bayesdl.integrations.pyro import global_randomness, nuts


def gaussian(theta: Tensor) -> Tensor:
    """U of N((1, -2), diag(1, 1/9))."""
    centred = theta - theta.new_tensor([1.0, -2.0])
    return 0.5 * (centred.square() * theta.new_tensor([1.0, 9.0])).sum()


def states() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def test_global_generators_are_put_back_also_after_an_error() -> None:
    before = states()
    with global_randomness(3):
        first = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
    assert states() == before
    with pytest.raises(KeyError), global_randomness(3):
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == first  # noqa: NPY002
        raise KeyError
    assert states() == before


def test_samples_of_a_gaussian() -> None:
    """Two chains of 300: means within 4 standard errors, of which NUTS has about those of independent draws."""
    before = states()
    start = torch.zeros(2, dtype=torch.float64)
    run = nuts(gaussian, [start, start + 1], 300, 150, seeds=[0, 1], progress=False)
    assert states() == before
    assert run.samples.shape == (2, 300, 2) and run.samples.dtype is torch.float64
    assert len(run.step_size) == len(run.moved) == len(run.divergences) == 2 and sum(run.divergences) == 0
    flat = run.samples.flatten(0, 1)
    sd = torch.tensor([1.0, 1 / 3], dtype=torch.float64)
    error = (flat.mean(0) - torch.tensor([1.0, -2.0], dtype=torch.float64)) / sd
    assert bool((error.abs() < 4 / 300**0.5).all())
    # sd of a variance of n normal draws is sqrt(2 / n) of it; half of them count
    assert bool(((flat.var(0) / sd**2 - 1).abs() < 4 * (2 / 300) ** 0.5).all())
    again = nuts(gaussian, [start, start + 1], 300, 150, seeds=[0, 1], progress=False)
    assert torch.equal(again.samples, run.samples)


def test_refusals() -> None:
    start = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="2 seeds and 1 starts"):
        nuts(gaussian, [start], 4, 2, seeds=[0, 1])
    with pytest.raises(NonFiniteError, match="where a chain of NUTS starts"):
        nuts(lambda theta: theta.log().sum(), [start], 4, 2, seeds=[0])
