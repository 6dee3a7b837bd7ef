"""Labels of a head's loss: class indices or soft labels, checked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesdl.errors import LabelError, NonFiniteError, ShapeError


def class_labels(y: Tensor, mean: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """One-hot or soft labels `(B, K)` for outputs `(B, K)`, and which of them count `(B,)`.

    Raises:
        ShapeError, LabelError, NonFiniteError: labels that do not fit.
    """
    batch, classes = mean.shape
    if y.dtype.is_floating_point:
        return soft_labels(y, mean), torch.ones(batch, dtype=torch.bool, device=mean.device)
    if y.numel() != batch or y.dtype is torch.bool:
        raise ShapeError(f"targets have shape {tuple(y.shape)} and dtype {y.dtype}; expected {batch} class indices")
    labels = y.reshape(-1).to(device=mean.device, dtype=torch.long)
    kept = labels != ignore_index
    bad = kept & ((labels < 0) | (labels >= classes))
    if bool(bad.any()):
        place = int(bad.nonzero()[0])
        raise LabelError(f"target {int(labels[place])} at index {place} is outside 0..{classes - 1}")
    hard = nn.functional.one_hot(torch.where(kept, labels, 0), classes)
    return hard.to(mean.dtype), kept


def soft_labels(y: Tensor, mean: Tensor) -> Tensor:
    """Probabilities of classes or labels as `(B, K)`.

    Raises:
        ShapeError, LabelError, NonFiniteError: labels that do not fit.
    """
    classes = mean.shape[-1]
    if y.numel() != mean.numel() or (y.shape[-1] != classes and classes > 1):
        raise ShapeError(f"targets have shape {tuple(y.shape)}; expected labels {tuple(mean.shape)}")
    soft = y.reshape(mean.shape).to(mean)
    if not bool(torch.isfinite(soft).all()):
        raise NonFiniteError("soft labels: NaN or infinity")
    bad = (soft < 0) | (soft > 1)
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        raise LabelError(f"target {float(soft[place])} at index {place} is no probability; expected 0..1")
    return soft
