"""Left-out residuals in function space, against explicit refits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bayesdl.tuning.leftout import left_out, nll, space


def problem(outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Design `(10, 4)`, targets, and weights that are no mode of anything."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(4, outputs, generator=generator, dtype=torch.float64)
    y = y + 0.4 * torch.randn(10, outputs, generator=generator, dtype=torch.float64)
    return x, y, torch.randn(4, outputs, generator=generator, dtype=torch.float64)


def kernel_of(x: Tensor, outputs: int) -> Tensor:
    return torch.kron(x @ x.T, torch.eye(outputs, dtype=x.dtype))


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("ratio", [1e-3, 0.2, 7.0, 1e4])
def test_equals_a_refit_without_the_point_under_every_prior(outputs: int, ratio: float) -> None:
    x, y, weights = problem(outputs)
    model = space(kernel_of(x, outputs), (y - x @ weights) + x @ weights)
    residual, precision, noise = model.at(torch.tensor(ratio, dtype=torch.float64))
    total = 0.0
    for n in range(len(x)):
        rest = torch.arange(len(x)) != n
        hessian = x[rest].T @ x[rest] + torch.eye(4, dtype=x.dtype) / ratio
        refit = torch.linalg.solve(hessian, x[rest].T @ y[rest])
        torch.testing.assert_close(residual[n], y[n] - x[n] @ refit, rtol=1e-8, atol=1e-8)
        spread = 1.0 + x[n] @ torch.linalg.solve(hessian, x[n])
        expected = torch.eye(outputs, dtype=x.dtype) * spread
        torch.testing.assert_close(torch.linalg.inv(precision[n]), expected, rtol=1e-8, atol=1e-8)
        normal = torch.distributions.Normal(x[n] @ refit, noise * spread.sqrt())
        total -= float(normal.log_prob(y[n]).sum())
    constant = 0.5 * outputs * (math.log(2 * math.pi) + 1.0)  # at the likeliest noise the squares sum to one half
    assert math.isclose(total / len(x), float(nll(precision, noise)) + constant, rel_tol=1e-9)


def test_the_weights_at_which_the_model_is_linearised_do_not_matter() -> None:
    x, y, weights = problem(2)
    kernel = kernel_of(x, 2)
    here = left_out(kernel, y - x @ weights, x @ weights)
    mode = torch.linalg.solve(x.T @ x, x.T @ y)
    torch.testing.assert_close(here.square() >= 0, torch.ones_like(here, dtype=torch.bool))
    there = left_out(kernel, y - x @ mode, x @ mode)
    assert float(there.square().mean()) > float((y - x @ mode).square().mean())
    # far-off weights have larger residuals than any left out: those are the bound, point by point
    assert float((y - x @ weights).square().mean()) > float(there.square().mean())
    torch.testing.assert_close(here.abs(), torch.maximum(there.abs(), (y - x @ weights).abs()))


def test_residuals_of_an_overfitted_network_are_those_of_new_data_to_a_factor_of_two() -> None:
    """A network that knows its targets by heart: its own residuals are several times too small."""
    import bayesdl as bdl
    from bayesdl.tuning.training import left_out_residuals

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 2, generator=generator)
    y = (x[:, :1] * x[:, 1:]).sin() + 0.3 * torch.randn(400, 1, generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(1500):
        optimiser.zero_grad()
        nn.functional.mse_loss(net(x[:60]), y[:60]).backward()
        optimiser.step()
    with torch.no_grad():
        inside, outside = ((net(x[p]) - y[p]).square().mean().sqrt() for p in (slice(0, 60), slice(60, 400)))
    bayes = bdl.wrap(net, "laplace", [(x[:60], y[:60])], likelihood="gaussian", progress=False)
    assert isinstance(bayes.posterior, bdl.posteriors.GaussianPosterior)
    residual = left_out_residuals(bayes, bayes.posterior, [(x[:60], y[:60])], 60)
    assert inside < outside / 3.0
    assert 0.5 < float(residual.square().mean().sqrt()) / float(outside) < 2.0
