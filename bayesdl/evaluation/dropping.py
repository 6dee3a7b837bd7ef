"""`nan="drop"`: which examples have no finite forecast or target, and what is left without them.

`Predictions` are finite by construction, so whatever was left out is noted in their `meta`, in the numbering of the
data set as it was given: that is what keeps the examples of several methods paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, NonFiniteError
from bayesdl.evaluation import validation

if TYPE_CHECKING:
    from bayesdl.evaluation.predictions import Predictions

DROPPED = "dropped"
_MEMBERS_FIRST = 3  # axes of an array whose first one counts members, in place of examples


def check_choice(nan: str) -> None:
    """Raise `ArgumentError` for anything but "raise" and "drop"."""
    if nan not in ("raise", "drop"):
        raise ArgumentError(f'nan={nan!r} was given; expected "raise" or "drop"')


def dropped_of(predictions: Predictions) -> list[int]:
    """Examples that were left out of these predictions, by their number in the data set as it was given."""
    numbers = predictions.meta.get(DROPPED, [])
    if not isinstance(numbers, (list, tuple)) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ArgumentError(f"meta[{DROPPED!r}]: expected the numbers of examples in a list, got {numbers!r:.80}")
    return sorted(set(numbers))


def finite_arrays(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The examples of an archive's arrays on which all of them are finite, and the numbers of the others.

    Minus infinity is a value in `log_probs` and a fault elsewhere. Arrays whose lengths differ are left as they are,
    for the checks that follow.

    Raises:
        NonFiniteError: no example is finite.
    """
    tensors = {name: validation.tensor(value, name) for name, value in arrays.items()}
    axes = {name: _example_axis(name, value) for name, value in tensors.items()}
    lengths = {value.shape[axes[name]] for name, value in tensors.items() if value.dim()}
    if len(lengths) != 1 or not all(value.dim() for value in tensors.values()):
        return dict(arrays), []
    bad = torch.zeros(lengths.pop(), dtype=torch.bool)
    for name, value in tensors.items():
        if value.is_floating_point():
            fault = value.isnan() | value.isposinf() if name == "log_probs" else ~value.isfinite()
            bad |= fault.movedim(axes[name], 0).reshape(len(bad), -1).any(1).cpu()
    if not bool(bad.any()):
        return dict(arrays), []
    if bool(bad.all()):
        raise NonFiniteError(f"none of the {len(bad)} examples is finite, so that nothing is left to score")
    keep = (~bad).nonzero()[:, 0]
    kept = {name: value.index_select(axes[name], keep.to(value.device)) for name, value in tensors.items()}
    return kept, bad.nonzero()[:, 0].tolist()


def finite_predictions(predict: Callable[[Iterable[Any]], Predictions], data: Iterable[Any]) -> Predictions:
    """`predict(data)` without the examples that make it raise `NonFiniteError`, found by halving their batches.

    Raises:
        NonFiniteError: no example is finite.
        ArgumentError: batches that cannot be cut, or networks with several predictions an example (tokens, pixels).
    """
    try:
        return predict(data)
    except NonFiniteError:
        batches = list(data)
    out, first = [], 0
    for batch in batches:
        size = batch_length(batch)
        out += _unusable(predict, batch, list(range(size)), first)
        first += size
    found = predict(without(batches, out))
    if len(found) + len(out) != first:
        raise ArgumentError(
            f'nan="drop": {first - len(out)} examples gave {len(found)} predictions; examples can be left out only '
            "where each has one prediction"
        )
    return replace(found, meta={**found.meta, DROPPED: out})


def without(batches: Iterable[Any], out: Sequence[int]) -> list[Any]:
    """The batches without the examples numbered in `out`, and without batches of which none is left."""
    unwanted, kept, first = set(out), [], 0
    for batch in batches:
        size = batch_length(batch)
        rows = [row for row in range(size) if first + row not in unwanted]
        if rows:
            kept.append(batch if len(rows) == size else _cut(batch, rows))
        first += size
    if not kept:
        raise NonFiniteError(f"none of the {first} examples is finite, so that nothing is left to score")
    return kept


def batch_length(batch: Any) -> int:
    """Examples in a batch: the length of its first tensor's first axis."""
    if isinstance(batch, Tensor) and batch.dim():
        return len(batch)
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(parts, (list, tuple)) and len(parts):
        return batch_length(parts[0])
    raise ArgumentError(f'nan="drop" cuts batches of tensors, in tuples, lists or dicts; got {type(batch).__name__}')


def _unusable(predict: Callable[[Iterable[Any]], Predictions], batch: Any, rows: list[int], first: int) -> list[int]:
    """The examples among `rows` of a batch that raise, numbered from `first`."""
    try:
        predict([_cut(batch, rows)])
    except NonFiniteError:
        if len(rows) == 1:
            return [first + rows[0]]
        half = len(rows) // 2
        return [*_unusable(predict, batch, rows[:half], first), *_unusable(predict, batch, rows[half:], first)]
    return []


def _cut(part: Any, rows: list[int]) -> Any:
    if isinstance(part, Tensor):
        return part[torch.tensor(rows, device=part.device)]
    if isinstance(part, Mapping):
        return {key: _cut(value, rows) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return tuple(_cut(value, rows) for value in part)
    raise ArgumentError(f'nan="drop" cuts batches of tensors, in tuples, lists or dicts; got {type(part).__name__}')


def _example_axis(name: str, value: Tensor) -> int:
    return 1 if value.dim() == _MEMBERS_FIRST or (name == "samples" and value.dim() > 1) else 0
