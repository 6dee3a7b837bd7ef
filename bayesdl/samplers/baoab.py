"""Underdamped Langevin dynamics by the BAOAB splitting (Leimkuhler and Matthews 2013)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from bayesdl.samplers.arguments import Schedule, Shared, check_unit
from bayesdl.samplers.forces import Block
from bayesdl.samplers.momentum import MomentumSampler

Number = float | Tensor


def baoab(
    theta: Tensor, m: Tensor, g: Tensor, noise: Tensor, step: Number, decay: Number, temperature: Number = 1.0
) -> tuple[Tensor, Tensor]:
    """`m -= h g; theta += m/2; m = c m + sqrt((1 - c^2) h T) xi; theta += m/2`, c = decay; shapes as in `sgld`."""
    m = m - step * g
    half = theta + 0.5 * m
    m = decay * m + ((1 - decay * decay) * step * temperature) ** 0.5 * noise
    return half + 0.5 * m, m


@final
class BAOAB(MomentumSampler):
    """Langevin dynamics with momentum, one gradient a step; the two half kicks that share it are merged.

    On a Gaussian coordinate of variance s^2 the chain's variance is `T s^2` exactly for every stable step,
    lr / (N s^2) < 4; noise of variance v in the gradient of U makes it
    `s^2 [T + h v (1 + c) / ((1 - c)(4 - a))]` with h = lr / N, a = h / s^2.

    Args:
        params, lr, num_data, shared: see `Sampler` and `Shared`.
        momentum: c, what is left of the momentum after a step; a group may have its own.
    """

    name: ClassVar[str] = "baoab"

    def __init__(
        self, params: Any, lr: Schedule, num_data: int, *, momentum: float = 0.9, **shared: Unpack[Shared]
    ) -> None:
        super().__init__(params, lr, num_data, shared, {"momentum": momentum})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_unit(group, "momentum")

    def _update(self, blocks: list[Block], temperature: float) -> None:
        momenta = [self._momenta(block, temperature) for block in blocks]
        drawn = self._draw(blocks) if temperature > 0 else [None] * len(blocks)
        for block, m, noise in zip(blocks, momenta, drawn, strict=True):
            decay = block.group["momentum"]
            torch._foreach_add_(m, block.forces, alpha=-block.lr)
            torch._foreach_add_(block.params, m, alpha=0.5)
            torch._foreach_mul_(m, decay)
            if noise is not None:
                torch._foreach_add_(m, noise, alpha=math.sqrt((1 - decay * decay) * block.lr * temperature))
            torch._foreach_add_(block.params, m, alpha=0.5)
