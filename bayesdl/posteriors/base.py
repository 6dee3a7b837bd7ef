"""Posterior: what a method leaves behind. The seam to everything downstream is `push`: a belief over outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayesdl.errors import UnsupportedError
from bayesdl.latent import Latent, SampleLatent
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

    def covariance(self, network: Network, first: Any, second: Any, state: Any) -> tuple[Tensor, Tensor]:
        """Outputs `(B, C)` at the first inputs, and their covariance `(B, C, B', C)` with those at the second.

        Here the empirical covariance of the samples, the same ones at both inputs; `second` None stands for `first`.
        """
        mine = self.push(network, first, state)
        other = mine if second is None else self.push(network, second, state)
        if not isinstance(mine, SampleLatent) or not isinstance(other, SampleLatent):
            raise UnsupportedError(f"a {self.kind} posterior has no joint covariance over several inputs")
        check_positions(mine.mean)
        left, right = mine.samples - mine.mean, other.samples - other.mean
        return mine.mean, torch.einsum("s,sbc,sde->bcde", mine.weights, left, right)

    @property
    @abstractmethod
    def forward_passes(self) -> float:
        """Cost of a prediction in passes through the network; a backward pass counts as one."""

    def num_uncertain(self, network: Network) -> int:
        """How many scalars of the network this belief is about; 0 where it is about something else."""
        return network.num_parameters if self.over_weights else 0

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

    @classmethod
    def check_network(cls, network: Network, config: Mapping[str, Any]) -> None:
        """Raise where this kind can say in what a file's network differs; called where fingerprints do."""
        del network, config

    @classmethod
    def concerns(cls, config: Mapping[str, Any]) -> Callable[[str], bool] | None:
        """Which tensors of the network, by name, a file of this kind depends on; None: on all of them."""
        del config
        return None

    def check(self, network: Network) -> None:
        """Raise unless what was restored from a file is whole and fits the network; any error will do."""
        del network

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply `function` to every tensor (moves between devices and dtypes)."""
        return self.restore({name: function(value) for name, value in self.tensors().items()}, self.config())


def check_positions(mean: Tensor) -> None:
    """Raise `UnsupportedError` where outputs have positions, between which no covariance is computed."""
    if mean.dim() != 2:
        raise UnsupportedError(
            f"a joint covariance over several inputs is for outputs of shape (B, C), and these have {tuple(mean.shape)}"
        )


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
