"""Patches: what meets a convolution's kernel at each of its positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def patches(module: Any, value: Tensor, groups: int, ones: bool) -> Tensor:
    """Patches `(G, B, T, in)` of a convolution's input, channels grouped as its weight has them.

    They lie in memory column by column, position next to position, as the convolution's outputs and their gradients
    do; strided views are copied there once, which is several times as fast as `F.unfold` on a CPU.

    Args:
        module: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
        value: `(B, C, ...)`.
        groups: G.
        ones: whether a last column of ones follows, for the bias.
    """
    width = _padding(module)
    if any(width):
        value = F.pad(value, width, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    dims = len(module.kernel_size)
    view = _windows(module, value)  # (B, C, positions.., kernel..)
    positions, kernel = view.shape[2 : 2 + dims], view.shape[2 + dims :]
    view = view.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)).unflatten(1, (groups, -1))
    rows = view.shape[2] * kernel.numel()
    if kernel.numel() == 1 and not ones:
        return view.reshape(len(value), groups, rows, -1).mT.transpose(0, 1)
    kept = value.new_empty(len(value), groups, rows + ones, positions.numel())
    kept[:, :, :rows].unflatten(3, positions).unflatten(2, (-1, *kernel)).copy_(view)
    if ones:
        kept[:, :, rows] = 1.0
    return kept.mT.transpose(0, 1)


def transposed_patches(module: Any, gradient: Tensor, positions: torch.Size) -> Tensor:
    """Patches `(B, T, C k)` of a transposed convolution's cotangent under the positions of its input."""
    dims = len(module.kernel_size)
    view = _windows(module, F.pad(gradient, _padding(module)))
    for axis, size in enumerate(positions):  # output padding adds places that no input reaches
        view = view.narrow(2 + axis, 0, size)
    # (B, C, o1.., k1..) -> (B, o1.., C, k1..)
    view = view.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return view.reshape(len(view), positions.numel(), -1)


def _padding(module: Any) -> list[int]:
    """As `F.pad` takes it."""
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return list(module._reversed_padding_repeated_twice)
    # not the layer's own list, which dilated networks that rewrite `padding` leave as it was
    return [size for size in reversed(module.padding) for _ in range(2)]


def _windows(module: Any, value: Tensor) -> Tensor:
    """`(B, C, positions.., kernel..)`, a view."""
    for axis, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        value = value.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return value
