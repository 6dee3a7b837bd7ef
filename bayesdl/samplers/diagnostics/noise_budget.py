"""How much of the noise of a chain comes from minibatches instead of from the sampler."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError


def gradient_variance(first: Mapping[str, Tensor], second: Mapping[str, Tensor], num_data: int) -> dict[str, float]:
    """Variance per coordinate of the gradient of U on a whole batch, by layer, from those of its two halves.

    `v = mean (g1 - g2)^2 / 4`, unbiased; a layer is a parameter's name up to its last dot.

    Args:
        first, second: gradients of the MEAN loss on the halves, by parameter name.
        num_data: N; the gradient of U is N times that of the mean loss.

    Raises:
        ShapeError: other names or shapes.
    """
    if set(first) != set(second):
        raise ShapeError(f"the halves hold gradients of {sorted(first)} and of {sorted(second)}")
    squares: dict[str, list[Tensor]] = {}
    for name, one in first.items():
        if one.shape != second[name].shape:
            raise ShapeError(f"gradients of {name!r} have shapes {tuple(one.shape)} and {tuple(second[name].shape)}")
        difference = (one.detach() - second[name].detach()).double().reshape(-1)
        squares.setdefault(name.rpartition(".")[0] or name, []).append(difference.square() / 4)
    return {layer: num_data**2 * float(torch.cat(parts).mean()) for layer, parts in squares.items()}


def noise_budget(
    variance: Mapping[str, float], *, lr: float, num_data: int, temperature: float = 1.0, friction: float = 1.0
) -> dict[str, float]:
    """Noise of minibatches over that which the sampler adds, `h v / (2 f T)` with `h = lr / N`, by layer.

    The chain samples at T (1 + this) where the curvature is small against 1 / h; below 0.1 it is of no concern.

    Args:
        variance: v by layer, see `gradient_variance`.
        friction: 1 - momentum; 1 for SGLD.

    Raises:
        ArgumentError: a temperature, friction, lr or number of data that is not positive.
    """
    if not (temperature > 0 and friction > 0 and lr > 0 and num_data >= 1):
        raise ArgumentError(
            f"lr={lr}, num_data={num_data}, temperature={temperature}, friction={friction}; expected positive numbers"
        )
    return {layer: lr / num_data * v / (2 * friction * temperature) for layer, v in variance.items()}
