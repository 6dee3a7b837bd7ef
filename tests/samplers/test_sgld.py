"""SGLD: closed forms on Gaussians, SGD at T = 0, the noise correction."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, StepSizeError
from bayesdl.samplers import SGLD
from bayesdl.samplers.sgld import sgld
from tests.oracles import linear_law
from tests.samplers.chains import assert_mean, step_on_gaussian

CASES = list(itertools.product((0.1, 0.3, 1.0), (1.0, 0.5), (1.0, 0.25), (0.0, 3.0)))  # a = h / s^2, s, T, v


@pytest.mark.parametrize(("a", "s", "t", "v"), CASES)
def test_variance_of_the_discrete_chain(a: float, s: float, t: float, v: float) -> None:
    h = a * s * s

    def step(x: Tensor, xi: Tensor) -> Tensor:
        return sgld(x, x / s**2 + v**0.5 * xi[1:], xi[:1], h, t)

    matrix, covariance = linear_law(step, 1, 2)
    assert float(matrix) == pytest.approx(1 - a, rel=1e-12)  # the lag-1 autocorrelation
    assert float(covariance) == pytest.approx((t + h * v / 2) * s * s / (1 - a / 2), rel=1e-10)


@pytest.mark.parametrize("t", [1.0, 0.3])
def test_covariance_for_a_precision_matrix(t: float) -> None:
    p = torch.tensor([[2.0, 0.8, 0.0], [0.8, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)
    _, covariance = linear_law(lambda x, xi: sgld(x, p @ x, xi, 0.2, t), 3, 3)
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(covariance, t * torch.linalg.inv(p) @ torch.linalg.inv(eye - 0.1 * p), rtol=1e-9)


def test_the_correction_takes_off_the_noise_of_gradients() -> None:
    h, t, v = 0.1, 0.7, 4.0

    def step(x: Tensor, xi: Tensor) -> Tensor:
        return sgld(x, x + v**0.5 * xi[1:], xi[:1], h, t, v)

    assert float(linear_law(step, 1, 2)[1]) == pytest.approx(t / (1 - h / 2), rel=1e-10)


@pytest.mark.parametrize(("lr", "t", "correction"), [(50.0, 0.5, 0.0), (20.0, 1.0, 5.0)])
def test_the_optimiser_has_that_variance(lr: float, t: float, correction: float) -> None:
    # 20,000 coordinates are as many chains; a = 50 / (100 * 2) = 0.25 and 0.1, two hundred steps after sixty
    n, s2 = 100, 2.0
    theta = nn.Parameter(torch.zeros(20_000))
    sampler = SGLD([theta], lr, n, prior_precision=0.0, temperature=t, noise_correction=correction,
                   generator=torch.Generator().manual_seed(1))  # fmt: skip
    source, squares = torch.Generator().manual_seed(2), torch.zeros(20_000)
    for k in range(260):
        added = torch.randn(20_000, generator=source) * correction**0.5
        step_on_gaussian(sampler, theta, s2, added)
        if k >= 60:
            squares += theta.detach().square() / 200
    assert_mean(squares, t * s2 / (1 - lr / n / s2 / 2), 0.004)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize("wd", [0.0, 5e-4])
def test_zero_temperature_is_sgd_bit_for_bit(wd: float) -> None:
    ends = []
    for ours in (True, False):
        net = network()
        lam = bdl.samplers.precision_from_weight_decay(wd, 4000)
        optimizer = (
            SGLD(net.parameters(), 0.3, 4000, prior_precision=lam, temperature=0.0)
            if ours
            else torch.optim.SGD(net.parameters(), 0.3, weight_decay=wd)
        )
        source = torch.Generator().manual_seed(3)
        for _ in range(50):
            x, y = torch.randn(8, 5, generator=source), torch.randint(3, (8,), generator=source)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    assert torch.equal(*ends)


def test_conjugate_linear_regression() -> None:
    # exact posterior of a linear model with known noise; minibatch-free gradients, 3,000 chains one after another would
    # take long: the rows of `theta` are independent copies of the model
    torch.manual_seed(1)
    x, sigma, lam, n = torch.randn(50, 2, dtype=torch.float64), 0.5, 2.0, 50
    y = x @ torch.tensor([1.0, -0.5], dtype=torch.float64) + sigma * torch.randn(50, dtype=torch.float64)
    precision = x.T @ x / sigma**2 + lam * torch.eye(2, dtype=torch.float64)
    mean = torch.linalg.solve(precision, x.T @ y / sigma**2)
    lr = 0.02 * n / float(torch.linalg.eigvalsh(precision)[-1])
    theta = nn.Parameter(mean.repeat(3000, 1))
    sampler = SGLD([theta], lr, n, prior_precision=lam, generator=torch.Generator().manual_seed(4))
    kept = []
    for k in range(1500):
        theta.grad = (theta.detach() @ x.T - y) @ x / sigma**2 / n
        sampler.step()
        if k >= 300 and k % 10 == 0:
            kept.append(theta.detach().clone())
    draws = torch.stack(kept)
    offset = draws - mean
    covariance = torch.linalg.inv(precision) @ torch.linalg.inv(torch.eye(2) - lr / n * precision / 2)
    for i, j in ((0, 0), (0, 1), (1, 1)):  # five checks at 4 standard errors: a right sampler fails once in 3,000
        assert_mean((offset[..., i] * offset[..., j]).mean(0), float(covariance[i, j]), 0.1 if i != j else 0.01)
        if i == j:
            error = float(draws[..., i].mean(0).std() / 3000**0.5)
            assert abs(float(draws[..., i].mean() - mean[i])) < 4 * error < 0.01


def test_corrections_that_exceed_the_noise() -> None:
    theta = nn.Parameter(torch.zeros(3))
    sampler = SGLD([theta], 1.0, 10, noise_correction=30.0)
    theta.grad = torch.ones(3)
    with pytest.raises(StepSizeError, match=r"largest admissible lr is 0.6667"):
        sampler.step()
    assert torch.equal(theta.detach(), torch.zeros(3)) and sampler.iteration == 0
    sampler.param_groups[0]["lr"] = 0.66
    sampler.step()
    with pytest.raises(ArgumentError, match="noise_correction=-1"):
        SGLD([theta], 1.0, 10, noise_correction=-1.0)
