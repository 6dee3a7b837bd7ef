"""Blocks in front of all noise run once for all draws: exact, because nothing in them is random."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bayesdl.errors import SelectionError
from bayesdl.lora.adapters import AdaptedLayer, block_list, block_of


@final
@dataclass(frozen=True)
class Prefix:
    """Where the shared part of a model ends.

    Attributes:
        path: of the list of blocks.
        first: index of the first block with noise.
    """

    path: str
    first: int

    @contextmanager
    def shared(self, module: nn.Module, items: int, draws: int) -> Iterator[None]:
        """Pre-hooks on a clone: earlier blocks see B rows, the first block with noise sees S B again."""
        rows = items * draws
        blocks: Any = module.get_submodule(self.path)
        handles = []
        try:
            for block in blocks[: self.first]:
                handles.append(block.register_forward_pre_hook(_slicing(rows, items), with_kwargs=True))
            handles.append(blocks[self.first].register_forward_pre_hook(_repeating(items, draws), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_prefix(module: nn.Module, layers: Iterable[AdaptedLayer], blocks: str | None = None) -> Prefix | None:
    """The shared part of a model; None where noise starts in the first block, or lies in front of the blocks."""
    names = [layer.name for layer in layers]
    try:
        path = block_list(module, names, blocks)
    except SelectionError:
        if blocks is not None:
            raise
        return None
    places = [block_of(name, path) for name in names]
    inside = [place for place in places if place is not None]
    if not inside or min(inside) == 0:
        return None
    order = [name for name, _ in module.named_modules()]
    behind = order.index(path)
    in_front = any(place is None and order.index(n) < behind for n, place in zip(names, places, strict=True))
    return None if in_front or getattr(module.config, "is_encoder_decoder", False) else Prefix(path, min(inside))


def agrees(shared: Tensor, plain: Tensor) -> bool:
    """Whether two computations of one output differ by rounding alone."""
    tolerance = 1e-9 if plain.dtype is torch.float64 else 1e-4 if plain.dtype is torch.float32 else 3e-2
    scale = float(plain.abs().max().clamp(min=1e-6))
    return float((shared - plain).abs().max()) <= tolerance * scale


PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]


def _slicing(rows: int, items: int) -> PreHook:
    def shorter(value: Any) -> Any:
        return value[:items] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tree_map(shorter, args), tree_map(shorter, kwargs)

    return hook


def _repeating(items: int, draws: int) -> PreHook:
    def longer(value: Tensor) -> Tensor:
        return value.repeat(draws, *(1,) * (value.dim() - 1)) if len(value) == items else value

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:  # hidden states come first
            return (longer(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": longer(kwargs["hidden_states"])}

    return hook
