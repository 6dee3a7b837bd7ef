"""Passes over the data: curvature of the log-likelihood, and the statistics that go with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter, batch_size, flatten_tensors, index_batch, resolve_adapter
from bayesdl.curvature.factors import layer_factors
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import STRUCTURES, Recipe, check_recipe, first, following
from bayesdl.curvature.structure import Structure
from bayesdl.data import batches, in_batch
from bayesdl.errors import ArgumentError, NumericalError, UnknownNameError
from bayesdl.likelihoods import Gaussian, Likelihood, resolve
from bayesdl.network import Network, first_inputs
from bayesdl.select import Selector

__all__ = [
    "CURVATURE_KINDS",
    "STRUCTURES",
    "Fit",
    "chunk_size",
    "chunks",
    "cotangent_rule",
    "estimate",
    "fit_curvature",
]

CURVATURE_KINDS = ("ggn", "mc", "empirical")

# bytes of activations and gradients alive at once
DEFAULT_MEMORY = 512 << 20
# on a CPU smaller chunks stay near the caches (a quarter faster on an MLP), down to a batch that convolutions need
NEAR_CACHE, FEWEST = 32 << 20, 256


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
        fit, absolute = _pass(network, into, source, likelihood, kind, samples, generator, dtype, memory)
        _check(fit.curvature)
        return fit, absolute

    fit, _ = one_pass(first(structure, layout, dtype, network.device, rank))
    while (into := following(structure, fit.curvature)) is not None:
        before, (fit, absolute) = fit, one_pass(into)
        _check_same_data(before, fit, absolute, network.dtype or torch.float32)
    return fit


def _pass(
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


def cotangent_rule(
    likelihood: Likelihood, kind: str, samples: int = 1, generator: torch.Generator | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """`(f, y) -> V (K, B, C)` with curvature sum_n J_n^T V_n V_n^T J_n.

    Raises:
        UnknownNameError: no such kind.
    """
    if kind == "ggn":
        return lambda f, y: likelihood.hessian_root(f)
    if kind == "empirical":
        return lambda f, y: likelihood.score(f, y).unsqueeze(0)
    if kind == "mc":
        if samples < 1:
            raise ArgumentError(f"samples={samples}; the Monte Carlo Fisher needs at least one draw per example")

        source = generator

        def drawn(f: Tensor, y: Tensor) -> Tensor:
            nonlocal source
            if source is None:  # the global state is the user's
                source = torch.Generator(f.device).manual_seed(0)
            targets = likelihood.sample(f, samples, source)
            return torch.stack([likelihood.score(f, t) for t in targets]) / samples**0.5

        return drawn
    raise UnknownNameError(f"kind {kind!r} is not known; choose one of {CURVATURE_KINDS}")


def chunk_size(
    layout: Layout,
    structure: str | Structure,
    dtype: torch.dtype,
    *,
    width: int | None = None,
    memory: int | None = None,
    device: torch.device | None = None,
) -> int:
    """Examples per chunk so that what lives at once stays within `memory` bytes.

    Args:
        layout: counts activations, outputs and parameters without a closed form.
        structure: "full" forms whole Jacobian rows; other structures say for which blocks they do.
        dtype: of the factors.
        width: cotangents K; default one per output.
        memory: bytes; default `DEFAULT_MEMORY`, and on a CPU less where that is faster.
        device: where it all happens; default a CPU.
    """
    names = structure.whole_blocks() if isinstance(structure, Structure) else frozenset()
    whole = [b.numel for b in layout.blocks if structure == "full" or b.kind == "dense" or b.name in names]
    scalars = (3 * layout.activations + 2 * sum(whole)) * (width or layout.outputs)
    example = max(1, scalars) * torch.finfo(dtype).bits // 8
    most = max(1, (memory or DEFAULT_MEMORY) // example)
    if memory is not None or (device is not None and device.type != "cpu"):
        return most
    return min(most, max(FEWEST, NEAR_CACHE // example))


def chunks(inputs: Any, target: Any, step: int) -> Iterator[tuple[Any, Any]]:
    """A batch in pieces of at most `step` examples."""
    tensors, _ = flatten_tensors(inputs)
    if not tensors or batch_size(inputs) <= step:
        yield inputs, target
        return
    size = batch_size(inputs)
    for start in range(0, size, step):
        piece = slice(start, min(start + step, size))
        yield index_batch(inputs, piece), None if target is None else target[piece]


def _check(curvature: Structure) -> None:
    if curvature.is_zero():
        raise NumericalError(
            "the curvature is exactly zero: the likelihood is flat at these outputs (saturated logits?), "
            "or the selected parameters have no influence on this data"
        )


def _check_same_data(before: Fit, after: Fit, absolute: float, dtype: torch.dtype) -> None:
    """Raise unless two passes agree in count and, up to rounding, in loss."""
    slack = min(1e3 * torch.finfo(dtype).eps, 0.05) * (absolute + after.num_data)
    if before.num_data != after.num_data or not abs(before.log_likelihood - after.log_likelihood) <= slack:
        raise ArgumentError(
            "this structure takes several passes over the same data, and two passes of the loader differ: "
            f"{before.num_data} examples with log-likelihood {before.log_likelihood:.6g}, then {after.num_data} with "
            f'{after.log_likelihood:.6g}. Switch random augmentation off, or use structure="kron", which takes one pass'
        )
