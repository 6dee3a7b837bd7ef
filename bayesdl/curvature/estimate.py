"""Curvature of the log-likelihood of a network on a data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bayesdl.batch import BatchAdapter, resolve_adapter
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.passes import Fit, accumulate, check_curvature, check_same_data
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import Recipe, check_recipe, first, following
from bayesdl.curvature.structure import Structure
from bayesdl.data import batches
from bayesdl.likelihoods import Likelihood, resolve
from bayesdl.network import Network, first_inputs
from bayesdl.select import Selector

__all__ = ["estimate", "fit_curvature"]


def estimate(
    model: nn.Module | Network,
    data: Iterable[Any],
    likelihood: str | Likelihood,
    *,
    structure: Recipe = "kron",
    kind: str = "ggn",
    select: Selector = "all",
    bias: str = "joint",
    batch: str | BatchAdapter | None = None,
    samples: int = 1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    allow_partial: bool = False,
    progress: bool = True,
    rank: int | None = None,
) -> Structure:
    """Curvature H = sum_n J_n^T Lambda_n J_n, a SUM over the data.

    Args:
        model: trained network; never written to.
        data: loader of batches.
        likelihood: name or object.
        structure: "full", "diag", "kron", "ekfac" (two passes over the data) or "lowrank" (three); or a dictionary
            from layer patterns to these, e.g. `{"head": "full", "*": "kron"}`; see `bayesdl.curvature.mixed.Mixed`.
        kind: "ggn" (exact), "mc" (Fisher from sampled targets), "empirical" (from the true targets).
        select: which parameters; see `bayesdl.select.resolve`.
        bias: "joint" (weight and bias of a layer are one block) or "separate".
        batch: batch adapter.
        samples: draws of y per example for kind "mc".
        generator: for kind "mc"; default a fixed seed.
        dtype: of the curvature; default float32, or float64 for a float64 network.
        memory: bytes that one chunk of examples may take.
        allow_partial: accept a loader that skips part of its data set (drop_last).
        progress: whether to show progress bars.
        rank: of structure "lowrank"; default 32.

    Raises:
        NonFiniteError, ShapeError, LabelError: bad data; the message names the batch.
        UnsupportedError: the network or the size does not allow this structure.
    """
    network = (
        model
        if isinstance(model, Network)
        else Network(model, select=select, batch=batch, example=first_inputs(data, resolve_adapter(batch)))
    )
    layout = plan(network, first_inputs(data, network.batch), bias)
    return fit_curvature(
        network,
        layout,
        data,
        resolve(likelihood),
        structure=structure,
        kind=kind,
        samples=samples,
        generator=generator,
        dtype=dtype,
        memory=memory,
        allow_partial=allow_partial,
        progress=progress,
        rank=rank,
    ).curvature


def fit_curvature(
    network: Network,
    layout: Layout,
    data: Iterable[Any],
    likelihood: Likelihood,
    *,
    structure: Recipe,
    kind: str,
    samples: int = 1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    allow_partial: bool = False,
    progress: bool = True,
    rank: int | None = None,
) -> Fit:
    """`estimate` with its side results; arguments as there.

    Raises:
        ArgumentError: the structure takes several passes and the loader does not yield the same data in each.
    """
    check_recipe(structure, rank)
    dtype = dtype or torch.promote_types(network.dtype or torch.float32, torch.float32)
    start = None if generator is None else generator.get_state()

    def one_pass(into: Structure) -> tuple[Fit, float]:
        if generator is not None and start is not None:
            generator.set_state(start)  # every pass draws the same targets
        source = batches(network, data, progress=progress, describe="curvature", allow_partial=allow_partial)
        fit, absolute = accumulate(network, into, source, likelihood, kind, samples, generator, dtype, memory)
        check_curvature(fit.curvature)
        return fit, absolute

    fit, _ = one_pass(first(structure, layout, dtype, network.device, rank))
    while (into := following(structure, fit.curvature)) is not None:
        before, (fit, absolute) = fit, one_pass(into)
        check_same_data(before, fit, absolute, network.dtype or torch.float32)
    return fit
