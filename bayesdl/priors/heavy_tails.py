"""Independent weights with heavier tails than a Gaussian's: Laplace, Student-t, Cauchy."""

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


@dataclass(frozen=True)
class IndependentPrior(Prior):
    """Base: one density for every weight, around 0.

    Args:
        scale: of the density.
        fan_in: divide the scale of weight matrices and kernels by the root of their fan-in.
    """

    scale: float = 1.0
    fan_in: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "scale")

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        values = [self._log_density(p.double(), self._scale(p)).sum() for p in parameters.values()]
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    def grad(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._score(p, self._scale(p)) for name, p in parameters.items()}

    def sample(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {
            name: (self._scale(p) * self._standard(tuple(p.shape), generator)).to(p) for name, p in parameters.items()
        }

    def _scale(self, parameter: Tensor) -> float:
        return self.scale / math.sqrt(fan_in(parameter)) if self.fan_in else self.scale

    @abstractmethod
    def _log_density(self, u: Tensor, scale: float) -> Tensor:
        """log density, elementwise."""

    @abstractmethod
    def _score(self, u: Tensor, scale: float) -> Tensor:
        """Its derivative, elementwise."""

    @abstractmethod
    def _standard(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Draws with scale 1, float64."""


@final
@dataclass(frozen=True)
class LaplacePrior(IndependentPrior):
    """Density `exp(-|w| / b) / (2 b)`, b = scale; standard deviation b sqrt(2). Its gradient at 0 is taken as 0."""

    name: ClassVar[str] = "laplace"

    def _log_density(self, u: Tensor, scale: float) -> Tensor:
        return -u.abs() / scale - math.log(2 * scale)

    def _score(self, u: Tensor, scale: float) -> Tensor:
        return -u.sign() / scale

    def _standard(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        size = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.5, -size, size)


@final
@dataclass(frozen=True)
class StudentTPrior(IndependentPrior):
    """Student's t with `df` degrees of freedom, `-log p = (df + 1) / 2 log(1 + w^2 / (df scale^2)) + const`."""

    df: float = 3.0

    name: ClassVar[str] = "student-t"

    def __post_init__(self) -> None:
        check_positive(self, "scale", "df")

    def _log_density(self, u: Tensor, scale: float) -> Tensor:
        half = (self.df + 1) / 2
        constant = math.lgamma(half) - math.lgamma(self.df / 2) - 0.5 * math.log(self.df * math.pi) - math.log(scale)
        return constant - half * torch.log1p((u / scale).square() / self.df)

    def _score(self, u: Tensor, scale: float) -> Tensor:
        return -(self.df + 1) * u / (self.df * scale**2 + u * u)

    def _standard(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        chi = 2 * gamma(torch.full(shape, self.df / 2, dtype=torch.float64), generator)
        return torch.randn(shape, dtype=torch.float64, generator=generator) * (self.df / chi).sqrt()


@final
@dataclass(frozen=True)
class CauchyPrior(IndependentPrior):
    """Density `1 / (pi b (1 + w^2 / b^2))`, b = scale: Student's t with one degree of freedom."""

    name: ClassVar[str] = "cauchy"

    def _log_density(self, u: Tensor, scale: float) -> Tensor:
        return -torch.log1p((u / scale).square()) - math.log(math.pi * scale)

    def _score(self, u: Tensor, scale: float) -> Tensor:
        return -2 * u / (scale**2 + u * u)

    def _standard(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).cauchy_(generator=generator)


def gamma(shape: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gamma draws with rate 1; torch's public distribution takes no generator."""
    return torch._standard_gamma(shape, generator=generator)


def check_positive(prior: Prior, *fields: str) -> None:
    """Raise unless these fields are positive finite numbers."""
    for field in fields:
        value = getattr(prior, field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ArgumentError(f"{type(prior).__name__}: {field}={value!r}; expected a positive finite number")
