"""NUTS: the gold standard for small networks and last layers, on all data at once (Hoffman and Gelman 2014)."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.diagnose import Finding
from bayesdl.errors import ArgumentError, require
from bayesdl.integrations.pyro import NutsRun, nuts
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.methods.noise import with_left_out_noise
from bayesdl.methods.potential import Potential, full_potential
from bayesdl.methods.stream import INIT, NOISE, chain_generator, chain_seed, check_steps
from bayesdl.posteriors import SamplePosterior
from bayesdl.priors import GaussianPrior
from bayesdl.select import Selector

_log = logging.getLogger(__name__)
LARGE = 2000  # parameters above which a warning says what a run is likely to cost
PROBES = 32  # examples at whose outputs chains are compared
TREE = 64  # gradients a step assumed for the estimate of time
MIXED = 1.05  # R-hat above which chains do not agree


class CostWarning(UserWarning):
    """A run will be long."""


@final
@dataclass(frozen=True)
class NUTS(Method):
    """Hamiltonian Monte Carlo without a minibatch and with a correction step: samples of the posterior at T = 1.

    The potential is that of the samplers, `U = -sum_n log p(y_n | theta) - log p(theta)`, in float64. Where the last
    linear layer is selected, its features are computed once. Runs through Pyro; global generators are put back.

    Args:
        num_samples, warmup: steps of each chain, kept and before.
        chains: each starts and draws by its own number.
        workers: processes that run them, of one thread each; 1 runs them here, one after another. They are spawned:
            network and data must be picklable, and a script needs its `if __name__ == "__main__":`.
        thin: every so many of the steps kept are samples of the posterior.
        start: "warm", the network's weights, or "prior", a draw from the prior for each chain.
        target_accept, max_tree_depth, full_mass: of the sampler.
        select: which parameters are Bayesian.
    """

    num_samples: int = 500
    warmup: int = 500
    chains: int = 2
    thin: int = 1
    start: str = "warm"
    target_accept: float = 0.8
    max_tree_depth: int = 10
    full_mass: bool = False
    workers: int = 1
    select: Selector | None = None

    name: ClassVar[str] = "nuts"
    trains: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        for what, least in (("num_samples", 4), ("warmup", 1), ("chains", 1), ("thin", 1), ("workers", 1)):
            check_steps(getattr(self, what), what, least)
        if self.start not in ("warm", "prior"):
            raise ArgumentError(f'start={self.start!r}; expected "warm" or "prior"')
        if not 0 < self.target_accept < 1:
            raise ArgumentError(f"target_accept={self.target_accept!r}; expected a probability between 0 and 1")
        data = task.need_data(self.name)
        likelihood, findings = with_left_out_noise(task)
        prior = task.prior or GaussianPrior(1.0)
        if task.prior is None:
            findings = (*findings, Finding("info", "the prior is N(0, 1) on every weight", "pass prior=", "prior"))
        apart = self.workers > 1  # sending a tensor moves its memory, which must not be the user's
        network = task.network.map(lambda t: t.to(torch.float64 if t.is_floating_point() else t.dtype, copy=apart))
        potential = full_potential(network, likelihood, prior, data, progress=task.progress)
        self._say_cost(potential)
        base = 0
        if task.generator is not None:
            base = int(torch.randint(2**62, (), generator=task.generator, device=task.generator.device))
        run = nuts(
            potential,
            [self._start(potential, base, chain) for chain in range(self.chains)],
            self.num_samples,
            self.warmup,
            seeds=[chain_seed(base, chain, NOISE) for chain in range(self.chains)],
            target_accept=self.target_accept,
            max_tree_depth=self.max_tree_depth,
            full_mass=self.full_mass,
            workers=self.workers,
            progress=task.progress,
        )
        kept = run.samples[:, :: self.thin].flatten(0, 1)
        own = task.network.parameters
        snapshots = {name: value.to(own[name]) for name, value in potential.unflatten(kept).items()}
        numbers = torch.arange(self.chains).repeat_interleave(len(kept) // self.chains)
        posterior = SamplePosterior(snapshots, torch.full((len(kept),), 1.0 / len(kept)), numbers)
        return Fitted(
            posterior,
            likelihood,
            (*findings, *self._checks(potential, run)),
            cost=(("chains", float(self.chains)), ("step_size", sum(run.step_size) / self.chains)),
        )

    def _start(self, potential: Potential, base: int, chain: int) -> Tensor:
        if self.start == "warm":
            return potential.start
        drawn = potential.prior.sample(potential.network.parameters, chain_generator(base, chain, INIT))
        return torch.cat([drawn[name].reshape(-1) for name in potential.network.names])

    def _say_cost(self, potential: Potential) -> None:
        rounds = -(-self.chains // min(self.workers, self.chains))
        steps = rounds * (self.num_samples + self.warmup)
        seconds = potential.seconds()
        text = f"NUTS over {len(potential.start)} parameters: one gradient takes {seconds:.2g} s, the run about "
        text += f"{seconds * steps * TREE:.2g} s at {TREE} gradients a step"
        _log.info(text)
        if len(potential.start) > LARGE:
            warnings.warn(
                f'{text}. It is meant for up to {LARGE}: select="last_layer", or method "baoab"',
                CostWarning,
                stacklevel=4,
            )

    def _checks(self, potential: Potential, run: NutsRun) -> list[Finding]:
        """Step size, divergences, and agreement of chains on outputs: weights have symmetries, outputs have none."""
        stats = require("pyro.ops.stats")
        probes = potential.outputs(run.samples, PROBES)  # (chains, S, ...)
        r_hat = float(stats.split_gelman_rubin(probes, chain_dim=0, sample_dim=1).max())
        sizes = stats.effective_sample_size(probes, chain_dim=0, sample_dim=1)
        text = (
            f"step size {min(run.step_size):.3g}, {min(run.moved):.0%} of the steps moved; on outputs R-hat at most "
            f"{r_hat:.3f}, effective samples at least {float(sizes.min()):.0f}"
        )
        found = [Finding("warning" if r_hat > MIXED else "info", text, "more samples" if r_hat > MIXED else "")]
        if sum(run.divergences):
            found.append(
                Finding(
                    "warning", f"{sum(run.divergences)} divergences after warm-up", "target_accept=0.95, a wider prior"
                )
            )
        return found
