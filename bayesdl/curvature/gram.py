"""Function space: the kernel J J^T between all examples of one batch, from layer factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayesdl.curvature.factor import CHUNK, Factor, LinearFactor


def gram(factors: Sequence[Factor]) -> Tensor:
    """J J^T over all blocks, `(B K, B K)` float64, examples slower than outputs.

    A plain linear layer costs two products, (a a'^T) times (g g'^T) entry by entry; other blocks form the rows of
    their Jacobian for a few examples at a time.
    """
    return torch.stack(
        [_linear(f) if isinstance(f, LinearFactor) and f.positions == 1 else _rows(f) for f in factors]
    ).sum(0)


def joined(parts: Sequence[Factor]) -> Factor:
    """Factors of one block for several batches as one."""
    first = parts[0]
    g = torch.cat([part.g for part in parts], 2)
    if isinstance(first, LinearFactor):
        return LinearFactor(torch.cat([part.a for part in parts if isinstance(part, LinearFactor)], 1), g)
    return replace(first, index=torch.cat([part.index for part in parts if not isinstance(part, LinearFactor)]), g=g)


def _block(factor: Factor) -> Tensor:
    return _linear(factor) if isinstance(factor, LinearFactor) and factor.positions == 1 else _rows(factor)


def _linear(factor: LinearFactor) -> Tensor:
    groups, outputs, batch = factor.g.shape[:3]
    total = factor.a.new_zeros(batch, outputs, batch, outputs, dtype=torch.float64)
    for group in range(groups):
        a, g = factor.a[group, :, 0].double(), factor.g[group, :, :, 0].double()
        rows = g.transpose(0, 1).flatten(0, 1)
        total += (rows @ rows.mT).view(total.shape) * (a @ a.mT)[:, None, :, None]
    return total.view(batch * outputs, -1)


def _rows(factor: Factor) -> Tensor:
    outputs, batch = factor.g.shape[1:3]
    inputs = factor.a.shape[-1] * len(factor.g) if isinstance(factor, LinearFactor) else factor.size
    step = max(1, CHUNK // max(1, outputs * inputs * factor.g.shape[-1]))
    pieces = [slice(start, min(start + step, batch)) for start in range(0, batch, step)]
    total = factor.g.new_zeros(batch * outputs, batch * outputs, dtype=torch.float64)
    for i, mine in enumerate(pieces):
        left = _part(factor, mine).jacobian().flatten(0, 1).double()
        for other in pieces[: i + 1]:
            right = left if other == mine else _part(factor, other).jacobian().flatten(0, 1).double()
            block = left @ right.mT
            rows, columns = (slice(p.start * outputs, p.stop * outputs) for p in (mine, other))
            total[rows, columns] = block
            total[columns, rows] = block.mT
    return total


def _part(factor: Factor, piece: slice) -> Factor:
    g = factor.g[:, :, piece]
    if isinstance(factor, LinearFactor):
        return LinearFactor(factor.a[:, piece], g)
    return replace(factor, index=factor.index[piece], g=g)
