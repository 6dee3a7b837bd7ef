"""Stochastic-gradient Nosé-Hoover thermostat (Ding et al. 2014), in a splitting that is stable where Euler's is not."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.samplers.arguments import Schedule, Shared, check_unit
from bayesdl.samplers.forces import Block
from bayesdl.samplers.momentum import MomentumSampler, kinetic

Number = float | Tensor
_SMALL = 1e-6  # below, (1 - e^-2f) / f equals 2 (1 - f) to rounding


def _share(f: float) -> float:
    """(1 - e^-2f) / f."""
    return 2 - 2 * f if abs(f) < _SMALL else -math.expm1(-2 * f) / f


def sgnht(
    theta: Tensor, m: Tensor, f: Tensor, g: Tensor, noise: Tensor, step: Number, f0: Number, temperature: Number = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """One step; f `(...)` is one friction for all d coordinates of each chain.

    `m -= h g; theta += m/2; m = e^-f m + sqrt(f0 h T (1 - e^-2f) / f) xi; theta += m/2; f += |m|^2 / d - h T`.
    """
    m = m - step * g
    half = theta + 0.5 * m
    wide = f.unsqueeze(-1)
    near = wide.abs() < _SMALL
    safe = torch.where(near, torch.ones_like(wide), wide)
    share = torch.where(near, 2 - 2 * wide, -torch.expm1(-2 * safe) / safe)
    m = torch.exp(-wide) * m + (f0 * step * temperature * share) ** 0.5 * noise
    return half + 0.5 * m, m, f + (m * m).mean(-1) - step * temperature


@final
class SGNHT(MomentumSampler):
    """Langevin dynamics whose friction adapts so that the kinetic temperature stays T under unknown gradient noise.

    One friction f for all parameters, from `1 - momentum`. With noise of variance v in the gradient of U its mean is
    `1 - momentum + h v / (2 T)` to leading order, h = lr / N.

    Args:
        params, lr, num_data, shared: see `Sampler` and `Shared`; T must be positive.
        momentum: one value for all groups.
    """

    name: ClassVar[str] = "sgnht"

    def __init__(
        self, params: Any, lr: Schedule, num_data: int, *, momentum: float = 0.9, **shared: Unpack[Shared]
    ) -> None:
        check_unit({"momentum": momentum}, "momentum")
        self.momentum = momentum
        super().__init__(params, lr, num_data, shared)
        self._scalars["friction"] = 1 - momentum

    @property
    def friction(self) -> float:
        """f of the next step."""
        return self._scalars["friction"]

    def _check_group(self, group: dict[str, Any]) -> None:
        if "momentum" in group:
            raise ArgumentError("a parameter group has its own momentum; the thermostat has one friction for all")

    def _update(self, blocks: list[Block], temperature: float) -> None:
        momenta = [self._momenta(block, temperature) for block in blocks]
        for block, m in zip(blocks, momenta, strict=True):
            torch._foreach_add_(m, block.forces, alpha=-block.lr)
            torch._foreach_add_(block.params, m, alpha=0.5)
            for chain, rows in self._rows(m):
                torch._foreach_mul_(rows, math.exp(-chain._scalars["friction"]))
        for block, noise in self._drawn(blocks, temperature):
            for (chain, rows), (_, drawn) in zip(self._rows(momenta[block.index]), self._rows(noise), strict=True):
                spread = (1 - self.momentum) * block.lr * temperature * _share(chain._scalars["friction"])
                torch._foreach_add_(rows, drawn, alpha=math.sqrt(spread))
        for block, m in zip(blocks, momenta, strict=True):
            torch._foreach_add_(block.params, m, alpha=0.5)
        if temperature > 0:  # while exploring without noise there is no temperature to hold
            self._hold(blocks, momenta, temperature)

    def _hold(self, blocks: list[Block], momenta: list[list[Tensor]], temperature: float) -> None:
        """Move the friction of every chain by what its kinetic energy exceeds that of the temperature."""
        for number, (chain, _) in enumerate(self._rows(blocks[0].params)):
            excess, size = 0.0, 0
            for block, m in zip(blocks, momenta, strict=True):
                scales = None if block.scales is None else self._rows(block.scales, cut=True)[number][1]
                energy, count = kinetic(self._rows(m, cut=True)[number][1], scales)
                excess, size = excess + energy - count * block.lr * temperature, size + count
            chain._scalars["friction"] += excess / size

    def _remark(self) -> str:
        return f", friction={self.friction:.4g}"
