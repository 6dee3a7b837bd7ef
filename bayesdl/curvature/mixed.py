"""A structure per layer pattern: block-diagonal over groups of layers, each group in its own structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor
from bayesdl.curvature.layout import Block, Layout
from bayesdl.curvature.structure import Shift, Structure, check_noise
from bayesdl.errors import ArgumentError


@final
@dataclass(frozen=True, eq=False)
class Mixed(Structure):
    """Each query is that of independent groups: sums of log-determinants and covariances, pieces of vectors.

    A pattern is a layer's name or a shell pattern (`fnmatch`); a name covers everything inside that module. A layer
    belongs to the first pattern that it matches. All layers of one pattern form one group, so `full` keeps the cross
    terms between them; between groups there are none.

    Attributes:
        patterns: `(pattern, structure name)` as given, in order of precedence.
        kinds: structure name per group; a pattern whose layers all went to earlier ones has no group.
        parts: one structure per group, over that group's layout.
    """

    patterns: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]
    parts: tuple[Structure, ...]

    name: ClassVar[str] = "mixed"

    @classmethod
    def of(cls, layout: Layout, patterns: Mapping[str, str], make: Callable[[str, Layout], Structure]) -> Self:
        """Groups by pattern, each made by `make(structure name, its layout)`.

        Raises:
            ArgumentError: a layer matches no pattern, or a pattern no layer; both by name.
        """
        groups = _grouped(layout, patterns)
        kinds = tuple(patterns[pattern] for pattern in groups)
        parts = tuple(make(patterns[pattern], _sub_layout(layout, blocks)) for pattern, blocks in groups.items())
        return cls(layout, tuple(patterns.items()), kinds, parts)

    @property
    def recipe(self) -> str | dict[str, str]:
        return dict(self.patterns)

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in part.options.items()}

    def with_options(self, options: Mapping[str, Any]) -> Self:
        return self.with_parts([part.with_options(options) for part in self.parts])

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Positions in the layout of the blocks of each group."""
        where = {block.parameters: i for i, block in enumerate(self.layout.blocks)}
        return tuple(tuple(where[block.parameters] for block in part.layout.blocks) for part in self.parts)

    def with_parts(self, parts: Sequence[Structure]) -> Self:
        """The same groups in other structures."""
        return replace(self, parts=tuple(parts))

    def fresh(self) -> Self:
        return self.with_parts([part.fresh() for part in self.parts])

    def whole_blocks(self) -> frozenset[str]:
        return frozenset().union(*(part.whole_blocks() for part in self.parts))

    @property
    def num_prepared(self) -> int:
        return sum(part.num_prepared for part in self.parts)

    def update(self, factors: Sequence[Factor]) -> None:
        for part, own in self._own(factors):
            part.update(own)

    def per_block(self) -> Sequence[Tensor]:
        found = {
            i: value
            for part, own in zip(self.parts, self.members, strict=True)
            for i, value in zip(own, part.per_block(), strict=True)
        }
        return [found[i] for i in range(len(found))]

    def is_zero(self) -> bool:
        return all(part.is_zero() for part in self.parts)

    def _plus(self, other: Self) -> Self:
        return self.with_parts([a + b for a, b in zip(self.parts, other.parts, strict=True)])

    def scaled(self, weight: Tensor) -> Self:
        return self.with_parts([part.scaled(weight) for part in self.parts])

    def logdet(self, scale: Shift, shift: Shift) -> Tensor:
        pairs = zip(self.parts, self._shifts(shift), strict=True)
        return torch.stack([part.logdet(scale, own) for part, own in pairs]).sum()

    def product(self, vectors: Tensor) -> Tensor:
        return self._join([part.product(v) for part, v in zip(self.parts, self._split(vectors), strict=True)])

    def solve(self, vectors: Tensor, scale: Shift, shift: Shift) -> Tensor:
        pieces = zip(self.parts, self._split(vectors), self._shifts(shift), strict=True)
        return self._join([part.solve(v, scale, own) for part, v, own in pieces])

    def quad(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        pairs = zip(self._own(factors), self._shifts(shift), strict=True)
        return torch.stack([part.quad(own, scale, s) for (part, own), s in pairs]).sum(0)

    def cross(self, first: Sequence[Factor], second: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        groups = zip(self._own(first), self._own(second), self._shifts(shift), strict=True)
        return torch.stack([part.cross(mine, other, scale, s) for (part, mine), (_, other), s in groups]).sum(0)

    def marginal(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        pairs = zip(self._own(factors), self._shifts(shift), strict=True)
        return torch.stack([part.marginal(own, scale, s) for (part, own), s in pairs]).sum(0)

    def prepared(self, factors: Sequence[Factor]) -> Sequence[Factor]:
        return [factor for part, own in self._own(factors) for factor in part.prepared(own)]

    def quad_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        pairs = zip(self._prepared_own(factors), self._shifts(shift), strict=True)
        return torch.stack([part.quad_prepared(own, scale, s) for (part, own), s in pairs]).sum(0)

    def marginal_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        pairs = zip(self._prepared_own(factors), self._shifts(shift), strict=True)
        return torch.stack([part.marginal_prepared(own, scale, s) for (part, own), s in pairs]).sum(0)

    def sample(self, noise: Tensor, scale: Shift, shift: Shift) -> Tensor:
        check_noise(noise, self.layout.numel)
        pieces = zip(self.parts, self._split(noise), self._shifts(shift), strict=True)
        return self._join([part.sample(e, scale, own) for part, e, own in pieces])

    def eigenvalues(self) -> Tensor:
        return torch.cat([part.eigenvalues() for part in self.parts])

    def to_dense(self) -> Tensor:
        blocks = [part.to_dense() for part in self.parts]
        dense = blocks[0].new_zeros(self.layout.numel, self.layout.numel)
        flat = torch.arange(self.layout.numel, device=dense.device)
        for index, block in zip(self._split(flat), blocks, strict=True):
            dense[index.unsqueeze(1), index] = block
        return dense

    def sums(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": value for i, part in enumerate(self.parts) for name, value in part.sums().items()}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": value for i, part in enumerate(self.parts) for name, value in part.tensors().items()}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        def own(i: int) -> dict[str, Tensor]:
            prefix = f"{i}."
            return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

        return self.with_parts([part.with_tensors(own(i)) for i, part in enumerate(self.parts)])

    def _own(self, factors: Sequence[Factor]) -> list[tuple[Structure, list[Factor]]]:
        pairs = zip(self.parts, self.members, strict=True)
        return [(part, [factors[i] for i in own]) for part, own in pairs]

    def _prepared_own(self, factors: Sequence[Factor]) -> list[tuple[Structure, Sequence[Factor]]]:
        pairs, start = [], 0
        for part in self.parts:
            pairs.append((part, factors[start : start + part.num_prepared]))
            start += part.num_prepared
        return pairs

    def _shifts(self, shift: Shift) -> list[Shift]:
        """The prior precision of each group."""
        value = torch.as_tensor(shift)
        if value.numel() == 1:
            return [shift] * len(self.parts)
        if value.shape == (len(self.layout.blocks),):
            return [value[list(own)] for own in self.members]
        self.layout.shifts(value, value)  # refuses any other shape
        return list(self._split(value))

    def _split(self, flat: Tensor) -> list[Tensor]:
        """`(..., P)` -> one flat vector per group."""
        values = self.layout.to_dict(flat)
        return [part.layout.flatten(values, flat.dim() - 1) for part in self.parts]

    def _join(self, pieces: Sequence[Tensor]) -> Tensor:
        values: dict[str, Tensor] = {}
        for part, piece in zip(self.parts, pieces, strict=True):
            values |= part.layout.to_dict(piece)
        return self.layout.flatten(values, pieces[0].dim() - 1)


def _grouped(layout: Layout, patterns: Mapping[str, str]) -> dict[str, list[Block]]:
    taken: dict[str, list[Block]] = {}
    for block in layout.blocks:
        pattern = next((p for p in patterns if _matches(p, block)), None)
        if pattern is None:
            left = [b.name for b in layout.blocks if not any(_matches(p, b) for p in patterns)]
            raise ArgumentError(
                f"no pattern of structure={dict(patterns)!r} matches {', '.join(map(repr, left))}; add them, or a "
                'last entry "*" for the rest'
            )
        taken.setdefault(pattern, []).append(block)
    for pattern in patterns:
        if not any(_matches(pattern, block) for block in layout.blocks):
            raise ArgumentError(
                f"the pattern {pattern!r} of structure={dict(patterns)!r} matches no selected layer; they are "
                f"{', '.join(repr(block.name) for block in layout.blocks)}"
            )
    return {pattern: taken[pattern] for pattern in patterns if pattern in taken}


def _matches(pattern: str, block: Block) -> bool:
    names = (block.name, *block.modules)
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names)


def _sub_layout(layout: Layout, blocks: Sequence[Block]) -> Layout:
    inside = {name for block in blocks for name in block.parameters}
    pairs = [(n, s) for n, s in zip(layout.names, layout.shapes, strict=True) if n in inside]
    names, shapes = zip(*pairs, strict=True)
    return Layout(tuple(blocks), tuple(names), tuple(shapes), layout.activations, layout.outputs)
