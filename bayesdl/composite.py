"""Layers whose weight meets a product of two inputs or a bag of rows, with that meeting in the open."""

from __future__ import annotations

import math
from typing import cast, final

import torch
from torch import Tensor, nn

from bayesdl.maps import LinearMap, Lookup, Part, differentiated, dissect


@final
class ExplicitBilinear(nn.Bilinear):
    """`nn.Bilinear` as a linear map of the products of its inputs' entries. Made by `expose`."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        if not differentiated(self, input1, input2):
            return super().forward(input1, input2)
        products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
        return cast(Tensor, self._modules["form"](products, self.weight.flatten(1), self.bias))  # type: ignore[misc]


@final
class ExplicitBag(nn.EmbeddingBag):
    """`nn.EmbeddingBag` as look-ups and a sum, mean or maximum over each bag, for bags of one size `(B, T)`.

    Bags given by offsets differ in size: torch runs them.
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        plain = input.dim() == 2 and input.shape[1] > 0 and offsets is None
        odd = per_sample_weights is not None and (self.mode != "sum" or per_sample_weights.shape != input.shape)
        if not plain or odd or not differentiated(self, input, per_sample_weights):
            return super().forward(input, offsets, per_sample_weights)
        rows = self._modules["lookup"](input, self.weight)  # type: ignore[misc]
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(-1)
        counted = torch.ones_like(input, dtype=torch.bool) if self.padding_idx is None else input != self.padding_idx
        counted = counted.unsqueeze(-1)
        if self.mode == "max":
            largest = rows.masked_fill(~counted, -math.inf).max(1).values
            return cast(Tensor, largest.masked_fill(~counted.any(1), 0.0))
        total = rows.masked_fill(~counted, 0.0).sum(1)
        return cast(Tensor, total if self.mode == "sum" else total / counted.sum(1).clamp(min=1))


def expose(layer: nn.Module) -> None:
    """Replace a bilinear form or a bag of a private clone by its explicit equivalent, in place; other modules stay."""
    if type(layer) is nn.Bilinear:
        bias = None if layer.bias is None else "bias"
        dissect(layer, ExplicitBilinear, {Part("form", "weight", bias): LinearMap()})
    elif type(layer) is nn.EmbeddingBag:
        dissect(layer, ExplicitBag, {Part("lookup", "weight"): Lookup(layer.padding_idx)})
