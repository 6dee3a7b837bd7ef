"""Weights that are spread over processes, whole for as long as an operation looks at them.

A private clone of a model that torch's `fully_shard` (FSDP2) has sharded keeps the shards. Whoever reads a weight of it
gets the whole one, gathered from all processes; nobody keeps it, so that it is gone behind the layer. What automatic
differentiation would keep for the backward pass is gathered again there. A pass over the network then takes the memory
of one weight and not of all of them, and everything that runs the network's forward works on it unchanged: hooks,
cotangents batched or one after another, derivatives of derivatives.

Every gathering is a collective, and processes may want different weights, or none: their shares of the data are uneven,
one of them tunes while the others wait, one has met an error. So a process first says which weight it wants; all of
them then help with each that was named. In a `session` a process that is done goes on helping until all are done.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, NoReturn, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bayesdl.errors import UnsupportedError

DONE = -1
GATHER = "give it bdl.gathered(model), a plain copy that takes the memory of the full model on every process"

Change = Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shard:
    """What this process holds of a weight.

    Attributes:
        local: its part, along `axis`.
        shape: of the whole.
        axis: that is cut, as `torch.chunk` does.
    """

    local: Tensor
    shape: torch.Size
    axis: int


@dataclass(frozen=True)
class _Again:
    """A view of a weight that the backward pass is to gather anew."""

    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@final
class Exchange:
    """Whole weights from their shards.

    Args:
        handle: group of the processes that hold them.
        shards: of this process, in the order that all of them share.
    """

    def __init__(self, handle: dist.ProcessGroup, shards: Sequence[Shard]) -> None:
        self.handle, self._shards, self._size = handle, tuple(shards), dist.get_world_size(handle)
        self._depth = 0
        self._alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._lock = RLock()

    def gather(self, number: int) -> Tensor:
        """The whole weight of that number: all processes call this, or are in a `session`."""
        ((whole,), _) = self._round(number)
        place = whole.untyped_storage().data_ptr()
        self._alive[place] = weakref.ref(whole), number
        weakref.finalize(whole, self._forget, place)
        return whole

    @contextmanager
    def session(self) -> Iterator[None]:
        """Processes may want different weights inside; who leaves helps the others until all of them leave."""
        with self._lock:
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                while self._depth == 0 and any(number != DONE for number in self._round(DONE)[1]):
                    pass

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is computed inside keeps no whole weight for its backward pass."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _round(self, wanted: int) -> tuple[list[Tensor], list[int]]:
        """Gather what any process wants; the one wanted here, and what all of them want."""
        found = []
        with self._lock, torch.no_grad():
            mine = torch.tensor([wanted], device=self._shards[0].local.device)
            theirs = [torch.empty_like(mine) for _ in range(self._size)]
            dist.all_gather(theirs, mine, group=self.handle)
            numbers = [int(number) for number in theirs]
            for number in sorted(set(numbers) - {DONE}):
                whole = self._whole(self._shards[number])
                if number == wanted:
                    found.append(whole)
        return found, numbers

    def _whole(self, shard: Shard) -> Tensor:
        length, axis = shard.shape[shard.axis], shard.axis
        step = -(-length // self._size)
        local = shard.local.movedim(axis, 0)
        padded = local.new_zeros(step, *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in range(self._size)]
        dist.all_gather(parts, padded, group=self.handle)
        whole = torch.cat(parts)[:length]
        return whole if axis == 0 else whole.movedim(0, axis).contiguous()

    def _forget(self, place: int) -> None:
        held = self._alive.get(place)
        if held is not None and held[0]() is None:
            del self._alive[place]

    def _pack(self, tensor: Tensor) -> Any:
        held = self._alive.get(tensor.untyped_storage().data_ptr())
        if held is None or held[0]() is None:
            return tensor
        return _Again(held[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, _Again):
            return self.gather(kept.number).as_strided(kept.size, kept.stride, kept.offset)
        return kept


@final
class Parameters(dict[str, Any]):
    """`_parameters` of a module: shards, read as whole weights. Iteration gives the shards, for names and shapes.

    Args:
        values: as the module held them.
        numbers: of the sharded ones within the exchange, by name.
        exchange: what gathers them.

    Attributes:
        changes: by name, what a weight is to be replaced with, or to go through, in the present call.
    """

    def __init__(self, values: Mapping[str, Any], numbers: Mapping[str, int], exchange: Exchange) -> None:
        super().__init__(values)
        self.numbers, self.exchange = dict(numbers), exchange
        self.changes: dict[str, Change] = {}

    def __getitem__(self, name: str) -> Any:
        change = self.changes.get(name)
        if isinstance(change, Tensor):
            return change
        value = self.exchange.gather(self.numbers[name]) if name in self.numbers else super().__getitem__(name)
        return value if change is None else change(value)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UnsupportedError(f"this copies the whole model, whose weights are sharded over processes; {GATHER}")


@final
class Streamed:
    """The sharded parameters of a template and of the clones that share them.

    Args:
        template: whose sharded parameters are DTensors, each cut over the same processes.

    Attributes:
        digest: of the whole model, once it is known: one process may save what all of them have fitted.
    """

    def __init__(self, template: nn.Module) -> None:
        sharded = {id(p): p for p in template.parameters() if is_sharded(p)}
        self._numbers = {key: number for number, key in enumerate(sharded)}
        some: Any = next(iter(sharded.values()))
        self.exchange = Exchange(group_of(some), [_shard(p) for p in sharded.values()])
        self.digest: str | None = None
        self.install(template)

    def install(self, module: nn.Module) -> nn.Module:
        """Let the weights of a clone be read whole; returns it."""
        for part in module.modules():
            held = part._parameters
            numbers = {name: self._numbers[id(p)] for name, p in held.items() if id(p) in self._numbers}
            if numbers:
                part.__dict__["_parameters"] = Parameters(held, numbers, self.exchange)
        return module

    def whole(self, parameter: Tensor) -> Tensor:
        """A parameter of the template as a plain tensor."""
        number = self._numbers.get(id(parameter))
        return parameter if number is None else self.exchange.gather(number)

    @contextmanager
    def running(self, module: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
        """A forward pass of an installed clone in which tensors, by every name they have, are changed."""
        undo: list[Callable[[], None]] = []
        try:
            for path, change in changes.items():
                owner, _, name = path.rpartition(".")
                undo.append(_change(module.get_submodule(owner), name, change))
            with self.exchange.running():
                yield
        finally:
            for step in reversed(undo):
                step()


@final
class Whole(Mapping[str, Tensor]):
    """Parameters by name, each gathered when it is read."""

    def __init__(self, streamed: Streamed, parameters: Mapping[str, Tensor]) -> None:
        self._streamed, self._parameters = streamed, parameters

    def __getitem__(self, name: str) -> Tensor:
        return self._streamed.whole(self._parameters[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor of torch."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """A DTensor as a plain one, by a collective of all processes that hold it; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def group_of(parameter: Any) -> dist.ProcessGroup:
    """The processes that hold the parts of a sharded parameter."""
    return parameter.device_mesh.get_group(cut_axes(parameter)[0])


def cut_axes(parameter: Any) -> list[int]:
    """The mesh's axes along which a parameter is cut; along the others it is copied."""
    return [axis for axis, placement in enumerate(parameter.placements) if placement.is_shard()]


def _shard(parameter: Any) -> Shard:
    axis = parameter.placements[cut_axes(parameter)[0]].dim
    return Shard(parameter.detach().to_local(), parameter.shape, axis % parameter.dim())


def _change(part: nn.Module, name: str, change: Change) -> Callable[[], None]:
    """Put a change into a module of a clone; what takes it back."""
    held = part._parameters
    if isinstance(held, Parameters):
        held.changes[name] = change
        return lambda: held.changes.__delitem__(name)
    store: dict[str, Any] = held if name in held else part._buffers
    before = store[name]
    store[name] = change if isinstance(change, Tensor) else change(before)
    return lambda: store.__setitem__(name, before)
