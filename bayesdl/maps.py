"""Linear maps and look-ups as modules of their own, so that their calls inside a composite layer can be hooked.

A recurrent cell, a bilinear form or a bag of embeddings multiplies its parameters inside one call of torch's. On the
library's private clone such a layer computes the same step by step, and every product with a parameter goes through
one of these modules, which hold no parameters themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdl.streaming import Parameters


@final
class LinearMap(nn.Module):
    """W x + b with tensors that another module owns."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def forward(self, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(value, weight, bias)


@final
class Lookup(nn.Module):
    """Rows of a table that another module owns; those of `padding_idx` carry no gradient."""

    def __init__(self, padding_idx: int | None) -> None:
        super().__init__()
        self.padding_idx = padding_idx
        self.training = False

    def forward(self, index: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(index, weight, self.padding_idx)


@dataclass(frozen=True)
class Part:
    """One product inside a composite layer.

    Attributes:
        module: name of the `LinearMap` or `Lookup` under the layer.
        weight, bias: the layer's own names of the parameters.
    """

    module: str
    weight: str
    bias: str | None = None


def parts_of(layer: nn.Module) -> tuple[Part, ...]:
    """The products of a composite layer of a private clone; empty for any other module."""
    parts: tuple[Part, ...] = layer.__dict__.get("explicit_parts", ())
    return parts


def dissect(layer: nn.Module, cls: type[nn.Module], parts: Mapping[Part, nn.Module]) -> None:
    """Make a layer of a private clone an instance of its explicit subclass `cls`, with a module for each product."""
    layer.__class__ = cls
    layer.__dict__["explicit_parts"] = tuple(parts)
    layer._modules.update({part.module: module for part, module in parts.items()})


def differentiated(layer: nn.Module, *values: Any) -> bool:
    """Whether a derivative or a vmap is being taken: where neither is, torch's fused kernels are as good and faster.

    Fused kernels keep lists of weights of their own, which those of a sharded model must not be in.
    """
    if torch.is_grad_enabled() or isinstance(layer._parameters, Parameters):
        return True
    tensors = [v for v in (*layer._parameters.values(), *values) if isinstance(v, Tensor)]
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
