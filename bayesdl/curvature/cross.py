"""Products of Jacobians between two batches, J diag(w) J'^T, from layer factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor, LinearFactor, RowFactor
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.products import selected, times
from bayesdl.errors import ShapeError

# scalars of one intermediate result, which bounds the examples or rows treated at once
LIMIT = 1 << 23


def cross(first: Factor, second: Factor, weight: Tensor | None = None) -> Tensor:
    """J diag(weight) J'^T of one block for every pair of examples: `(B, K, B', K')`.

    A plain linear layer costs products of inputs and of cotangents; layers with positions form the rows of their
    Jacobians, and embeddings compare positions, for a few examples at a time.

    Args:
        first: B examples, K cotangents.
        second: B' examples, K' cotangents, in the same coordinates.
        weight: `(G, out, in)`; None stands for ones.
    """
    if isinstance(first, LinearFactor) and isinstance(second, LinearFactor):
        rotated = any(basis is not None for f in (first, second) for basis in (f.u_in, f.u_out))
        if first.positions == second.positions == 1 and not rotated:
            return _plain(first, second, weight)
        return _positions(first, second, weight)
    if isinstance(first, RowFactor) and isinstance(second, RowFactor):
        return _rows(first, second, weight)
    raise ShapeError("two factors of one block must be of one kind")


def _plain(first: LinearFactor, second: LinearFactor, weight: Tensor | None) -> Tensor:
    """sum_o g_o g'_o (sum_i a_i w_oi a'_i); without a weight the two sums separate."""
    total = first.g.new_zeros(first.g.shape[2], first.g.shape[1], second.g.shape[2], second.g.shape[1])
    for group in range(len(first.a)):
        a, other = first.a[group, :, 0], second.a[group, :, 0]
        g, h = first.g[group, :, :, 0].transpose(0, 1), second.g[group, :, :, 0].transpose(0, 1)  # (B, K, out)
        if weight is None or weight[group].numel() == 1:
            # a product over one output or input alone counts its own weight
            scale = 1.0 if weight is None else weight[group].reshape(())
            flat = (g.flatten(0, 1) @ h.flatten(0, 1).mT).view(total.shape)
            total = total + scale * flat * (a @ other.mT)[:, None, :, None]
            continue
        if a.shape[-1] == 1:  # norms, biases: one input
            rows = (g * weight[group, :, 0] * a[:, :, None]).flatten(0, 1)
            total = total + (rows @ (h * other[:, :, None]).flatten(0, 1).mT).view(total.shape)
            continue
        step = max(1, LIMIT // max(1, len(a) * max(len(other), a.shape[-1])))
        for start in range(0, g.shape[-1], step):
            part = slice(start, start + step)
            spread = (a * weight[group, part, None]) @ other.mT  # (o, B, B')
            total = total + _contracted(g[..., part], spread, h[..., part])
    return total


def _contracted(g: Tensor, spread: Tensor, h: Tensor) -> Tensor:
    """sum_o g_bko s_obc h_clo."""
    pairs, count = spread.permute(1, 2, 0), h.shape[1]  # (B, B', o)
    if g.shape[1] == count == 1:
        return torch.einsum("bo,bco,co->bc", g[:, 0], pairs, h[:, 0])[:, None, :, None]
    return torch.stack([(g @ (pairs * h[:, column]).mT) for column in range(count)], -1)


def _positions(first: LinearFactor, second: LinearFactor, weight: Tensor | None) -> Tensor:
    strips = []
    for mine in _pieces(first):
        rows = mine.jacobian()
        rows = rows if weight is None else rows * weight.flatten()
        strip = [rows.flatten(0, 1) @ other.jacobian().flatten(0, 1).mT for other in _pieces(second)]
        strips.append(torch.cat(strip, 1))
    shape = (first.g.shape[2], first.g.shape[1], second.g.shape[2], second.g.shape[1])
    return torch.cat(strips).view(shape)


def _pieces(factor: LinearFactor) -> Iterator[LinearFactor]:
    """The factor, a few examples at a time, so that the rows of two pieces stay small."""
    groups, width, batch, _, out = factor.g.shape
    step = max(1, LIMIT // max(1, groups * width * out * factor.a.shape[-1]))
    for start in range(0, batch, step):
        where = slice(start, start + step)
        yield replace(factor, a=factor.a[:, where], g=factor.g[:, :, where])


def _rows(first: RowFactor, second: RowFactor, weight: Tensor | None) -> Tensor:
    """sum over positions that look up the same row: padding has no cotangent, so it meets nothing."""
    width, other = first.g.shape[1], second.g.shape[1]
    batch, positions = first.index.shape
    others, places = second.index.shape
    h = second.g[0].permute(1, 0, 2, 3).flatten(0, 2)  # (B' K' S, D)
    step = max(1, LIMIT // max(1, width * positions * len(h)))
    strips = []
    for start in range(0, batch, step):
        index = first.index[start : start + step]
        g = first.g[0, :, start : start + step].transpose(0, 1)  # (b, K, T, D)
        if weight is not None:
            g = g * weight[0].T[index.clamp(min=0)].unsqueeze(1)
        same = (index[:, None, :, None, None, None] == second.index[None, None, None, :, None, :]).to(g)
        products = (g.flatten(0, 2) @ h.mT).view(len(index), width, positions, others, other, places)
        strips.append((products * same).sum((2, 5)))
    return torch.cat(strips)


def through_solve(
    layout: Layout, solve: Callable[[Tensor], Tensor], first: Sequence[Factor], second: Sequence[Factor]
) -> Tensor:
    """J P^-1 J'^T for any P: rows of J' for a few examples at a time, solved and multiplied with the factors of J.

    Args:
        layout: of all blocks.
        solve: flat vectors `(..., P)` -> P^-1 v.
        first, second: factors of all blocks.
    """
    width, batch = second[0].g.shape[1:3]
    step = max(1, LIMIT // max(1, width * layout.numel))
    columns = []
    for start in range(0, batch, step):
        pieces = [selected(factor, slice(start, start + step)) for factor in second]
        count = pieces[0].g.shape[2]
        rows = [
            piece.jacobian().reshape(count, width, block.groups, block.rows, block.columns)
            for piece, block in zip(pieces, layout.blocks, strict=True)
        ]
        directions = layout.split(solve(layout.join(rows)).flatten(0, 1))
        found = torch.stack([times(f, d) for f, d in zip(first, directions, strict=True)]).sum(0)  # (b K', B, K)
        columns.append(found.permute(1, 2, 0).unflatten(2, (count, width)))
    return torch.cat(columns, 2)
