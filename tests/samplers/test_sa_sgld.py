"""SA-SGLD: weighted averages are right where plain ones are not; m = M is SGLD; the optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError
from bayesdl.samplers import BAOAB, SASGLD, SGLD, UnweightedChainWarning
from bayesdl.samplers.baoab import baoab
from bayesdl.samplers.sa_sgld import monitor_of, relax, time_factor
from bayesdl.samplers.sgld import sgld
from tests.samplers.chains import step_on_gaussian

SMALLEST, LARGEST, R, ALPHA, RATE = 0.1, 10.0, 0.5, 5.0, 0.005


def gaussian(x: Tensor) -> Tensor:
    return x / torch.tensor([1.0, 0.04])


def funnel(x: Tensor) -> Tensor:
    """U = y^2 / 2 + x^2 e^-y / 2 + y / 2; coordinates (y, x)."""
    y, z = x.unbind(-1)
    return torch.stack([y - 0.5 * z * z * torch.exp(-y) + 0.5, z * torch.exp(-y)], -1)


TARGETS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "gaussian": (gaussian, torch.tensor([1.0, 0.04])),
    "funnel": (funnel, torch.tensor([1.0, 1.6487])),
}


@cache
def moments(target: str, how: str, chains: int = 2000, steps: int = 4000, burn: int = 1200) -> dict[str, Tensor]:
    """Second moments under several weights; `how`: one zeta per chain ("global") or "coordinate", or "underdamped"."""
    gradient, truth = TARGETS[target]
    source = torch.Generator().manual_seed(0)
    x = torch.randn(chains, 2, generator=source) * truth.clamp(max=1).sqrt()
    m, last = torch.zeros_like(x), torch.ones(chains, 1)
    zeta: Tensor | None = None
    time, spacing = torch.zeros(chains, 1, dtype=torch.float64), 0.2
    sums = {key: torch.zeros(2, dtype=torch.float64) for key in ("plain", "weighted", "time")}
    norms = dict.fromkeys(sums, 0.0)
    for k in range(steps):
        g = gradient(x)
        monitor = g.square() if how == "coordinate" else g.square().sum(-1, keepdim=True)
        zeta = relax(monitor / ALPHA if zeta is None else zeta, monitor, RATE, ALPHA)
        psi = time_factor(zeta, SMALLEST, LARGEST, R)
        advance = psi.mean(-1, keepdim=True).double() * RATE
        if k >= burn:
            crossed = torch.floor((time + advance) / spacing) - torch.floor(time / spacing)
            for key, weight in (("plain", torch.ones_like(advance)), ("weighted", advance), ("time", crossed)):
                sums[key] += (weight * x.double().square()).sum(0)
                norms[key] += float(weight.sum())
        time += advance
        noise = torch.randn(chains, 2, generator=source)
        if how == "underdamped":
            x, m = baoab(x, m * psi / last, g, noise, psi * psi * RATE**2, 0.99**psi)
            last = psi
        else:
            x = sgld(x, g, noise, psi * RATE)
    return {key: sums[key] / norms[key] for key in sums}


def right(found: Tensor, truth: Tensor) -> bool:
    """The moment test: second moments within 6 %.

    Discretisation takes 3 % of that; Monte Carlo errors are 0.5 % (the funnel's E x^2: 1.5 %), so that a right sampler
    fails less than once in 400.
    """
    return bool(((found / truth - 1).abs() < 0.06).all())


@pytest.mark.parametrize("target", list(TARGETS))
def test_weighted_averages_hit_the_truth_and_plain_ones_do_not(target: str) -> None:
    found, truth = moments(target, "global"), TARGETS[target][1]
    assert right(found["weighted"], truth), found
    assert right(found["time"], truth), found
    assert not right(found["plain"], truth), found


@pytest.mark.parametrize("target", list(TARGETS))
def test_one_monitor_per_coordinate_is_wrong_with_any_weight(target: str) -> None:
    found, truth = moments(target, "coordinate"), TARGETS[target][1]
    assert not right(found["weighted"], truth) and not right(found["plain"], truth), found


def test_weighted_averages_with_momentum() -> None:
    # with RATE^2 for h the time step is RATE psi; 20,000 steps of it would reach the same accuracy as above, so a
    # shorter run tests E x1^2, whose time scale is 0.2, alone
    found = moments("gaussian", "underdamped", 3000, 3500, 1500)
    assert abs(float(found["weighted"][1]) / 0.04 - 1) < 0.05, found
    assert abs(float(found["plain"][1]) / 0.04 - 1) > 0.08, found


def test_bounds() -> None:
    zeta = torch.logspace(-12, 12, 200, dtype=torch.float64)
    psi = time_factor(zeta, 0.1, 10.0, 0.25)
    assert isinstance(psi, Tensor)
    assert bool((psi.diff() < 0).all()) and float(psi.max()) < 10 and float(psi.min()) > 0.1
    assert time_factor(0.0, 0.1, 10.0, 0.25) == pytest.approx(10.0)
    inner = zeta[(zeta > 1e-6) & (zeta < 1e6)]  # further out psi has lost the digits
    back = monitor_of(time_factor(inner, 0.1, 10.0, 0.25), 0.1, 10.0, 0.25)
    assert torch.allclose(torch.as_tensor(back), inner, rtol=1e-8)
    for equal in (0.1, 0.3, 7.0):
        assert all(time_factor(float(z), equal, equal, 0.25) == equal for z in zeta)


def run(sampler: SASGLD | SGLD | BAOAB, theta: nn.Parameter, steps: int = 30) -> Tensor:
    for _ in range(steps):
        step_on_gaussian(sampler, theta, torch.linspace(0.5, 2, len(theta)).to(theta))
    return theta.detach()


@pytest.mark.parametrize("t", [1.0, 0.0])
def test_equal_bounds_are_sgld_bit_for_bit(t: float) -> None:
    start, lr = torch.linspace(-1, 1, 500), 0.7
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    shared = {"prior_precision": 2.0, "temperature": t}
    ours = SASGLD([one], lr, 30, smallest=0.3, largest=0.3, generator=torch.Generator().manual_seed(3), **shared)
    plain = SGLD([two], 0.3 * lr, 30, generator=torch.Generator().manual_seed(3), **shared)
    assert torch.equal(run(ours, one), run(plain, two))


def test_equal_bounds_with_momentum_are_baoab() -> None:
    start = torch.linspace(-1, 1, 50, dtype=torch.float64)
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = SASGLD([one], 0.7, 30, momentum=0.8, smallest=0.5, largest=0.5, generator=torch.Generator().manual_seed(3))
    plain = BAOAB([two], 0.25 * 0.7, 30, momentum=0.8**0.5, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(run(ours, one), run(plain, two), rtol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_optimiser_makes_these_steps(momentum: float) -> None:
    start, n, lr, s2 = torch.linspace(-1, 1, 6, dtype=torch.float64), 20, 0.8, 0.5
    theta = nn.Parameter(start.clone())
    sampler = SASGLD([theta], lr, n, momentum=momentum, alpha=3.0, omega=2.0, prior_precision=1.5, temperature=0.7,
                     generator=torch.Generator().manual_seed(0))  # fmt: skip
    records = []
    sampler.register_pre_update_hook(lambda s: records.append((s.record, theta.detach().clone())))
    x, m, zeta, last, time = start.clone(), None, None, None, 0.0
    for k in range(8):
        before = sampler._noise.state()
        step_on_gaussian(sampler, theta, s2)
        after = sampler._noise.state()
        sampler._noise.load(before)
        m = sampler._noise.draw_apart(x) * 1.0 if m is None and momentum else m
        noise = sampler._noise.draw([x])[0].clone()
        sampler._noise.load(after)
        g = x / s2 + 1.5 * x
        monitor = float((g / n).norm()) ** 2 / 2.0
        zeta = float(relax(monitor / 3.0 if zeta is None else zeta, monitor, lr, 3.0))
        psi = float(time_factor(zeta, 0.1, 10.0, 0.25))
        assert torch.equal(records[k][1], x) or torch.allclose(records[k][1], x)
        record = records[k][0]
        assert (record.step, record.psi, record.time) == (k, pytest.approx(psi), pytest.approx(time))
        if momentum:
            step = psi**2 * lr / n
            m = m * (step * 0.7) ** 0.5 if last is None else m * psi / last
            x, m = baoab(x, m, g, noise, step, momentum**psi, 0.7)
            last = psi
            assert record.weight == pytest.approx(psi * lr**0.5)
        else:
            x = sgld(x, g, noise, psi * lr / n, 0.7)
            assert record.weight == pytest.approx(psi * lr)
        time += record.weight
        assert torch.allclose(theta.detach(), x)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_zero_temperature_is_descent_by_the_running_norm(momentum: float) -> None:
    """theta' = theta - psi lr ghat with psi of the running mean of |ghat|^2; with momentum psi^2 lr and c = 0.9^psi."""
    start, n, lr, s2 = torch.linspace(-1, 1, 6, dtype=torch.float64), 20, 0.8, 0.5
    theta = nn.Parameter(start.clone())
    sampler = SASGLD([theta], lr, n, momentum=momentum, alpha=3.0, omega=2.0, prior_precision=1.5, temperature=0.0)
    sampler.register_pre_update_hook(lambda s: None)
    x, m, zeta, last = start.clone(), torch.zeros(6, dtype=torch.float64), None, None
    for _ in range(8):
        step_on_gaussian(sampler, theta, s2)
        force = (x / s2 + 1.5 * x) / n
        monitor = float(force.square().sum()) / 2.0
        fresh = monitor / 3.0 if zeta is None else zeta
        zeta = math.exp(-3.0 * lr) * fresh + (1 - math.exp(-3.0 * lr)) * monitor / 3.0
        psi = 0.1 * (zeta**0.25 + 10.0) / (zeta**0.25 + 0.1)
        if momentum:
            m = m * (1.0 if last is None else psi / last) - psi**2 * lr * force
            x, m, last = x + 0.5 * (1 + momentum**psi) * m, momentum**psi * m, psi
        else:
            x = x - psi * lr * force
        assert torch.allclose(theta.detach(), x, rtol=1e-12)


def test_steps_without_a_chain_are_said_to_be_unweighted() -> None:
    theta = nn.Parameter(torch.ones(3))
    sampler = SASGLD([theta], 0.1, 10)
    step_on_gaussian(sampler, theta, 1.0)
    with pytest.warns(UnweightedChainWarning, match="biased"):
        step_on_gaussian(sampler, theta, 1.0)
    step_on_gaussian(sampler, theta, 1.0)


@pytest.mark.parametrize(
    "arguments", [{"smallest": 0.0}, {"smallest": 2.0, "largest": 1.0}, {"r": 0.0}, {"alpha": -1.0}, {"momentum": 1.0}]
)
def test_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ArgumentError):
        SASGLD([nn.Parameter(torch.zeros(2))], 0.1, 10, **arguments)
