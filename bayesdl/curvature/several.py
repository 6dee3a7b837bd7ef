"""Several structures from one pass: the network runs, and its cotangents go back, once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from bayesdl.batch import BatchAdapter, resolve_adapter
from bayesdl.curvature.passes import Tally, check_curvature
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import Recipe, check_recipe, empty, num_passes
from bayesdl.curvature.structure import Structure
from bayesdl.data import batches, peek, warn_if_unsteady
from bayesdl.distributed import share_of
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.likelihoods import Gaussian, Likelihood, resolve
from bayesdl.network import Network
from bayesdl.select import Selector


def estimate_several(
    model: nn.Module | Network,
    data: Iterable[Any],
    likelihood: str | Likelihood,
    structures: Sequence[Recipe],
    *,
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
) -> tuple[Structure, ...]:
    """What `estimate` gives for each structure, at the cost of the passes of one of them.

    Args:
        model, data, likelihood: see `bayesdl.curvature.estimate`; a Gaussian one of several outputs has its noise.
        structures: of one pass each: "diag", "kron", "full", "dual" or dictionaries of these.
        kind, select, bias, batch, samples, generator, dtype, memory, allow_partial, progress: as there; not "hessian".

    Raises:
        ArgumentError: no structure.
        UnsupportedError: a structure that takes several passes, the exact Hessian, or an open noise.
    """
    for recipe in structures:
        check_recipe(recipe)
        if num_passes(recipe) > 1:
            raise UnsupportedError(f"structure={recipe!r} takes several passes over the data: fit it by estimate(...)")
    if not structures or isinstance(structures, str):
        raise ArgumentError(f'structures={structures!r}; expected several of them, e.g. ("diag", "kron")')
    if kind == "hessian":
        raise UnsupportedError('kind="hessian" is no sum of outer products: fit it by estimate(...)')
    family = resolve(likelihood)
    share_of(data, None, None)
    warn_if_unsteady(data)
    data, first = peek(data)
    adapter = resolve_adapter(batch)
    network = (
        model if isinstance(model, Network) else Network(model, select=select, batch=batch, example=adapter(first)[0])
    ).reading(family.output_axis)
    example = network.batch(first)[0]
    with network.session():
        layout = plan(network, example, bias)
    if isinstance(family, Gaussian) and family.noise is None and layout.outputs > 1:
        raise UnsupportedError(
            "an open noise needs the curvature of each output alone: fix it, bdl.Gaussian(noise=...), or fit "
            "the structures one by one"
        )
    wide = dtype or torch.promote_types(network.dtype or torch.float32, torch.float32)
    found = [empty(recipe, layout, wide, network.device) for recipe in structures]
    if generator is None and kind == "mc":  # the global state is the user's
        generator = torch.Generator(network.device).manual_seed(0)
    # cotangents that suffice for a structure which separates the outputs would not for the others
    order = sorted(range(len(found)), key=lambda i: found[i].separates_outputs)
    lead, *others = (found[i] for i in order)
    tally = Tally(network, lead, family, kind, samples, generator, wide, memory, others=others)
    source = batches(
        network, data, progress=progress, describe="curvature", allow_partial=allow_partial, example=example
    )
    with network.session():
        for number, inputs, target in source:
            tally.add(number, inputs, target)
    tally.result()
    for curvature in found:
        check_curvature(curvature)
    return tuple(found)
