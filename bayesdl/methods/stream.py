"""Minibatches of a chain: their order belongs to the chain's number, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bayesdl.data import batches
from bayesdl.errors import ArgumentError
from bayesdl.network import Network

INIT, NOISE, DATA, PASS = range(4)  # streams of a chain


def chain_seed(base: int, chain: int, stream: int, *more: int) -> int:
    """63 bits for one stream of one chain, from the base seed and the chain's number: never from a process's rank."""
    sequence = np.random.SeedSequence(base, spawn_key=(chain, stream, *more))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def chain_generator(base: int, chain: int, stream: int) -> torch.Generator:
    """A generator on the CPU for one stream of one chain."""
    return torch.Generator().manual_seed(chain_seed(base, chain, stream))


def endless(
    network: Network, data: Iterable[Any], base: int, chain: int, *, start: int = 0, length: int = 1
) -> Iterator[tuple[int, Any, Any]]:
    """`(number in its pass, inputs, target)`, pass after pass; each pass is seeded by chain and number.

    Neither torch's global generator nor the loader's own is moved: both are put back after every batch.

    Args:
        network: gives the adapter.
        data: loader.
        base, chain: of the seeds.
        start: batches to leave out at first, those of whole passes without being read.
        length: batches of a pass.
    """
    epoch, skip = divmod(start, length)
    while True:
        with _seeded(data, chain_seed(base, chain, DATA, epoch)) as switch:
            source = batches(network, data, progress=False)
            while True:
                with switch():
                    found = next(source, None)
                if found is None:
                    break
                if skip:
                    skip -= 1
                else:
                    yield found
        epoch += 1


@contextmanager
def repeatable(data: Iterable[Any], base: int) -> Iterator[None]:
    """Passes over the data inside are the same each time, whatever was read before."""
    with _seeded(data, chain_seed(base, 0, PASS)) as switch, switch():
        yield


@contextmanager
def _seeded(data: Iterable[Any], seed: int) -> Iterator[Any]:
    """A context that lends out random states of one pass: the global one, and those that the loader holds."""
    held = [g for g in _generators(data) if isinstance(g, torch.Generator)]
    states = [torch.Generator(g.device).manual_seed(seed).get_state() for g in held]
    own = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def switch() -> Iterator[None]:
        nonlocal own
        outside, theirs = torch.get_rng_state(), [g.get_state() for g in held]
        torch.set_rng_state(own)
        for generator, state in zip(held, states, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            own = torch.get_rng_state()
            states[:] = [g.get_state() for g in held]
            torch.set_rng_state(outside)
            for generator, state in zip(held, theirs, strict=True):
                generator.set_state(state)

    yield switch


def _generators(data: Iterable[Any]) -> list[Any]:
    """Distinct generators of a loader and its samplers."""
    found: list[Any] = []
    for owner in (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)):
        generator = getattr(owner, "generator", None)
        if generator is not None and not any(generator is g for g in found):
            found.append(generator)
    return found


def check_steps(value: int | None, what: str, least: int) -> None:
    """Raise unless `value` is None or a whole number of at least `least`."""
    if value is not None and (isinstance(value, bool) or int(value) != value or value < least):
        raise ArgumentError(f"{what}={value!r}; expected a whole number of at least {least}")
