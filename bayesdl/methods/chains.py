"""Running chains on private copies of a network: one after another, in processes, over a process group."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from bayesdl.batch import BatchAdapter
from bayesdl.clone import independent_copy
from bayesdl.data import in_batch
from bayesdl.distributed import Group, together
from bayesdl.errors import NonFiniteError
from bayesdl.methods.energy import Energy, prepare_module
from bayesdl.methods.stream import DATA, INIT, NOISE, chain_generator, endless
from bayesdl.network import Network, OutputAxis
from bayesdl.posteriors import SamplePosterior
from bayesdl.priors import GaussianPrior, Prior
from bayesdl.samplers import SAMPLERS, Cyclical, Sampler, Structured
from bayesdl.samplers.noticing import StochasticForwardWarning

if TYPE_CHECKING:
    from bayesdl.methods.sgmcmc import SGMCMC
    from bayesdl.samplers.chain import Chain


@final
@dataclass(frozen=True)
class Job:
    """One chain, complete: what a process of its own is sent.

    Attributes:
        settings: the method.
        module: the network to start from; every run copies it.
        names: parameters that move.
        batch, output_axis: of the network.
        data: loader.
        energy: the negative log-likelihood.
        prior: over the named parameters.
        lr: learning rate.
        burn_in, thin: in steps.
        squares: mean squared gradients by name that a preconditioner starts from; None without one.
        base: base seed of all chains.
        chain: number of this one.
        progress: show a bar.
        together: all chains in one batched pass a step, see `bayesdl.methods.batched`.
    """

    settings: SGMCMC
    module: nn.Module
    names: tuple[str, ...]
    batch: BatchAdapter
    output_axis: OutputAxis
    data: Iterable[Any]
    energy: Energy
    prior: Prior
    lr: float
    burn_in: int
    thin: int
    squares: Mapping[str, Tensor] | None
    base: int
    chain: int
    progress: bool
    together: bool = False


def run(job: Job) -> SamplePosterior:
    """Run one chain from its start, or from what its store holds, to its last sample.

    Raises:
        NonFiniteError: the chain diverged; the message names chain and step.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StochasticForwardWarning)  # a finding says it
        return _run(job)


@dataclass
class Live:
    """A chain under way: what a step needs.

    Attributes:
        network: view of the module for adapter and outputs.
        module: the private copy that moves.
        pairs: its moving parameters by name.
        sampler, schedule, structured: what moves them.
        chain: what collects; None for structured ones, which draw at the end.
        source: minibatches.
        done, total: steps made before, and in all.
    """

    network: Network
    module: nn.Module
    pairs: list[tuple[str, nn.Parameter]]
    sampler: Sampler
    schedule: Cyclical | None
    structured: Structured | None
    chain: Chain | None
    source: Iterator[tuple[int, Any, Any]]
    done: int
    total: int

    def after(self) -> None:
        """What follows a step of the sampler."""
        if self.schedule is not None:
            self.schedule.step()
        if self.chain is not None:
            self.chain.step(self.schedule is None or self.schedule.sampling)


def start(job: Job) -> Live:
    """Build a chain at its start, or where its store left it."""
    from bayesdl.samplers.chain import Chain  # with its files: only where a chain runs

    settings = job.settings
    network = Network(job.module, select=list(job.names), batch=job.batch, output_axis=job.output_axis)
    module = independent_copy(job.module, job.names)
    pairs, _ = prepare_module(module, job.names)
    if settings.start == "prior":
        drawn = job.prior.sample(dict(pairs), chain_generator(job.base, job.chain, INIT))
        with torch.no_grad():
            for name, parameter in pairs:
                parameter.copy_(drawn[name])
    sampler = build_sampler(job, pairs)
    total, thin, burn_in = job.burn_in + settings.num_samples * job.thin, job.thin, job.burn_in
    schedule: Cyclical | None = None
    if settings.cyclical:
        cycle, explore, thin = cycle_of(total, settings.cycles, settings.num_samples, settings.explore)
        schedule, burn_in = Cyclical(sampler, cycle, settings.cycles, explore), 0
        total = schedule.total
    structured, chain, done = _structured(job, sampler, burn_in, thin), None, 0
    if structured is None:
        store = None if settings.store is None else Path(settings.store) / f"chain-{job.chain:04d}"
        wide = any(parameter.dtype is torch.float64 for _, parameter in pairs)
        chain = Chain(
            module,
            burn_in,
            thin,
            sampler=schedule or sampler,
            store=store,
            dtype="float64" if wide else "float32",
            chain_id=job.chain,
        )
        if store is not None and chain.resume():
            done = chain.steps
    source = endless(network, job.data, job.base, job.chain, start=done, length=job.energy.num_batches)
    return Live(network, module, pairs, sampler, schedule, structured, chain, source, done, total)


def finish(job: Job, live: Live) -> SamplePosterior:
    """The samples of a chain that has made its steps."""
    if live.structured is not None:
        return _drawn(live.structured, live.module, job)
    assert live.chain is not None
    live.chain.close()
    found = live.chain.posterior()
    values = {**found.snapshots}
    for name, buffer in _moving_buffers(live.module).items():  # a chain may have found them unchanged
        values.setdefault(name, buffer.detach().expand(len(found), *buffer.shape).clone())
    return replace(found, snapshots={name: values[name] for name in sorted(values)})


def diverged(job: Job, step: int, error: NonFiniteError) -> NonFiniteError:
    """The error with chain and step named; as it is at the first step, where nothing has moved."""
    if not step:
        return error
    return NonFiniteError(f"chain {job.chain} diverged at step {step}: {error}; lower lr (it is {job.lr:g})")


def _run(job: Job) -> SamplePosterior:
    live = start(job)
    label = f"chain {job.chain + 1}/{job.settings.chains}"
    for step in tqdm(range(live.done, live.total), desc=label, disable=not job.progress, leave=False):
        advance(job, live, step)
    return finish(job, live)


def advance(job: Job, live: Live, step: int) -> None:
    """One step of one chain.

    Raises:
        NonFiniteError: it diverged.
    """
    number, inputs, target = next(live.source)
    try:
        with in_batch(number), torch.enable_grad():
            if live.structured is not None:

                def loss_fn(values: Mapping[str, Tensor]) -> Tensor:
                    return job.energy.loss(live.network, live.module, inputs, target, values)

                live.structured.step(loss_fn)
            else:
                live.sampler.zero_grad(set_to_none=True)
                job.energy.loss(live.network, live.module, inputs, target).backward()
                live.sampler.step()
    except NonFiniteError as error:
        raise diverged(job, step, error) from error
    live.after()


def build_sampler(job: Job, pairs: list[tuple[str, nn.Parameter]]) -> Sampler:
    """The sampler of a chain over (name, parameter) pairs."""
    settings, kind = job.settings, job.settings.kind
    options: dict[str, Any] = dict(settings.options)
    if kind in ("sghmc", "baoab", "sgnht"):
        options.setdefault("momentum", settings.momentum)
    if kind == "psgld":
        options.setdefault("freeze_after", max(1, job.burn_in))
    precision = scalar_precision(job.prior)
    options |= {"prior": job.prior} if precision is None else {"prior_precision": precision}
    make: Any = SAMPLERS[kind]
    made: Sampler = make(
        pairs,
        job.lr,
        job.energy.num_data,
        temperature=settings.temperature,
        generator=chain_generator(job.base, job.chain, NOISE),
        **options,
    )
    if job.squares is not None:
        for name, parameter in pairs:
            made.state[parameter]["square"] = job.squares[name].to(parameter).clone()
    return made


def scalar_precision(prior: Prior) -> float | None:
    """Precision of a Gaussian prior around zero with one for all; None for other priors."""
    if not isinstance(prior, GaussianPrior):
        return None
    if isinstance(prior.precision, Mapping) or isinstance(prior.mean, Mapping):
        return None
    precision, mean = torch.as_tensor(prior.precision), torch.as_tensor(prior.mean)
    return float(precision) if precision.numel() == 1 and not bool(mean.any()) else None


def cycle_of(total: int, cycles: int, num_samples: int, explore: float) -> tuple[int, float, int]:
    """Steps a cycle, share of exploration, and steps between samples, for about `total` steps in all.

    Samples are spread evenly over the last 1 - explore of each cycle, at least one step apart, the last one at its end.
    """
    each = math.ceil(num_samples / cycles)
    cycle = max(total // cycles, each)
    thin = max(1, int((1 - explore) * cycle + 1e-9) // each)
    return cycle, (cycle - thin * each) / cycle, thin


def run_all(jobs: Sequence[Job], workers: int) -> list[SamplePosterior]:
    """One after another, or in `workers` new processes of one thread each; the same chains either way."""
    if len(jobs) > 1 and jobs[0].together:
        from bayesdl.methods.batched import run_batched

        return run_batched(jobs)
    if workers == 1 or len(jobs) == 1:
        return [run(job) for job in jobs]
    silent = [replace(job, progress=False) for job in jobs]
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        return [SamplePosterior.restore(*_unpacked(found)) for found in pool.map(_remote, silent)]


def run_shared(jobs: Sequence[Job], workers: int, group: Group | None) -> list[SamplePosterior]:
    """Process r of a group runs chains r, r + size, ...; all of them end with all chains."""
    if group is None:
        return run_all(jobs, workers)
    with together(group):
        mine = dict(
            zip(range(group.rank, len(jobs), group.size), run_all(jobs[group.rank :: group.size], workers), strict=True)
        )
    return [_from_owner(mine.get(i), jobs[i], group) for i in range(len(jobs))]


def _from_owner(mine: SamplePosterior | None, job: Job, group: Group) -> SamplePosterior:
    """A chain on every process, from the one that ran it."""
    held = {} if mine is None else {k: v for k, v in mine.tensors().items() if k != "chains"}
    size = group.largest([0 if mine is None else len(mine)])[0]
    if mine is None:
        module = independent_copy(job.module, job.names)
        prepare_module(module, job.names)
        own = dict(module.named_parameters())
        tensors = {**{name: own[name] for name in job.names}, **_moving_buffers(module)}
        held = {f"snapshot.{name}": torch.zeros(size, *v.shape).to(v) for name, v in tensors.items()}
        held["weights"] = torch.zeros(size)
    ordered = {name: held[name].clone() for name in sorted(held)}
    group.add(list(ordered.values()))
    return SamplePosterior.restore(ordered, {})


def _moving_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that a prepared module changes and a prediction uses: statistics of batch norm in training."""
    return {
        f"{name}.{key}" if name else key: value
        for name, layer in module.named_modules()
        if layer.training and isinstance(layer, _BatchNorm)
        for key, value in layer.named_buffers()
        if value.is_floating_point()
    }


def _structured(job: Job, sampler: Sampler, burn_in: int, thin: int) -> Structured | None:
    settings = job.settings
    if not settings.structured:
        return None
    return Structured(
        sampler,
        settings.groups,
        reservoir=settings.reservoir,
        thin=thin,
        burn_in=burn_in,
        live=settings.live,
        generator=chain_generator(job.base, job.chain, DATA),
    )


def _drawn(structured: Structured, module: nn.Module, job: Job) -> SamplePosterior:
    """Networks whose groups are drawn independently; buffers are those at the end of the chain."""
    buffers = {name: value.detach().clone() for name, value in _moving_buffers(module).items()}
    states = [{**structured.draw(), **buffers} for _ in range(job.settings.num_samples)]
    return SamplePosterior.from_states(states)


def _remote(job: Job) -> dict[str, Any]:
    # arrays: shared memory of tensors would have to outlive this process
    with torch.random.fork_rng(devices=[]):
        return {name: value.cpu().numpy() for name, value in run(job).tensors().items()}


def _unpacked(found: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {name: torch.from_numpy(value) for name, value in found.items()}, {}
