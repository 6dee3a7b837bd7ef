"""Entropy-MCMC: the joint covariance of weights and anchor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, StepSizeError
from bayesdl.samplers import EntropyMCMC
from bayesdl.samplers.entropy import entropy_mcmc
from tests.oracles import linear_law
from tests.samplers.chains import assert_mean, step_on_gaussian


@pytest.mark.parametrize(("s", "eta", "h", "t"), [(1.0, 0.5, 0.02, 1.0), (0.6, 0.2, 0.05, 0.3)])
def test_joint_law(s: float, eta: float, h: float, t: float) -> None:
    def step(x: Tensor, xi: Tensor) -> Tensor:
        return torch.stack(entropy_mcmc(x[0], x[1], x[0] / s**2, (xi[0], xi[1]), h, eta, t))

    _, covariance = linear_law(step, 2, 2)
    p = torch.tensor([[1 / s**2 + 1 / eta, -1 / eta], [-1 / eta, 1 / eta]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    assert torch.allclose(covariance, t * torch.linalg.inv(p) @ torch.linalg.inv(eye - h * p / 2), rtol=1e-9)
    if s == 1.0:
        assert [float(covariance[i]) for i in ((0, 0), (1, 1), (0, 1))] == pytest.approx(
            [1.0103, 1.5102, 0.9998], abs=1e-4
        )


def test_law_of_exact_anchors() -> None:
    def step(x: Tensor, xi: Tensor) -> Tensor:
        return torch.stack(entropy_mcmc(x[0], x[1], x[0], (xi[0], xi[1]), 1e-4, 0.5, 1.0, gibbs=True))

    _, covariance = linear_law(step, 2, 2)
    assert float(covariance[0, 0]) == pytest.approx(1.0, abs=1e-3)
    assert float(covariance[1, 1] - covariance[0, 0]) == pytest.approx(0.5, rel=1e-9)
    assert float(covariance[0, 1]) == pytest.approx(float(covariance[0, 0]), rel=1e-9)


@pytest.mark.parametrize("anchor", ["langevin", "gibbs"])
def test_the_optimiser_has_that_law(anchor: str) -> None:
    n, h, s2, eta, t = 50, 0.1, 0.5, 0.4, 0.7
    theta = nn.Parameter(torch.zeros(10_000))
    sampler = EntropyMCMC([("w", theta)], h * n, n, eta=eta, anchor=anchor, prior_precision=0.0, temperature=t,
                          generator=torch.Generator().manual_seed(0))  # fmt: skip

    def step(x: Tensor, xi: Tensor) -> Tensor:
        return torch.stack(entropy_mcmc(x[0], x[1], x[0] / s2, (xi[0], xi[1]), h, eta, t, gibbs=anchor == "gibbs"))

    _, covariance = linear_law(step, 2, 2)
    sums = torch.zeros(3, 10_000)
    for k in range(300):
        step_on_gaussian(sampler, theta, s2)
        if k >= 100:
            w, a = theta.detach(), sampler.anchors()["w"]
            sums += torch.stack([w * w, a * a, w * a]) / 200
    for found, expected in zip(sums, (covariance[0, 0], covariance[1, 1], covariance[0, 1]), strict=True):
        assert_mean(found, float(expected), 0.006)


def test_the_coupling_bounds_the_step() -> None:
    theta = nn.Parameter(torch.zeros(3))
    sampler = EntropyMCMC([theta], 1.0, 10, prior_precision=1.0)
    theta.grad = torch.ones(3)
    assert sampler.param_groups[0]["eta"] == pytest.approx(0.01)
    with pytest.raises(StepSizeError, match=r"largest admissible lr is 0.1\b"):
        sampler.step()
    assert torch.equal(theta.detach(), torch.zeros(3))


def test_each_group_has_its_coupling() -> None:
    groups = [
        {"params": [nn.Parameter(torch.zeros(2))], "prior_precision": 4.0},
        {"params": [nn.Parameter(torch.zeros(2))]},
    ]
    sampler = EntropyMCMC(groups, 1e-4, 10, prior_precision=2.0)
    assert [group["eta"] for group in sampler.param_groups] == pytest.approx([0.0025, 0.005])


@pytest.mark.parametrize("arguments", [{"eta": -1.0}, {"anchor": "x"}, {"prior_precision": 0.0}])
def test_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ArgumentError):
        EntropyMCMC([nn.Parameter(torch.zeros(2))], 0.1, 10, **arguments)


@pytest.mark.parametrize("keep", ["theta", "anchor", "both"])
def test_chains_keep_weights_anchors_or_both(keep: str) -> None:
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.3)
    sampler = EntropyMCMC(
        net.named_parameters(), 0.5, 50, eta=0.4, keep=keep, generator=torch.Generator().manual_seed(0)
    )
    chain = bdl.Chain(net, burn_in=2, sampler=sampler)
    seen = []
    for k in range(6):
        net.weight.grad = net.weight.detach() / 50
        if k >= 2:  # theta_k and the anchor before the step that leaves them
            seen.append({"theta": net.weight.detach().clone(), "anchor": sampler.anchors()["weight"].clone()})
        sampler.step()
        chain.step()
    expected = [pair[name] for pair in seen for name in ("theta", "anchor") if keep in (name, "both")]
    found = chain.posterior().snapshots["weight"]
    assert torch.equal(found, torch.stack(expected))


def test_anchors_of_networks_with_running_statistics_need_fresh_ones() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    sampler = EntropyMCMC(net.named_parameters(), 0.5, 50, eta=0.4, keep="anchor", prior_precision=1.0)
    chain = bdl.Chain(net, sampler=sampler)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ArgumentError, match="buffers='refresh'"):
        sampler.step()
    assert len(chain) == 0


def test_unknown_choice_of_what_to_keep() -> None:
    with pytest.raises(ArgumentError, match="keep='all'"):
        EntropyMCMC([nn.Parameter(torch.zeros(2))], 0.1, 10, eta=1.0, keep="all")
