"""Gaussian weights whose variances are unknown too: drawn in turn with the weights, by Gibbs steps in closed form."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        shape, rate: of the inverse gamma: numbers, or dictionaries from parameter names to numbers.
        fan_in: the variance of weight matrices and kernels is v / fan-in.
        step_cap: see `ScaleMixturePrior`.
        report: how it was found, where `bdl.functional.match` found it.
    """

    shape: float | Mapping[str, float] = 2.0
    rate: float | Mapping[str, float] = 1.0
    fan_in: bool = False
    step_cap: float = 1.0
    report: object = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "hierarchical"

    def __post_init__(self) -> None:
        check_positive(self, "step_cap")
        for value in (self.shape, self.rate):
            for number in value.values() if isinstance(value, Mapping) else (value,):
                if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                    raise ArgumentError(
                        f"HierarchicalPrior: shape={self.shape!r}, rate={self.rate!r}; expected positive finite numbers"
                    )

    def hyper(self, name: str) -> tuple[float, float]:
        """Shape and rate of one parameter.

        Raises:
            ArgumentError: they are given by name and not for this one.
        """
        found = []
        for value in (self.shape, self.rate):
            if isinstance(value, Mapping) and name not in value:
                raise ArgumentError(
                    f"the prior has a shape and rate for {sorted(value)} and none for {name!r}; select the same "
                    "parameters that it was made for"
                )
            found.append(float(value[name] if isinstance(value, Mapping) else value))
        return found[0], found[1]

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Marginal over v."""
        total = torch.zeros((), dtype=torch.float64, device=_device(parameters))
        for name, p in parameters.items():
            shape, rate = self.hyper(name)
            n, scale = p.numel(), self._fan(p)
            half = p.double().square().sum() * scale / 2
            total = total + (
                math.lgamma(shape + n / 2)
                - math.lgamma(shape)
                + shape * math.log(rate)
                + 0.5 * n * math.log(scale / (2 * math.pi))
                - (shape + n / 2) * torch.log(rate + half).to(total.device)
            )
        return total

    def grad(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, p in parameters.items():
            shape, rate = self.hyper(name)
            found[name] = -p * (shape + p.numel() / 2) * self._fan(p) / (rate + p.square().sum() * self._fan(p) / 2)
        return found

    def sample(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        variance = self.variance(parameters, self.start(parameters, generator))
        return {
            name: (torch.randn(p.shape, generator=generator) * variance[name].cpu().sqrt()).to(p)
            for name, p in parameters.items()
        }

    def start(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Scales:
        pairs = {name: torch.tensor(self.hyper(name), dtype=torch.float64) for name in parameters}
        return {name: inverse_gamma(pair[0], pair[1], 1.0, generator) for name, pair in pairs.items()}

    def gibbs(
        self,
        parameters: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Scales:
        drawn = {}
        for name, p in parameters.items():
            shape, start = self.hyper(name)
            rate = start + 0.5 * self._fan(p) * p.detach().double().square().sum().cpu()
            drawn[name] = inverse_gamma(rate.new_tensor(shape + p.numel() / 2), rate, temperature, generator)
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
