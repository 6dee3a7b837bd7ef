"""Stochastic-gradient Hamiltonian Monte Carlo (Chen, Fox and Guestrin 2014), with scale adaptation during burn-in."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, StepSizeError, UnsupportedError
from bayesdl.priors import ScaleMixturePrior
from bayesdl.samplers.arguments import Schedule, Shared, check_unit
from bayesdl.samplers.forces import Block
from bayesdl.samplers.momentum import MomentumSampler

Number = float | Tensor


def sghmc(
    theta: Tensor,
    m: Tensor,
    g: Tensor,
    noise: Tensor,
    step: Number,
    friction: Number,
    temperature: Number = 1.0,
    gradient_variance: Number = 0.0,
) -> tuple[Tensor, Tensor]:
    """`m' = (1 - f) m - h g + sqrt(2 f h T - h^2 v) xi; theta' = theta + m'`; shapes as in `sgld`."""
    variance = 2 * friction * step * temperature - step * step * gradient_variance
    m = (1 - friction) * m - step * g + variance**0.5 * noise
    return theta + m, m


def adapt(tau: Tensor, mean: Tensor, square: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the running moments of g with a window tau of their own (Springenberg et al. 2016).

    `r = 1 / (tau + 1); tau' = 1 + tau (1 - mean^2 / V); mean' = (1 - r) mean + r g; V' = (1 - r) V + r g^2`, with the
    old tau, mean and V on the right.
    """
    rate = 1 / (tau + 1)
    return 1 + tau * (1 - mean * mean / square), torch.lerp(mean, g, rate), torch.lerp(square, g * g, rate)


@final
class SGHMC(MomentumSampler):
    """Langevin dynamics with momentum and friction f = 1 - momentum.

    On a Gaussian coordinate of variance s^2 with a = lr / (N s^2): variance `T s^2 / (1 - a / (2 (2 - f)))`, stable for
    a < 2 (2 - f); noise of variance v in the gradient of U replaces T by `T + h v / (2 f)`, h = lr / N. With momentum 0
    it is SGLD; with T = 0 it is SGD with momentum, up to rounding.

    Args:
        params, lr, num_data, shared: see `Sampler` and `Shared`.
        momentum: 1 - f; a group may have its own.
        adapt: during the first `burn_in` steps learn V, the second moment of each coordinate's gradient of U, then keep
            it; steps are `h / sqrt(V)` with `h = lr / N`.
        burn_in: steps of that adaptation.
        noise_correction: reduce the noise by that of the gradients as `adapt` estimates it.

    Raises:
        StepSizeError: the correction exceeds the noise of a step.
    """

    name: ClassVar[str] = "sghmc"

    def __init__(
        self,
        params: Any,
        lr: Schedule,
        num_data: int,
        *,
        momentum: float = 0.9,
        adapt: bool = False,
        burn_in: int = 0,
        noise_correction: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        if adapt and burn_in < 1:
            raise ArgumentError("adapt=True needs burn_in=, the number of steps after which the scales are kept")
        if noise_correction and not adapt:
            raise ArgumentError("noise_correction=True needs adapt=True, which estimates the noise of the gradients")
        if noise_correction and isinstance(shared.get("prior"), ScaleMixturePrior):
            raise UnsupportedError(
                f"noise_correction with {type(shared['prior']).__name__}: its steps follow the prior's variances, and "
                "the share of the gradients' noise in them is not estimated; leave the correction out"
            )
        self.adapt, self.burn_in, self.noise_correction = adapt, burn_in, noise_correction
        super().__init__(params, lr, num_data, shared, {"momentum": momentum})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_unit(group, "momentum")

    def _monitor(self, blocks: list[Block]) -> None:
        if self.adapt:
            for block in blocks:
                block.scales = [
                    self._adapted(parameter, grad)
                    for parameter, grad in zip(block.group["params"], block.forces, strict=True)
                ]
                if self.noise_correction:
                    self._check_correction(block)

    def _adapted(self, parameter: Tensor, force: Tensor) -> Tensor:
        """1 / sqrt(V), V in the units of the gradient of U."""
        state = self.state[parameter]
        if "square" not in state:
            state["window"], state["mean"], state["square"] = (torch.ones_like(force) for _ in range(3))
        if self.iteration < self.burn_in:
            moments = adapt(state["window"], state["mean"], state["square"], force * self.num_data)
            state["window"], state["mean"], state["square"] = moments
            if self.iteration == self.burn_in - 1:
                del state["window"], state["mean"]
        return state["square"].rsqrt()

    def _check_correction(self, block: Block) -> None:
        friction, temperature = 1 - block.group["momentum"], self.temperature
        assert block.scales is not None
        smallest = min(float(scale.min()) for scale in block.scales)
        step = block.lr / self.num_data
        if 2 * friction * temperature * smallest < step and temperature > 0:
            raise StepSizeError(
                f"lr={block.lr:g}: the largest gradient noise has standard deviation {1 / smallest:.4g}, and its share "
                f"of the noise cannot be taken off; the largest admissible lr is "
                f"{2 * friction * temperature * smallest * self.num_data:.4g}"
            )

    def _update(self, blocks: list[Block], temperature: float) -> None:
        momenta = [self._momenta(block, temperature) for block in blocks]
        for block, m in zip(blocks, momenta, strict=True):
            torch._foreach_mul_(m, block.group["momentum"])
            torch._foreach_add_(m, block.forces, alpha=-block.lr)
        for block, noise in self._drawn(blocks, temperature):
            variance = 2 * (1 - block.group["momentum"]) * block.lr * temperature
            if self.noise_correction and block.scales is not None:
                torch._foreach_mul_(noise, [self._share(block.lr, variance, scale) for scale in block.scales])
            torch._foreach_add_(momenta[block.index], noise, alpha=math.sqrt(variance))
        for block, m in zip(blocks, momenta, strict=True):
            torch._foreach_add_(block.params, m)

    def _share(self, lr: float, variance: float, scale: Tensor) -> Tensor:
        """Factor that turns noise of variance 2 f h_i T into one of variance 2 f h_i T - h^2."""
        return (1 - (lr / self.num_data) ** 2 / (variance * scale)).clamp(min=0).sqrt()
