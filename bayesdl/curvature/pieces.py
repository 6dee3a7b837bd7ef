"""Layer factors as values that are kept: their names in files, their precision, the rows Z that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor, LinearFactor, RowFactor
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.products import times, transposed_times


def named_factors(pieces: Sequence[Sequence[Factor]]) -> dict[str, Tensor]:
    """Tensors of the factors of all blocks for some examples each, by "piece.block.field"."""
    named: dict[str, Tensor] = {}
    for i, piece in enumerate(pieces):
        for j, factor in enumerate(piece):
            named[f"{i}.{j}.g"] = factor.g
            if isinstance(factor, RowFactor):
                named[f"{i}.{j}.index"] = factor.index
                continue
            named[f"{i}.{j}.a"] = factor.a
            if factor.lengths:
                named[f"{i}.{j}.lengths"] = torch.tensor(factor.lengths)
    return named


def factors_named(tensors: Mapping[str, Tensor], layout: Layout) -> list[list[Factor]]:
    """Inverse of `named_factors`; tensors of other names are not looked at."""
    count = len({name.split(".")[0] for name in tensors if name[0].isdigit()})
    return [[_factor(tensors, layout, i, j) for j in range(len(layout.blocks))] for i in range(count)]


def _factor(tensors: Mapping[str, Tensor], layout: Layout, i: int, j: int) -> Factor:
    g, index = tensors[f"{i}.{j}.g"], tensors.get(f"{i}.{j}.index")
    if index is not None:
        return RowFactor(index.long(), g, layout.blocks[j].columns)
    lengths = tensors.get(f"{i}.{j}.lengths")
    return LinearFactor(tensors[f"{i}.{j}.a"], g, lengths=() if lengths is None else tuple(int(n) for n in lengths))


def num_rows(factors: Sequence[Factor]) -> int:
    """Rows of V^T J, examples times cotangents."""
    return int(factors[0].g.shape[1] * factors[0].g.shape[2])


def content(factor: Factor) -> Tensor:
    """A scalar that is finite exactly when the factor is."""
    total = factor.g.abs().sum()
    return total + 0.0 * factor.a.sum() if isinstance(factor, LinearFactor) else total


def in_double(factor: Factor) -> Factor:
    """The factor in float64."""
    if isinstance(factor, LinearFactor):
        return replace(factor, a=factor.a.double(), g=factor.g.double())
    return replace(factor, g=factor.g.double())


def rows_times(pieces: Sequence[Sequence[Factor]], layout: Layout, vectors: Tensor) -> Tensor:
    """Z v for flat vectors `(q, P)` in float64: `(q, r)`."""
    directions = layout.split(vectors)
    found = []
    for piece in pieces:
        parts = [times(in_double(f), d) for f, d in zip(piece, directions, strict=True)]
        found.append(torch.stack(parts).sum(0).flatten(1))
    return torch.cat(found, 1)


def rows_pulled(pieces: Sequence[Sequence[Factor]], layout: Layout, vectors: Tensor, j: int) -> Tensor:
    """Block j of Z^T u for vectors `(q, r)`: `(q, G, out, in)`."""
    found = []
    for piece, own in zip(pieces, vectors.split([num_rows(p) for p in pieces], 1), strict=True):
        factor = in_double(piece[j])
        shaped = own.unflatten(1, (factor.g.shape[2], factor.g.shape[1]))
        found.append(transposed_times(factor, shaped, layout.blocks[j]))
    return torch.stack(found).sum(0)


def rows_squared(pieces: Sequence[Sequence[Factor]], layout: Layout, vectors: Tensor, room: int) -> list[Tensor]:
    """Per block, the sums over vectors `(q, r)` of the squares of Z^T u; `room` scalars at once."""
    totals = []
    for j, block in enumerate(layout.blocks):
        parts = vectors.split(max(1, room // block.numel))
        totals.append(torch.stack([rows_pulled(pieces, layout, part, j).square().sum(0) for part in parts]).sum(0))
    return totals


def same_rows(
    first: Sequence[Sequence[Factor]],
    second: Sequence[Sequence[Factor]],
    basis: Tensor | None = None,
    other: Tensor | None = None,
) -> bool:
    """Whether two lists of factors, and the bases that go with them, hold the same values."""
    if first is second and basis is other:
        return True
    if (basis is None) != (other is None) or (basis is not None and other is not None and not _equal(basis, other)):
        return False
    mine, theirs = named_factors(first), named_factors(second)
    return list(mine) == list(theirs) and all(_equal(value, theirs[name]) for name, value in mine.items())


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
