"""How many examples go through the network at once: memory budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bayesdl.batch import batch_size, flatten_tensors, index_batch
from bayesdl.curvature.layout import REPEATED, Layout
from bayesdl.curvature.structure import Structure
from bayesdl.errors import ArgumentError

__all__ = ["chunk_size", "chunks", "cotangent_width", "goes_in_turn"]

# kinds whose Jacobian rows are formed whatever the structure
UNFACTORED = ("dense", "elements")
# bytes of activations and gradients alive at once
DEFAULT_MEMORY = 512 << 20
# on a CPU smaller chunks stay near the caches (a quarter faster on an MLP), down to a batch that convolutions need
NEAR_CACHE, FEWEST = 32 << 20, 256
# cotangents whose gradients take as much as the graph, the patches and the gradients of one (measured on ResNet-20)
IN_TURN = 4


def goes_in_turn(layout: Layout, structures: Iterable[Structure], device: torch.device) -> bool:
    """Whether cotangents go back one after another, each into curvature that takes it so.

    Convolutions on a CPU have no batched backward pass that would be faster; what needs per-example gradients of whole
    parameters takes all cotangents at once.
    """
    if device.type != "cpu" or layout.whole is not None or not all(each.takes_turns for each in structures):
        return False
    if any(b.kind == "dense" and b.axis > REPEATED for b in layout.blocks):
        return False
    return any(b.kind == "linear" and len(b.shapes[0]) > 2 for b in layout.blocks)


def chunk_size(
    layout: Layout,
    structure: str | Structure,
    dtype: torch.dtype,
    *,
    width: int | None = None,
    memory: int | None = None,
    device: torch.device | None = None,
    in_turn: bool = False,
) -> int:
    """Examples per chunk so that what lives at once stays within `memory` bytes.

    Args:
        layout: counts activations, outputs and parameters without a closed form.
        structure: "full" forms whole Jacobian rows; other structures say for which blocks they do.
        dtype: of the factors.
        width: cotangents K; default one per output.
        memory: bytes; default `DEFAULT_MEMORY`, and on a CPU less where that is faster.
        device: where it all happens; default a CPU.
        in_turn: whether the cotangents go back one after another.

    Raises:
        ArgumentError: a budget that is not positive.
    """
    if memory is not None and memory < 1:
        raise ArgumentError(f"memory={memory}; expected a positive number of bytes, or None")
    width = width or layout.outputs
    scalars = _scalars(layout, structure) * (min(width, IN_TURN) if in_turn else width)
    example = max(1, scalars) * torch.finfo(dtype).bits // 8
    most = max(1, (memory or DEFAULT_MEMORY) // example)
    if memory is not None or (device is not None and device.type != "cpu"):
        return most
    return min(most, max(FEWEST, NEAR_CACHE // example))


def cotangent_width(
    layout: Layout, structure: str | Structure, dtype: torch.dtype, shape: torch.Size, memory: int | None = None
) -> int:
    """Cotangents that go back at once for outputs of a given shape, so that what lives at once stays within `memory`.

    Args:
        layout, structure, dtype, memory: as in `chunk_size`.
        shape: of the outputs, `(B, C)` or `(B, positions..., C)`; sequences may be longer than the planned one.
    """
    longer = max(1.0, shape[1:-1].numel() / layout.positions) if layout.positions and len(shape) > 2 else 1.0
    example = max(1, int(longer * _scalars(layout, structure))) * torch.finfo(dtype).bits // 8
    return max(1, (memory or DEFAULT_MEMORY) // (example * shape[0]))


def _scalars(layout: Layout, structure: str | Structure) -> int:
    """Scalars alive per example and cotangent."""
    names = structure.whole_blocks() if isinstance(structure, Structure) else frozenset()
    whole = [b.numel for b in layout.blocks if structure == "full" or b.kind in UNFACTORED or b.name in names]
    return 3 * layout.activations + 2 * sum(whole)


def chunks(inputs: Any, target: Any, step: int | Callable[[], int]) -> Iterator[tuple[Any, Any]]:
    """A batch in pieces of at most `step` examples; a function is asked before every piece."""
    most = step if callable(step) else lambda: step
    tensors, _ = flatten_tensors(inputs)
    if not tensors or batch_size(inputs) <= most():
        yield inputs, target
        return
    size, start = batch_size(inputs), 0
    while start < size:
        piece = slice(start, min(start + most(), size))
        yield index_batch(inputs, piece), None if target is None else target[piece]
        start = piece.stop
