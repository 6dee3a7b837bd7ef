"""Functions of a network under a law of its weights: one vectorised forward pass over draws and points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayesdl.errors import NonFiniteError, SelectionError, UnsupportedError
from bayesdl.functional.families import Slot
from bayesdl.network import Network
from bayesdl.priors.base import fan_in

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
WITH_FAN_IN = (nn.Linear, nn.modules.conv._ConvNd)
BYTES = 256 << 20  # of function values and weights at once


class Pushforward:
    """Draws of functions from draws of weights.

    Args:
        network: with the selection whose prior is meant; never written to.
        extra: standard deviations by name for parameters of layers without a fan-in.
        example: one batch of inputs, to tell which layer's outputs are the network's; without it the last layer counts.

    Raises:
        UnsupportedError: batch norm, whose functions would depend on their batch.
        SelectionError: a selected parameter belongs to no layer with a fan-in.
    """

    def __init__(self, network: Network, extra: Mapping[str, float] | None = None, example: Any = None) -> None:
        self.network = network
        self.extra = dict(extra or {})
        owners = _owners(network)
        for name in network.names:
            if isinstance(owners.get(name), _BatchNorm):
                raise UnsupportedError(
                    f"{name!r} belongs to a batch norm: a function under the prior would depend on its batch, or on "
                    "trained statistics. Use a network without it (group norm, layer norm)"
                )
        slots = [self._slot(n, t, owners.get(n)) for n, t in network.parameters.items() if self._free(n, owners)]
        last = _output_layer(network, example)
        self.slots = tuple(replace(slot, output=slot.name.rpartition(".")[0] == last) for slot in slots)
        self.held = held_norms(network, set())

    def _free(self, name: str, owners: Mapping[str, nn.Module]) -> bool:
        return not isinstance(owners.get(name), NORMS) and name not in self.extra

    def _slot(self, name: str, value: Tensor, owner: nn.Module | None) -> Slot:
        if not isinstance(owner, WITH_FAN_IN):
            kind = "no layer" if owner is None else type(owner).__name__
            raise SelectionError(
                f"{name!r} belongs to {kind}, which has no fan-in to scale a prior with: leave it out of select=, or "
                f"fix its prior with extra={{{name!r}: std}}"
            )
        return Slot(name, tuple(value.shape), fan_in(value) if value.dim() > 1 else 1)

    def __call__(self, weights: Mapping[str, Tensor], inputs: Any, generator: torch.Generator) -> Tensor:
        """Outputs `(n, M, C)` at `inputs` for weights `(n, *shape)` by name; differentiable in the weights."""
        n = len(next(iter(weights.values())))
        own = self.network.parameters
        drawn = {name: value.to(own[name]) for name, value in weights.items()}
        for name, std in self.extra.items():
            noise = torch.randn(n, *own[name].shape, generator=generator)
            drawn[name] = (std * noise).to(own[name])
        module, call = self.network.module(), self.network.prepare(inputs)

        def one(tensors: dict[str, Tensor]) -> Tensor:
            return self.network.forward(module, call, {**self.held, **tensors})

        scalars = sum(value[0].numel() for value in drawn.values())
        outputs = torch.func.vmap(one, chunk_size=max(1, BYTES // (16 * max(1, scalars))))(drawn)
        if not bool(torch.isfinite(outputs).all()):
            raise NonFiniteError(
                "the network's functions under the prior hold NaN or infinity: lower lr, or start narrower"
            )
        return outputs


def held_norms(network: Network, known: set[str] | None) -> dict[str, Tensor]:
    """Ones and zeros for selected affine parameters of norm layers whose names are not `known`; None knows all."""
    if known is None:
        return {}
    owners, parameters = _owners(network), network.parameters
    return {
        name: torch.ones_like(parameters[name]) if name.endswith("weight") else torch.zeros_like(parameters[name])
        for name in network.names
        if isinstance(owners.get(name), NORMS) and name not in known
    }


def _output_layer(network: Network, example: Any) -> str:
    """Path of the layer whose outputs are the network's; of the last one with parameters where none is."""
    if example is not None:
        try:
            return network.reselect("last_layer", example).names[0].rpartition(".")[0]
        except SelectionError:  # a sum or an activation behind it
            pass
    return list(dict(network.template.named_parameters()))[-1].rpartition(".")[0]


def _owners(network: Network) -> dict[str, nn.Module]:
    return {
        f"{path}.{key}" if path else key: module
        for path, module in network.template.named_modules()
        for key in module._parameters
    }
