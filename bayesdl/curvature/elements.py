"""Single elements of parameters: a layout cut down to them, and their columns of J from the factors of whole blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bayesdl.curvature.factor import CHUNK, DEVICE_CHUNK, Factor, LinearFactor, RowFactor, dense_factor
from bayesdl.curvature.layout import Block, Layout


def restricted(layout: Layout, masks: Mapping[str, Tensor]) -> Layout:
    """The same blocks with the marked elements alone; blocks without any are left out, full ones stay as they are.

    Args:
        layout: of whole parameters.
        masks: `(*shape)` by name, true for a selected element.
    """
    blocks = []
    for block in layout.blocks:
        marks = block.pack({name: masks[name].cpu().float() for name in block.parameters}).flatten()
        index = marks.nonzero().squeeze(1)
        if len(index) == block.numel:
            blocks.append(block)
        elif len(index):
            elements = tuple(index.tolist())
            cut = replace(block, kind="elements", groups=1, rows=len(index), columns=1, transposed=False)
            blocks.append(replace(cut, whole=block, elements=elements))
    held = {name for block in blocks for name in block.parameters}
    pairs = [(n, s) for n, s in zip(layout.names, layout.shapes, strict=True) if n in held]
    return replace(
        layout, blocks=tuple(blocks), names=tuple(n for n, _ in pairs), shapes=tuple(tuple(s) for _, s in pairs)
    )


def chosen(factor: Factor, block: Block) -> Factor:
    """The factor of a block's elements, from that of the whole block: their columns of V^T J, dense."""
    if block.whole is None:
        return factor
    index = block.index.to(factor.g.device)
    if isinstance(factor, RowFactor):
        return dense_factor(_from_rows(factor, index))
    if factor.positions == 1 and factor.u_in is None and factor.u_out is None:
        return dense_factor(_from_products(factor, block.whole, index))
    return dense_factor(torch.cat([part[..., index] for part in _rows(factor)]).transpose(0, 1))


def _from_products(factor: LinearFactor, whole: Block, index: Tensor) -> Tensor:
    """g_o a_i of each element `(K, B, k)`: no other entry of the gradient is formed."""
    group, rest = index // (whole.rows * whole.columns), index % (whole.rows * whole.columns)
    out, column = rest // whole.columns, rest % whole.columns
    a, g = factor.a[:, :, 0], factor.g[:, :, :, 0]  # (G, B, in), (G, K, B, out)
    return (g[group, :, :, out] * a[group, :, column].unsqueeze(1)).permute(1, 2, 0)


def _from_rows(factor: RowFactor, index: Tensor) -> Tensor:
    """sum_t g_td [row looked up at t is v] for elements (d, v), `(K, B, k)`."""
    width, row = index // factor.size, index % factor.size
    hits = (factor.index.unsqueeze(-1) == row).to(factor.g)  # (B, T, k)
    return torch.einsum("btk,lbtk->lbk", hits, factor.g[0][..., width])


def _rows(factor: LinearFactor) -> list[Tensor]:
    """The factor's rows `(b, K, P)`, a few examples at a time."""
    _, count, batch, _, out = factor.g.shape
    limit = CHUNK if factor.g.device.type == "cpu" else DEVICE_CHUNK
    step = max(1, limit // max(1, len(factor.g) * count * out * factor.a.shape[-1]))
    pieces = [slice(start, start + step) for start in range(0, batch, step)]
    return [replace(factor, a=factor.a[:, p], g=factor.g[:, :, p]).jacobian() for p in pieces]
