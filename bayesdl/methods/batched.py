"""Several chains of one process in step: one vectorised forward and backward pass for all of them.

Each chain keeps its own noise, minibatches, numbers and collector, so that it is the chain it would be alone, up to the
rounding of batched products. Where the prior is the same for every weight, one step of one matrix moves them all.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from bayesdl.batch import Call
from bayesdl.clone import independent_copy
from bayesdl.data import in_batch
from bayesdl.errors import BayesDLError, NonFiniteError, UnreachedParameterError, UnsupportedError
from bayesdl.methods.chains import Job, Live, build_sampler, diverged, finish, scalar_precision, start
from bayesdl.methods.energy import prepare_module
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers.noticing import StochasticForwardWarning
from bayesdl.samplers.stacked import Stacked

Minibatch = tuple[int, Any, Any]  # number in its pass, inputs, target


def unbatchable(job: Job) -> str:
    """Why the chains of a job cannot share their passes; empty where they can."""
    if job.settings.structured:
        return 'sampler "structured" takes several passes a step'
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
    """Run the chains of one process together, from their starts or from what their stores hold.

    Raises:
        NonFiniteError: a chain diverged; the message names chain and step.
    """
    with quiet():
        chains = start_together(jobs)
        first, total = min(live.done for live in chains.lives), chains.lives[0].total
        bar = tqdm(
            range(first, total), desc=f"{len(jobs)} chains", initial=first, disable=not jobs[0].progress, leave=False
        )
        for step in bar:
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
@dataclass
class Together:
    """Chains under way in one piece of memory.

    Attributes:
        jobs, lives: of the chains.
        weights: `(chains, P)`; the chains' parameters are views of its rows, in the order of their names.
        stacked: moves all of them in one step; None while, or where, each chain's sampler has to move its own.
        outputs: of the first chain, by the shapes of a batch: what targets of such batches are checked against.
    """

    jobs: tuple[Job, ...]
    lives: tuple[Live, ...]
    weights: nn.Parameter
    stacked: Stacked | None = None
    outputs: dict[Any, Tensor] = field(default_factory=dict)


def start_together(jobs: Sequence[Job]) -> Together:
    """The chains at their starts, or where their stores left them."""
    lives = [start(job) for job in jobs]
    weights = nn.Parameter(torch.stack([_flat([p.detach() for _, p in live.pairs]) for live in lives]))
    for live, row in zip(lives, weights.detach(), strict=True):
        for (_, parameter), piece in zip(live.pairs, _pieces(row, live), strict=True):
            parameter.data = piece  # of private copies
    return Together(tuple(jobs), tuple(lives), weights)


def step_together(chains: Together, step: int) -> None:
    """One step of every chain that has not made it before: those of a store may have come further.

    The others' rows are in the pass too, and left where they are, because the number of rows decides how products are
    rounded: a run goes on bit for bit.

    Raises:
        NonFiniteError: a chain diverged.
        UnsupportedError: the network cannot be vectorised over its weights.
    """
    active = [number for number, live in enumerate(chains.lives) if live.done <= step]
    own = {number: next(chains.lives[number].source) for number in active}
    found = [own.get(number, own[active[0]]) for number in range(len(chains.lives))]
    gradients = _gradients(chains, found, step)
    if len(active) == len(chains.lives) and chains.stacked is None:
        chains.stacked = _stacked_sampler(chains)
    if chains.stacked is None:
        _step_apart(chains, gradients, own, step)
    else:
        try:
            chains.stacked.step(gradients)
        except NonFiniteError:
            _step_apart(chains, gradients, own, step)  # says which chain and parameter it was
            raise
    for number in active:
        chains.lives[number].after()


def _stacked_sampler(chains: Together) -> Stacked | None:
    """A sampler of all chains; None where their prior is not the same for every weight."""
    job, lives = chains.jobs[0], chains.lives
    if scalar_precision(job.prior) is None:
        return None
    leader = build_sampler(replace(job, squares=None), [("chains", chains.weights)])
    sizes = [parameter.numel() for _, parameter in lives[0].pairs]
    return Stacked(leader, [live.sampler for live in lives], chains.weights, sizes)


def _step_apart(chains: Together, gradients: Tensor, own: dict[int, Minibatch], step: int) -> None:
    for number, minibatch in own.items():
        live = chains.lives[number]
        for (_, parameter), piece in zip(live.pairs, _pieces(gradients[number], live), strict=True):
            parameter.grad = piece
        try:
            with in_batch(minibatch[0]):
                live.sampler.step()
        except NonFiniteError as error:
            raise diverged(chains.jobs[number], step, error) from error


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _pieces(row: Tensor, live: Live) -> list[Tensor]:
    """One chain's `(P,)`, by parameter."""
    shapes = [parameter.shape for _, parameter in live.pairs]
    parts = row.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _gradients(chains: Together, found: Sequence[Minibatch], step: int) -> Tensor:
    """Gradients of the minibatch losses, `(chains, P)`."""
    lives, job = chains.lives, chains.jobs[0]
    first = lives[0]
    names = [name for name, _ in first.pairs]
    likelihood, factor = job.energy.likelihood, job.energy.num_batches / job.energy.counted
    calls = [live.network.prepare(inputs) for live, (_, inputs, _) in zip(lives, found, strict=True)]
    shapes = {_shapes(call, target) for call, (_, _, target) in zip(calls, found, strict=True)}
    if len(shapes) > 1:  # padded to the longest of a batch, for example
        return _gradients_apart(chains, found, step)
    (shape,) = shapes
    if shape not in chains.outputs:
        chains.outputs[shape] = _first_outputs(chains, found[0])
    targets = []
    for number, _, target in found:
        with in_batch(number):
            targets.append(likelihood.check_targets(chains.outputs[shape], target))
    inputs = tuple(torch.stack([call.args[i] for call in calls]) for i in range(len(calls[0].args)))
    named = {key: torch.stack([(call.kwargs or {})[key] for call in calls]) for key in calls[0].kwargs or {}}

    def loss(row: Tensor, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> tuple[Tensor, Any]:
        tensors = dict(zip(names, _pieces(row, first), strict=True))
        f = first.network.forward(first.module, Call(args, kwargs), tensors)
        f = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
        value = likelihood.log_prob(f, y).sum()
        return -value * factor, (f.detach(), value.detach())

    with torch.enable_grad():
        slope = torch.func.vmap(torch.func.grad(loss, has_aux=True), randomness="error")
        try:
            gradients, (outputs, values) = slope(chains.weights.detach(), inputs, named, torch.stack(targets))
        except (BayesDLError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # torch has no narrower class for what vmap refuses
            raise UnsupportedError(
                f'the network cannot be vectorised over its weights, use parallel="sequential": {error}'
            ) from error
    if not bool(torch.isfinite(values).all()):
        _name_divergence(chains, found, outputs, values, step)
    whole: Tensor = gradients
    return whole


def _gradients_apart(chains: Together, found: Sequence[Minibatch], step: int) -> Tensor:
    """Chain by chain: their batches cannot be stacked."""
    rows = []
    for job, live, (number, inputs, target) in zip(chains.jobs, chains.lives, found, strict=True):
        try:
            with in_batch(number), torch.enable_grad():
                loss = job.energy.loss(live.network, live.module, inputs, target)
        except NonFiniteError as error:
            raise diverged(job, step, error) from error
        rows.append(_flat(_reached(job, live, loss)))
    return torch.stack(rows)


def _first_outputs(chains: Together, minibatch: Minibatch) -> Tensor:
    """Outputs of the first chain; checks once that they, and the loss, are what a chain alone would accept."""
    job, live, (number, inputs, target) = chains.jobs[0], chains.lives[0], minibatch
    with in_batch(number), torch.enable_grad():
        outputs = job.energy.likelihood.check_outputs(live.network.forward(live.module, live.network.prepare(inputs)))
        checked = job.energy.likelihood.check_targets(outputs, target)
        _reached(job, live, job.energy.likelihood.log_prob(outputs, checked).sum())
    return outputs.detach()


def _reached(job: Job, live: Live, loss: Tensor) -> list[Tensor]:
    """Gradients of one chain's parameters; vmap has zeros for those that the loss does not depend on."""
    parameters = [parameter for _, parameter in live.pairs]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for (name, parameter), grad in zip(live.pairs, found, strict=True):
        if grad is None and not job.settings.options.get("allow_unused", False):
            raise UnreachedParameterError(
                f"parameter {name!r} of shape {tuple(parameter.shape)} has no gradient: leave it out of the chain "
                '(select=), or pass options={"allow_unused": True} to run it on its prior alone'
            )
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found, strict=True)]


def _name_divergence(chains: Together, found: Sequence[Minibatch], outputs: Tensor, values: Tensor, step: int) -> None:
    """Raise for the first chain whose log-likelihood is not finite, in the words of a chain alone."""
    for job, minibatch, f, value in zip(chains.jobs, found, outputs, values, strict=True):
        try:
            with in_batch(minibatch[0]):
                job.energy.likelihood.check_outputs(f)
                if not bool(torch.isfinite(value)):
                    raise NonFiniteError("the log-likelihood is NaN or infinite")
        except NonFiniteError as error:
            raise diverged(job, step, error) from error


def _shapes(call: Call, target: Any) -> tuple[Any, ...]:
    """Shapes and dtypes of a batch; raises `UnsupportedError` unless all of it is tensors."""
    parts: dict[Any, Any] = {**dict(enumerate(call.args)), **(call.kwargs or {}), "target": target}
    for value in parts.values():
        if not isinstance(value, Tensor):
            raise UnsupportedError(
                f"the network takes a {type(value).__name__} as an input, which cannot be stacked over chains; use "
                'parallel="sequential"'
            )
    return tuple((key, value.shape, value.dtype) for key, value in parts.items())
