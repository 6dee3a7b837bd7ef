"""Inputs that stand for unseen ones: mixtures of two training inputs, with the label of the greater part.

A classifier that knows its training labels by heart is sure of itself on those very inputs alone. Off them, on the way
to another input, it errs about as it does on unseen data, and how sure it should be shows there: mixup (Zhang et al.
2018) of the inputs with the labels left hard, as a stand-in for a held-out set (Hu et al. 2024, for temperatures).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bayesdl.data import batches
from bayesdl.network import Network

# share of an input that keeps its label; chosen with benchmarks/defaults.py
SHARE = 0.8


def mixed(network: Network, data: Iterable[Any], count: int, share: float = SHARE) -> tuple[Tensor, Tensor] | None:
    """Mixtures of the first `count` examples with each other, and the labels of the greater parts.

    Args:
        network: gives the adapter.
        data: training batches.
        count: examples used.
        share: of the input whose label stays, above a half.

    Returns:
        Inputs and targets; None where inputs cannot be mixed: they are no single tensor of numbers (token indices,
        several inputs), differ in shape, or are fewer than two.
    """
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    seen = 0
    for _, x, y in batches(network, data, progress=False):
        if not isinstance(x, Tensor) or not x.is_floating_point() or (inputs and x.shape[1:] != inputs[0].shape[1:]):
            return None
        inputs.append(x[: count - seen])
        targets.append(torch.as_tensor(y)[: count - seen])
        seen += len(inputs[-1])
        if seen >= count:
            break
    if seen < 2:
        return None
    every = torch.cat(inputs)
    order = torch.randperm(seen, generator=torch.Generator().manual_seed(0)).to(every.device)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)  # another one for each
    return share * every + (1.0 - share) * every[partner], torch.cat(targets)
