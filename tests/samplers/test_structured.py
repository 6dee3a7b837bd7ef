"""Structured SG-MCMC: the product of group laws, its limits, the reservoir."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, FileFormatError
from bayesdl.samplers import SGLD, Structured
from tests.samplers.chains import assert_mean

P = torch.tensor([[1.0, 0.5], [0.5, 2.0]]) / 0.75  # precision


def loss(params: dict[str, Tensor]) -> Tensor:
    """U / N of a Gaussian whose coordinates are parameters of many chains, N = 10."""
    a, b = params["a.w"], params["b.w"]
    return (0.5 * P[0, 0] * a * a + P[0, 1] * a * b + 0.5 * P[1, 1] * b * b).sum() / 10


def build(chains: int, seed: int = 0, lr: float = 0.5, **own: Any) -> tuple[dict[str, nn.Parameter], Structured]:
    params = {name: nn.Parameter(torch.zeros(chains)) for name in ("a.w", "b.w")}
    sampler = SGLD(params.items(), lr, 10, prior_precision=0.0, generator=torch.Generator().manual_seed(seed))
    return params, Structured(sampler, generator=torch.Generator().manual_seed(seed + 1), **own)


def test_one_group_is_the_sampler_bit_for_bit() -> None:
    params, structured = build(5, groups=[["a.w", "b.w"]], thin=3)
    twins, other = build(5)
    for _ in range(10):
        structured.step(loss)
        other.sampler.zero_grad()
        loss(dict(twins)).backward()
        other.sampler.step()
    assert all(torch.equal(params[name], twins[name]) for name in params)
    assert all(parameter.grad is None for parameter in params.values())


@pytest.mark.parametrize("own", [{}, {"live": 0.5, "masks": 2}])
def test_law_of_singletons(own: dict[str, Any]) -> None:
    # chains share the picks from the reservoir, whose entries differ from chain to chain; h P = 0.07 to 0.13
    params, structured = build(4000, reservoir=64, thin=4, burn_in=20, **own)
    sums, cross = torch.zeros(2, 4000), torch.zeros(4000)
    for k in range(900):
        structured.step(loss)
        if k >= 300:
            a, b = params["a.w"].detach(), params["b.w"].detach()
            sums += torch.stack([a * a, b * b]) / 600
            cross += a * b / 600
    # T / P_ii up to O(h); in the dropout form a live group sees another live one with probability rho, and the law has
    # that share of the coupling
    share = torch.tensor([[1.0, own.get("live", 0.0)], [own.get("live", 0.0), 1.0]])
    exact = torch.linalg.inv(P * share)
    for i in range(2):  # noise of draws and masks adds some per cent
        assert float(sums[i].mean()) == pytest.approx(float(exact[i, i]), rel=0.12)
    assert float(cross.mean()) == pytest.approx(float(exact[0, 1]), abs=0.02)


def test_two_coordinates_with_independent_draws() -> None:
    # the closed form 2T / (2 P11 - h P11^2 - h P12^2) holds for fresh draws of the others' law; here they are drawn
    # anew for each step and chain, as a reservoir of unlimited span would do
    p11, p12, h = 1 / 0.36, -0.8 / 0.36, 0.05
    source = torch.Generator().manual_seed(0)
    x, kept = torch.zeros(2, 4000), torch.zeros(4000)
    for k in range(700):
        other = x.flip(0)[:, torch.randperm(4000, generator=source)]
        x = x - h * (p11 * x + p12 * other) + (2 * h) ** 0.5 * torch.randn(2, 4000, generator=source)
        if k >= 100:
            kept += x.square().mean(0) / 600
    assert 2 / (2 * p11 - h * p11**2 - h * p12**2) == pytest.approx(0.406, abs=5e-4)
    assert_mean(kept, 0.406, 0.003)


def test_the_reservoir_is_a_ring() -> None:
    params, structured = build(1, reservoir=3, thin=2, burn_in=4)
    seen = []
    for k in range(1, 15):
        structured.step(loss)
        if k > 4 and k % 2 == 0:
            seen.append(float(params["a.w"].detach()))
    assert structured.span == 4
    kept = {float(structured.draw(torch.Generator().manual_seed(i))["a.w"]) for i in range(60)}
    assert kept == set(seen[-3:])


def test_the_dropout_form_averages_to_the_full_gradient() -> None:
    # all groups live: one mask is the plain gradient
    params, structured = build(3, live=1.0, masks=2)
    twins, plain = build(3, groups=[["a.w", "b.w"]])
    structured.step(loss)
    plain.step(loss)
    assert all(torch.allclose(params[name], twins[name]) for name in params)


def test_state() -> None:
    def trajectory(stop: int) -> list[Tensor]:
        params, structured = build(3, reservoir=4, thin=2)
        found = []
        for k in range(14):
            if k == stop:
                saved = copy.deepcopy((list(params.values()), structured.state_dict()))
                params, structured = build(3, seed=9, reservoir=4, thin=2)
                for parameter, value in zip(params.values(), saved[0], strict=True):
                    parameter.data.copy_(value)
                structured.load_state_dict(saved[1])
            structured.step(loss)
            found.append(params["a.w"].detach().clone())
        return found

    whole = trajectory(-1)
    for stop in (1, 7):
        assert all(torch.equal(a, b) for a, b in zip(whole, trajectory(stop), strict=True))
    with pytest.raises(FileFormatError, match="groups"):
        build(3)[1].load_state_dict(build(3, groups=[["a.w", "b.w"]])[1].state_dict())


@pytest.mark.parametrize(
    "own", [{"reservoir": 0}, {"live": 0.0}, {"groups": "x"}, {"groups": [["a.w"]]}, {"groups": [["a.w"], ["b.w"], []]}]
)
def test_arguments(own: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        build(2, **own)


def test_names_are_needed_and_can_be_grouped() -> None:
    with pytest.raises(ArgumentError, match="named_parameters"):
        Structured(SGLD([nn.Parameter(torch.zeros(2))], 0.1, 10))
    by: Callable[[str], str] = lambda name: name[-1]  # noqa: E731
    assert build(2, groups=by)[1].groups == [["a.w", "b.w"]]
    assert build(2)[1].groups == [["a.w"], ["b.w"]]
