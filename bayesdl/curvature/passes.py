"""One pass over the data into a structure, and what the evidence needs beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesdl.curvature.chunking import chunk_size, chunks
from bayesdl.curvature.cotangents import cotangent_rule
from bayesdl.curvature.factors import layer_factors
from bayesdl.curvature.structure import Structure
from bayesdl.data import in_batch
from bayesdl.errors import ArgumentError, NumericalError
from bayesdl.likelihoods import Gaussian, Likelihood
from bayesdl.network import Network

__all__ = ["Fit", "accumulate", "check_curvature", "check_same_data"]


@dataclass(frozen=True, eq=False)
class Fit:
    """Curvature at the network's weights, with what the evidence needs beside it.

    Attributes:
        curvature: at the likelihood's noise, or at unit noise where that is still open (Gaussian).
        parts: for a Gaussian likelihood with open noise and several outputs, the curvature of each output alone.
        num_data: N.
        log_likelihood: sum of log p(y | f); at unit noise where the noise is open.
        squared_error: `(C,)` sum of squared residuals, Gaussian only.
    """

    curvature: Structure
    parts: tuple[Structure, ...]
    num_data: int
    log_likelihood: float
    squared_error: Tensor | None


def accumulate(
    network: Network,
    curvature: Structure,
    data: Iterable[tuple[int, Any, Any]],
    likelihood: Likelihood,
    kind: str,
    samples: int,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    memory: int | None,
) -> tuple[Fit, float]:
    """One pass of `batches` into `curvature`, and sum_n |log p(y_n | f_n)|, the scale of its rounding errors."""
    open_noise = isinstance(likelihood, Gaussian) and likelihood.noise is None
    if isinstance(likelihood, Gaussian) and likelihood.noise is None:
        likelihood = likelihood.with_noise(1.0)
    seeds = cotangent_rule(likelihood, kind, samples, generator)
    total, layout = curvature, curvature.layout
    parts: list[Structure] = []
    count, squared = 0, None
    log_likelihood, absolute = torch.zeros(2, dtype=torch.float64, device=network.device).unbind()
    width = {"mc": samples, "empirical": 1}.get(kind)
    step = chunk_size(layout, curvature, dtype, width=width, memory=memory, device=network.device)
    for number, inputs, target in data:
        for rows, labels in chunks(inputs, target, step):
            seen: dict[str, Tensor] = {}

            def cotangents(f: Tensor, labels: Tensor = labels, seen: dict[str, Tensor] = seen) -> Tensor:
                outputs = likelihood.check_outputs(f)
                seen["f"], seen["y"] = outputs, likelihood.check_targets(outputs, labels)
                return seeds(outputs, seen["y"])

            with in_batch(number):
                _, factors = layer_factors(network, layout, rows, cotangents, dtype)
            f, y = seen["f"], seen["y"]
            count += len(f)
            each = likelihood.log_prob(f, y).double()
            log_likelihood, absolute = log_likelihood + each.sum(), absolute + each.abs().sum()
            if isinstance(likelihood, Gaussian):
                residual = (y - f).double().square().sum(0)
                squared = residual if squared is None else squared + residual
            if open_noise and kind == "ggn" and f.shape[1] > 1:
                parts = parts or [curvature.fresh() for _ in range(f.shape[1])]
                for c, part in enumerate(parts):
                    part.update([replace(factor, g=factor.g[:, c : c + 1]) for factor in factors])
            else:
                total.update(factors)
            with in_batch(number):
                for kept in parts or [total]:
                    kept.check_finite()
    if parts:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
    return Fit(total, tuple(parts), count, float(log_likelihood), squared), float(absolute)


def check_curvature(curvature: Structure) -> None:
    """Raise `NumericalError` where the curvature is exactly zero."""
    if curvature.is_zero():
        raise NumericalError(
            "the curvature is exactly zero: the likelihood is flat at these outputs (saturated logits?), "
            "or the selected parameters have no influence on this data"
        )


def check_same_data(before: Fit, after: Fit, absolute: float, dtype: torch.dtype) -> None:
    """Raise unless two passes agree in count and, up to rounding, in loss."""
    slack = min(1e3 * torch.finfo(dtype).eps, 0.05) * (absolute + after.num_data)
    if before.num_data != after.num_data or not abs(before.log_likelihood - after.log_likelihood) <= slack:
        raise ArgumentError(
            "this structure takes several passes over the same data, and two passes of the loader differ: "
            f"{before.num_data} examples with log-likelihood {before.log_likelihood:.6g}, then {after.num_data} with "
            f'{after.log_likelihood:.6g}. Switch random augmentation off, or use structure="kron", which takes one pass'
        )
