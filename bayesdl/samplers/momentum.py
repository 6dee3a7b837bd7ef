"""Momentum in parameter units: m = sqrt(h) p with p of unit mass, so that m ~ N(0, h T)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesdl.samplers.base import Sampler
from bayesdl.samplers.forces import Block


class MomentumSampler(Sampler):
    """Base of the underdamped samplers: draws momenta at first, rescales them when the step size changes."""

    underdamped = True

    def _momenta(self, block: Block, temperature: float) -> list[Tensor]:
        """m of a block for this step; `temperature` is T / N, and h T = lr psi^2 T / N."""
        key = f"step {block.index}"
        sizes = {chain: block.lr * chain._psi() ** 2 for chain, _ in self._rows(block.params)}
        before = {chain: chain._scalars.get(key, step) for chain, step in sizes.items()}
        for chain, step in sizes.items():
            chain._scalars[key] = step
        momenta, stopped = [], min(before.values()) == 0
        for index, (parameter, moving) in enumerate(zip(block.group["params"], block.params, strict=True)):
            state: dict[str, Any] = self.state[parameter]
            fresh = "momentum" not in state or stopped
            if fresh:
                state["momentum"] = self._noise.draw_apart(moving)
            for chain, rows in self._rows([state["momentum"]]):
                step = sizes[chain]
                factor = math.sqrt(step * temperature) if fresh else math.sqrt(step / before[chain])
                if fresh or factor != 1.0:
                    torch._foreach_mul_(rows, factor)
            if fresh and block.scales is not None:
                state["momentum"].mul_(block.scales[index].sqrt())
            momenta.append(state["momentum"])
        return momenta

    def momentum_of(self, parameter: Tensor) -> Tensor | None:
        """m of a parameter, None before its first step."""
        found: Tensor | None = self.state[parameter].get("momentum") if parameter in self.state else None
        return found


def kinetic(momenta: list[Tensor], scales: Any) -> tuple[float, int]:
    """Sum of m^2 / D over a block, and the number of entries."""
    if scales is not None:
        momenta = list(torch._foreach_div(momenta, torch._foreach_sqrt(scales)))
    norms = torch._foreach_norm(momenta)
    total = torch.stack([n.double().square().to(norms[0].device) for n in norms]).sum()
    return float(total), sum(m.numel() for m in momenta)
