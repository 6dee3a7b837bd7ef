"""Stochastic-gradient Langevin dynamics (Welling and Teh 2011)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, StepSizeError
from bayesdl.samplers.arguments import Schedule, Shared
from bayesdl.samplers.base import Sampler
from bayesdl.samplers.forces import Block

Number = float | Tensor


def sgld(
    theta: Tensor, g: Tensor, noise: Tensor, step: Number, temperature: Number = 1.0, gradient_variance: Number = 0.0
) -> Tensor:
    """`theta - h g + sqrt(2 h T - h^2 v) xi`.

    Args:
        theta, g, noise: `(..., d)`, leading axes are chains: parameters, gradient of the potential U, N(0, 1) draws.
        step: h, broadcastable; with the gradient of U / N and T / N instead, lr.
        temperature: T.
        gradient_variance: v, variance of the noise of g that is discounted; 0 discounts nothing.
    """
    return theta - step * g + (2 * step * temperature - step * step * gradient_variance) ** 0.5 * noise


@final
class SGLD(Sampler):
    """Langevin steps `theta <- theta - lr ghat + sqrt(2 lr T / N) xi` on the gradient ghat of the mean potential.

    On a Gaussian coordinate of variance s^2 with a = lr / (N s^2) the chain's variance is `T s^2 / (1 - a/2)`; the step
    is stable for a < 2. With T = 0 it is `torch.optim.SGD(lr, weight_decay=lam / N)` bit for bit.

    Args:
        params, lr, num_data, shared: see `Sampler` and `Shared`.
        noise_correction: variance per coordinate of the noise of the gradient of U (N times that of the mean loss), by
            which the injected noise is reduced.

    Raises:
        StepSizeError: the correction exceeds the noise of a step.
    """

    name: ClassVar[str] = "sgld"

    def __init__(
        self,
        params: Any,
        lr: Schedule,
        num_data: int,
        *,
        noise_correction: float = 0.0,
        **shared: Unpack[Shared],
    ) -> None:
        if not 0 <= noise_correction < math.inf:
            raise ArgumentError(f"noise_correction={noise_correction!r}; expected a variance of at least 0")
        self.noise_correction = noise_correction
        super().__init__(params, lr, num_data, shared)

    def _monitor(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._variance(block.lr, self.temperature)

    def _update(self, blocks: list[Block], temperature: float) -> None:
        moved = self._draw(blocks) if temperature > 0 else [None] * len(blocks)
        for block, noise in zip(blocks, moved, strict=True):
            torch._foreach_add_(block.params, block.forces, alpha=-block.lr)
            if noise is not None:
                torch._foreach_add_(block.params, noise, alpha=math.sqrt(self._variance(block.lr, self.temperature)))

    def _variance(self, lr: float, temperature: float) -> float:
        """2 lr T / N - (lr / N)^2 v."""
        step = lr / self.num_data
        variance = 2 * lr * temperature / self.num_data - step * step * self.noise_correction
        if variance < 0 < temperature:
            largest = 2 * temperature * self.num_data / self.noise_correction
            raise StepSizeError(
                f"lr={lr:g} with noise_correction={self.noise_correction:g}: the gradients are noisier than the step "
                f"allows; the largest admissible lr is {largest:.4g}"
            )
        return max(variance, 0.0)
