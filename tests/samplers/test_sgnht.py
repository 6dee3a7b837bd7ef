"""SGNHT: the telescoping identity, mean friction and kinetic temperature under gradient noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bayesdl.errors import ArgumentError
from bayesdl.samplers import SGNHT
from bayesdl.samplers.sgnht import sgnht
from tests.samplers.chains import assert_mean, step_on_gaussian


def simulate(h: float, f0: float, v: float, t: float, steps: int, burn: int, chains: int = 200, d: int = 20) -> tuple:
    source = torch.Generator().manual_seed(0)
    theta = torch.randn(chains, d, generator=source, dtype=torch.float64) * t**0.5
    m = torch.randn(chains, d, generator=source, dtype=torch.float64) * (h * t) ** 0.5
    f = torch.full((chains,), f0, dtype=torch.float64)
    start, kinetic_sum = f.clone(), torch.zeros(chains, dtype=torch.float64)
    friction, kinetic, square = torch.zeros(3, chains, dtype=torch.float64)
    for k in range(steps):
        noise, felt = torch.randn(2, chains, d, generator=source, dtype=torch.float64)
        if k >= burn:
            friction += f / (steps - burn)
        theta, m, f = sgnht(theta, m, f, theta + v**0.5 * felt, noise, h, f0, t)
        kinetic_sum += m.square().mean(-1)
        if k >= burn:
            kinetic += m.square().mean(-1) / h / (steps - burn)
            square += theta.square().mean(-1) / (steps - burn)
    assert torch.allclose(kinetic_sum / steps, h * t + (f - start) / steps, rtol=1e-9)  # telescoping
    return friction, kinetic, square


@pytest.mark.parametrize(("v", "t"), [(4.0, 0.5), (0.0, 1.0)])
def test_friction_takes_up_the_noise_of_gradients(v: float, t: float) -> None:
    h, f0 = 0.01, 0.05
    friction, kinetic, square = simulate(h, f0, v, t, 3000, 800)
    error = float(friction.std() / 200**0.5)
    # leading order in h v / T: off by less than 5 % here
    assert abs(float(friction.mean()) - (f0 + h * v / (2 * t))) < 0.05 * (f0 + h * v / (2 * t)) + 4 * error
    assert_mean(kinetic, t, 0.004, sd=5)
    # the bias of the variance is of first order in h v / T and below 5 % here; SGHMC's would be h v / (2 f T) = 80 %
    assert abs(float(square.mean()) / t - 1) < 0.05


def test_frictions_near_zero_are_smooth() -> None:
    theta, m, g, noise = torch.randn(4, 6, dtype=torch.float64)
    near = [sgnht(theta, m, torch.tensor(f).double(), g, noise, 0.1, 0.2)[0] for f in (0.0, 1e-9, 1.1e-6, -1.1e-6)]
    for other in near[1:]:
        assert torch.allclose(near[0], other, atol=1e-5)
    assert torch.isfinite(sgnht(theta, m, torch.tensor(-0.3).double(), g, noise, 0.1, 0.2)[0]).all()


def test_the_optimiser_makes_the_kernels_steps() -> None:
    start = torch.linspace(-1, 1, 8, dtype=torch.float64)
    theta = nn.Parameter(start.clone())
    sampler = SGNHT([theta], 3.0, 20, momentum=0.8, prior_precision=2.0, temperature=0.6,
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    h, f0 = 3.0 / 20, 1 - 0.8
    step_on_gaussian(sampler, theta, 1.5)
    values = (
        theta.detach().clone(),
        sampler.state[theta]["momentum"].clone(),
        torch.tensor(sampler.friction, dtype=torch.float64),
    )
    for _ in range(5):
        before = sampler._noise.state()
        g = values[0] / 1.5 + 2.0 * values[0]
        step_on_gaussian(sampler, theta, 1.5)
        after = sampler._noise.state()
        sampler._noise.load(before)
        noise = sampler._noise.draw([theta.detach()])[0].clone()
        sampler._noise.load(after)
        values = sgnht(*values, g, noise, h, f0, 0.6)
        assert torch.allclose(theta.detach(), values[0]) and torch.allclose(sampler.state[theta]["momentum"], values[1])
        assert sampler.friction == pytest.approx(float(values[2]), rel=1e-9)


def test_one_friction_for_all() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "momentum": 0.5}]
    with pytest.raises(ArgumentError, match="one friction for all"):
        SGNHT(groups, 0.1, 10)
    assert math.isclose(SGNHT(parameters, 0.1, 10, momentum=0.7).friction, 0.3)
