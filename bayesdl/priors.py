"""Priors over the selected weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, as_numbers


class Prior(ABC):
    """p(theta) over the selected parameters."""

    name: ClassVar[str]

    @abstractmethod
    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """log p, a scalar, for tensors by parameter name."""


@final
@dataclass(frozen=True)
class GaussianPrior(Prior):
    """N(mean, diag(1 / precision)).

    Args:
        precision: inverse variance of the weights: a positive number, one per layer (block) in the order of
            `bayes.layers`, or one per selected parameter in flat order.
        mean: a number, or a flat vector over the selected parameters.
    """

    precision: float | Sequence[float] | Tensor = 1.0
    mean: float | Tensor = 0.0

    name: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        value = as_numbers(self.precision, "precision")
        if value.dim() > 1 or not value.numel() or not bool((torch.isfinite(value) & (value > 0)).all()):
            raise ArgumentError(
                f"precision={self.precision!r}; expected a positive finite number, or a vector of them (per layer "
                "or per parameter)"
            )

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        flat = torch.cat([p.reshape(-1) for p in parameters.values()]).double()
        precision = torch.as_tensor(self.precision, dtype=flat.dtype, device=flat.device)
        if precision.numel() not in (1, flat.numel()):
            raise ArgumentError(
                f"log_prob needs a scalar precision or one per parameter ({flat.numel()}), got {precision.numel()}"
            )
        offset = flat - torch.as_tensor(self.mean, dtype=flat.dtype, device=flat.device)
        log_precision = precision.log().expand_as(flat)
        return 0.5 * (log_precision - precision * offset.square() - torch.log(flat.new_tensor(2 * torch.pi))).sum()

    def map(self, function: Callable[[Tensor], Tensor]) -> GaussianPrior:
        """Apply `function` to the tensors held."""
        precision = function(self.precision) if isinstance(self.precision, Tensor) else self.precision
        mean = function(self.mean) if isinstance(self.mean, Tensor) else self.mean
        return replace(self, precision=precision, mean=mean)
