"""BAOAB: exact variances for every stable step, which only this order of the pieces has."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError
from bayesdl.samplers import BAOAB
from bayesdl.samplers.baoab import baoab
from tests.oracles import linear_law
from tests.samplers.chains import assert_mean, step_on_gaussian

CASES = list(itertools.product((0.5, 1.0, 1.5, 1.9), (1.0, 0.6), (1.0, 0.25), (0.0, 3.0)))


@pytest.mark.parametrize(("delta", "s", "t", "v"), CASES)
def test_law_of_the_discrete_chain(delta: float, s: float, t: float, v: float) -> None:
    h, c = delta**2 * s * s, math.exp(-0.8 * delta)
    a = h / s**2

    def step(x: Tensor, xi: Tensor) -> Tensor:
        return torch.stack(baoab(x[0], x[1], x[0] / s**2 + v**0.5 * xi[1], xi[0], h, c, t))

    matrix, covariance = linear_law(step, 2, 2)
    variance = s * s * (t + h * v * (1 + c) / ((1 - c) * (4 - a)))
    assert float(covariance[0, 0]) == pytest.approx(variance, rel=1e-9)
    if v == 0:
        assert float(covariance[1, 1]) / h == pytest.approx(t, rel=1e-9)
        assert float(covariance[0, 1]) == pytest.approx(h * t / 2, rel=1e-9)
        # one further half kick ends the palindromic step
        kick = torch.tensor([-0.5 * a, 1.0], dtype=torch.float64)
        assert float(kick @ covariance @ kick) / h == pytest.approx(t * (1 - a / 4), rel=1e-9)
    assert matrix.shape == (2, 2)


def test_the_optimiser_has_that_law() -> None:
    n, lr, s2, t = 100, 250.0, 2.0, 0.5  # a = 1.25, far beyond what SGHMC with this friction would bear unbiased
    theta = nn.Parameter(torch.zeros(20_000))
    sampler = BAOAB([theta], lr, n, momentum=0.6, prior_precision=0.0, temperature=t,
                    generator=torch.Generator().manual_seed(1))  # fmt: skip
    squares, momenta, products = torch.zeros(3, 20_000)
    for k in range(260):
        step_on_gaussian(sampler, theta, s2)
        if k >= 60:
            m = sampler.state[theta]["momentum"]
            squares += theta.detach().square() / 200
            momenta += m.square() / 200
            products += theta.detach() * m / 200
    assert_mean(squares, t * s2, 0.004)
    assert_mean(momenta, 2.5 * t, 0.004)
    assert_mean(products, 2.5 * t / 2, 0.004)


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="momentum=1"):
        BAOAB([nn.Parameter(torch.zeros(2))], 0.1, 10, momentum=1.0)
