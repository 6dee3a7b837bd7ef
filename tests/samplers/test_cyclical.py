"""The cyclical schedule: rates, phases, what is collected, and the modes that it finds."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, FileFormatError
from bayesdl.samplers import SAMPLERS, SGHMC, SGLD, Cyclical
from tests.samplers.chains import step_on_gaussian


def build(**own: Any) -> tuple[nn.Parameter, SGLD, Cyclical]:
    theta = nn.Parameter(torch.linspace(-1, 1, 5))
    sampler = SGLD([theta], 0.5, 20, temperature=0.7, generator=torch.Generator().manual_seed(0))
    return theta, sampler, Cyclical(sampler, **own)


def test_rates_temperatures_and_phases() -> None:
    theta, sampler, schedule = build(cycle=10, cycles=3, explore=0.8, lr_min=0.1)
    rates, temperatures, collected, weights = [], [], [], []
    for k in range(1, 31):
        rates.append(sampler.param_groups[0]["lr"])
        temperatures.append(sampler.temperature)
        step_on_gaussian(sampler, theta, 1.0)
        schedule.step()
        if schedule.sampling:
            collected.append((k, schedule.index, schedule.phase))
            weights.append(schedule.weight)
    expected = [0.1 + 0.2 * (math.cos(math.pi * (k % 10) / 10) + 1) for k in range(30)]
    assert rates == pytest.approx(expected)
    assert (rates[0], rates[5]) == (0.5, pytest.approx(0.3)) and rates[9] == pytest.approx(
        0.1 + 0.2 * (1 - math.cos(math.pi / 10))
    )
    assert temperatures == ([0.0] * 8 + [0.7] * 2) * 3
    assert [k for k, _, _ in collected] == [9, 10, 19, 20, 29, 30]
    assert [c for _, c, _ in collected] == [0, 0, 1, 1, 2, 2] and collected[0][2] == 0.8
    assert sum(weights) == pytest.approx(3.0) and weights[0] / weights[1] == pytest.approx(expected[8] / expected[9])
    assert schedule.finished
    with pytest.raises(ArgumentError, match="all 3 cycles"):
        schedule.step()


def test_exploration_is_sgd() -> None:
    theta, sampler, schedule = build(cycle=10, explore=0.9)
    twin = nn.Parameter(theta.detach().clone())
    sgd = torch.optim.SGD([twin], 0.5, weight_decay=1 / 20)
    for k in range(9):
        sgd.param_groups[0]["lr"] = 0.25 * (math.cos(math.pi * k / 10) + 1)
        twin.grad = twin.detach() / 1.0 / 20
        sgd.step()
        step_on_gaussian(sampler, theta, 1.0)
        schedule.step()
    assert torch.equal(theta, twin)


def centres() -> Tensor:
    grid = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0])
    return torch.cartesian_prod(grid, grid)


def visited(cyclical: bool, chains: int = 12, steps: int = 3000) -> float:
    """Mean number of modes of a mixture of 25 Gaussians (sd 0.2, 2 apart) that chains visit while sampling."""
    means, s2 = centres(), 0.04
    source = torch.Generator().manual_seed(0)
    theta = nn.Parameter(means[12].repeat(chains, 1) + 0.2 * torch.randn(chains, 2, generator=source))
    sampler = SGLD([theta], 0.07 if cyclical else 0.01, 1, prior_precision=0.0,
                   generator=torch.Generator().manual_seed(1))  # fmt: skip
    schedule = Cyclical(sampler, cycle=100, cycles=steps // 100, explore=0.0) if cyclical else None
    seen = torch.zeros(chains, 25, dtype=torch.bool)
    for _ in range(steps):
        offset = theta.detach().unsqueeze(1) - means
        share = torch.softmax(-offset.square().sum(-1) / (2 * s2), 1)
        theta.grad = (share.unsqueeze(-1) * offset).sum(1) / s2
        sampler.step()
        if schedule is not None:
            schedule.step()
        if schedule is None or schedule.phase > 0.8:
            distance, mode = torch.cdist(theta.detach(), means).min(1)
            near = distance < 0.6
            seen[near, mode[near]] = True
    return float(seen.sum(1).double().mean())


def test_modes_of_a_grid_of_gaussians() -> None:
    # a constant small step stays near its mode: the barrier is 25 / 2; steps near the largest stable one
    # (h / s^2 = 1.75) spread it eightfold and leave it
    assert visited(False) < 4
    assert visited(True) > 10


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_around_every_sampler(name: str) -> None:
    theta = nn.Parameter(torch.ones(4))
    own = {"freeze_after": 3} if name == "psgld" else {"eta": 1.0} if name == "entropy-mcmc" else {}
    sampler = SAMPLERS[name]([theta], 0.1, 20, generator=torch.Generator().manual_seed(0), **own)
    sampler.register_pre_update_hook(lambda s: None)
    schedule = Cyclical(sampler, cycle=5, cycles=2, explore=0.6)
    while not schedule.finished:
        step_on_gaussian(sampler, theta, 1.0)
        schedule.step()
    assert torch.isfinite(theta).all() and "T=1" in repr(schedule)


def test_momenta_are_rescaled_between_cycles() -> None:
    theta = nn.Parameter(torch.zeros(3))
    sampler = SGHMC([theta], 0.4, 10, generator=torch.Generator().manual_seed(0))
    schedule = Cyclical(sampler, cycle=4, cycles=2, explore=0.5)
    for _ in range(4):
        step_on_gaussian(sampler, theta, 1.0)
        schedule.step()
    m = sampler.state[theta]["momentum"].clone()
    ratio = (1 / (0.5 * (math.cos(math.pi * 0.75) + 1))) ** 0.5
    force = theta.detach() / 10 + theta.detach() / 10
    step_on_gaussian(sampler, theta, 1.0)
    assert torch.allclose(sampler.state[theta]["momentum"], 0.9 * ratio * m - 0.4 * force)


def test_state() -> None:
    def trajectory(stop: int) -> list[Tensor]:
        theta, sampler, schedule = build(cycle=6, cycles=3, explore=0.5)
        found = []
        for k in range(15):
            if k == stop:
                saved = copy.deepcopy((theta.detach(), sampler.state_dict(), schedule.state_dict()))
                theta, sampler, schedule = build(cycle=6, cycles=3, explore=0.5)
                theta.data.copy_(saved[0])
                sampler.load_state_dict(saved[1])
                schedule.load_state_dict(saved[2])
            step_on_gaussian(sampler, theta, 1.0)
            schedule.step()
            found.append(theta.detach().clone())
        return found

    whole = trajectory(-1)
    for stop in (2, 3, 6, 11):
        assert all(torch.equal(a, b) for a, b in zip(whole, trajectory(stop), strict=True))
    with pytest.raises(FileFormatError, match="another schedule"):
        build(cycle=70)[2].load_state_dict(build(cycle=60)[2].state_dict())


@pytest.mark.parametrize(
    "own",
    [
        {"cycle": 2.5},
        {"cycle": 0},
        {"cycle": 5, "cycles": 0},
        {"cycle": 5, "explore": 0.9},
        {"cycle": 5, "lr_min": 1.0},
    ],
)
def test_arguments(own: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        build(**own)


def test_one_schedule_alone() -> None:
    sampler = SGLD([nn.Parameter(torch.zeros(2))], lambda k: 0.1, 10)
    with pytest.raises(ArgumentError, match="function of the step"):
        Cyclical(sampler, cycle=20)
