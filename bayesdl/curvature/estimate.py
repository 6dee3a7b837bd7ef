"""Curvature of the log-likelihood of a network on a data set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from bayesdl.batch import BatchAdapter, flatten_tensors, resolve_adapter
from bayesdl.curvature.hessian import fit_hessian
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.passes import Fit
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import Recipe
from bayesdl.curvature.run import Run
from bayesdl.curvature.structure import Structure
from bayesdl.data import batches, check_rereadable, keeps_order, peek, warn_if_unsteady
from bayesdl.distributed import Group, check_total, resolve_group, same_network, share_of, together
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.likelihoods import Likelihood, resolve
from bayesdl.network import Network
from bayesdl.select import Selector
from bayesdl.tensorfile import checksum

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
    shared: str = "expand",
    classes: int | None = None,
    distributed: Processes = None,
    resume: str | Path | None = None,
    every: int = 100,
) -> Structure:
    """Curvature H = sum_n J_n^T Lambda_n J_n, a SUM over the data.

    Args:
        model: trained network; never written to.
        data: loader of batches; an iterator that can be read once is enough for structures that take one pass.
        likelihood: name or object.
        structure: "full", "diag", "kron", "kron-lowrank" (of large factors the leading eigenpairs), "ekfac" (two passes
            over the data) or "lowrank" (three); or a dictionary from layer patterns to these, e.g. `{"head": "full",
            "*": "kron"}`; see `bayesdl.curvature.mixed.Mixed`.
        kind: "ggn" (exact), "mc" (Fisher from sampled targets), "empirical" (from the true targets) or "hessian" (of
            -sum log p(y | f(theta)); "full", "diag" or "lowrank"). At weights that are no minimum a Hessian has
            negative eigenvalues: queries refuse a shift that leaves scale * H + diag(shift) not positive definite.
        select: which parameters; see `bayesdl.select.resolve`.
        bias: "joint" (weight and bias of a layer are one block) or "separate".
        batch: batch adapter.
        samples: draws of y per example for kind "mc".
        classes: for kind "ggn" with thousands of classes: the exact terms of so many classes, the most probable of each
            example, and one draw among the others that stands for them, which leaves the estimate unbiased; exact where
            `classes` is C. Their cotangents are K = classes + 1 instead of C.
        generator: for kind "mc"; default a fixed seed.
        dtype: of the curvature; default float32, or float64 for a float64 network.
        memory: bytes that one chunk of examples may take.
        allow_partial: accept a loader that skips part of its data set (drop_last).
        progress: whether to show progress bars.
        rank: of structure "lowrank" or "kron-lowrank"; default 32.
        shared: for "kron", "kron-lowrank" and "ekfac", how a weight that meets several positions of an example
            (convolutions, sequences) is treated: "expand" (every position a datum) or "reduce" (inputs averaged,
            cotangents summed over positions first); see `bayesdl.curvature.kron.Kron`.
        distributed: True, or a process group of torch: every process calls this with its own share of the data, and
            all of them get the curvature of the whole (one reduction a pass). Never on its own, because a call on one
            process alone would wait for the others for ever: by default a loader that visibly holds a share (a
            DistributedSampler) is an error; False takes the share for the whole.
        resume: a file that keeps the state of the fit; where it exists the fit goes on from there, to the same bits as
            without an interruption. The loader must keep its order. See also `bayesdl.curvature.Accumulator`.
        every: batches after which that file is written anew.

    Raises:
        DistributedError: another process failed.
        NonFiniteError, ShapeError, LabelError: bad data; the message names the batch.
        UnsupportedError: the network or the size does not allow this structure.
    """
    group, family = resolve_group(distributed), resolve(likelihood)
    with together(group):
        data, batch_one = peek(data)
    with together(group):
        network = (
            model
            if isinstance(model, Network)
            else Network(model, select=select, batch=batch, example=resolve_adapter(batch)(batch_one)[0])
        ).reading(family.output_axis)
    if group is not None:
        same_network(group, network)
    with together(group), network.session():
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
        shared=shared,
        classes=classes,
        distributed=distributed,
        resume=resume,
        every=every,
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
    shared: str = "expand",
    classes: int | None = None,
    distributed: Processes = None,
    resume: str | Path | None = None,
    every: int = 100,
    example: Any = None,
) -> Fit:
    """`estimate` with its side results; arguments as there, and the inputs of the loader's first batch.

    Raises:
        ArgumentError: the structure takes several passes and the loader does not yield the same data in each.
    """
    group = resolve_group(distributed)
    if every < 1:
        raise ArgumentError(f"every={every}; expected a positive number of batches")
    if kind == "hessian":
        if group is not None or resume is not None:
            given = "distributed=" if group is not None else "resume="
            raise UnsupportedError(f'kind="hessian" runs in one process and in one go, without {given}; or use "ggn"')
        share_of(data, distributed, group)
        with network.session():
            return fit_hessian(
                network,
                layout,
                data,
                likelihood,
                structure=structure,
                dtype=dtype,
                memory=memory,
                allow_partial=allow_partial,
                progress=progress,
                rank=rank,
                shared=shared,
            )
    if group is not None and generator is None:
        generator = torch.Generator(network.device).manual_seed(group.rank)
    run = Run(
        network,
        layout,
        likelihood,
        structure=structure,
        kind=kind,
        samples=samples,
        generator=generator,
        dtype=dtype,
        memory=memory,
        rank=rank,
        shared=shared,
        classes=classes,
    )
    with together(group):
        if run.passes > 1:
            check_rereadable("data", data)
        share = share_of(data, distributed, group)
        warn_if_unsteady(data)
        if resume is not None:
            _check_resumable(data, group)
            data_of = {"first batch (digest)": _digest(example)}
            run.resume(resume, **data_of)
    partial = allow_partial or share.total is not None  # a share is counted with all the others
    while True:
        source = batches(network, data, progress=progress, describe="curvature", allow_partial=partial, example=example)
        with together(group), network.session():
            for number, inputs, target in share.cut(source):
                if number >= run.batches:
                    run.add(number, inputs, target)
                    if resume is not None and run.batches % every == 0:
                        run.save(resume, **data_of)
        if group is not None:
            run.combine(group)
            if not allow_partial:
                check_total(share, group, run.examples)
        if not run.next_pass(group):
            return run.fit()


def _check_resumable(data: Iterable[Any], group: Group | None) -> None:
    if group is not None:
        raise ArgumentError("resume= was given with distributed=: several processes cannot resume together")
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset) and not keeps_order(data):
        raise ArgumentError(
            f"resume= needs the same batches in the same order after an interruption, and this loader's sampler "
            f"({type(data.sampler).__name__}) may shuffle: build it with shuffle=False"
        )


def _digest(example: Any) -> str:
    tensors = flatten_tensors(example)[0]
    return checksum({}, {str(i): tensor.detach().cpu() for i, tensor in enumerate(tensors)})
