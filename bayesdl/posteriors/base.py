"""Posterior: what a method leaves behind. The seam to everything downstream is `push`: a belief over outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayesdl.latent import Latent
from bayesdl.network import Network

Function = Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class Posterior(ABC):
    """A belief over functions; a frozen value of tensors."""

    kind: ClassVar[str]

    def prepare(self, network: Network, num_samples: int | None, generator: torch.Generator | None) -> Any:
        """Everything random about one prediction, drawn once and shared by all of its batches."""
        del network, num_samples, generator
        return None

    @abstractmethod
    def push(self, network: Network, inputs: Any, state: Any) -> Latent:
        """Belief over the outputs of one batch; `state` is what `prepare` returned."""

    @abstractmethod
    def draw(self, network: Network, n: int, generator: torch.Generator | None) -> list[Function]:
        """`n` callables, each one function drawn from the posterior: inputs -> outputs `(B, C)`."""

    @property
    @abstractmethod
    def forward_passes(self) -> float:
        """Cost of a prediction in passes through the network; a backward pass counts as one."""

    @property
    @abstractmethod
    def over_weights(self) -> bool:
        """Whether the posterior is a distribution over the selected weights."""

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

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply `function` to every tensor (moves between devices and dtypes)."""
        return self.restore({name: function(value) for name, value in self.tensors().items()}, self.config())


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Base noise from `generator` (its own device), or from a fixed seed, so that predictions repeat."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).to(like)


def frozen(network: Network, tensors: Mapping[str, Tensor] | None = None) -> Function:
    """The network as a plain function of its inputs, at given tensors."""
    held = None if tensors is None else dict(tensors)

    def function(inputs: Any) -> Tensor:
        return network(inputs, held)

    return function
