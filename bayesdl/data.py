"""Iterating a loader: adapter, checks that name the batch, count, progress."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler
from tqdm import tqdm

from bayesdl.batch import batch_size, count_batches, flatten_tensors
from bayesdl.errors import ArgumentError, BayesDLError, NonFiniteError, ShapeError
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
    example: Any = None,
) -> Iterator[tuple[int, Any, Any]]:
    """Yield `(number, inputs, target)` for every batch.

    Args:
        network: gives the adapter.
        data: any iterable of batches.
        allow_partial: False makes it an error that the loader yields fewer examples than its data set holds.
        need_targets: whether a batch without a target is an error.
        example: inputs of the first batch of an earlier pass. A loader that keeps its order must yield them again: if
            not, something in it is random, and a warning says so.

    Raises:
        NonFiniteError: NaN or infinity in the inputs; the batch is named.
        ArgumentError: no batch, a missing target, a partial pass, or more than the loader promises.
    """
    check_loader(data)
    seen, number, expected, promised = 0, -1, declared_size(data), count_batches(data)
    bar = tqdm(data, desc=describe, total=count_batches(data), disable=not progress, leave=False)
    for number, batch in enumerate(bar):
        with in_batch(number):
            inputs, target = check_batch(network.batch(batch), need_targets)
            seen += batch_size(inputs) if flatten_tensors(inputs)[0] else 0
        if promised is not None and number >= promised:
            raise ArgumentError(
                f"the loader yields more batches than its length promises ({promised}): has it no end, or a wrong "
                "__len__?"
            )
        if number == 0 and example is not None and keeps_order(data) and not _same(inputs, example):
            _warn_of_randomness("its first batch differed between two passes")
        yield number, inputs, target
    if number < 0:
        raise ArgumentError("the data loader yields no batch")
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


def check_batch(pair: tuple[Any, Any], need_target: bool = True) -> tuple[Any, Any]:
    """Inputs and target of one batch as they are.

    Raises:
        NonFiniteError: NaN or infinity in the inputs.
        ArgumentError: the target is missing.
    """
    inputs, target = pair
    check_inputs(inputs)
    if need_target and target is None:
        raise ArgumentError(
            "it holds no target; expected (inputs, target) or a mapping with labels. Data that are tensors already are "
            "one batch: pass [(x, y)]"
        )
    return inputs, target


def peek(data: Iterable[Any]) -> tuple[Iterable[Any], Any]:
    """Data that still hold everything, and their first batch; an iterator is not read a second time.

    Raises:
        ArgumentError: there is no batch.
    """
    check_loader(data)
    for batch in data:
        return (chain([batch], data) if isinstance(data, Iterator) else data), batch
    raise ArgumentError("the data loader yields no batch")


def check_rereadable(name: str, data: Iterable[Any] | None) -> None:
    """Raise `ArgumentError` for what can be read only once."""
    if data is None:
        return
    check_loader(data)
    if isinstance(data, Iterator):
        raise ArgumentError(
            f"{name} is a {type(data).__name__} that can be read once; pass a DataLoader or a list, which methods read "
            "several times"
        )


def keeps_order(data: Iterable[Any]) -> bool:
    """Whether a loader is known to yield the same examples in the same order every time."""
    if not isinstance(data, DataLoader) or type(data.batch_sampler) not in (BatchSampler, type(None)):
        return False
    return type(data.sampler) in (SequentialSampler, DistributedSampler)


def warn_if_unsteady(data: Iterable[Any]) -> None:
    """Warn of a loader that repeats examples, or whose data set answers differently when it is asked again.

    Three examples are read three times each: flips of every second example escape once in 64 times. Only where the
    loader reads in this process itself: a data set that opens files in its workers must not be read here before them.
    Loaders that keep their order need none of it: `batches` compares their first batch.
    """
    if not isinstance(data, DataLoader):
        return
    if getattr(data.sampler, "replacement", False) and type(data.batch_sampler) in (BatchSampler, type(None)):
        warnings.warn(
            f"the loader draws with replacement ({type(data.sampler).__name__}): curvature then counts some examples "
            "several times and leaves others out. Fit with a loader that yields every example once",
            stacklevel=2,
        )
    whole = isinstance(data.dataset, Dataset) and not isinstance(data.dataset, IterableDataset)
    count = count_batches(data.dataset) if whole else None  # type: ignore[arg-type]  # may know no length
    if not count or keeps_order(data) or data.num_workers:
        return
    with torch.random.fork_rng(devices=[]):
        for index in sorted({0, count // 2, count - 1}):
            first = data.dataset[index]
            if not all(_same(first, data.dataset[index]) for _ in range(2)):
                _warn_of_randomness(f"its example {index} differed between two reads")
                return


def _same(one: Any, other: Any) -> bool:
    """Whether all tensors of two nested values agree; what is none is not compared."""
    pairs = zip(flatten_tensors(one)[0], flatten_tensors(other)[0], strict=False)
    return all(torch.equal(a, b) for a, b in pairs)


def _warn_of_randomness(what: str) -> None:
    warnings.warn(
        f"the loader is random: {what}. Curvature is a sum over the data, and this one is a sum over one draw of their "
        "augmentation: switch random augmentation off for the fit",
        stacklevel=3,
    )


def check_inputs(inputs: Any) -> None:
    """Raise `NonFiniteError` that names the first NaN or infinity of a batch of inputs, `ShapeError` if it is empty."""
    for tensor in flatten_tensors(inputs)[0]:
        if not len(tensor):
            raise ShapeError("the batch is empty; expected at least one example")
        # one reduction first: a mask over every entry only where it has something to name
        if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor.sum())) and not _all_finite(tensor):
            bad = (~torch.isfinite(tensor)).nonzero()[0]
            raise NonFiniteError(f"the inputs hold NaN or infinity, the first at index {tuple(int(i) for i in bad)}")


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
