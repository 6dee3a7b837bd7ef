"""Chains whose weights are the rows of one matrix are the chains they would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.errors import NonFiniteError
from bayesdl.samplers import BAOAB, SGHMC, SGLD, Cyclical, Sampler
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
        found.append((params, sampler))
    return found


def gradient(params: list[nn.Parameter]) -> list[Tensor]:
    return [(p.detach().sin() + 0.2) / N for p in params]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize(("kind", "own"), [(SGLD, {}), (SGHMC, {"momentum": 0.6}), (BAOAB, {"momentum": 0.6})])
def test_rows_are_the_chains_bit_for_bit(
    kind: type[Sampler], own: dict[str, Any], around: bool, dtype: torch.dtype
) -> None:
    own = {**own, "temperature": 0.7, "prior_precision": 2.0}
    alone, followers = chains(kind, dtype, **own), chains(kind, dtype, **own)
    matrix = nn.Parameter(torch.stack([flat(list(params)) for params, _ in followers]))
    for (params, _), row in zip(followers, matrix.detach(), strict=True):
        for parameter, piece in zip(params, row.split([15, 4]), strict=True):
            parameter.data = piece.view(parameter.shape)
    make: Any = kind
    leader = make([matrix], 0.3, N, generator=torch.Generator(), **own)
    stacked = Stacked(leader, [sampler for _, sampler in followers], matrix, [15, 4])
    schedules = [Cyclical(s, 4, 2, 0.5) for _, s in (*alone, *followers)] if around else []
    records: list[list[Any]] = [[], []]
    alone[1][1].register_pre_update_hook(lambda s: records[0].append((s.record, flat(list(alone[1][0])))))
    followers[1][1].register_pre_update_hook(lambda s: records[1].append((s.record, flat(list(followers[1][0])))))
    for _ in range(8):
        for params, sampler in alone:
            for parameter, grad in zip(params, gradient(params), strict=True):
                parameter.grad = grad
            sampler.step()
        stacked.step(torch.stack([flat(gradient(params)) for params, _ in followers]))
        for schedule in schedules:
            schedule.step()
    for (params, sampler), (others, follower) in zip(alone, followers, strict=True):
        assert torch.equal(flat(list(params)), flat(list(others)))
        assert (sampler.iteration, sampler.time) == (follower.iteration, follower.time)
    for (one, place), (other, there) in zip(*records, strict=True):
        assert one == other and torch.equal(place, there)


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
