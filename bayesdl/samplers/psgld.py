"""Preconditioned Langevin dynamics (Li et al. 2016), with the preconditioner frozen when burn-in ends."""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.samplers.arguments import Schedule, Shared, check_unit
from bayesdl.samplers.base import Sampler
from bayesdl.samplers.forces import Block

Number = float | Tensor
_log = logging.getLogger(__name__)


def psgld(
    theta: Tensor,
    square: Tensor,
    g: Tensor,
    gradient: Tensor,
    noise: Tensor,
    step: Number,
    *,
    alpha: float = 0.999,
    eps: float = 1e-5,
    temperature: Number = 1.0,
    frozen: bool = False,
) -> tuple[Tensor, Tensor]:
    """`V' = alpha V + (1 - alpha) gbar^2; G = 1 / (eps + sqrt(V')); theta' = theta - h G g + sqrt(2 h T G) xi`.

    Args:
        theta, g, noise, step, temperature: as in `sgld`.
        square: V; kept where `frozen`.
        gradient: gbar, gradient of the mean loss alone.
    """
    if not frozen:
        square = alpha * square + (1 - alpha) * gradient * gradient
    scale = 1 / (eps + square.sqrt())
    return theta - step * scale * g + (2 * step * temperature * scale) ** 0.5 * noise, square


@final
class PSGLD(Sampler):
    """Langevin dynamics with RMSprop's diagonal preconditioner G.

    While G moves with the chain its divergence is left out, as everybody does, and the law is wrong (a variance up to
    twice too large); frozen, each coordinate is SGLD with the step h G_i.

    Args:
        params, lr, num_data, shared: see `Sampler` and `Shared`.
        alpha: decay of the running mean of squared gradients of the mean loss.
        eps: added to their root.
        freeze_after: steps after which G is kept: the length of burn-in. None never freezes, and `repr` says "biased".
    """

    name: ClassVar[str] = "psgld"

    def __init__(
        self,
        params: Any,
        lr: Schedule,
        num_data: int,
        *,
        alpha: float = 0.999,
        eps: float = 1e-5,
        freeze_after: int | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        check_unit({"alpha": alpha}, "alpha")
        if not 0 < eps < math.inf:
            raise ArgumentError(f"eps={eps!r}; expected a positive number")
        if freeze_after is not None and freeze_after < 1:
            raise ArgumentError(
                f"freeze_after={freeze_after!r}; expected at least one step to learn the preconditioner"
            )
        if freeze_after is None:
            _log.warning("PSGLD without freeze_after= samples from a biased law; pass the number of burn-in steps")
        self.alpha, self.eps, self.freeze_after = alpha, eps, freeze_after
        super().__init__(params, lr, num_data, shared)

    @property
    def frozen(self) -> bool:
        """Whether the preconditioner is kept from the next step on."""
        return self.freeze_after is not None and self.iteration >= self.freeze_after

    def _monitor(self, blocks: list[Block]) -> None:
        for block in blocks:
            block.scales = []
            for parameter, grad in zip(block.group["params"], block.grads, strict=True):
                state = self.state[parameter]
                if "square" not in state:
                    state["square"] = torch.zeros_like(grad)
                if not self.frozen:
                    state["square"].mul_(self.alpha).addcmul_(grad, grad, value=1 - self.alpha)
                block.scales.append(state["square"].sqrt().add_(self.eps).reciprocal_())

    def _update(self, blocks: list[Block], temperature: float) -> None:
        drawn = self._draw(blocks) if temperature > 0 else [None] * len(blocks)
        for block, noise in zip(blocks, drawn, strict=True):
            torch._foreach_add_(block.params, block.forces, alpha=-block.lr)
            if noise is not None:
                torch._foreach_add_(block.params, noise, alpha=math.sqrt(2 * block.lr * temperature))

    def _remark(self) -> str:
        if self.freeze_after is None:
            return ", biased: the preconditioner is never frozen"
        return f", preconditioner {'frozen' if self.frozen else f'freezes after step {self.freeze_after}'}"
