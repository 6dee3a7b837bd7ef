"""Dropout as a posterior: every draw is one set of masks, shared by all inputs (Gal and Ghahramani 2016)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayesdl.errors import ArgumentError, FileFormatError
from bayesdl.latent import Latent, SampleLatent
from bayesdl.network import Network
from bayesdl.posteriors.base import Function, Posterior

ELEMENTWISE: tuple[type[nn.Module], ...] = (nn.Dropout,)
CHANNELWISE: tuple[type[nn.Module], ...] = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROPOUTS = ELEMENTWISE + CHANNELWISE


@final
@dataclass(frozen=True, eq=False)
class MaskPosterior(Posterior):
    """Masks on the network's own dropout layers.

    Attributes:
        layers: names of the dropout layers.
        num_samples: draws S per prediction by default.
        rate: replaces every layer's own rate; None keeps them.
    """

    layers: tuple[str, ...]
    num_samples: int
    rate: float | None = None

    kind: ClassVar[str] = "masks"

    def prepare(self, network: Network, num_samples: int | None, generator: torch.Generator | None) -> Any:
        return self._seeds(num_samples or self.num_samples, generator)

    def push(self, network: Network, inputs: Any, state: Any) -> Latent:
        outputs = torch.stack([self._forward(network, inputs, seed) for seed in state])
        return SampleLatent(outputs, outputs.new_full((len(outputs),), 1.0 / len(outputs)))

    def draw(self, network: Network, n: int, generator: torch.Generator | None) -> list[Function]:
        def fixed(seed: int) -> Function:
            return lambda inputs: self._forward(network, inputs, seed)

        return [fixed(seed) for seed in self._seeds(n, generator)]

    @property
    def forward_passes(self) -> float:
        return float(self.num_samples)

    @property
    def over_weights(self) -> bool:
        return False

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def config(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "num_samples": self.num_samples, "rate": self.rate}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        return cls(tuple(config["layers"]), int(config["num_samples"]), config["rate"])

    def check(self, network: Network) -> None:
        """Raise `FileFormatError` where a layer is no dropout of the network's, or a number is no number."""
        modules = dict(network.template.named_modules())
        odd = [name for name in self.layers if not isinstance(modules.get(name), DROPOUTS)]
        if odd or not self.layers:
            raise FileFormatError(f"{odd or 'nothing'} is no dropout layer of this network")
        if not 1 <= self.num_samples < 1 << 31 or not (self.rate is None or 0.0 <= self.rate < 1.0):
            raise FileFormatError(f"{self.num_samples} masks of rate {self.rate}")

    def _seeds(self, n: int, generator: torch.Generator | None) -> list[int]:
        if n < 1:
            raise ArgumentError(f"{n} draws were asked for; expected at least 1")
        source = generator or torch.Generator().manual_seed(0)
        return torch.randint(2**31, (n,), generator=source, device=source.device).tolist()

    def _forward(self, network: Network, inputs: Any, seed: int) -> Tensor:
        module = network.module()
        calls: dict[str, int] = defaultdict(int)
        handles: list[RemovableHandle] = []

        def masked(number: int, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            def hook(layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
                calls[name] += 1
                # the mask depends on draw, layer and call alone: never on the inputs or on how they are batched
                # (odd factors: torch keeps 32 bits of a seed, and an even factor would push bits of `seed` out)
                mixed = ((seed * 1000003 + number) * 999983 + calls[name]) % 2**32
                stream = torch.Generator().manual_seed(mixed)
                return output * _mask(layer, output, self.rate, stream)

            return hook

        try:
            for number, name in enumerate(self.layers):
                handles.append(module.get_submodule(name).register_forward_hook(masked(number, name)))
            return network(inputs)
        finally:
            for handle in handles:
                handle.remove()


def _mask(layer: Any, output: Tensor, rate: float | None, stream: torch.Generator) -> Tensor:
    p = float(layer.p if rate is None else rate)
    shape = list(output.shape[1:])
    if isinstance(layer, CHANNELWISE):
        shape = [shape[0]] + [1] * (len(shape) - 1)
    keep = torch.rand(shape, generator=stream) >= p
    return keep.to(output) / (1.0 - p) if p < 1.0 else torch.zeros(shape).to(output)
