"""sum of log(scale v + shift) over many eigenvalues v, a few at a time, with its derivatives in scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# eigenvalues treated at once: 32 MiB in float64
PIECE = 1 << 22


def log_sum(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A float64 scalar, differentiable in the scalars `scale` and `shift`; `values` of any shape and dtype.

    Up to `PIECE` values are one ordinary expression, which has all derivatives. More of them are never held in float64
    together, and have first derivatives.
    """
    wide_scale, wide_shift = scale.double(), shift.double()
    if values.numel() <= PIECE:
        return torch.addcmul(wide_shift, wide_scale, values.double()).log().sum()
    return _LogSum.apply(values, wide_scale, wide_shift)


class _LogSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        total = torch.zeros(3, dtype=torch.float64, device=values.device)
        for piece in values.flatten().split(PIECE):
            exact = piece.double()
            precision = exact * scale + shift
            share = (exact / precision).sum(), precision.reciprocal().sum()
            total += torch.stack([precision.log_().sum(), *share])
        ctx.save_for_backward(total[1], total[2])
        return total[0].clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, Tensor]:
        of_scale, of_shift = ctx.saved_tensors
        return None, slope * of_scale, slope * of_shift
