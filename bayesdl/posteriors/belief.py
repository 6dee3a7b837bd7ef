"""Belief: a distribution over maps from features to outputs, the random part of a last-layer posterior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayesdl.likelihoods import Likelihood

Map = Callable[[Tensor], Tensor]


class Belief(ABC):
    """A distribution over maps from features to outputs."""

    name: ClassVar[str]

    @abstractmethod
    def latent(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the outputs at `(B, d)`: two `(B, K)`."""

    @abstractmethod
    def functions(self, n: int, generator: torch.Generator | None) -> list[Map]:
        """`n` maps from features `(..., d)` to outputs `(..., K)`."""

    def log_evidence(self, likelihood: Likelihood) -> Tensor | None:
        """log p(data), or a lower bound of it, a scalar; None where the fit left none."""
        del likelihood
        return None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by name."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-ready rest."""

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """Inverse of `tensors` and `config`."""


class LinearBelief(Belief):
    """A distribution over linear maps."""

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Weights `(n, K, d)` and biases `(n, K)`."""

    @abstractmethod
    def cross(self, phi: Tensor, other: Tensor) -> Tensor:
        """Covariance between the outputs at `(B, d)` and those at `(B', d)`, each output apart: `(K, B, B')`."""

    def functions(self, n: int, generator: torch.Generator | None) -> list[Map]:
        def linear(weight: Tensor, bias: Tensor) -> Map:
            return lambda phi: phi @ weight.mT.to(phi) + bias.to(phi)

        return [linear(weight, bias) for weight, bias in zip(*self.draw(n, generator), strict=True)]
