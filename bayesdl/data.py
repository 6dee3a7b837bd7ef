"""Iterating a loader: adapter, checks that name the batch, count, progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from bayesdl.batch import batch_size, count_batches, flatten_tensors
from bayesdl.errors import ArgumentError, BayesDLError, NonFiniteError
from bayesdl.network import Network


@contextmanager
def in_batch(number: int) -> Iterator[None]:
    """Errors of the library raised inside gain the number of the batch."""
    try:
        yield
    except BayesDLError as error:
        raise type(error)(f"batch {number}: {error}") from error


def batches(
    network: Network,
    data: Iterable[Any],
    *,
    progress: bool = True,
    describe: str = "batches",
    allow_partial: bool = True,
    need_targets: bool = True,
) -> Iterator[tuple[int, Any, Any]]:
    """Yield `(number, inputs, target)` for every batch.

    Args:
        network: gives the adapter.
        data: any iterable of batches.
        allow_partial: False makes it an error that the loader yields fewer examples than its data set holds.
        need_targets: whether a batch without a target is an error.

    Raises:
        NonFiniteError: NaN or infinity in the inputs; the batch is named.
        ArgumentError: no batch, a missing target, or a partial pass.
    """
    check_loader(data)
    seen, number = 0, -1
    bar = tqdm(data, desc=describe, total=count_batches(data), disable=not progress, leave=False)
    for number, batch in enumerate(bar):
        with in_batch(number):
            inputs, target = network.batch(batch)
            check_inputs(inputs)
            if need_targets and target is None:
                raise ArgumentError("it holds no target; expected (inputs, target) or a mapping with labels")
            seen += batch_size(inputs) if flatten_tensors(inputs)[0] else 0
        yield number, inputs, target
    if number < 0:
        raise ArgumentError("the data loader yields no batch")
    expected = declared_size(data)
    if not allow_partial and expected is not None and seen != expected:
        raise ArgumentError(
            f"the loader yielded {seen} examples and its data set holds {expected}: curvature is a sum over the "
            "data, so a partial pass changes the posterior. Build the loader with drop_last=False, or pass "
            "allow_partial=True"
        )


def check_loader(data: Iterable[Any]) -> None:
    """Raise `ArgumentError` for what is iterable and holds no batches: a tensor, a data set of single examples."""
    if isinstance(data, Tensor):
        raise ArgumentError("a tensor was given where a loader of batches is expected; pass [(x, y)] or a DataLoader")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ArgumentError(
            f"a data set ({type(data).__name__}) of single examples was given where a loader of batches is expected; "
            "pass DataLoader(dataset, batch_size=...)"
        )


def declared_size(data: Iterable[Any]) -> int | None:
    """Number of examples that a torch DataLoader promises: its sampler's length."""
    sampler = getattr(data, "sampler", None)
    try:
        return len(sampler) if isinstance(sampler, torch.utils.data.Sampler) else None  # type: ignore[arg-type]
    except TypeError:
        return None


def check_inputs(inputs: Any) -> None:
    """Raise `NonFiniteError` that names the first NaN or infinity of a batch of inputs."""
    for tensor in flatten_tensors(inputs)[0]:
        # one reduction first: a mask over every entry only where it has something to name
        if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor.sum())) and not _all_finite(tensor):
            bad = (~torch.isfinite(tensor)).nonzero()[0]
            raise NonFiniteError(f"the inputs hold NaN or infinity, the first at index {tuple(int(i) for i in bad)}")


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
