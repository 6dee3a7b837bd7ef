"""SGHMC: closed forms on Gaussians, SGD with momentum at T = 0, scale adaptation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, StepSizeError, UnsupportedError
from bayesdl.samplers import SGHMC
from bayesdl.samplers.sghmc import adapt, sghmc
from tests.oracles import linear_law
from tests.samplers.chains import assert_mean, step_on_gaussian

CASES = list(itertools.product(((0.1, 0.2), (0.5, 0.5), (1.0, 0.3)), (1.0, 0.5), (1.0, 0.25), (0.0, 3.0)))


@pytest.mark.parametrize(("pair", "s", "t", "v"), CASES)
def test_law_of_the_discrete_chain(pair: tuple[float, float], s: float, t: float, v: float) -> None:
    f, a = pair
    h = a * s * s

    def step(x: Tensor, xi: Tensor) -> Tensor:
        return torch.stack(sghmc(x[0], x[1], x[0] / s**2 + v**0.5 * xi[1], xi[0], h, f, t))

    _, covariance = linear_law(step, 2, 2)
    felt = t + h * v / (2 * f)
    assert float(covariance[0, 0]) == pytest.approx(felt * s * s / (1 - a / (2 * (2 - f))), rel=1e-9)
    assert float(covariance[1, 1]) / h == pytest.approx(felt / (1 - f / 2 - a / 4), rel=1e-9)


def test_full_friction_is_sgld() -> None:
    from bayesdl.samplers.sgld import sgld

    theta, m, g, xi = torch.randn(4, 6, dtype=torch.float64)
    assert torch.allclose(sghmc(theta, m, g, xi, 0.2, 1.0, 0.7)[0], sgld(theta, g, xi, 0.2, 0.7))


@pytest.mark.parametrize("t", [1.0, 0.4])
def test_the_optimiser_has_that_law(t: float) -> None:
    n, lr, s2, f = 100, 40.0, 2.0, 0.5  # a = 0.2
    theta = nn.Parameter(torch.zeros(20_000))
    sampler = SGHMC([theta], lr, n, momentum=1 - f, prior_precision=0.0, temperature=t,
                    generator=torch.Generator().manual_seed(1))  # fmt: skip
    squares, momenta = torch.zeros(20_000), torch.zeros(20_000)
    for k in range(300):
        step_on_gaussian(sampler, theta, s2)
        if k >= 100:
            squares += theta.detach().square() / 200
            momenta += sampler.state[theta]["momentum"].square() / 200 / (lr / n)
    assert_mean(squares, t * s2 / (1 - 0.2 / (2 * (2 - f))), 0.004)
    assert_mean(momenta, t / (1 - f / 2 - 0.05), 0.004)


def test_zero_temperature_is_sgd_with_momentum() -> None:
    ends = []
    for ours in (True, False):
        theta = nn.Parameter(torch.linspace(-2, 2, 9, dtype=torch.float64))
        optimizer = (
            SGHMC([theta], 0.1, 500, momentum=0.8, prior_precision=1.0, temperature=0.0)
            if ours
            else torch.optim.SGD([theta], 0.1, momentum=0.8, weight_decay=1 / 500)
        )
        for _ in range(40):
            theta.grad = torch.sin(theta.detach())
            optimizer.step()
        ends.append(theta.detach())
    assert torch.allclose(*ends, rtol=1e-12, atol=1e-14)


def test_momenta_start_at_their_temperature_and_follow_the_step_size() -> None:
    theta = nn.Parameter(torch.zeros(50_000))
    sampler = SGHMC([theta], 1e-4, 10, temperature=0.5, prior_precision=0.0,
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    theta.grad = torch.zeros(50_000)
    sampler.step()
    # one step keeps E m^2 = h T (1 - f)^2 + 2 f h T, 50,000 draws: relative deviation 0.0063, failure at 5 of them 6e-7
    expected = 1e-5 * 0.5 * (0.9**2 + 0.2)
    assert float(sampler.state[theta]["momentum"].square().mean()) == pytest.approx(expected, rel=0.032)
    before = sampler.state[theta]["momentum"].clone()
    sampler.temperature, sampler.param_groups[0]["lr"] = 0.0, 4e-4
    sampler.step()
    assert torch.allclose(sampler.state[theta]["momentum"], 0.9 * 2 * before)


def test_corrections_know_nothing_of_the_steps_of_mixture_priors() -> None:
    with pytest.raises(UnsupportedError, match="leave the correction out"):
        SGHMC([nn.Parameter(torch.zeros(2))], 0.1, 10, adapt=True, burn_in=5, noise_correction=True,
              prior=bdl.HierarchicalPrior())  # fmt: skip


def test_adaptation_follows_the_published_recursion() -> None:
    # by hand for a constant gradient g: first step r = 1/2, tau 1 + 1 (1 - 1) = 1, mean (1 + g)/2, V (1 + g^2)/2
    g = torch.tensor([3.0])
    one = torch.ones(1)
    tau, mean, square = adapt(one, one, one, g)
    assert (tau, mean, square) == (torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([5.0]))
    tau, mean, square = adapt(tau, mean, square, g)  # r = 1/2 of the old tau; tau = 1 + (1 - 4/5)
    assert (
        float(tau) == pytest.approx(1.2) and float(mean) == pytest.approx(2.5) and float(square) == pytest.approx(7.0)
    )


@pytest.mark.parametrize("correct", [False, True])
def test_adapted_steps(correct: bool) -> None:
    # V settles near its gradient's second moment; frozen, each coordinate has the closed form of its own step
    n, f, noise = 100, 0.3, torch.tensor([2.0, 6.0]).repeat_interleave(10_000)
    theta = nn.Parameter(torch.zeros(20_000))
    h = 0.08 if correct else 0.3
    sampler = SGHMC([theta], h * n, n, momentum=1 - f, adapt=True, burn_in=60, prior_precision=0.0,
                    noise_correction=correct, generator=torch.Generator().manual_seed(0))  # fmt: skip
    for _ in range(60):
        theta.grad = torch.ones(20_000) * noise / n
        sampler.step()
    square = sampler.state[theta]["square"]
    # the recursion forgets V = 1 at the rate at which its window grows
    assert torch.allclose(square, noise.square(), rtol=0.05)
    assert "window" not in sampler.state[theta]
    theta.data.zero_()
    squares, source = torch.zeros(20_000), torch.Generator().manual_seed(5)
    for k in range(800):
        felt = square.sqrt() * torch.randn(20_000, generator=source) if correct else None
        step_on_gaussian(sampler, theta, 1.0, felt)
        if k >= 200:
            squares += theta.detach().square() / 600
    assert torch.equal(square, sampler.state[theta]["square"])
    for part in (slice(0, 10_000), slice(10_000, 20_000)):
        a = h / float(square[part][0]) ** 0.5
        assert_mean(squares[part], 1 / (1 - a / (2 * (2 - f))), 0.01)


def test_corrections_that_exceed_the_noise() -> None:
    theta = nn.Parameter(torch.zeros(3))
    sampler = SGHMC([theta], 10.0, 10, adapt=True, burn_in=5, noise_correction=True)
    theta.grad = torch.full((3,), 100.0)
    with pytest.raises(StepSizeError, match="largest admissible lr"):
        sampler.step()
    assert torch.equal(theta.detach(), torch.zeros(3))


@pytest.mark.parametrize(
    "arguments", [{"adapt": True}, {"noise_correction": True}, {"momentum": 1.0}, {"momentum": -0.1}]
)
def test_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ArgumentError):
        bdl.samplers.SGHMC([nn.Parameter(torch.zeros(2))], 0.1, 10, **arguments)
