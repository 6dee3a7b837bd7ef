"""The last layer on its own: its outputs are the network's, so that every position is an example of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor, LinearFactor, dense_factor
from bayesdl.curvature.factors import layer_factors
from bayesdl.curvature.layout import Layout
from bayesdl.network import Network

__all__ = ["Head", "head_of", "is_one_layer"]


@dataclass(frozen=True)
class Head:
    """Outputs of the network and the inputs of its last layer, N = B T positions of all examples in one row.

    Attributes:
        output: `(B, C)` or `(B, positions..., C)`.
        inputs: per block `(1, N, 1, in)`; None for a bias that is a block of its own.
    """

    output: Tensor
    inputs: tuple[Tensor | None, ...]

    def factors(self, vectors: Tensor, index: Tensor | None = None) -> list[Factor]:
        """Factors for cotangents `(K, N, C)`, of the positions at `index` alone where it is given (`(K, n, C)`)."""
        found: list[Factor] = []
        for a in self.inputs:
            if a is None:
                found.append(dense_factor(vectors))
            else:
                found.append(LinearFactor(a if index is None else a[:, index], vectors[None, :, :, None]))
        return found


def is_one_layer(layout: Layout) -> bool:
    """Whether the selection is one linear or convolutional layer that has as many outputs as the network."""
    linear = [block for block in layout.blocks if block.kind == "linear"]
    modules = {block.modules for block in layout.blocks}
    if len(linear) != 1 or len(modules) != 1 or any(block.kind not in ("linear", "shift") for block in layout.blocks):
        return False
    return linear[0].groups == 1 and len(linear[0].modules) == 1 and linear[0].rows == layout.outputs


def head_of(network: Network, layout: Layout, inputs: Any, dtype: torch.dtype) -> Head | None:
    """The last layer of a batch; None where something lies between the selected layer and the outputs.

    A random cotangent that comes back to the layer as it was proves that nothing does.

    Args:
        network: the network.
        layout: of the selection.
        inputs: one batch.
        dtype: of the factors.
    """
    if not is_one_layer(layout):
        return None
    seen: list[Tensor] = []

    def probe(f: Tensor) -> Tensor:
        source = torch.Generator(f.device).manual_seed(0)
        seen.append(torch.rand(f.shape, generator=source, device=f.device).to(f.dtype))
        return seen[0].unsqueeze(0)

    output, factors = layer_factors(network, layout, inputs, probe, dtype)
    sent = seen[0].flatten(0, -2).to(dtype)
    found: list[Tensor | None] = []
    for block, factor in zip(layout.blocks, factors, strict=True):
        if block.kind != "linear" or not isinstance(factor, LinearFactor):
            found.append(None)
            continue
        if not torch.equal(factor.g[0, 0].flatten(0, 1), sent):
            return None
        found.append(factor.a.flatten(1, 2).unsqueeze(2))
    return Head(output, tuple(found))
