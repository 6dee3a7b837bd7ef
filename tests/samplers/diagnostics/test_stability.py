"""h lambda_max against the Hessian of the potential, and against what a step does beyond the limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import bayesdl as bdl
from bayesdl.errors import ArgumentError
from bayesdl.samplers import BAOAB, PSGLD, SASGLD, SGHMC, SGLD, EntropyMCMC, Sampler
from bayesdl.samplers.diagnostics import stability

N, NOISE = 40, 0.5


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
    return x, x.sum(1, keepdim=True)


def curvature(scales: Tensor, precisions: Tensor) -> float:
    """Largest eigenvalue of D^1/2 (X^T X / s^2 + Lambda) D^1/2 with a column of ones for the bias."""
    x = torch.cat([data()[0], torch.ones(N, 1, dtype=torch.float64)], 1)
    hessian = x.T @ x / NOISE**2 + torch.diag(precisions)
    return float(torch.linalg.eigvalsh(scales.sqrt().unsqueeze(1) * hessian * scales.sqrt()).max())


def groups(net: nn.Linear) -> list[dict[str, Any]]:
    return [
        {"params": [("weight", net.weight)], "prior_precision": 2.0},
        {"params": [("bias", net.bias)], "prior_precision": 50.0, "lr": 0.05},
    ]


@pytest.mark.parametrize(
    ("make", "own", "limit"),
    [
        (SGLD, {}, 2.0),
        (SGHMC, {"momentum": 0.7}, 3.4),
        (BAOAB, {}, 4.0),
        (PSGLD, {"freeze_after": 2}, 2.0),
        (SGHMC, {"momentum": 0.7, "adapt": True, "burn_in": 3}, 3.4),
        (SASGLD, {}, 2.0),
        (SASGLD, {"momentum": 0.5}, 4.0),
        (EntropyMCMC, {"eta": 0.5}, 2.0),
    ],
)
def test_the_step_in_the_stiffest_direction(make: Callable[..., Sampler], own: dict[str, Any], limit: float) -> None:
    net, (x, y) = nn.Linear(3, 1).double(), data()
    sampler = make(groups(net), 0.01, N, generator=torch.Generator().manual_seed(0), **own)
    sampler.register_pre_update_hook(lambda s: None)
    for _ in range(4):
        sampler.zero_grad()
        (-Normal(net(x), NOISE).log_prob(y).mean()).backward()
        sampler.step()
    scales = torch.tensor([1.0, 1, 1, 5], dtype=torch.float64)
    if make is PSGLD or own.get("adapt"):
        square = torch.cat([sampler.state[p]["square"].flatten() for p in net.parameters()])
        scales = scales / (1e-5 + square.sqrt() if make is PSGLD else square.sqrt())
    expected = curvature(scales, torch.tensor([2.0, 2, 2, 50], dtype=torch.float64)) + (
        4.0 if make is EntropyMCMC else 0
    )
    found = stability(sampler, net, [(x, y)], bdl.Gaussian(noise=NOISE))
    factor = sampler.record.psi ** (2 if sampler.underdamped else 1)
    assert found.curvature == pytest.approx(expected, rel=1e-6)
    assert found.limit == pytest.approx(limit)
    assert found.size == pytest.approx(0.01 / N * factor * expected, rel=1e-6)
    assert found.largest_lr * found.size == pytest.approx(0.01 * limit)
    assert found.stable == (found.size < limit)


@pytest.mark.parametrize(("share", "stable"), [(0.98, True), (1.02, False)])
def test_beyond_the_limit_a_chain_without_noise_leaves(share: float, stable: bool) -> None:
    net, (x, y) = nn.Linear(3, 1).double(), data()
    sampler = SGLD(net.named_parameters(), 1e-3, N, temperature=0.0, prior_precision=0.0)
    likelihood = bdl.Gaussian(noise=NOISE)
    lr = stability(sampler, net, [(x, y)], likelihood).largest_lr * share
    sampler.param_groups[0]["lr"] = lr
    assert stability(sampler, net, [(x, y)], likelihood).stable == stable
    for _ in range(3000):
        sampler.zero_grad()
        (-Normal(net(x), NOISE).log_prob(y).mean()).backward()
        sampler.step()
    residual = float((net(x) - y).detach().abs().max())
    assert residual < 1e-3 if stable else residual > 1e3


def test_parameters_of_another_network_are_refused() -> None:
    net = nn.Linear(3, 1)
    with pytest.raises(ArgumentError, match="2 of the sampler's 2 parameters"):
        stability(SGLD(nn.Linear(3, 1).parameters(), 0.1, N), net, [data()], "gaussian")
