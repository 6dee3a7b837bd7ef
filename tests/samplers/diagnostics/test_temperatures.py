from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import NotFittedError, UnsupportedError
from bayesdl.samplers import BAOAB, SASGLD, SGHMC, SGLD, SGNHT, Sampler
from bayesdl.samplers.diagnostics import Thermometer, expected_kinetic
from tests.samplers.chains import step_on_gaussian

WIDTH, N, STEPS, T = 4000, 100, 400, 0.7
VARIANCE = 2.0


def measured(
    make: Callable[..., Sampler], a: float, centre: Tensor | None = None, **own: Any
) -> tuple[Sampler, Thermometer]:
    """A thermometer in a chain on N(0, VARIANCE) per coordinate, started in its law; a = h / VARIANCE."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(
        torch.randn(WIDTH, generator=generator, dtype=torch.float64) * math.sqrt(T * VARIANCE)
    )
    sampler = make([parameter], a * VARIANCE * N, N, prior_precision=0.0, temperature=T, generator=generator, **own)
    sampler.register_pre_update_hook(lambda _: None)  # as a chain does
    for _ in range(50):
        step_on_gaussian(sampler, parameter, VARIANCE)
    meter = Thermometer(sampler, None if centre is None else {"0.0": centre})
    for _ in range(STEPS):
        step_on_gaussian(sampler, parameter, VARIANCE)
    return sampler, meter


def tolerance(effective_steps: float) -> float:
    """Four relative standard errors sqrt(2 / (d ess)): a right thermometer fails once in 16,000."""
    return 4 * math.sqrt(2 / (WIDTH * effective_steps))


@pytest.mark.parametrize("a", [0.1, 0.5])
def test_configurational_temperature_of_sgld(a: float) -> None:
    """T / (1 - a / 2); squares of an AR(1) chain with r = 1 - a: ess = n (1 - r^2) / (1 + r^2)."""
    r = 1 - a
    _, meter = measured(SGLD, a, torch.zeros(WIDTH))
    effective = STEPS * (1 - r * r) / (1 + r * r)
    assert meter.configurational()["0.0"] == pytest.approx(T / (1 - a / 2), rel=tolerance(effective))
    assert abs(T / (1 - a / 2) - T) > 2 * tolerance(effective) * T  # the bias of the step is seen


def test_the_mean_as_centre_costs_its_share() -> None:
    """1 - tau / n, tau = (1 + r) / (1 - r), up to terms of 1 / n^2."""
    a, r = 0.1, 0.9
    _, meter = measured(SGLD, a)
    tau = (1 + r) / (1 - r)
    expected = T / (1 - a / 2) * (1 - tau / STEPS)
    effective = STEPS * (1 - r * r) / (1 + r * r)
    assert meter.configurational()["0.0"] == pytest.approx(expected, rel=tolerance(effective))


@pytest.mark.parametrize(
    ("make", "own"),
    [(SGHMC, {"momentum": 0.5}), (BAOAB, {"momentum": 0.5}), (SGNHT, {"momentum": 0.5}), (SASGLD, {"momentum": 0.5})],
)
def test_kinetic_temperature(make: Callable[..., Sampler], own: dict[str, Any]) -> None:
    """Momenta forget within two steps or so: ess of at least a fourth of the steps."""
    a = 0.05
    if make is SASGLD:  # bounds that the steps stay between, so that psi varies
        own = {**own, "smallest": 0.8, "largest": 1.0}
    sampler, meter = measured(make, a, **own)
    expected = expected_kinetic(sampler, a)
    if make is SGHMC:
        assert expected == pytest.approx(T / (1 - 0.25 - a / 4))
    assert meter.kinetic()["0.0"] == pytest.approx(expected, rel=tolerance(STEPS / 4))


def test_noise_of_gradients_heats() -> None:
    """Noise of variance v: T + h v / (2 f) in the kinetic temperature of SGHMC, and none in the configurational one's
    own noise, which is independent of theta."""
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.randn(WIDTH, generator=generator, dtype=torch.float64))
    h, v, f = 0.05, 10.0, 0.5
    sampler = SGHMC([parameter], h * N, N, momentum=1 - f, prior_precision=0.0, generator=generator)
    meter = None
    for step in range(100 + STEPS):
        if step == 100:
            meter = Thermometer(sampler)
        noise = math.sqrt(v) * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        step_on_gaussian(sampler, parameter, 1.0, noise)
    assert meter is not None
    hot = 1 + h * v / (2 * f)
    assert meter.kinetic()["0.0"] == pytest.approx(hot / (1 - f / 2 - h / 4), rel=tolerance(STEPS / 4))


def test_the_prior_is_part_of_the_potential() -> None:
    """A chain on the prior alone: T / (1 - a / 2) with a = h lam, for a precision and for a Prior object."""
    a, lam = 0.2, 4.0
    for own in ({"prior_precision": lam}, {"prior": bdl.GaussianPrior(precision=lam)}):
        generator = torch.Generator().manual_seed(2)
        parameter = torch.nn.Parameter(torch.randn(WIDTH, generator=generator, dtype=torch.float64) / math.sqrt(lam))
        sampler = SGLD([parameter], a / lam * N, N, allow_unused=True, generator=generator, **own)  # type: ignore[arg-type]
        meter = Thermometer(sampler, {"0.0": torch.zeros(WIDTH)})
        for _ in range(STEPS):
            sampler.step()
        r = 1 - a
        effective = STEPS * (1 - r * r) / (1 + r * r)
        assert meter.configurational()["0.0"] == pytest.approx(1 / (1 - a / 2), rel=tolerance(effective))


def test_refusals() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedError, match="preconditioner"):
        Thermometer(SGLD([("w", parameter)], 0.1, 10, prior=bdl.HorseshoePrior(scale=1.0)))
    sampler = SGLD([parameter], 0.1, 10)
    meter = Thermometer(sampler)
    with pytest.raises(NotFittedError, match="two or more"):
        meter.configurational()
    parameter.grad = torch.zeros(3)
    sampler.step()
    with pytest.raises(NotFittedError, match="momentum"):
        meter.kinetic()
    meter.close()
    sampler.step()
    assert meter.steps == 1
    with pytest.raises(UnsupportedError, match="no kinetic"):
        expected_kinetic(sampler)


@pytest.mark.parametrize("steps", [63, 300])
def test_the_standard_error_is_the_spread_of_independent_measurements(steps: int) -> None:
    """60 blocks of 50 coordinates; the mean of squared errors over them has a relative sd of sqrt(2 / (40 * 60)) and
    their variance one of sqrt(2 / 59): 5 of these in the ratio, a failure in a million."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64)) for _ in range(60)]
    sampler = BAOAB(blocks, 0.1 * N, N, prior_precision=0.0, momentum=0.8, generator=generator)
    for k in range(50 + steps + 1):
        if k == 50:
            meter = Thermometer(sampler)
        for block in blocks:
            block.grad = block.detach() / N
        sampler.step()
    found = torch.tensor(list(meter.kinetic().values()))
    errors = torch.tensor(list(meter.kinetic_error().values()))
    assert float(errors.square().mean() / found.var()) == pytest.approx(1.0, rel=5 * math.sqrt(2 / 59 + 2 / 2400))


def test_few_steps_have_no_standard_error() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    sampler = BAOAB([parameter], 0.1, 10, generator=torch.Generator().manual_seed(0))
    meter = Thermometer(sampler)
    for _ in range(5):
        parameter.grad = torch.ones(3)
        sampler.step()
    with pytest.raises(NotFittedError, match="too few"):
        meter.kinetic_error()
