"""Features: what goes into the last layer, read off a private clone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, SelectionError, ShapeError
from bayesdl.network import Network

AGREEMENT = 1e-3  # of the head applied to the features with the network's own outputs


def features(network: Network, layer: str, inputs: Any, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
    """What layer `layer` is given for one batch, after whatever the network does to its outputs: `(B, d)`.

    Networks with outputs at every position have features there: `(B, T, d)`, `(B, H, W, d)`.

    The layer hands its input on as it is, so that pooling behind the layer pools the features. `tensors` replace the
    network's own by name.
    """
    with _identity(network.module().get_submodule(layer)):
        return network(inputs, tensors)


def linear_layer(network: Network, name: str) -> nn.Linear:
    """The layer of that name. Raises `ArgumentError` that lists the linear layers where there is none."""
    modules = dict(network.template.named_modules())
    found = modules.get(name)
    if isinstance(found, nn.Linear):
        return found
    linear = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
    raise ArgumentError(f"layer={name!r} is no nn.Linear of the network; choose one of {linear}")


def last_linear(network: Network, example: Any) -> str:
    """Name of the linear layer whose output is the network's output, or gives it from features that are pooled alike.

    Raises:
        SelectionError: there is none, or it is not linear; the message lists the linear layers.
    """
    linear = [name for name, module in network.template.named_modules() if isinstance(module, nn.Linear)]
    try:
        chosen = network.reselect("last_layer", example)
    except SelectionError as error:
        found = [name for name in reversed(linear) if makes_outputs(network, name, example)]
        if found:  # decoders score every token and keep one
            return found[0]
        raise SelectionError(f"{error}. The linear layers are {linear or 'none'}: pass layer=...") from error
    name = chosen.names[0].rpartition(".")[0]
    if name not in linear:
        kind = type(network.template.get_submodule(name)).__name__
        raise SelectionError(
            f"the last layer {name!r} is {kind}; a Bayesian last layer replaces an nn.Linear. "
            f"The linear layers are {linear or 'none'}: pass layer=..."
        )
    return name


def makes_outputs(network: Network, layer: str, example: Any) -> bool:
    """Whether the layer applied to its features gives the network's outputs."""
    with torch.no_grad():
        outputs = network(example)
        if network.template.get_submodule(layer).out_features != outputs.shape[-1]:
            return False
        try:
            phi = features(network, layer, example)
            found = network.module().get_submodule(layer)(phi)
        except RuntimeError:
            return False
        except (ShapeError, ArgumentError):
            return False
    scale = float(outputs.abs().max().clamp(min=1e-6))
    return found.shape == outputs.shape and torch.allclose(found, outputs, rtol=AGREEMENT, atol=AGREEMENT * scale)


@contextmanager
def _identity(layer: nn.Module) -> Iterator[None]:
    handle = layer.register_forward_hook(_input)
    try:
        yield
    finally:
        handle.remove()


def _input(_layer: nn.Module, arguments: tuple[Any, ...], _output: Any) -> Tensor:
    if not arguments or not isinstance(arguments[0], Tensor):
        raise ShapeError("the last layer was not called with one tensor of features; name another layer")
    return arguments[0]
