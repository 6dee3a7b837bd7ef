"""What a step size, a noise and a weight decay mean: effective temperature, prior precision, scale of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from bayesdl.errors import ArgumentError, LossScaleError


def effective_temperature(lr: float, noise_variance: float, num_data: int, friction: float = 1.0) -> float:
    """T of the law p^(1/T) that a Langevin code samples: `N q / (2 f lr)`.

    Args:
        lr: learning rate on the gradient of the MEAN loss (the drift of one step is `lr` times that gradient).
        noise_variance: q, variance of the noise added to each parameter (to its momentum) in one step.
        num_data: N, number of training points.
        friction: 1 - momentum; 1 without momentum.

    Raises:
        ArgumentError: lr or friction not positive, num_data below 1, a negative variance.
    """
    if not (lr > 0 and friction > 0 and num_data >= 1 and noise_variance >= 0):
        raise ArgumentError(
            f"lr={lr}, noise_variance={noise_variance}, num_data={num_data}, friction={friction}; expected lr and "
            "friction positive, num_data at least 1, a variance of at least 0"
        )
    return num_data * noise_variance / (2 * friction * lr)


def precision_from_weight_decay(weight_decay: float, num_data: int) -> float:
    """Precision of the Gaussian prior that a weight decay on the MEAN loss stands for: `N weight_decay`."""
    if not (weight_decay >= 0 and math.isfinite(weight_decay)) or num_data < 1:
        raise ArgumentError(
            f"weight_decay={weight_decay}, num_data={num_data}; expected a finite decay of at least 0 and at least one "
            "data point"
        )
    return num_data * weight_decay


@final
@dataclass(frozen=True)
class Decreasing:
    """Learning rate `a (b + t)^-gamma` of step t = 0, 1, ... (Welling and Teh 2011); pass it as `lr=`.

    Samples then carry the weight of their step.
    """

    a: float
    b: float = 1.0
    gamma: float = 0.55

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0 and 0.5 < self.gamma <= 1):
            raise ArgumentError(f"{self}: expected a and b positive, gamma above 0.5 and at most 1")

    def __call__(self, step: int) -> float:
        return self.a * (self.b + step) ** -self.gamma


def check_loss_scale(loss_fn: Callable[[Any], torch.Tensor], batch: Any) -> float:
    """Compare the loss of a batch with the loss of its halves: a mean is wanted, a sum is an error.

    Args:
        loss_fn: batch -> scalar loss; called under `no_grad`.
        batch: a tensor, or a tuple, list or dict of tensors with the examples first.

    Returns:
        loss(batch) over the average loss of its two halves: 1 for a mean, 2 for a sum.

    Raises:
        LossScaleError: the ratio is nearer to 2 than to 1.
    """
    size = _length(batch)
    if size < 2:
        raise ArgumentError(f"the batch has {size} example(s); at least 2 are needed to tell a sum from a mean")
    half = size // 2
    with torch.no_grad():
        whole = float(loss_fn(_cut(batch, 0, 2 * half)))
        parts = 0.5 * (float(loss_fn(_cut(batch, 0, half))) + float(loss_fn(_cut(batch, half, 2 * half))))
    ratio = whole / parts if parts else 1.0
    if ratio > 2**0.5:
        raise LossScaleError(
            f"the loss of {2 * half} examples is {ratio:.3g} times the loss of {half}: it is summed over the batch; "
            "samplers take the MEAN loss and num_data (reduction='mean')"
        )
    return ratio


def _length(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return len(batch)
    parts: Sequence[Any] = list(batch.values()) if isinstance(batch, dict) else list(batch)
    return _length(parts[0])


def _cut(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[start:stop]
    if isinstance(batch, dict):
        return {key: _cut(value, start, stop) for key, value in batch.items()}
    return type(batch)(_cut(value, start, stop) for value in batch)
