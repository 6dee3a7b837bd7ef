"""Several chains of one process in step: one vectorised forward and backward pass for all of them.

Each chain keeps its own noise, minibatches and collector, so that it is the chain it would be alone, up to the rounding
of batched products. Samplers whose step is elementwise move all chains in one step, the others each its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from bayesdl.batch import Call, batch_size
from bayesdl.clone import independent_copy
from bayesdl.data import in_batch
from bayesdl.errors import BayesDLError, NonFiniteError, ShapeError, UnsupportedError
from bayesdl.methods.chains import Job, Live, build_sampler, diverged, finish, scalar_precision, start
from bayesdl.methods.energy import prepare_module
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers.noticing import StochasticForwardWarning
from bayesdl.samplers.stacked import Stacked

ELEMENTWISE = ("sgld", "sghmc", "baoab")  # samplers without a number that all weights of a chain share


def unbatchable(job: Job) -> str:
    """Why the chains of a job cannot share their passes; empty where they can."""
    if job.settings.structured:
        return 'sampler "structured" takes several passes a step'
    if job.settings.store is not None:
        return "chains with a store go on from different steps"
    module = independent_copy(job.module, job.names)
    pairs, _ = prepare_module(module, job.names)
    kinds = {(parameter.dtype, parameter.device) for _, parameter in pairs}
    if len(kinds) > 1:
        return f"its parameters have {len(kinds)} dtypes or devices, and share one piece of memory"
    moving = [n for n, m in module.named_modules() if m.training and isinstance(m, _BatchNorm)]
    if moving:
        return f"batch norm {moving[0]!r} would write the statistics of all chains into one"
    return ""


def run_batched(jobs: Sequence[Job]) -> list[SamplePosterior]:
    """Run the chains of one process together.

    Raises:
        NonFiniteError: a chain diverged; the message names chain and step.
        ShapeError: the loader's batches differ in size from chain to chain.
    """
    with quiet():
        chains = start_together(jobs)
        total = chains.lives[0].total
        for step in tqdm(range(total), desc=f"{len(jobs)} chains", disable=not jobs[0].progress, leave=False):
            step_together(chains, step)
        return [finish(job, live) for job, live in zip(jobs, chains.lives, strict=True)]


@contextmanager
def quiet(unvectorised: Literal["ignore", "error"] = "ignore") -> Iterator[None]:
    """Without warnings of what findings say, and of operations that torch runs chain by chain under vmap."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StochasticForwardWarning)
        warnings.filterwarnings(unvectorised, message="There is a performance drop")
        yield


@final
@dataclass(frozen=True)
class Together:
    """Chains under way in one piece of memory.

    Attributes:
        jobs, lives: of the chains.
        weights: `(chains, P)`; the chains' parameters are views of its rows, in the order of their names.
        stacked: moves all of them in one step; None where each chain's sampler has to move its own.
    """

    jobs: tuple[Job, ...]
    lives: tuple[Live, ...]
    weights: nn.Parameter
    stacked: Stacked | None


def start_together(jobs: Sequence[Job]) -> Together:
    """The chains at their starts."""
    lives = [start(job) for job in jobs]
    weights = nn.Parameter(torch.stack([_flat([p.detach() for _, p in live.pairs]) for live in lives]))
    for live, row in zip(lives, weights.detach(), strict=True):
        for (_, parameter), piece in zip(live.pairs, _pieces(row, live), strict=True):
            parameter.data = piece  # of private copies
    stacked = None
    if _elementwise(jobs[0]):
        leader = build_sampler(jobs[0], [("chains", weights)])
        sizes = [parameter.numel() for _, parameter in lives[0].pairs]
        stacked = Stacked(leader, [live.sampler for live in lives], weights, sizes)
    return Together(tuple(jobs), tuple(lives), weights, stacked)


def step_together(chains: Together, step: int) -> None:
    """One step of every chain.

    Raises:
        NonFiniteError: a chain diverged.
        ShapeError: the chains' batches differ in size.
        UnsupportedError: the network cannot be vectorised over its weights.
    """
    found = [next(live.source) for live in chains.lives]
    sizes = {batch_size(inputs) for _, inputs, _ in found}
    if len(sizes) > 1:
        raise ShapeError(
            f"step {step}: the chains' batches have sizes {sorted(sizes)}, and one pass for all needs equal ones; use "
            'parallel="sequential"'
        )
    gradients = _gradients(chains, found)
    if chains.stacked is None:
        _step_apart(chains, gradients, found, step)
    else:
        try:
            chains.stacked.step(gradients)
        except NonFiniteError:
            _step_apart(chains, gradients, found, step)  # says which chain and parameter it was
            raise
    for live in chains.lives:
        live.after()


def _step_apart(chains: Together, gradients: Tensor, found: Sequence[tuple[int, Any, Any]], step: int) -> None:
    for job, live, row, (number, _, _) in zip(chains.jobs, chains.lives, gradients, found, strict=True):
        for (_, parameter), piece in zip(live.pairs, _pieces(row, live), strict=True):
            parameter.grad = piece
        try:
            with in_batch(number):
                live.sampler.step()
        except NonFiniteError as error:
            raise diverged(job, step, error) from error


def _elementwise(job: Job) -> bool:
    """Whether a step of one weight depends on no other's, by the sampler nor by the prior."""
    adapts = job.settings.options.get("adapt", False)
    return job.settings.kind in ELEMENTWISE and not adapts and scalar_precision(job.prior) is not None


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _pieces(row: Tensor, live: Live) -> list[Tensor]:
    """One chain's `(P,)`, by parameter."""
    shapes = [parameter.shape for _, parameter in live.pairs]
    parts = row.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _gradients(chains: Together, found: Sequence[tuple[int, Any, Any]]) -> Tensor:
    """Gradients of the minibatch losses, `(chains, P)`."""
    lives, job = chains.lives, chains.jobs[0]
    first = lives[0]
    names = [name for name, _ in first.pairs]
    likelihood, factor = job.energy.likelihood, job.energy.num_batches / job.energy.counted
    calls = [live.network.prepare(inputs) for live, (_, inputs, _) in zip(lives, found, strict=True)]
    with torch.no_grad(), in_batch(found[0][0]):  # what the targets of every chain are checked against
        outputs = likelihood.check_outputs(first.network.forward(first.module, calls[0]))
    targets = []
    for number, _, target in found:
        with in_batch(number):
            targets.append(likelihood.check_targets(outputs, target))
    inputs = tuple(_stacked([call.args[i] for call in calls]) for i in range(len(calls[0].args)))
    named = {key: _stacked([dict(call.kwargs or {})[key] for call in calls]) for key in calls[0].kwargs or {}}

    def loss(row: Tensor, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
        tensors = dict(zip(names, _pieces(row, first), strict=True))
        value = likelihood.log_prob(first.network.forward(first.module, Call(args, kwargs), tensors), y)
        return -value.sum() * factor

    with torch.enable_grad():
        slope = torch.func.vmap(torch.func.grad(loss), randomness="error")
        try:
            gradients: Tensor = slope(chains.weights.detach(), inputs, named, torch.stack(targets))
        except (BayesDLError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # torch has no narrower class for what vmap refuses
            raise UnsupportedError(
                f'the network cannot be vectorised over its weights, use parallel="sequential": {error}'
            ) from error
    return gradients


def _stacked(values: Sequence[Any]) -> Tensor:
    if not all(isinstance(value, Tensor) for value in values):
        raise UnsupportedError(
            f"the network takes a {type(values[0]).__name__} as an input, which cannot be stacked over chains; use "
            'parallel="sequential"'
        )
    return torch.stack(list(values))
