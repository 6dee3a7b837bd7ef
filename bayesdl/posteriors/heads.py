"""Samples of a network that ends in a Bayesian head: every one gives a belief of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesdl.clone import structural_clone
from bayesdl.network import Network
from bayesdl.posteriors.base import Function

if TYPE_CHECKING:
    from bayesdl.last_layer.head import Head


def bayesian_head(network: Network) -> str | None:
    """Name of the network's one Bayesian head; None where it has none, or several."""
    from bayesdl.last_layer.head import Head

    found = [name for name, module in network.template.named_modules() if isinstance(module, Head)]
    return found[0] if len(found) == 1 else None


def head_latent(network: Network, name: str, inputs: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance `(B, C)` of the noise-free outputs, with features and head at `tensors`."""
    from bayesdl.last_layer.features import features

    phi = features(network, name, inputs, tensors)
    belief = _Belief(network.module().get_submodule(name))
    own = {f"head.{key}": value for key, value in _below(name, tensors).items()}
    mean, variance = torch.func.functional_call(belief, own, (phi.flatten(0, -2),))
    shape = phi.shape[:-1]
    return mean.reshape(*shape, -1), variance.reshape(*shape, -1)


def head_functions(
    network: Network, name: str, states: Sequence[Mapping[str, Tensor]], generator: torch.Generator
) -> list[Function]:
    """One function drawn from the head of each sample."""
    from bayesdl.last_layer.features import features

    def function(tensors: Mapping[str, Tensor]) -> Function:
        head = _at(network.template.get_submodule(name), _below(name, tensors))
        (chosen,) = head.posterior().belief.functions(1, generator)

        def outputs(inputs: Any) -> Tensor:
            return chosen(features(network, name, inputs, tensors))

        return outputs

    return [function(state) for state in states]


class _Belief(nn.Module):
    """What a head believes about its outputs, as a module whose tensors can be replaced in a call."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        head: Head = self.head  # type: ignore[assignment]
        found = head.latent(*head.moments(phi))
        return found.mean, found.variance


def _below(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}." if name else ""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def _at(head: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    copy = structural_clone(head, lambda t: nn.Parameter(t.detach().clone()), lambda t: t.detach().clone())
    copy.load_state_dict(dict(tensors), strict=False)
    return copy
