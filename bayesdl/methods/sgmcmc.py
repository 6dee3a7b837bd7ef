"""Stochastic-gradient MCMC: the loop around the samplers of `bayesdl.samplers`, on private copies of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from bayesdl.clone import independent_copy
from bayesdl.diagnose import Finding
from bayesdl.distributed import Group, resolve_group
from bayesdl.errors import ArgumentError, UnknownNameError, UnsupportedError
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.methods.chains import Job, build_sampler, run_shared, scalar_precision
from bayesdl.methods.energy import prepare_module, survey
from bayesdl.methods.parallel import PARALLEL, share_passes
from bayesdl.methods.stepsize import DIMENSIONLESS, check_stable, gradient_squares, largest_curvature
from bayesdl.methods.stream import INIT, chain_generator, check_steps, endless, repeatable
from bayesdl.network import Network
from bayesdl.posteriors import SamplePosterior
from bayesdl.priors import GaussianPrior
from bayesdl.samplers import SAMPLERS, SASGLD
from bayesdl.samplers.sa_sgld import time_factor
from bayesdl.select import Selector

AROUND = ("cyclical", "structured")  # names of schedules and wrappers, which go around `base`
STARTS = ("warm", "prior")
PSGLD_EPS = 1e-5  # its default


@final
@dataclass(frozen=True)
class SGMCMC(Method):
    """Samples of the posterior p(theta | data)^(1/T) by stochastic-gradient MCMC.

    `bdl.wrap(net, "sghmc", loader, likelihood=...)` is `bdl.SGMCMC("sghmc")`. The network is copied; dropout is off,
    batch norm keeps its statistics with each sample, and a minibatch of any size enters with the weight of its data.

    Args:
        sampler: "sgld", "sghmc", "baoab", "sgnht", "psgld", "sa-sgld", "entropy-mcmc", or "cyclical" and "structured",
            which go around `base`.
        lr: step on the mean loss, h = lr / N. None is 0.2 N / lambda_max, lambda_max the largest curvature of the
            potential at the start ("sa-sgld": with the step's factor there): no variance is inflated by more than 11 %.
        temperature: T; 1 is Bayes.
        momentum: of "sghmc", "baoab" and "sgnht".
        burn_in: steps before the first sample; None is half of those that follow.
        thin: steps between samples; None is one pass over the loader.
        num_samples: of each chain, at least 2.
        chains: number of chains; their random streams depend on their numbers alone.
        start: "warm", the network's own weights, or "prior", a draw from the prior for each chain. Draws of heavy tails
            (hierarchies of small shape) begin where a chain can stay for thousands of steps: start those warm.
        schedule: "cyclical" for learning rates in cycles around any sampler; None for a constant one. The steps of
            burn-in and samples together are cut into the cycles, and samples spread over their sampling phases.
        cycles, explore: of that schedule.
        base: sampler inside "cyclical" and "structured".
        groups, reservoir, live: of "structured"; see `bdl.samplers.Structured`.
        workers: processes that run chains, of one thread each. They are spawned: network and data must be picklable,
            and a script needs its `if __name__ == "__main__":`.
        parallel: how several chains of one process run: "sequential", one after another; "batched", one vectorised
            forward and backward pass a step for all (the same chains up to rounding, which grows with the steps);
            "fastest" times both for a few steps, on chains thrown away, takes the faster and says so in `diagnose()`.
            "auto" never looks at the clock, so that a seed fixes every bit: "batched" on a GPU, where small kernels
            wait for their launch, and on a CPU for at least four chains of a process whose weights and activations
            take at most 4 MiB each (`benchmarks/many_chains.py`) and 1 GiB together, if the network allows it;
            otherwise "sequential", whose chains are equal bit for bit whatever their number, `workers` and processes.
        store: folder in which each chain writes its samples as they come; see `bdl.Chain`. The same call after an
            interruption goes on from there, bit for bit, in the way that its chains began to run.
        options: further arguments of the sampler's constructor, such as `{"adapt": True}`.
        select: which parameters move; the others stay as they are.

    With `wrap(..., distributed=True)` process r of n runs chains r, r + n, ...; every process gets all samples.
    """

    sampler: str = "sghmc"
    lr: float | None = None
    temperature: float = 1.0
    momentum: float = 0.9
    burn_in: int | None = None
    thin: int | None = None
    num_samples: int = 32
    chains: int = 1
    start: str = "warm"
    schedule: str | None = None
    cycles: int = 4
    explore: float = 0.9
    base: str = "sghmc"
    groups: str | Sequence[Sequence[str]] | Callable[[str], Any] = "layer"
    reservoir: int = 32
    live: float | None = None
    workers: int = 1
    parallel: str = "auto"
    store: str | Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    select: Selector | None = None

    name: ClassVar[str] = "sgmcmc"
    trains: ClassVar[bool] = True
    distributed: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return self.sampler

    @property
    def kind(self) -> str:
        """Name of the sampler that moves the weights."""
        return self.base if self.sampler in AROUND else self.sampler

    @property
    def cyclical(self) -> bool:
        """Whether learning rates go in cycles."""
        return self.schedule == "cyclical" or self.sampler == "cyclical"

    @property
    def structured(self) -> bool:
        """Whether groups of weights are independent."""
        return self.sampler == "structured"

    def fit(self, task: Task) -> Fitted:
        self._check()
        data = task.need_data(self.label)
        if task.network.dtype in (torch.float16, torch.bfloat16):  # steps are smaller than their rounding
            model = independent_copy(task.models[0]).float()
            network = task.network.map(lambda t: t.float() if t.is_floating_point() else t)
        else:
            model, network = independent_copy(task.models[0], task.network.names), task.network
        group = resolve_group(task.distributed)
        base = _base_seed(task.generator, group)
        with repeatable(data, base):
            energy, findings = survey(task, data)
        prior = task.prior or GaussianPrior(1.0)
        if task.prior is None:
            findings = (*findings, Finding("info", "the prior is N(0, 1) on every weight", "pass prior=", "prior"))
        thin = energy.num_batches if self.thin is None else self.thin
        burn_in = (self.num_samples * thin + 1) // 2 if self.burn_in is None else self.burn_in
        _, said = prepare_module(independent_copy(model, task.network.names), task.network.names)
        job = Job(
            settings=self,
            module=model,
            names=task.network.names,
            batch=task.network.batch,
            output_axis=task.network.output_axis,
            data=data,
            energy=energy,
            prior=prior,
            lr=1.0,
            burn_in=burn_in,
            thin=thin,
            squares=None,
            base=base,
            chain=0,
            progress=task.progress,
        )
        job, chosen = self._with_step(job, network, group)
        jobs = [replace(job, chain=c) for c in range(self.chains)]
        shared, way = share_passes(jobs, group)
        jobs = [replace(one, together=shared) for one in jobs]
        posterior = pooled(run_shared(jobs, self.workers, group))
        steps = float((burn_in + self.num_samples * thin) * self.chains)
        return Fitted(
            posterior,
            energy.likelihood,
            (*findings, *said, *chosen, *way, *self._remarks(job)),
            cost=(("steps", steps), ("chains", float(self.chains)), ("lr", job.lr)),
        )

    def _with_step(self, job: Job, network: Network, group: Group | None) -> tuple[Job, tuple[Finding, ...]]:
        """The job with its learning rate (and the start of a preconditioner), checked against the curvature."""
        energy, generator = job.energy, chain_generator(job.base, 0, INIT)
        scales, stretch = None, 1.0  # preconditioner; factor of a step
        if self.kind in ("psgld", "sa-sgld"):
            module = independent_copy(job.module, job.names)
            pairs, _ = prepare_module(module, job.names)
            source = endless(network, job.data, job.base, 0)
            squares = gradient_squares(network, module, energy, pairs, source, group)
            if self.kind == "psgld":
                job = replace(job, squares=squares)
                eps = float(self.options.get("eps", PSGLD_EPS))
                scales = {name: 1 / (eps + value.sqrt()) for name, value in squares.items()}
            else:
                stretch = self._factor(job, sum(float(value.sum()) for value in squares.values()))
        try:
            with repeatable(job.data, job.base):
                largest = largest_curvature(network, energy, job.data, job.prior, generator, scales, group)
        except UnsupportedError as error:
            if self.lr is None:
                raise UnsupportedError(f"the step size cannot be chosen, pass lr=...: {error}") from error
            found = Finding("warning", f"the step size was not checked against the curvature: {error}")
            return replace(job, lr=self.lr), (found,)
        if self.kind == "entropy-mcmc":  # the coupling adds at most 2 / eta to the stiffest direction
            pairs, _ = prepare_module(independent_copy(job.module, job.names), job.names)
            sampler = build_sampler(replace(job, lr=0.0), pairs)
            largest += 2 / min(float(group["eta"]) for group in sampler.param_groups)
        lr = DIMENSIONLESS * energy.num_data / (largest * stretch) if self.lr is None else self.lr
        if not self.options.get("adapt"):  # whose steps are in the units of the gradients' scale
            check_stable(self.kind, self.momentum, lr * min(stretch, 1.0), energy.num_data, largest)
        said = "chosen from" if self.lr is None else "at"
        size = lr * stretch / energy.num_data * largest
        where = f" with psi = {stretch:.3g} as at the start" if self.kind == "sa-sgld" else ""
        text = f"lr {lr:.4g} {said} lambda_max {largest:.4g}: h lambda_max = {size:.3g}{where}"
        return replace(job, lr=lr), (Finding("info", text, topic="step size"),)

    def _factor(self, job: Job, square: float) -> float:
        """Factor of a step of "sa-sgld" whose monitor rests at a mean squared gradient norm; it falls from there."""
        pairs, _ = prepare_module(independent_copy(job.module, job.names), job.names)
        sampler = build_sampler(job, pairs)
        assert isinstance(sampler, SASGLD)
        zeta = square ** (sampler.s / 2) / (sampler.alpha * sampler.omega)
        psi = float(time_factor(zeta, sampler.smallest, sampler.largest, sampler.r))
        return psi * psi if sampler.underdamped else psi

    def _remarks(self, job: Job) -> tuple[Finding, ...]:
        bayes = "Bayes" if self.temperature == 1 else "the posterior to the power 1/T, not Bayes"
        action = "" if self.temperature == 1 else "temperature=1"
        precision = scalar_precision(job.prior)
        prior = repr(job.prior) if not precision else f"of precision {precision:g} (sd {precision**-0.5:g})"
        text = f"effective temperature T={self.temperature:g}: {bayes}; prior {prior}"
        found = [Finding("info", text, action, "temperature")]
        if self.chains == 1:
            found.append(Finding("info", "one chain cannot show whether chains agree", "chains=4"))
        if self.structured and self.start == "warm" and job.burn_in == 0:
            found.append(Finding("warning", "the reservoir starts before any burn-in", "burn_in="))
        return tuple(found)

    def _check(self) -> None:
        known = sorted({*SAMPLERS, *AROUND})
        if self.sampler not in known or self.base not in SAMPLERS:
            name = self.sampler if self.sampler not in known else self.base
            allowed = known if self.sampler not in known else sorted(SAMPLERS)
            raise UnknownNameError(f"sampler {name!r} is not known; choose one of {allowed}")
        for what, least in (
            ("burn_in", 0),
            ("thin", 1),
            ("num_samples", 2),
            ("chains", 1),
            ("workers", 1),
            ("cycles", 1),
        ):
            check_steps(getattr(self, what), what, least)
        if self.start not in STARTS:
            raise ArgumentError(f"start={self.start!r}; expected one of {STARTS}")
        if self.parallel not in PARALLEL:
            raise ArgumentError(f"parallel={self.parallel!r}; expected one of {PARALLEL}")
        if self.parallel in ("batched", "fastest") and self.workers > 1:
            raise ArgumentError(f'parallel="{self.parallel}" is for one process, and workers={self.workers} was given')
        if self.schedule not in (None, "cyclical"):
            raise ArgumentError(f'schedule={self.schedule!r}; expected None or "cyclical"')
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ArgumentError(f"lr={self.lr!r}; expected a positive number, or None")
        if self.structured and self.kind == "sa-sgld":
            raise UnsupportedError(
                'sampler "structured" around "sa-sgld": samples would need the weights of its steps, and a reservoir '
                "holds none; take another base"
            )
        if self.structured and self.store is not None:
            raise UnsupportedError('sampler "structured" draws its networks at the end; it takes no store')
        if not 0 <= self.explore < 1:
            raise ArgumentError(f"explore={self.explore!r}; expected from 0 to below 1")


def pooled(chains: Sequence[SamplePosterior]) -> SamplePosterior:
    """All chains, in the order of their numbers, as one posterior with equal weight for each."""
    weights = torch.cat([chain.weights / chain.weights.sum() for chain in chains]) / len(chains)
    names = list(chains[0].snapshots)
    snapshots = {name: torch.cat([chain.snapshots[name] for chain in chains]) for name in names}
    sizes = torch.tensor([len(chain) for chain in chains])
    return SamplePosterior(snapshots, weights, torch.arange(len(chains)).repeat_interleave(sizes).to(weights.device))


def _base_seed(generator: torch.Generator | None, group: Group | None) -> int:
    """One seed for all chains: the first process's."""
    device = "cpu" if generator is None else generator.device
    seed = torch.zeros((), dtype=torch.int64)
    if generator is not None:
        seed = torch.randint(2**62, (), generator=generator, device=device).cpu()
    if group is not None:
        seed = seed.to(group.device)
        group.spread([seed])
    return int(seed)
