"""Arguments of the samplers: what is accepted, and what is said of the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.priors import Prior
from bayesdl.samplers.temperature import precision_from_weight_decay

Schedule = float | Callable[[int], float]


class Shared(TypedDict, total=False):
    """Keyword arguments of every sampler.

    Attributes:
        prior_precision: lam of the prior N(0, 1/lam) on every parameter; 1 where neither it nor `prior` is given.
            0 is the improper flat prior. A parameter group may have its own.
        prior: any `Prior` instead.
        temperature: T of the target p^(1/T), or a function of the step; 1 is Bayes, 0 has no noise.
        generator: seeds the sampler's own noise stream with one number drawn from it; None takes that number from
            torch's global generator.
        gibbs_every: steps between Gibbs updates of a prior that has scales of its own.
        allow_unused: run parameters without gradient on their prior alone instead of raising.
        master: move float32 copies of float16 and bfloat16 parameters, which would round the noise away.
    """

    prior_precision: float | None
    prior: Prior | None
    temperature: Schedule
    generator: torch.Generator | None
    gibbs_every: int
    allow_unused: bool
    master: bool


def check_dtype(tensor: Tensor, master: bool) -> None:
    """Raise for parameters that a chain cannot move."""
    if tensor.dtype in (torch.float16, torch.bfloat16) and not master:
        raise UnsupportedError(
            f"a parameter of {tensor.dtype}: steps are smaller than its rounding, the noise would vanish; pass "
            "master=True to move float32 copies, or keep float32 parameters and use autocast"
        )
    if not tensor.dtype.is_floating_point:
        raise UnsupportedError(f"a parameter of {tensor.dtype}; expected real floating-point parameters")


def check_precision(value: Any, where: str) -> None:
    """Raise unless `value` is None or a finite number of at least 0."""
    if value is None:
        return
    if (isinstance(value, Tensor) and value.numel() != 1) or not 0 <= float(value) < math.inf:
        raise ArgumentError(
            f"{where}: prior_precision={value!r}; expected a finite number of at least 0, or "
            "prior=bdl.GaussianPrior(...) for a vector"
        )


def check_temperature(value: float) -> None:
    """Raise unless `value` is finite and at least 0."""
    if not 0 <= value < math.inf:
        raise ArgumentError(f"temperature={value!r}; expected a finite number of at least 0 (1 is Bayes)")


def check_unit(group: dict[str, Any], key: str, *, closed: bool = True) -> None:
    """Raise unless 0 <= group[key] < 1 (0 < without `closed`)."""
    value = group[key]
    if not (0 <= value < 1) or (not closed and value == 0):
        raise ArgumentError(f"{key}={value!r}; expected a number from 0{'' if closed else ' (excluded)'} to below 1")


def refuse_unknown(name: str, shared: Any, num_data: int) -> None:
    """Raise for keyword arguments that no sampler has."""
    if "weight_decay" in shared:
        raise ArgumentError(weight_decay_message(shared["weight_decay"], num_data))
    unknown = sorted(set(shared) - set(Shared.__annotations__))
    if unknown:
        raise TypeError(f"{name}() got an unexpected keyword argument {unknown[0]!r}")


def check_ranks(generator: torch.Generator | None) -> None:
    """Raise where replicas of one model would draw different noise."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if generator is None and distributed and torch.distributed.get_world_size() > 1:
        raise ArgumentError(
            "several processes and no generator: each would draw noise of its own. Pass generator=, with one seed on "
            "all ranks for one data-parallel chain, or seeded by the chain's number for a chain per rank"
        )


def weight_decay_message(value: float, num_data: int) -> str:
    """What to write instead of a weight decay."""
    precision = precision_from_weight_decay(value, num_data)
    sd = precision**-0.5 if precision else math.inf
    return (
        f"weight_decay={value!r}: samplers take the prior itself. A decay of {value:g} on the mean loss of {num_data} "
        f"points is prior_precision={precision:.6g} (lam = N wd, prior sd {sd:.4g})"
    )


def named(params: Any) -> tuple[list[str] | None, list[Tensor]]:
    """Names (None without) and tensors of a group's parameters."""
    entries = [params] if isinstance(params, Tensor) else list(params)
    pairs = [entry for entry in entries if isinstance(entry, tuple)]
    if not pairs:
        return None, entries
    if len(pairs) != len(entries):
        raise ArgumentError("parameters with and without names in one group; name all of them or none")
    return [name for name, _ in pairs], [tensor for _, tensor in pairs]


def as_rate(value: Any, where: str) -> float:
    """`value` as a learning rate."""
    rate = float(value)
    if not 0 <= rate < math.inf:
        raise ArgumentError(f"{where}: lr={value!r}; expected a finite learning rate of at least 0")
    return rate


def at_least_one(value: int, what: str) -> int:
    """`value` as a whole number."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ArgumentError(f"{what}={value!r}; expected a whole number of at least 1")
    return int(value)
