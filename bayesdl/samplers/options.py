"""Arguments of a chain: what is accepted, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bayesdl.errors import ArgumentError
from bayesdl.samplers.packing import has_state


def at_least(name: str, value: Any, least: int) -> None:
    """Raise unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or int(value) != value or value < least:
        raise ArgumentError(f"{name}={value!r}; expected a whole number of at least {least}")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise unless `value` is allowed."""
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r}; expected one of {allowed}")


def check_states(things: Mapping[str, Any]) -> None:
    """Raise unless all of them have a state that can be stored."""
    for name, thing in things.items():
        if not has_state(thing):
            raise ArgumentError(
                f"{name} is {type(thing).__name__}; expected an object with state_dict and load_state_dict, or a "
                "torch.Generator"
            )


def writes(net: nn.Module) -> bool:
    """Whether this process writes the chain's folder: of the ranks of a data-parallel network, the first."""
    if not isinstance(net, nn.parallel.DistributedDataParallel):
        return True
    return torch.distributed.get_rank(net.process_group) == 0
