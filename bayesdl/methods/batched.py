"""Several chains of one process in step: one vectorised forward and backward pass for all of them.

Each chain keeps its own sampler, noise, minibatches and collector, so that it is the chain it would be alone, up to the
rounding of batched products; only the gradients are computed together.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from bayesdl.batch import Call, batch_size
from bayesdl.clone import independent_copy
from bayesdl.data import in_batch
from bayesdl.errors import BayesDLError, NonFiniteError, ShapeError, UnsupportedError
from bayesdl.methods.chains import Job, Live, diverged, finish, start
from bayesdl.methods.energy import prepare_module
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers.noticing import StochasticForwardWarning


def unbatchable(job: Job) -> str:
    """Why the chains of a job cannot share their passes; empty where they can."""
    if job.settings.structured:
        return 'sampler "structured" takes several passes a step'
    if job.settings.store is not None:
        return "chains with a store go on from different steps"
    module = independent_copy(job.module)
    prepare_module(module, job.names)
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StochasticForwardWarning)  # a finding says it
        lives = start_together(jobs)
        total = lives[0].total
        for step in tqdm(range(total), desc=f"{len(jobs)} chains", disable=not jobs[0].progress, leave=False):
            step_together(jobs, lives, step)
        return [finish(job, live) for job, live in zip(jobs, lives, strict=True)]


def start_together(jobs: Sequence[Job]) -> list[Live]:
    """The chains at their starts, the weights of all in one piece of memory, `(chains, *shape)` for each parameter."""
    lives = [start(job) for job in jobs]
    for pairs in zip(*(live.pairs for live in lives), strict=True):
        held = torch.stack([parameter.detach() for _, parameter in pairs])
        for (_, parameter), row in zip(pairs, held, strict=True):
            parameter.data = row  # of private copies
    return lives


def step_together(jobs: Sequence[Job], lives: Sequence[Live], step: int) -> None:
    """One step of every chain, from `start_together`.

    Raises:
        NonFiniteError: a chain diverged.
        ShapeError: the chains' batches differ in size.
        UnsupportedError: the network cannot be vectorised over its weights.
    """
    found = [next(live.source) for live in lives]
    sizes = {batch_size(inputs) for _, inputs, _ in found}
    if len(sizes) > 1:
        raise ShapeError(
            f"step {step}: the chains' batches have sizes {sorted(sizes)}, and one pass for all needs equal ones; use "
            'parallel="sequential"'
        )
    gradients = _gradients(jobs[0], lives, found)
    for c, (job, live) in enumerate(zip(jobs, lives, strict=True)):
        for name, parameter in live.pairs:
            parameter.grad = gradients[name][c]
        try:
            with in_batch(found[c][0]):
                live.sampler.step()
        except NonFiniteError as error:
            raise diverged(job, step, error) from error
        live.after()


def _gradients(job: Job, lives: Sequence[Live], found: Sequence[tuple[int, Any, Any]]) -> dict[str, Tensor]:
    """Gradients of the minibatch losses, `(chains, *shape)` by name."""
    first = lives[0]
    likelihood, factor = job.energy.likelihood, job.energy.num_batches / job.energy.counted
    calls = [live.network.prepare(inputs) for live, (_, inputs, _) in zip(lives, found, strict=True)]
    with torch.no_grad(), in_batch(found[0][0]):  # what the targets of every chain are checked against
        outputs = likelihood.check_outputs(first.network.forward(first.module, calls[0]))
    targets = []
    for number, _, target in found:
        with in_batch(number):
            targets.append(likelihood.check_targets(outputs, target))
    weights = {name: _joined(parameter, len(lives)) for name, parameter in first.pairs}
    inputs = tuple(_stacked([call.args[i] for call in calls]) for i in range(len(calls[0].args)))
    named = {key: _stacked([dict(call.kwargs or {})[key] for call in calls]) for key in calls[0].kwargs or {}}

    def loss(tensors: dict[str, Tensor], args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
        value = likelihood.log_prob(first.network.forward(first.module, Call(args, kwargs), tensors), y)
        return -value.sum() * factor

    with torch.enable_grad():
        slope = torch.func.vmap(torch.func.grad(loss), randomness="error")
        try:
            gradients: dict[str, Tensor] = slope(weights, inputs, named, torch.stack(targets))
        except (BayesDLError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # torch has no narrower class for what vmap refuses
            raise UnsupportedError(
                f'the network cannot be vectorised over its weights, use parallel="sequential": {error}'
            ) from error
    return gradients


def _joined(first: Tensor, count: int) -> Tensor:
    """The rows of all chains, from the first one's: see `start_together`."""
    return first.detach().as_strided((count, *first.shape), (first.numel(), *first.stride()))


def _stacked(values: Sequence[Any]) -> Tensor:
    if not all(isinstance(value, Tensor) for value in values):
        raise UnsupportedError(
            f"the network takes a {type(values[0]).__name__} as an input, which cannot be stacked over chains; use "
            'parallel="sequential"'
        )
    return torch.stack(list(values))
