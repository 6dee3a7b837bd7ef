"""Gaussian weights whose variances are unknown too: drawn in turn with the weights, by Gibbs steps in closed form."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.priors.base import Prior, fan_in
from bayesdl.priors.heavy_tails import check_positive, gamma

Scales = dict[str, Tensor]


class ScaleMixturePrior(Prior):
    """Base: w given its variances is N(0, variance); the variances have a prior of their own.

    A prior is a value and holds no scales: samplers hold them and pass them in. They are tensors by name, on the CPU
    in float64 where they are few.

    Attributes:
        step_cap: samplers take the step `h min(variance, step_cap)` on each coordinate, since small variances are stiff
            directions; fixed between two Gibbs steps.
    """

    step_cap: float

    @abstractmethod
    def start(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Scales:
        """Scales to begin with, drawn from their prior."""

    @abstractmethod
    def gibbs(
        self,
        parameters: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Scales:
        """Scales drawn given the parameters, from the conditionals of the joint density to the power 1/T.

        Raises:
            ArgumentError: a conditional that cannot be normalised at this temperature.
        """

    @abstractmethod
    def variance(self, parameters: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Prior variance of every weight given the scales, broadcastable to its parameter, in its dtype."""


@final
@dataclass(frozen=True)
class HierarchicalPrior(ScaleMixturePrior):
    """w ~ N(0, v), v ~ InverseGamma(shape, rate), one v for each parameter tensor.

    Without v, each tensor is a multivariate t with `2 shape` degrees of freedom and squared scale `rate / shape`.

    Args:
        shape, rate: of the inverse gamma.
        fan_in: the variance of weight matrices and kernels is v / fan-in.
        step_cap: see `ScaleMixturePrior`.
    """

    shape: float = 2.0
    rate: float = 1.0
    fan_in: bool = False
    step_cap: float = 1.0

    name: ClassVar[str] = "hierarchical"

    def __post_init__(self) -> None:
        check_positive(self, "shape", "rate", "step_cap")

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Marginal over v."""
        total = torch.zeros((), dtype=torch.float64, device=_device(parameters))
        for p in parameters.values():
            n, scale = p.numel(), self._fan(p)
            half = p.double().square().sum() * scale / 2
            total = total + (
                math.lgamma(self.shape + n / 2)
                - math.lgamma(self.shape)
                + self.shape * math.log(self.rate)
                + 0.5 * n * math.log(scale / (2 * math.pi))
                - (self.shape + n / 2) * torch.log(self.rate + half).to(total.device)
            )
        return total

    def grad(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: -p * (self.shape + p.numel() / 2) * self._fan(p) / (self.rate + p.square().sum() * self._fan(p) / 2)
            for name, p in parameters.items()
        }

    def sample(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        variance = self.variance(parameters, self.start(parameters, generator))
        return {
            name: (torch.randn(p.shape, generator=generator) * variance[name].cpu().sqrt()).to(p)
            for name, p in parameters.items()
        }

    def start(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Scales:
        shape, rate = torch.full((), self.shape).double(), torch.full((), self.rate).double()
        return {name: inverse_gamma(shape, rate, 1.0, generator) for name in parameters}

    def gibbs(
        self,
        parameters: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Scales:
        drawn = {}
        for name, p in parameters.items():
            rate = self.rate + 0.5 * self._fan(p) * p.detach().double().square().sum().cpu()
            drawn[name] = inverse_gamma(rate.new_tensor(self.shape + p.numel() / 2), rate, temperature, generator)
        return drawn

    def variance(self, parameters: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: (scales[name] / self._fan(p)).to(p) for name, p in parameters.items()}

    def _fan(self, parameter: Tensor) -> int:
        return fan_in(parameter) if self.fan_in else 1


def inverse_gamma(
    shape: Tensor, rate: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from IG(shape, rate) to the power 1/T, which is `IG((shape + 1) / T - 1, rate / T)`; the mode at T = 0.

    Raises:
        ArgumentError: T is so large that this has no finite mass.
    """
    if temperature == 0:
        return rate / (shape + 1)
    tempered = (shape + 1) / temperature - 1
    if bool((tempered <= 0).any()):
        largest = float(shape.min()) + 1
        raise ArgumentError(
            f"temperature={temperature:g}: a prior scale has the law IG({float(shape.min()):g}, ...) whose power 1/T "
            f"cannot be normalised; the temperature must stay below {largest:g}"
        )
    return rate / temperature / gamma(tempered, generator).clamp(min=torch.finfo(rate.dtype).tiny)


def _device(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device
