"""Whether weights are still those that were there before: some values of each, or a digest of all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.streaming import is_sharded

PROBES = 16  # values of each parameter that are compared to notice a write without a trace


def spread(module: nn.Module) -> Tensor:
    """Up to `PROBES` values of every parameter, evenly spread, in one vector; of what this process holds of it."""
    held = [_local(p.detach()) for p in module.parameters() if p.is_floating_point()]
    parameters = [p for p in held if p.numel()]
    if not parameters:
        return torch.zeros(0)
    wide = torch.float64 if any(p.dtype is torch.float64 for p in parameters) else torch.float32
    picked = [_in_memory_order(p)[:: -(-p.numel() // PROBES)] for p in parameters]
    return torch.cat([values.to(device=picked[0].device, dtype=wide) for values in picked])


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and values."""
    found = hashlib.sha256()
    for name in tensors:
        tensor = tensors[name]
        found.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
        found.update(tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A flat view, also of dense tensors in another layout such as channels-last."""
    strides: tuple[int, ...] = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d])).reshape(-1)
