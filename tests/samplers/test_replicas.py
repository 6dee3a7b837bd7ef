"""Ranks of one data-parallel chain stay equal, or say that they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import DistributedError
from bayesdl.samplers import replicas
from bayesdl.samplers.replicas import Replicas, digest_of
from tests.processes import run as run_processes
from tests.samplers.loops import backward, batch, network, sgld


def test_a_digest_is_of_the_bits() -> None:
    values = {"a": torch.randn(3, 4), "b": torch.randn(5, dtype=torch.float64), "c": torch.randn(2).bfloat16()}
    found = digest_of(values)
    assert digest_of({name: value.clone() for name, value in values.items()}) == found
    for name, value in values.items():
        other = value.clone()
        other.view(-1)[-1] = torch.nextafter(other.view(-1)[-1], other.new_tensor(9.0))
        assert digest_of({**values, name: other}) != found
    assert digest_of({"a": values["a"].t(), "b": values["b"]}) == digest_of({"a": values["a"], "b": values["b"]})
    assert digest_of({"b": values["b"], "a": values["a"]}) != digest_of({"a": values["a"], "b": values["b"]})


def test_networks_of_one_process_are_not_compared() -> None:
    check = Replicas(network())
    check.check(1, {"a": torch.full((2,), torch.nan)})


def _apart(rank: int, size: int) -> None:
    """Noise of another seed on each rank is an error on both after the first step."""
    wrapped = nn.parallel.DistributedDataParallel(network())
    chain = bdl.Chain(wrapped, sampler=(sampler := sgld(wrapped.module, seed=rank)))
    backward(wrapped, 0)
    sampler.step()
    with pytest.raises(DistributedError, match=r"step 1: .* not the same on the 2 ranks .* one seed for all"):
        chain.step()


def _later(rank: int, size: int) -> None:
    """Copies that come apart later are found at the next comparison."""
    replicas.EVERY = 4
    wrapped = nn.parallel.DistributedDataParallel(network())
    chain = bdl.Chain(wrapped, sampler=(sampler := sgld(wrapped.module, seed=3)))
    for k in range(7):
        x, y = batch(k)
        wrapped.zero_grad()
        nn.functional.cross_entropy(wrapped(x[rank * 4 :][:4]), y[rank * 4 :][:4]).backward()
        sampler.step()
        if k == 5 and rank == 1:
            with torch.no_grad():
                next(wrapped.parameters()).view(-1)[0] += 1e-6
        chain.step()
    x, y = batch(7)
    backward(wrapped, 7)
    sampler.step()
    with pytest.raises(DistributedError, match="step 8: "):
        chain.step()


@pytest.mark.dist
@pytest.mark.parametrize("check", [_apart, _later])
def test_ranks_that_come_apart_are_found(check: object) -> None:
    run_processes(check, 2)
