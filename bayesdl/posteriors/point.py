"""Point posterior: certainty about the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.latent import Latent, point_latent
from bayesdl.network import Network
from bayesdl.posteriors.base import Function, Posterior, frozen


@final
@dataclass(frozen=True, eq=False)
class PointPosterior(Posterior):
    """The network as it is."""

    kind: ClassVar[str] = "point"

    def push(self, network: Network, inputs: Any, state: Any) -> Latent:
        return point_latent(network(inputs))

    def draw(self, network: Network, n: int, generator: torch.Generator | None) -> list[Function]:
        return [frozen(network) for _ in range(n)]

    @property
    def forward_passes(self) -> float:
        return 1.0

    @property
    def over_weights(self) -> bool:
        return False

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        return cls()
