"""Gradients of whole weights by a few random numbers each, so that no two of them are in memory together.

u^T G v with u and v standard normal is zero for a matrix G only if G is, up to a set of measure zero: two ways to a
gradient agree where their sketches do. A weight of a sharded model goes through `Probe` in the forward pass, which is
the identity; its backward keeps the sketch of the gradient that arrives and lets the gradient go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.streaming import Change

RANK = 3


@final
class Sketches:
    """Random directions for parameters.

    Args:
        parameters: by name; for their shapes, dtypes and devices alone.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._seeds = {name: seed for seed, name in enumerate(parameters)}
        self._like = {name: (torch.promote_types(p.dtype, torch.float32), p.device) for name, p in parameters.items()}

    def of(self, name: str, gradient: Tensor) -> Tensor:
        """`(RANK, RANK)` numbers for a gradient of the parameter's shape."""
        kind, device = self._like[name]
        matrix = gradient.reshape(self._shapes[name][0] if len(self._shapes[name]) else 1, -1).to(kind)
        source = torch.Generator().manual_seed(self._seeds[name])
        left, right = (torch.randn(RANK, size, generator=source).to(device, kind) for size in matrix.shape)
        return left @ matrix @ right.mT

    def probes(self) -> tuple[dict[str, Tensor], dict[str, Change]]:
        """Leaves whose gradients are the sketches, and the functions that the parameters are to go through."""
        leaves = {
            name: torch.zeros(RANK, RANK, dtype=kind, device=device, requires_grad=True)
            for name, (kind, device) in self._like.items()
        }

        def through(name: str) -> Change:
            return lambda weight: _Probe.apply(weight, leaves[name], self, name)

        return leaves, {name: through(name) for name in self._shapes}


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, leaf: Tensor, sketches: Sketches, name: str) -> Tensor:
        ctx.sketches, ctx.name = sketches, name
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        return None, ctx.sketches.of(ctx.name, gradients[0]), None, None
