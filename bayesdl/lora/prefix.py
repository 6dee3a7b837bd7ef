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
    def shared(self, module: nn.Module, items: tuple[int, ...], draws: int) -> Iterator[None]:
        """Pre-hooks on a clone: earlier blocks see B rows, the first block with noise sees S B again.

        `items` are the numbers of rows that may stand for the items: B, or also B C where options become rows.
        """
        blocks: Any = module.get_submodule(self.path)
        rows = _Rows(items, draws)
        handles = []
        try:
            for index, block in enumerate(blocks[: self.first]):
                handles.append(block.register_forward_pre_hook(_slicing(rows, index == 0), with_kwargs=True))
            handles.append(blocks[self.first].register_forward_pre_hook(_repeating(rows), with_kwargs=True))
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


@final
class _Rows:
    """How many rows stand for the items in one run through the blocks, as the first block sees it."""

    def __init__(self, items: tuple[int, ...], draws: int) -> None:
        self._known = {draws * size: size for size in reversed(items)}
        self.draws, self.short = draws, items[0]

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.short = self._known.get(len(hidden), self.short)

    def shorter(self, value: Any) -> Any:
        long = isinstance(value, Tensor) and value.dim() and len(value) == self.draws * self.short
        return value[: self.short] if long else value

    def longer(self, value: Tensor) -> Tensor:
        return value.repeat(self.draws, *(1,) * (value.dim() - 1)) if len(value) == self.short else value


def _slicing(rows: _Rows, first: bool) -> PreHook:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if first:
            rows.enter(args, kwargs)
        return tree_map(rows.shorter, args), tree_map(rows.shorter, kwargs)

    return hook


def _repeating(rows: _Rows) -> PreHook:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:  # hidden states come first
            return (rows.longer(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": rows.longer(kwargs["hidden_states"])}

    return hook
