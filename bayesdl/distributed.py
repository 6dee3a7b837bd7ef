"""Several processes: sums over `torch.distributed`, loaders that hold a share of the data, and agreement on errors.

Only tensors travel, never pickled objects. Nothing here runs unless it is asked for: a call on one process alone must
not wait for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler

from bayesdl.batch import batch_size, index_batch
from bayesdl.errors import ArgumentError, DistributedError

if TYPE_CHECKING:
    from bayesdl.network import Network

    # what `distributed=` takes: True for all processes, a group of them, False for this one, None for not decided
    Processes = bool | dist.ProcessGroup | None

# tensors below this many bytes travel together
BUCKET = 32 << 20


@final
@dataclass(frozen=True, eq=False)
class Group:
    """Processes that hold a share of the data each.

    Attributes:
        handle: of torch; None for all processes.
        rank: of this process within the group.
        size: number of processes.
        device: where its collectives take integers.
    """

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    device: torch.device

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the group, in place; all processes get the same bits."""
        for bucket in _buckets(tensors):
            with _packed(bucket) as flat:
                dist.all_reduce(flat, group=self.handle)

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each integer over the group."""
        packed = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(packed, dist.ReduceOp.MAX, group=self.handle)
        return [int(value) for value in packed]

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by that of the group's first process, in place."""
        source = 0 if self.handle is None else dist.get_global_rank(self.handle, 0)
        for bucket in _buckets(tensors):
            with _packed(bucket) as flat:
                dist.broadcast(flat, source, group=self.handle)

    def message(self, content: bytes) -> bytes:
        """Bytes of the group's first process, on every process; what the others give is ignored."""
        size = self.largest([len(content) if self.rank == 0 else 0])[0]
        raw = torch.zeros(size, dtype=torch.uint8, device=self.device)
        if self.rank == 0 and content:
            raw.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.spread([raw])
        return raw.cpu().numpy().tobytes()


@contextmanager
def together(group: Group | None) -> Iterator[None]:
    """An error inside on any process becomes an error on all of them, so that none waits for one that has left.

    Raises:
        DistributedError: another process raised; its own message says why.
    """
    if group is None:
        yield
        return
    failed = 1
    try:
        yield
        failed = 0
    finally:
        worst = group.largest([(group.size - group.rank) * failed])[0]
    if worst:
        raise DistributedError(
            f"process {group.size - worst} of {group.size} raised an error (see its own message), so that this one "
            "cannot go on either"
        )


def resolve_group(distributed: Processes) -> Group | None:
    """The group that was asked for; None for this process alone.

    Raises:
        ArgumentError: several processes were asked for and torch.distributed is not initialised, or this process is
            no member of the group, or the argument has another type.
    """
    if distributed is None or distributed is False:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ArgumentError(
            "distributed=... was given and torch.distributed is not initialised: start the script with torchrun and "
            "call torch.distributed.init_process_group() first"
        )
    handle = None if distributed is True else distributed
    absent = dist.GroupMember.NON_GROUP_MEMBER  # what torch gives to the others when a group is made
    if handle is not None and handle != absent and not isinstance(handle, dist.ProcessGroup):
        raise ArgumentError(f"distributed={distributed!r}; expected True, False, or a torch.distributed process group")
    rank = dist.get_rank(handle)
    if rank < 0:
        raise ArgumentError("this process is no member of the process group that was given; call on its members only")
    cuda = dist.get_backend(handle) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Group(handle, rank, dist.get_world_size(handle), device)


@dataclass(frozen=True)
class Share:
    """What of a loader's examples counts on this process.

    Attributes:
        own: the first so many; what follows is padding that repeats examples of other processes. None for all.
        total: of all processes together; None where that is not known.
    """

    own: int | None = None
    total: int | None = None

    def cut(self, source: Iterator[tuple[int, Any, Any]]) -> Iterator[tuple[int, Any, Any]]:
        """`batches` without the padding; the source is read to its end."""
        left = self.own
        for number, inputs, target in source:
            if left is None:
                yield number, inputs, target
                continue
            size = batch_size(inputs)
            if size > left:
                inputs, target = index_batch(inputs, slice(0, left)), index_batch(target, slice(0, left))
            if left:
                yield number, inputs, target
            left = max(0, left - size)


def share_of(data: Iterable[Any], distributed: Processes, group: Group | None) -> Share:
    """How the examples of a loader are shared out.

    Torch's `DistributedSampler` and the loaders of accelerate even the shares out by repeating examples, always at
    their ends: those are known, and left out. What other samplers add is not known; it shows in the sum of the counts.

    Raises:
        ArgumentError: the loader holds one share of several and `distributed` does not say what to do; or it was made
            for another number of processes, or for another rank; or it shares a stream out, of unknown length.
    """
    parts, rank = _shares(data)
    if parts == 1:
        return Share()
    if distributed is None:
        raise ArgumentError(
            f"the loader yields one of {parts} shares of its data ({_sampler_name(data)}), and curvature is a sum over "
            "all of them: pass distributed=True on every process for the sum, or distributed=False for this share alone"
        )
    if group is None:
        return Share()
    if (parts, rank) != (group.size, group.rank):
        raise ArgumentError(
            f"the loader yields share {rank} of {parts}, and this is process {group.rank} of {group.size}; build its "
            "sampler with num_replicas and rank of the process group"
        )
    if _streams(data):
        raise ArgumentError(
            f"the loader shares a stream out ({_sampler_name(data)}) and repeats examples to even the shares, nobody "
            "knows how many: pass each process a loader of its own part of the data, or data with a length"
        )
    sampler = getattr(data, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return _share_of_accelerate(data.batch_sampler)  # type: ignore[attr-defined]
    count = len(sampler.dataset)  # type: ignore[arg-type]
    theirs = type(sampler).__iter__ is not DistributedSampler.__iter__
    if theirs or sampler.total_size <= count:
        return Share(None, count)
    return Share(len(range(rank, count, parts)), count)


def is_share(data: Iterable[Any]) -> bool:
    """Whether a loader visibly yields one of several shares of its data."""
    return _shares(data)[0] > 1


def for_one_process(data: Any) -> Any:
    """A loader that one process may read while the others do not: those of accelerate exchange random states first."""
    return data.base_dataloader if type(data).__name__ == "DataLoaderShard" else data


def same_network(group: Group, network: Network) -> None:
    """Give the private clones of all processes the buffers of the first one, and check that the weights agree.

    Running statistics of norm layers differ between processes at the end of data-parallel training, which copies them
    from the first process at the start of every step.

    Raises:
        ArgumentError: the weights differ.
    """
    group.spread([buffer for buffer in network.template.buffers() if buffer.numel()])
    digest = int(network.fingerprint()[:15], 16)
    top, bottom = group.largest([digest, -digest])
    if top != -bottom:
        raise ArgumentError(
            "the networks of the processes hold different weights: load the same checkpoint on all of them, or wrap "
            "them in DistributedDataParallel, which copies those of the first process"
        )


def check_total(share: Share, group: Group, count: int) -> None:
    """Raise `ArgumentError` where all processes together saw more or fewer examples than the data set holds."""
    if share.total is not None and count != share.total:
        less = "its sampler leaves some out: build it with drop_last=False, or pass allow_partial=True"
        more = "its sampler repeats some to even the shares out: build it without that (accelerate: even_batches=False)"
        raise ArgumentError(
            f"the {group.size} processes saw {count} examples and the data set holds {share.total}; "
            f"{less if count < share.total else more}"
        )


def _shares(data: Iterable[Any]) -> tuple[int, int]:
    """Number of shares that a loader's data were cut into, and which one this is."""
    sampler = getattr(data, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        return int(sampler.num_replicas), int(sampler.rank)
    outer: Any = getattr(data, "batch_sampler", None)
    if type(outer).__name__ == "BatchSamplerShard":  # of accelerate, as are the next two
        return int(outer.num_processes), int(outer.process_index)
    dataset: Any = getattr(data, "dataset", None)
    if type(dataset).__name__ == "IterableDatasetShard":
        return int(dataset.num_processes), int(dataset.process_index)
    if type(data).__name__ == "DataLoaderDispatcher":
        state: Any = data.state  # type: ignore[attr-defined]
        return int(state.num_processes), int(state.process_index)
    return 1, 0


def _streams(data: Iterable[Any]) -> bool:
    shared = type(getattr(data, "dataset", None)).__name__ == "IterableDatasetShard"
    return shared or type(data).__name__ == "DataLoaderDispatcher"


def _share_of_accelerate(outer: Any) -> Share:
    """Whole batches in turn, or a piece of every batch, then as many of the first examples as make all shares even."""
    count, parts, rank = len(outer.batch_sampler.sampler), int(outer.num_processes), int(outer.process_index)
    if type(outer.batch_sampler) is not BatchSampler or not outer.even_batches or outer.drop_last:
        return Share(None, count)
    size = int(outer.batch_size)
    if outer.split_batches:
        piece = size // parts
        return Share(count // size * piece + min(max(count % size - rank * piece, 0), piece), count)
    return Share(sum(min(size, count - start) for start in range(rank * size, count, parts * size)), count)


def _sampler_name(data: Iterable[Any]) -> str:
    if _streams(data):
        return type(data).__name__ if type(data).__name__ == "DataLoaderDispatcher" else "IterableDatasetShard"
    sampler = getattr(data, "sampler", None)
    named = sampler if isinstance(sampler, DistributedSampler) else getattr(data, "batch_sampler", None)
    return type(named).__name__


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and device in groups of at most `BUCKET` bytes, larger ones alone."""
    found: list[list[Tensor]] = []
    open_ones: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        key = (tensor.dtype, tensor.device)
        bucket, filled = open_ones.get(key, ([], BUCKET))
        if filled + size > BUCKET:
            bucket, filled = [], 0
            found.append(bucket)
        bucket.append(tensor)
        open_ones[key] = (bucket, filled + size)
    return found


@contextmanager
def _packed(bucket: list[Tensor]) -> Iterator[Tensor]:
    """One flat tensor to be changed in place; the bucket's tensors take its values afterwards."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        yield bucket[0]
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    yield flat
    for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(values.reshape(tensor.shape))
