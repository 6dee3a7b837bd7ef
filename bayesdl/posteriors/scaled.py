"""Temperature on the outputs of any posterior: f / T."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.latent import GaussianLatent, Latent, SampleLatent
from bayesdl.network import Network
from bayesdl.posteriors.base import Function, Posterior


@final
@dataclass(frozen=True, eq=False)
class ScaledPosterior(Posterior):
    """Another posterior whose outputs are divided by a temperature.

    Attributes:
        base: the posterior underneath.
        temperature: T > 0, a scalar tensor; above one softens the class probabilities.
    """

    base: Posterior
    temperature: Tensor

    kind: ClassVar[str] = "scaled"

    def __post_init__(self) -> None:
        if self.temperature.numel() != 1 or not bool(self.temperature > 0):
            raise ArgumentError(f"the temperature must be one positive number, got {self.temperature.tolist()}")

    def prepare(self, network: Network, num_samples: int | None, generator: torch.Generator | None) -> Any:
        return self.base.prepare(network, num_samples, generator)

    def push(self, network: Network, inputs: Any, state: Any) -> Latent:
        return scale_latent(self.base.push(network, inputs, state), self.temperature)

    def covariance(self, network: Network, first: Any, second: Any, state: Any) -> tuple[Tensor, Tensor]:
        mean, covariance = self.base.covariance(network, first, second, state)
        t = self.temperature.to(mean)
        return mean / t, covariance / t.square()

    def draw(self, network: Network, n: int, generator: torch.Generator | None) -> list[Function]:
        def cooled(function: Function) -> Function:
            def scaled(inputs: Any) -> Tensor:
                output = function(inputs)
                return output / self.temperature.to(output)

            return scaled

        return [cooled(function) for function in self.base.draw(network, n, generator)]

    def check(self, network: Network) -> None:
        self.base.check(network)

    @property
    def forward_passes(self) -> float:
        return self.base.forward_passes

    @property
    def over_weights(self) -> bool:
        return self.base.over_weights

    def num_uncertain(self, network: Network) -> int:
        return self.base.num_uncertain(network)

    def tensors(self) -> dict[str, Tensor]:
        return {"temperature": self.temperature, **{f"base.{k}": v for k, v in self.base.tensors().items()}}

    def config(self) -> dict[str, Any]:
        return {"base": self.base.kind, "base_config": self.base.config()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        from bayesdl.posteriors import POSTERIORS

        inner = {name[5:]: value for name, value in tensors.items() if name.startswith("base.")}
        base = POSTERIORS[config["base"]].restore(inner, config["base_config"])
        return cls(base, tensors["temperature"])


def scale_latent(latent: Latent, temperature: Tensor) -> Latent:
    """Outputs divided by `temperature`."""
    t = temperature.to(latent.mean)
    if isinstance(latent, SampleLatent):
        spreads = None if latent.spreads is None else latent.spreads / t.square()
        return SampleLatent(latent.samples / t, latent.weights, spreads)
    covariance = None if latent.covariance is None else latent.covariance / t.square()
    return GaussianLatent(latent.mean / t, latent.variance / t.square(), covariance)
