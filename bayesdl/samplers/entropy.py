"""Entropy-MCMC (Li and Zhang 2024): a guiding variable that sees a smoothed posterior, coupled to the weights."""

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
ANCHORS = ("langevin", "gibbs")
KEPT = {"theta": ("theta",), "anchor": ("anchor",), "both": ("theta", "anchor")}


def entropy_mcmc(
    theta: Tensor,
    anchor: Tensor,
    g: Tensor,
    noise: tuple[Tensor, Tensor],
    step: Number,
    eta: Number,
    temperature: Number = 1.0,
    *,
    gibbs: bool = False,
) -> tuple[Tensor, Tensor]:
    """`theta' = theta - h [g + (theta - a) / eta] + sqrt(2hT) xi1; a' = a - h (a - theta) / eta + sqrt(2hT) xi2`.

    With `gibbs`, `a' ~ N(theta', eta T)` exactly. Shapes as in `sgld`.
    """
    heat = (2 * step * temperature) ** 0.5
    pull = (theta - anchor) / eta
    theta = theta - step * (g + pull) + heat * noise[0]
    if gibbs:
        return theta, theta + (eta * temperature) ** 0.5 * noise[1]
    return theta, anchor + step * pull + heat * noise[1]


@final
class EntropyMCMC(Sampler):
    """Langevin dynamics of (theta, anchor) with the density `exp(-[U(theta) + |theta - anchor|^2 / (2 eta)] / T)`.

    The law of theta is the posterior exactly; the anchor is theta plus N(0, eta T) noise and has no prior of its own.

    Args:
        params, lr, num_data, shared: see `Sampler` and `Shared`.
        eta: variance of the coupling; a group may have its own. None is 0.01 / prior precision. lr / N must stay below.
        anchor: "langevin" moves the anchor by steps like theta's, "gibbs" draws it exactly.
        keep: what a chain collects: "theta" (the posterior exactly), "anchor" (smoothed by the coupling) or "both", two
            samples at a time, as published.

    Raises:
        ArgumentError: eta not positive, or left out without a prior precision to choose it from.
        StepSizeError: lr / N is not below eta.
    """

    name: ClassVar[str] = "entropy-mcmc"

    def __init__(
        self,
        params: Any,
        lr: Schedule,
        num_data: int,
        *,
        eta: float | None = None,
        anchor: str = "langevin",
        keep: str = "theta",
        **shared: Unpack[Shared],
    ) -> None:
        if anchor not in ANCHORS:
            raise ArgumentError(f'anchor={anchor!r}; expected "langevin" or "gibbs"')
        if keep not in KEPT:
            raise ArgumentError(f"keep={keep!r}; expected one of {tuple(KEPT)}")
        self.anchor, self.variables = anchor, KEPT[keep]
        super().__init__(params, lr, num_data, shared, {"eta": eta})

    def anchors(self) -> dict[str, Tensor]:
        """The anchor of every parameter by name ("group.index" without names), as it is held: do not write to it."""
        found = {}
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                found[name] = self.state[parameter].get("anchor", parameter.detach())
        return found

    def _check_group(self, group: dict[str, Any]) -> None:
        eta = group["eta"]
        if eta is None and not group["prior_precision"]:
            raise ArgumentError("eta is chosen as 0.01 / prior_precision, and there is no positive one here: pass eta=")
        if eta is None:
            group["eta"] = eta = 0.01 / float(group["prior_precision"])
        if not 0 < eta < math.inf:
            raise ArgumentError(f"eta={eta!r}; expected a positive finite number")

    def _precondition(self, blocks: list[Block]) -> None:
        super()._precondition(blocks)
        for block in blocks:
            largest = 1.0 if block.scales is None else max(float(scale.max()) for scale in block.scales)
            if block.lr * largest >= block.group["eta"] * self.num_data:
                raise StepSizeError(
                    f"lr={block.lr:g} is too large for the coupling eta={block.group['eta']:g}: lr / N must stay below "
                    f"eta; the largest admissible lr is {block.group['eta'] * self.num_data / largest:.4g}"
                )

    def _update(self, blocks: list[Block], temperature: float) -> None:
        anchors, pulls = [], []
        for block in blocks:
            held = [self._anchor(*pair) for pair in zip(block.group["params"], block.params, strict=True)]
            pull = torch._foreach_sub(block.params, held)
            anchors.append(held)
            pulls.append(pull if block.scales is None else torch._foreach_mul(pull, block.scales))
        for block, pull in zip(blocks, pulls, strict=True):
            torch._foreach_add_(block.params, block.forces, alpha=-block.lr)
            torch._foreach_add_(block.params, pull, alpha=-block.lr / (block.group["eta"] * self.num_data))
        for block, noise in self._drawn(blocks, temperature):
            torch._foreach_add_(block.params, noise, alpha=math.sqrt(2 * block.lr * temperature))
        for block, held, pull in zip(blocks, anchors, pulls, strict=True):
            if self.anchor == "gibbs":
                torch._foreach_copy_(held, block.params)
            else:
                torch._foreach_add_(held, pull, alpha=block.lr / (block.group["eta"] * self.num_data))
        for (block, noise), held in zip(self._drawn(blocks, temperature), anchors, strict=temperature > 0):
            variance = 2 * block.lr * temperature
            if self.anchor == "gibbs":  # the coupling's variance, whatever the preconditioner
                variance = block.group["eta"] * temperature * self.num_data
                if block.scales is not None:
                    torch._foreach_div_(noise, list(torch._foreach_sqrt(block.scales)))
            torch._foreach_add_(held, noise, alpha=math.sqrt(variance))

    def _anchor(self, parameter: Tensor, moving: Tensor) -> Tensor:
        state = self.state[parameter]
        if "anchor" not in state:
            state["anchor"] = moving.detach().clone()
        anchor: Tensor = state["anchor"]
        return anchor

    def _remark(self) -> str:
        return f", eta={self.param_groups[0]['eta']:.4g}"
