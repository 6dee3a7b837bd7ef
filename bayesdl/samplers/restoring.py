"""Whether a stored state is one of the optimiser that is about to take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bayesdl.errors import FileFormatError


def check_state(found: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor]) -> None:
    """Raise `FileFormatError` unless a stored state has the groups and the parameters' shapes of this optimiser."""
    own, states = found["sampler"], found.get("state")
    stored = found.get("param_groups")
    if not isinstance(states, dict) or not isinstance(stored, list) or len(stored) != len(groups):
        raise FileFormatError(f"the state is not of {len(groups)} groups of parameters")
    for given, group in zip(stored, groups, strict=True):
        for name, value in group.items():
            other = given.get(name)
            alike = type(other) is type(value) or (_is_real(other) and _is_real(value))
            if not alike or (name == "params" and len(other) != len(value)):
                raise FileFormatError(
                    f"{name} of a group of parameters is {str(other)[:80]!r}, here {str(value)[:80]!r}"
                )
    for index, values in states.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(values, dict):
            raise FileFormatError(f"the state is of a parameter {str(index)[:80]!r} that is not there")
    for name in {name for values in states.values() for name in values}:
        _check_entry(name, [(parameters[index], values[name]) for index, values in states.items() if name in values])
    scalars = own.get("scalars")
    if not isinstance(scalars, dict) or "time" not in scalars or not all(_is_real(v) for v in scalars.values()):
        raise FileFormatError(f"the state's numbers are {str(scalars)[:80]}")
    if not _is_real(own.get("temperature", 1.0)):
        raise FileFormatError(f"the state's temperature is {str(own['temperature'])[:80]}")
    if type(own.get("iteration")) is not int or not 0 <= own["iteration"] < 1 << 62:
        raise FileFormatError(f"the state is after {str(own.get('iteration'))[:80]} steps")


def _check_entry(name: str, pairs: Sequence[tuple[Tensor, Any]]) -> None:
    """One entry of all parameters: tensors of their shapes, or tensors of one number, or plain numbers."""
    tensors = [(parameter, value) for parameter, value in pairs if isinstance(value, Tensor)]
    shaped = all(value.shape == parameter.shape and value.is_floating_point() for parameter, value in tensors)
    if len(tensors) not in (0, len(pairs)) or not (shaped or all(value.numel() == 1 for _, value in tensors)):
        raise FileFormatError(f"{name!r} of the state does not have the shapes of the parameters")
    if not tensors and not all(_is_real(value) for _, value in pairs):
        raise FileFormatError(f"{name!r} of the state is {str(pairs[0][1])[:80]!r}")


def _is_real(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 62
    return isinstance(value, float)
