"""Layer factors as values that are kept: their names in files, their precision, how many rows they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor, LinearFactor, RowFactor
from bayesdl.curvature.layout import Layout


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
