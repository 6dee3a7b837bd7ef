"""Passes through a network at the values of one sample, on a private copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter
from bayesdl.network import Network


def probed(net: nn.Module, values: Mapping[str, Tensor], inputs: Any, batch: str | BatchAdapter | None) -> Tensor:
    """Outputs `(P, C)` at the inputs, in eval mode."""
    network = Network(net, batch=batch, output_axis="auto")
    own = network.tensors
    with torch.no_grad():
        return network(inputs, {name: value.to(own[name]) for name, value in values.items()})


def fresh_statistics(
    net: nn.Module, weights: Mapping[str, Tensor], data: Iterable[Any], batch: str | BatchAdapter | None
) -> dict[str, Tensor]:
    """Batch-norm statistics at the given weights, in one pass over the data."""
    from bayesdl.methods.finetune import recomputed_statistics

    return recomputed_statistics(Network(net, batch=batch, output_axis="auto"), net, data, weights)
