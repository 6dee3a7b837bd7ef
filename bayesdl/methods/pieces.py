"""Sums over data that the processes of a group share, to the bit that one process alone gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.distributed import Group, together

PIECES = 8  # at most; so many tensors of a sum's size are held and sent


@final
class Pieces:
    """Work in a fixed number of pieces: what they give is added in their order, whoever worked on them.

    Args:
        group: processes that work on every so many pieces each; None for this process alone.
        count: batches that the work consists of.
    """

    def __init__(self, group: Group | None, count: int) -> None:
        self._group, self._batches, self.count = group, count, min(PIECES, count)

    @property
    def own(self) -> list[int]:
        """Pieces of this process."""
        return (
            list(range(self.count))
            if self._group is None
            else list(range(self.count))[self._group.rank :: self._group.size]
        )

    def of(self, batch: int) -> int:
        """The piece that a batch belongs to."""
        return batch * self.count // self._batches

    def cut(self, held: Sequence[Any]) -> list[list[Any]]:
        """Batches by piece."""
        return [[batch for number, batch in enumerate(held) if self.of(number) == i] for i in range(self.count)]

    def total(self, piece: Callable[[int], Tensor], like: Tensor) -> Tensor:
        """The sum over all pieces, on every process.

        Args:
            piece: gives the part of one of this process's pieces.
            like: shape, dtype and device of the sum.
        """
        total = torch.zeros_like(like)
        if self._group is None:
            for number in self.own:
                total += piece(number)
            return total
        parts = like.new_zeros(self.count, *like.shape)
        with together(self._group):
            for number in self.own:
                parts[number] = piece(number)
        self._group.add([parts])  # to zeros: exact
        for part in parts:
            total += part
        return total
