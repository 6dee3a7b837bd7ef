"""Layer factors times many directions at once: J D and J^T u, without a Jacobian of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor, LinearFactor
from bayesdl.curvature.layout import Block

# scalars of one intermediate result, which bounds the examples treated at once
LIMIT = 1 << 23
# directions at once where only one can be multiplied at a time
CHUNK = 16


def times(factor: Factor, directions: Tensor) -> Tensor:
    """J vec(D) for block directions `(q, G, out, in)`: `(q, B, K)`."""
    if not isinstance(factor, LinearFactor):
        return torch.func.vmap(factor.dot, chunk_size=CHUNK)(directions)
    count = len(directions)
    if _forms_rows(factor, count):
        flat = directions.flatten(1).T
        return torch.cat([piece.jacobian() @ flat for _, piece in _pieces(factor, count)]).permute(2, 0, 1)
    turned = directions if factor.u_in is None else directions @ factor.u_in.mT
    turned = turned if factor.u_out is None else factor.u_out @ turned
    wide = turned.permute(1, 3, 2, 0).flatten(2)  # (G, in, out q)
    parts = []
    for _, piece in _pieces(factor, count):
        groups, batch = piece.a.shape[:2]
        moved = (piece.a.flatten(1, 2) @ wide).reshape(groups, batch, -1, count)  # (G, b, T out, q)
        parts.append((_cotangents(piece) @ moved).sum(0))
    return torch.cat(parts).permute(2, 0, 1)


def transposed_times(factor: Factor, vectors: Tensor, block: Block) -> Tensor:
    """sum_b sum_k u_bk J_bk for vectors `(q, B, K)`: `(q, G, out, in)`."""
    count, shape = len(vectors), (block.groups, block.rows, block.columns)
    if not isinstance(factor, LinearFactor):
        # not by torch.func.vjp, which goes wrong in torch 2.5's inference mode
        return torch.cat([factor.pull(part) for part in vectors.split(CHUNK)]).reshape(count, *shape)
    if _forms_rows(factor, count):
        flat = vectors.new_zeros(count, block.numel)
        for where, piece in _pieces(factor, count):
            flat += vectors[:, where].flatten(1) @ piece.jacobian().flatten(0, 1)
        return flat.reshape(count, *shape)
    total = vectors.new_zeros(factor.a.shape[0], factor.g.shape[-1] * count, factor.a.shape[-1])
    for where, piece in _pieces(factor, count):
        mixed = _cotangents(piece).mT @ vectors[:, where].permute(1, 2, 0)  # (G, b, T out, q)
        rows = piece.a.flatten(1, 2)
        total += mixed.reshape(*rows.shape[:2], -1).mT @ rows
    found = total.unflatten(1, (-1, count)).permute(2, 0, 1, 3)
    found = found if factor.u_in is None else found @ factor.u_in
    return found if factor.u_out is None else factor.u_out.mT @ found


def selected(factor: Factor, index: Tensor | slice) -> Factor:
    """The examples at `index`, a mask, positions or a slice."""
    g = factor.g[:, :, index]
    if isinstance(factor, LinearFactor):
        if factor.shared:  # stays one for all
            g = factor.g[:, :, :1].expand(-1, -1, g.shape[2], -1, -1)
        return replace(factor, a=factor.a[:, index], g=g)
    return replace(factor, index=factor.index[index], g=g)


def _forms_rows(factor: LinearFactor, count: int) -> bool:
    # K T products of out x in for the rows and K q with them, against q T for moved inputs
    width, positions = factor.g.shape[1], factor.positions
    return width * (positions + count) < count * positions


def _pieces(factor: LinearFactor, count: int) -> Iterator[tuple[slice, LinearFactor]]:
    """The factor, a few examples at a time."""
    groups, width, batch, positions, out = factor.g.shape
    rows = _forms_rows(factor, count)
    scalars = groups * out * (width * factor.a.shape[-1] if rows else positions * count)
    step = max(1, LIMIT // max(1, scalars))
    for start in range(0, batch, step):
        where = slice(start, start + step)
        yield where, replace(factor, a=factor.a[:, where], g=factor.g[:, :, where])


def _cotangents(factor: LinearFactor) -> Tensor:
    """`(G, B, K, T out)`."""
    return factor.g.transpose(1, 2).flatten(3)
