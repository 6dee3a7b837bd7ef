"""Means and sums under example weights: one code path for no weights, one weight vector (N,), or R resamples (R, N)."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.evaluation.validation import UndefinedError


def rows(weights: Tensor | None, num_examples: int, device: torch.device) -> Tensor:
    """Weights as (R, N) float64 on `device`; absent weights are one row of ones."""
    if weights is None:
        return torch.ones(1, num_examples, dtype=torch.float64, device=device)
    weights = weights.to(device)
    return weights[None] if weights.dim() == 1 else weights


def finish(values: Tensor, weights: Tensor | None) -> float | Tensor:
    """(R,) as it is for R resamples, else the one value as a float."""
    return values if weights is not None and weights.dim() == 2 else float(values.reshape(()))


def defined(values: Tensor, weights: Tensor | None, message: str, reason: str) -> float | Tensor:
    """`finish`, where NaN marks an undefined value: an error for one value, kept as NaN among resamples."""
    if (weights is None or weights.dim() == 1) and bool(values.isnan().any()):
        raise UndefinedError(message, reason)
    return finish(values, weights)


def mean(values: Tensor, weights: Tensor | None) -> float | Tensor:
    """Weighted mean of `values` (N,) float64, which may hold +inf; an infinite loss of weight 0 does not count."""
    if weights is None:
        return float(values.mean())
    table = rows(weights, len(values), values.device)
    infinite = values.isinf()
    if not bool(infinite.any()):
        return finish(table @ values / table.sum(1), weights)
    result = table @ values.masked_fill(infinite, 0.0) / table.sum(1)
    return finish(result.masked_fill((table[:, infinite] > 0).any(1), torch.inf), weights)


def total(values: Tensor, weights: Tensor | None) -> float | Tensor:
    """Weighted sum of finite `values` (N,)."""
    return finish(rows(weights, len(values), values.device) @ values, weights)
