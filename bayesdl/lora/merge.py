"""One draw of an adapter as a plain model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.lora.adapters import AdaptedLayer, weight

if TYPE_CHECKING:
    from bayesdl.model import BayesianModel


def merge_sample(model: BayesianModel, index: int = 0, *, merge: bool = True) -> nn.Module:
    """A new model, in memory of its own and in eval mode, in which draw `index` is part of the weights.

    Args:
        model: fitted by `bdl.TFB`.
        index: of the draw; `model.draw(n)[index]` computes the same.
        merge: add the adapter to the base weights and drop it; False keeps the adapter, perturbed (quantised bases).

    DoRA normalises columns; draws keep the mean's norm, so the magnitudes of the result are scaled to make up for it.

    Raises:
        UnsupportedError: another posterior, nothing that peft could merge, or a quantised base, whose rounding would
            swallow the draw.
        ArgumentError: a negative index.
    """
    from bayesdl.posteriors.lora import adapter_posterior

    posterior = adapter_posterior(model)
    if index < 0:
        raise ArgumentError(f"index={index}; expected a draw's number, from zero")
    model.network.check_values()
    if merge:
        _check_base(model.network.template, posterior.layers)
    draws = posterior.draws(model.network)
    result: Any = copy.deepcopy(model.network.template)
    with torch.no_grad():
        for layer in posterior.layers:
            down = weight(layer.down(result))
            wide = torch.float64 if down.dtype is torch.float64 else torch.float32
            noise = draws.noise(layer, posterior.seed, index, index + 1, down.to(wide))[0]
            before = _norm(result, layer)
            down.copy_(down.to(wide) + posterior.sigma * noise)
            if before is not None:
                magnitude = result.get_submodule(f"{layer.name}.lora_magnitude_vector.{layer.adapter}").weight
                magnitude.mul_(_norm(result, layer) / before)
    if not merge:
        return result
    if not hasattr(result, "merge_and_unload"):
        raise UnsupportedError(
            f"{type(result).__name__} is no PeftModel, which alone can be merged; use merge_sample(..., merge=False)"
        )
    return result.merge_and_unload()


def _check_base(module: nn.Module, layers: Iterable[AdaptedLayer]) -> None:
    for layer in layers:
        base: Any = module.get_submodule(layer.name)
        for held in base.get_base_layer().parameters():
            if not held.is_floating_point():
                raise UnsupportedError(
                    f"the weights of {layer.name!r} are quantised ({type(held).__name__}), and merging would round the "
                    "draw away; use merge_sample(..., merge=False), which keeps the adapter"
                )


def _norm(module: nn.Module, layer: AdaptedLayer) -> Any:
    """DoRA's norm of the columns; None for other layers."""
    if not layer.dora:
        return None
    part: Any = module.get_submodule(layer.name)
    from peft.utils.integrations import dequantize_module_weight

    vector = part.lora_magnitude_vector[layer.adapter]
    delta = weight(layer.up(module)) @ weight(layer.down(module))
    return vector.get_weight_norm(dequantize_module_weight(part.get_base_layer()), delta, part.scaling[layer.adapter])
