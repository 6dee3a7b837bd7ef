"""Prior: a density over the selected weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl.errors import UnsupportedError


class Prior(ABC):
    """p(theta) over the selected parameters."""

    name: ClassVar[str]

    @abstractmethod
    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """log p, a scalar, for tensors by parameter name."""

    def grad(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient of log p by parameter name; by automatic differentiation unless overridden."""
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        with torch.enable_grad():
            value = self.log_prob(leaves)
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }

    def sample(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw of every parameter, in the shapes, dtypes and devices of `parameters`."""
        raise UnsupportedError(f"{type(self).__name__} has a density and no way to draw from it: define `sample`")

    def save(self, path: str | Path) -> None:
        """Write the prior, and the report of its match, to a file that `bdl.load_prior` reads: safetensors plus JSON.

        Raises:
            UnsupportedError: a prior of the user's own, or the posterior of an earlier fit.
        """
        from bayesdl.priors.files import save_prior

        save_prior(self, path)


def fan_in(parameter: Tensor) -> int:
    """Inputs of one unit: entries per row of a weight, 1 for vectors (biases, gains)."""
    return parameter.numel() // max(parameter.shape[0], 1) if parameter.dim() > 1 else 1
