"""Langevin dynamics with adaptive steps by a change of time (after SamAdams: Leimkuhler, Lohmann and Whalley 2025)."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.samplers.arguments import Schedule, Shared, check_unit
from bayesdl.samplers.forces import Block, global_norm
from bayesdl.samplers.momentum import MomentumSampler

Number = float | Tensor


class UnweightedChainWarning(UserWarning):
    """Samples of an adaptive chain are being taken without their weights."""


def time_factor(zeta: Number, smallest: float, largest: float, r: float) -> Number:
    """psi = m ((zeta^r + M) / (zeta^r + m)): M at zeta = 0, m at infinity; exactly m where m = M."""
    power = zeta**r
    # the quotient first: equal numerator and denominator give exactly 1
    return smallest * ((power + largest) / (power + smallest))


def monitor_of(psi: Number, smallest: float, largest: float, r: float) -> Number:
    """zeta of a psi between m and M: inverse of `time_factor`, for traces of the monitor from a chain's records."""
    power: Number = smallest * (largest - psi) / (psi - smallest)
    return power ** (1 / r)


def relax(zeta: Number, monitor: Number, rate: Number, alpha: float) -> Number:
    """`zeta <- rho zeta + (1 - rho) monitor / alpha`, rho = exp(-alpha rate)."""
    rho = torch.exp(-alpha * rate) if isinstance(rate, Tensor) else math.exp(-alpha * rate)
    return rho * zeta + (1 - rho) * monitor / alpha


@final
class SASGLD(MomentumSampler):
    """Langevin dynamics in a time that runs slowly where gradients are large.

    One monitor zeta of all parameters follows `|ghat|^s / (alpha Omega)`, ghat the gradient of the mean potential; a
    step is one of SGLD (with `momentum` of BAOAB) with `psi(zeta)` times the time step. Averages over steps need the
    weights `record.weight`, or samples at equal distances in time, which a chain takes (`collect = "time"`). m = M is
    SGLD with lr m, bit for bit. With T = 0 it is gradient descent normalised by the running norm.

    Args:
        params, lr, num_data, shared: see `Sampler` and `Shared`; lr is the step in the new time.
        momentum: 0 is overdamped; otherwise what is left of the momentum after a step of psi = 1.
        smallest, largest: m and M, bounds of psi.
        r, s, alpha: exponent of zeta, of the gradient's norm, and rate at which zeta follows.
        omega: normalisation of the monitor; None is N / alpha, so that zeta follows |ghat|^2 / N.

    Raises:
        ArgumentError: not 0 < m <= M, or an exponent or rate that is not positive.
    """

    name: ClassVar[str] = "sa-sgld"
    collect: ClassVar[str] = "time"

    def __init__(
        self,
        params: Any,
        lr: Schedule,
        num_data: int,
        *,
        momentum: float = 0.0,
        smallest: float = 0.1,
        largest: float = 10.0,
        r: float = 0.25,
        s: float = 2.0,
        alpha: float = 50.0,
        omega: float | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        omega = num_data / alpha if omega is None and alpha > 0 else omega
        if not (0 < smallest <= largest < math.inf and min(r, s, alpha, omega or 0.0) > 0):
            raise ArgumentError(
                f"smallest={smallest}, largest={largest}, r={r}, s={s}, alpha={alpha}, omega={omega}; expected "
                "0 < smallest <= largest, and r, s, alpha, omega positive"
            )
        check_unit({"momentum": momentum}, "momentum")
        assert omega is not None
        self.momentum, self.smallest, self.largest = momentum, smallest, largest
        self.r, self.s, self.alpha, self.omega = r, s, alpha, omega
        self.underdamped = momentum > 0
        super().__init__(params, lr, num_data, shared)

    @property
    def zeta(self) -> float | None:
        """The monitor's running mean; None before the first step."""
        return self._scalars.get("zeta")

    def _check_group(self, group: dict[str, Any]) -> None:
        if "momentum" in group:
            raise ArgumentError("a parameter group has its own momentum; the adaptive sampler has one for all")

    def _monitor(self, blocks: list[Block]) -> None:
        for chain, forces in self._rows([force for block in blocks for force in block.forces], cut=True):
            monitor = global_norm(forces) ** self.s / self.omega
            before = chain._scalars.get("zeta", monitor / self.alpha)  # zero would make the first step the largest
            chain._scalars["zeta"] = float(relax(before, monitor, blocks[0].lr, self.alpha))
        if self.iteration == 1 and not self._hooks and self.smallest != self.largest:
            warnings.warn(
                "the sampler adapts its step and no chain takes account of it: averages over its steps are biased; use "
                "bdl.Chain(net, sampler=opt), or weight theta_k by opt.record.weight in opt.register_pre_update_hook",
                UnweightedChainWarning,
                stacklevel=6,
            )

    def _psi(self) -> float:
        return float(time_factor(self._scalars["zeta"], self.smallest, self.largest, self.r))

    def _update(self, blocks: list[Block], temperature: float) -> None:
        if self.underdamped:
            self._with_momentum(blocks, temperature)
            return
        for block in blocks:
            for (chain, rows), (_, forces) in zip(self._rows(block.params), self._rows(block.forces), strict=True):
                torch._foreach_add_(rows, forces, alpha=-(chain._psi() * block.lr))
        for block, noise in self._drawn(blocks, temperature):
            for (chain, rows), (_, drawn) in zip(self._rows(block.params), self._rows(noise), strict=True):
                torch._foreach_add_(rows, drawn, alpha=math.sqrt(2 * (chain._psi() * block.lr) * temperature))

    def _with_momentum(self, blocks: list[Block], temperature: float) -> None:
        momenta = [self._momenta(block, temperature) for block in blocks]
        for block, m in zip(blocks, momenta, strict=True):
            for (chain, rows), (_, forces) in zip(self._rows(m), self._rows(block.forces), strict=True):
                torch._foreach_add_(rows, forces, alpha=-chain._psi() * chain._psi() * block.lr)
            torch._foreach_add_(block.params, m, alpha=0.5)
            for chain, rows in self._rows(m):
                torch._foreach_mul_(rows, self.momentum ** chain._psi())
        for block, noise in self._drawn(blocks, temperature):
            for (chain, rows), (_, drawn) in zip(self._rows(momenta[block.index]), self._rows(noise), strict=True):
                psi = chain._psi()
                decay = self.momentum**psi
                heat = (1 - decay * decay) * psi * psi * block.lr * temperature
                torch._foreach_add_(rows, drawn, alpha=math.sqrt(heat))
        for block, m in zip(blocks, momenta, strict=True):
            torch._foreach_add_(block.params, m, alpha=0.5)

    def _remark(self) -> str:
        psi = "" if self.zeta is None else f", psi={self._psi():.4g}"
        return f"{psi} in [{self.smallest:g}, {self.largest:g}]" if psi else ""
