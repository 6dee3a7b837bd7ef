"""pSGLD: frozen, each coordinate is SGLD with its own step; not frozen, the known bias."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from bayesdl.errors import ArgumentError
from bayesdl.samplers import PSGLD
from bayesdl.samplers.psgld import psgld
from tests.samplers.chains import assert_mean, step_on_gaussian


def test_frozen() -> None:
    n, s2, t = 10, 2.0, 0.5
    theta = nn.Parameter(torch.ones(20_000))
    sampler = PSGLD([theta], 0.4, n, alpha=0.9, eps=1e-3, freeze_after=20, prior_precision=0.0, temperature=t,
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    level = torch.tensor([0.1, 0.4]).repeat_interleave(10_000)
    for _ in range(20):
        assert not sampler.frozen
        theta.grad = level.clone()
        sampler.step()
    square = sampler.state[theta]["square"].clone()
    assert torch.allclose(square, level.square() * (1 - 0.9**20)) and sampler.frozen
    theta.data.zero_()
    squares = torch.zeros(20_000)
    for k in range(300):
        step_on_gaussian(sampler, theta, s2)
        if k >= 100:
            squares += theta.detach().square() / 200
    assert torch.equal(square, sampler.state[theta]["square"])
    for part in (slice(0, 10_000), slice(10_000, 20_000)):
        a = 0.4 / n / (1e-3 + float(square[part][0]) ** 0.5) / s2
        assert_mean(squares[part], t * s2 / (1 - a / 2), 0.01)
    assert "preconditioner frozen" in repr(sampler)


@pytest.mark.parametrize(("alpha", "variance"), [(0.5, 1.95), (0.9, 1.69)])
def test_without_freezing_the_law_is_wrong(alpha: float, variance: float) -> None:
    # 2,000 chains of 600 steps on N(0, 1), h = .02: the bias that the divergence term would remove
    source = torch.Generator().manual_seed(0)
    theta, square = torch.randn(2000, generator=source), torch.ones(2000)
    kept = torch.zeros(2000)
    for k in range(900):
        noise = torch.randn(2000, generator=source)
        theta, square = psgld(theta, square, theta, theta, noise, 0.02, alpha=alpha, eps=1e-3)
        if k >= 300:
            kept += theta.square() / 600
    assert float(kept.mean()) == pytest.approx(variance, abs=0.2)


def test_gradients_enter_the_preconditioner_without_the_prior() -> None:
    theta = nn.Parameter(torch.full((4,), 3.0, dtype=torch.float64))
    sampler = PSGLD([theta], 0.1, 10, alpha=0.0, freeze_after=5, prior_precision=7.0, temperature=0.0)
    theta.grad = torch.full((4,), 0.5, dtype=torch.float64)
    sampler.step()
    assert torch.allclose(sampler.state[theta]["square"], torch.full((4,), 0.25, dtype=torch.float64))
    expected = psgld(torch.full((4,), 3.0).double(), torch.zeros(4).double(), torch.full((4,), 5.0 + 21.0).double(),
                     theta.grad, torch.zeros(4), 0.01, alpha=0.0, temperature=0.0)  # fmt: skip
    assert torch.allclose(theta.detach(), expected[0])


def test_never_frozen_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sampler = PSGLD([nn.Parameter(torch.zeros(2))], 0.1, 10)
    assert "biased" in caplog.text and "biased" in repr(sampler)


@pytest.mark.parametrize("arguments", [{"alpha": 1.0}, {"eps": 0.0}, {"freeze_after": 0}])
def test_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ArgumentError):
        PSGLD([nn.Parameter(torch.zeros(2))], 0.1, 10, **arguments)
