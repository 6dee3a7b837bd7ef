"""An open Gaussian noise: the residual that each training point would have without itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.methods.base import Task
from bayesdl.methods.noise import with_left_out_noise
from bayesdl.network import Network
from tests.untouched import untouched


def task(network: nn.Module, x: Tensor, y: Tensor, noise: float | None = None) -> Task:
    return Task(Network(network), (network,), bdl.Gaussian(noise), None, [(x, y)], None, False)


def overfitted() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    y = x[:, :1] + 0.5 * torch.randn(60, 1, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(600):
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        optimizer.step()
    return network, x, y


def test_an_overfitted_network_gets_a_noise_of_the_size_of_its_errors_elsewhere() -> None:
    network, x, y = overfitted()
    misfit = float((network(x) - y).detach().square().mean().sqrt())
    assert misfit < 0.05  # it knows the targets, whose noise is 0.5
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(2000, 4, generator=generator)
    error = float((network(other) - other[:, :1]).detach().square().mean().add(0.25).sqrt())
    with untouched(network):
        likelihood, findings = with_left_out_noise(task(network, x, y))
    assert float(likelihood.noise) == pytest.approx(error, rel=0.5)
    assert "with each training point left out" in findings[0].text and findings[0].topic == "noise"


def test_a_linear_model_that_is_known_well_keeps_its_residuals() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 2, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0]]) + 0.3 * torch.randn(1500, 1, generator=generator)
    network = nn.Linear(2, 1)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    network.load_state_dict({"weight": solution[:2].T, "bias": solution[2]})
    misfit = float((network(x) - y).detach().square().mean().sqrt())
    likelihood, _ = with_left_out_noise(task(network, x, y))
    assert float(likelihood.noise) == pytest.approx(misfit, rel=0.01)  # leave-one-out adds about d / N


def test_a_given_noise_stays() -> None:
    network, x, y = overfitted()
    assert with_left_out_noise(task(network, x, y, noise=0.7)) == (bdl.Gaussian(0.7), ())


def test_a_network_without_residuals_gets_a_noise() -> None:
    x = torch.eye(3)
    network = nn.Linear(3, 1, bias=False)
    y = network(x).detach()
    likelihood, _ = with_left_out_noise(task(network, x, y))
    assert float(likelihood.noise) > 0


def test_a_network_without_a_jacobian_keeps_its_residuals_and_says_so() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).detach()

    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    network, y = Detached(), torch.zeros(40, 1)
    likelihood, findings = with_left_out_noise(task(network, x, y))
    assert findings[0].severity == "warning" and "understates" in findings[0].text
    expected = network(x).square().mean().sqrt()
    assert float(likelihood.noise) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("method", [bdl.SWAG(epochs=2, lr=1e-4), bdl.SMC(particles=8, moves=1), "sghmc"])
def test_methods_that_train_or_sample_take_it(method: object) -> None:
    network, x, y = overfitted()
    bayes = bdl.wrap(network, method, [(x, y)], likelihood="gaussian")
    assert float(bayes.likelihood.noise) > 0.25
