"""Chains whose weights are the rows of one matrix are the chains they would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import NonFiniteError
from bayesdl.samplers import BAOAB, PSGLD, SASGLD, SGHMC, SGLD, SGNHT, Cyclical, EntropyMCMC, Sampler
from bayesdl.samplers.stacked import Stacked

SHAPES, CHAINS, N = ((3, 5), (4,)), 3, 50  # an odd number of weights: streams draw pairs


def chains(kind: type[Sampler], dtype: torch.dtype, **own: Any) -> list[tuple[list[nn.Parameter], Sampler]]:
    found = []
    for c in range(CHAINS):
        source = torch.Generator().manual_seed(c)
        params = [nn.Parameter(torch.randn(shape, generator=source, dtype=dtype)) for shape in SHAPES]
        named = [(f"layer.{i}", p) for i, p in enumerate(params)]
        make: Any = kind
        sampler = make(named, 0.3, N, generator=torch.Generator().manual_seed(10 + c), **own)
        sampler.register_pre_update_hook(lambda s: None)  # somebody who looks at the weights of its steps
        found.append((params, sampler))
    return found


def gradient(params: list[nn.Parameter]) -> list[Tensor]:
    return [(p.detach().sin() + 0.2) / N for p in params]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


KINDS: dict[str, tuple[type[Sampler], dict[str, Any]]] = {
    "SGLD": (SGLD, {}),
    "SGHMC": (SGHMC, {"momentum": 0.6}),
    "SGHMC that adapts": (SGHMC, {"momentum": 0.6, "adapt": True, "burn_in": 5}),
    "BAOAB": (BAOAB, {"momentum": 0.6}),
    "SGNHT": (SGNHT, {"momentum": 0.6}),
    "pSGLD": (PSGLD, {"freeze_after": 5, "alpha": 0.9}),
    "SA-SGLD": (SASGLD, {"alpha": 2.0}),
    "SA-SGLD with momentum": (SASGLD, {"alpha": 2.0, "momentum": 0.6}),
    "Entropy-MCMC": (EntropyMCMC, {"eta": 0.1, "keep": "both"}),
}


def stack(kind: type[Sampler], found: list[tuple[list[nn.Parameter], Sampler]], **own: Any) -> Stacked:
    """One sampler in place of those found, whose parameters become views of one matrix."""
    matrix = nn.Parameter(torch.stack([flat(list(params)) for params, _ in found]))
    for (params, _), row in zip(found, matrix.detach(), strict=True):
        for parameter, piece in zip(params, row.split([15, 4]), strict=True):
            parameter.data = piece.view(parameter.shape)
    make: Any = kind
    leader = make([matrix], 0.3, N, generator=torch.Generator(), **own)
    return Stacked(leader, [sampler for _, sampler in found], matrix, [15, 4])


def step_apart(found: list[tuple[list[nn.Parameter], Sampler]]) -> None:
    for params, sampler in found:
        for parameter, grad in zip(params, gradient(params), strict=True):
            parameter.grad = grad
        sampler.step()


def same_state(one: Sampler, other: Sampler) -> bool:
    """Whether two states would go on alike, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    same = a["sampler"]["scalars"] == b["sampler"]["scalars"] and a["sampler"]["iteration"] == b["sampler"]["iteration"]
    same = same and torch.equal(a["sampler"]["noise"]["bits"], b["sampler"]["noise"]["bits"])
    for index, values in a["state"].items():
        others = b["state"][index]
        same = same and values.keys() == others.keys() and all(torch.equal(values[k], others[k]) for k in values)
    return same and a["state"].keys() == b["state"].keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_the_chains_bit_for_bit(name: str, around: bool, dtype: torch.dtype) -> None:
    """What moves, what is counted, what is recorded, and the state that a chain would store."""
    kind, own = KINDS[name]
    own = {**own, "temperature": 0.7, "prior_precision": 2.0}
    alone, followers = chains(kind, dtype, **own), chains(kind, dtype, **own)
    stacked = stack(kind, followers, **own)
    schedules = [Cyclical(s, 4, 2, 0.5) for _, s in (*alone, *followers)] if around else []
    records: list[list[Any]] = [[], []]
    alone[1][1].register_pre_update_hook(lambda s: records[0].append((s.record, flat(list(alone[1][0])))))
    followers[1][1].register_pre_update_hook(lambda s: records[1].append((s.record, flat(list(followers[1][0])))))
    for _ in range(8):
        step_apart(alone)
        stacked.step(torch.stack([flat(gradient(params)) for params, _ in followers]))
        for schedule in schedules:
            schedule.step()
        for (params, sampler), (others, follower) in zip(alone, followers, strict=True):
            assert torch.equal(flat(list(params)), flat(list(others)))
            assert same_state(sampler, follower)
    for (one, place), (other, there) in zip(*records, strict=True):
        assert one == other and torch.equal(place, there)
    assert len({sampler.time for _, sampler in followers}) == (CHAINS if kind is SASGLD else 1)


@pytest.mark.parametrize("name", KINDS)
def test_chains_that_have_begun_apart_go_on_together(name: str) -> None:
    kind, own = KINDS[name]
    alone, followers = chains(kind, torch.float32, **own), chains(kind, torch.float32, **own)
    for _ in range(3):
        step_apart(alone), step_apart(followers)
    stacked = stack(kind, followers, **own)
    for _ in range(4):
        step_apart(alone)
        stacked.step(torch.stack([flat(gradient(params)) for params, _ in followers]))
    for (params, sampler), (others, follower) in zip(alone, followers, strict=True):
        assert torch.equal(flat(list(params)), flat(list(others))) and same_state(sampler, follower)


def test_nothing_moves_and_nothing_is_counted_when_a_gradient_is_not_finite() -> None:
    followers = chains(SGHMC, torch.float32)
    matrix = nn.Parameter(torch.zeros(CHAINS, 19))
    leader = SGHMC([matrix], 0.3, N, generator=torch.Generator())
    stacked = Stacked(leader, [sampler for _, sampler in followers], matrix, [15, 4])
    gradients = torch.ones(CHAINS, 19)
    gradients[1, 17] = torch.nan
    with pytest.raises(NonFiniteError):
        stacked.step(gradients)
    assert not matrix.detach().any() and [s.iteration for _, s in followers] == [0] * CHAINS
