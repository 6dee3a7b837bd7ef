"""Curvature of the log-likelihood of a network on a data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bayesdl.batch import BatchAdapter, resolve_adapter
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.passes import Fit, Tally, check_curvature, check_same_data
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import Recipe, check_recipe, first, following, num_passes
from bayesdl.curvature.structure import Structure
from bayesdl.data import batches, check_rereadable, peek, warn_if_unsteady
from bayesdl.distributed import check_total, resolve_group, same_network, share_of, together
from bayesdl.likelihoods import Likelihood, resolve
from bayesdl.network import Network
from bayesdl.select import Selector

if TYPE_CHECKING:
    from bayesdl.distributed import Processes

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
    distributed: Processes = None,
) -> Structure:
    """Curvature H = sum_n J_n^T Lambda_n J_n, a SUM over the data.

    Args:
        model: trained network; never written to.
        data: loader of batches; an iterator that can be read once is enough for structures that take one pass.
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
        distributed: True, or a process group of torch: every process calls this with its own share of the data, and
            all of them get the curvature of the whole (one reduction a pass). Never on its own, because a call on one
            process alone would wait for the others for ever: by default a loader that visibly holds a share (a
            DistributedSampler) is an error; False takes the share for the whole.

    Raises:
        DistributedError: another process failed.
        NonFiniteError, ShapeError, LabelError: bad data; the message names the batch.
        UnsupportedError: the network or the size does not allow this structure.
    """
    group, family = resolve_group(distributed), resolve(likelihood)
    with together(group):
        data, batch_one = peek(data)
        network = (
            model
            if isinstance(model, Network)
            else Network(model, select=select, batch=batch, example=resolve_adapter(batch)(batch_one)[0])
        ).reading(family.output_axis)
    if group is not None:
        same_network(group, network)
    with together(group):
        example = network.batch(batch_one)[0]
        layout = plan(network, example, bias)
    return fit_curvature(
        network,
        layout,
        data,
        family,
        structure=structure,
        kind=kind,
        samples=samples,
        generator=generator,
        dtype=dtype,
        memory=memory,
        allow_partial=allow_partial,
        progress=progress,
        rank=rank,
        distributed=distributed,
        example=example,
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
    distributed: Processes = None,
    example: Any = None,
) -> Fit:
    """`estimate` with its side results; arguments as there, and the inputs of the loader's first batch.

    Raises:
        ArgumentError: the structure takes several passes and the loader does not yield the same data in each.
    """
    check_recipe(structure, rank)
    group = resolve_group(distributed)
    with together(group):
        if num_passes(structure) > 1:
            check_rereadable("data", data)
        share = share_of(data, distributed, group)
        warn_if_unsteady(data)
    dtype = dtype or torch.promote_types(network.dtype or torch.float32, torch.float32)
    if group is not None and generator is None:
        generator = torch.Generator(network.device).manual_seed(group.rank)
    start = None if generator is None else generator.get_state()

    def one_pass(into: Structure) -> tuple[Fit, float]:
        if generator is not None and start is not None:
            generator.set_state(start)  # every pass draws the same targets
        tally = Tally(network, into, likelihood, kind, samples, generator, dtype, memory)
        partial = allow_partial or share.total is not None  # a share is counted with all the others
        source = batches(network, data, progress=progress, describe="curvature", allow_partial=partial, example=example)
        with together(group):
            for batch in share.cut(source):
                tally.add(*batch)
        if group is not None:
            tally.combine(group)
            if not allow_partial:
                check_total(share, group, tally.examples)
        fit, absolute = tally.result()
        check_curvature(fit.curvature)
        return fit, absolute

    fit, _ = one_pass(first(structure, layout, dtype, network.device, rank))
    while (into := following(structure, fit.curvature)) is not None:
        if group is not None:  # bases may differ between machines
            sums = into.sums()
            group.spread([value for name, value in into.tensors().items() if name not in sums])
        before, (fit, absolute) = fit, one_pass(into)
        check_same_data(before, fit, absolute, network.dtype or torch.float32)
    return fit
