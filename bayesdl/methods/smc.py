"""Sequential Monte Carlo for partially stochastic networks: particles of some weights, the others as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.diagnose import Finding
from bayesdl.errors import NonFiniteError
from bayesdl.methods.base import Fitted, Method, Task
from bayesdl.methods.noise import with_left_out_noise
from bayesdl.methods.particles import effective, largest_rise, systematic
from bayesdl.methods.potential import Held, Potential, full_potential
from bayesdl.methods.stream import INIT, NOISE, chain_generator, check_steps
from bayesdl.posteriors import SamplePosterior
from bayesdl.priors import GaussianPrior
from bayesdl.select import Selector

ACCEPTANCE = 0.57  # of Metropolis-adjusted Langevin moves at their most efficient step (Roberts and Rosenthal 1998)
SLOW = 0.1  # acceptance below which a warning says that the particles hardly move


@final
@dataclass(frozen=True)
class SMC(Method):
    """Particles (phi_j, w_j) from the prior to the posterior of the selected weights, batch by batch (Chopin 2002).

    After each batch `w_j <- w_j p(y_b | phi_j)`, with an evidence of `log Z = sum_b log sum_j w_j p(y_b | phi_j)`. A
    batch that would leave fewer than half of the particles effective, `1 / sum w^2 < J / 2`, enters as a power below
    one, then systematic resampling and Metropolis-adjusted Langevin moves that leave the posterior of what was seen so
    far invariant, then the rest of it. Particles of a last layer share one pass through the network before it; for
    other selections each takes passes of its own.

    Args:
        particles: J.
        moves: after each resampling.
        select: the stochastic weights: a last layer, low-rank adapters, a few layers.
    """

    particles: int = 256
    moves: int = 10
    select: Selector | None = "last_layer"

    name: ClassVar[str] = "smc"
    trains: ClassVar[bool] = True

    def fit(self, task: Task) -> Fitted:
        check_steps(self.particles, "particles", 4)
        check_steps(self.moves, "moves", 1)
        data = task.need_data(self.name)
        likelihood, findings = with_left_out_noise(task)
        prior = task.prior or GaussianPrior(1.0)
        if task.prior is None:
            findings = (*findings, Finding("info", "the prior is N(0, 1) on every weight", "pass prior=", "prior"))
        network = task.network.map(lambda t: t.double() if t.is_floating_point() else t)
        potential = full_potential(network, likelihood, prior, data, progress=task.progress, join=False)
        base = 0
        if task.generator is not None:
            base = int(torch.randint(2**62, (), generator=task.generator, device=task.generator.device))
        source = chain_generator(base, 0, INIT)
        drawn = [prior.sample(network.parameters, source) for _ in range(self.particles)]
        start = torch.stack([torch.cat([d[name].reshape(-1) for name in network.names]) for d in drawn])
        cloud = Cloud(potential, start, chain_generator(base, 0, NOISE))
        for batch in potential.held:
            cloud.absorb(batch, self.moves)
        weights = torch.softmax(cloud.log_weights, 0)
        own = task.network.parameters
        snapshots = {name: value.to(own[name]) for name, value in potential.unflatten(cloud.thetas).items()}
        return Fitted(
            SamplePosterior(snapshots, weights.float()),
            likelihood,
            (*findings, *_said(cloud)),
            cost=(("log_evidence", cloud.log_evidence), ("resamplings", float(len(cloud.acceptance)))),
        )


@dataclass(eq=False)
class Cloud:
    """Particles on their way.

    Attributes:
        potential: prior, likelihood and network.
        thetas: `(J, P)` float64.
        generator: of resampling and moves.
        log_weights: `(J,)`, normalised.
        log_evidence: log p of what was absorbed.
        step: of the moves, in units of the particles' variances.
        acceptance: mean acceptance of the moves after each resampling.
        seen: batches with their powers.
    """

    potential: Potential
    thetas: Tensor
    generator: torch.Generator
    log_weights: Tensor = field(init=False)
    log_evidence: float = 0.0
    step: float = field(init=False)
    acceptance: list[float] = field(default_factory=list)
    seen: list[tuple[Held, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        count, width = self.thetas.shape
        self.log_weights = self.thetas.new_full((count,), -math.log(count))
        self.step = 1.5 / width ** (1 / 3)

    def absorb(self, batch: Held, moves: int) -> None:
        """Take a batch in, in as many powers as the weights ask for.

        Raises:
            NonFiniteError: the batch is impossible under every particle.
        """
        power = 0.0
        while power < 1.0:
            with torch.no_grad():
                increments = self.potential.log_likelihoods(self.thetas, batch)
            if not bool((increments > -torch.inf).any()):
                raise NonFiniteError("the likelihood of a batch is zero, NaN or infinite under every particle")
            room = 1.0 - power
            rise = largest_rise(self.log_weights, increments, room)
            raised = self.log_weights + rise * increments
            total = torch.logsumexp(raised, 0)
            self.log_evidence += float(total)
            self.log_weights = raised - total
            power = 1.0 if rise == room else power + rise
            if rise < room:
                self._renew([*self.seen, (batch, power)], moves)
        self.seen.append((batch, 1.0))

    def _renew(self, seen: list[tuple[Held, float]], moves: int) -> None:
        """Resample, then move within the law of what was seen."""
        weights = torch.softmax(self.log_weights, 0).unsqueeze(1)
        mean = (weights * self.thetas).sum(0)
        spread = (weights * (self.thetas - mean).square()).sum(0)
        spread = spread.clamp(min=1e-12 * float(spread.max()))
        self.thetas = self.thetas[systematic(self.log_weights, self.generator)]
        self.log_weights = torch.full_like(self.log_weights, -math.log(len(self.thetas)))
        value, slope = self._target(self.thetas, seen)
        rates = []
        for _ in range(moves):
            scale = self.step * spread
            noise = torch.randn(self.thetas.shape, dtype=torch.float64, generator=self.generator).to(self.thetas)
            proposed = self.thetas + 0.5 * scale * slope + scale.sqrt() * noise
            new_value, new_slope = self._target(proposed, seen)
            back = self.thetas - proposed - 0.5 * scale * new_slope
            log_ratio = new_value - value - 0.5 * (back.square() / scale).sum(1) + 0.5 * noise.square().sum(1)
            uniform = torch.rand(len(value), dtype=torch.float64, generator=self.generator).to(value)
            taken = uniform.log() < log_ratio
            self.thetas = torch.where(taken.unsqueeze(1), proposed, self.thetas)
            value, slope = torch.where(taken, new_value, value), torch.where(taken.unsqueeze(1), new_slope, slope)
            rates.append(float(taken.double().mean()))
            self.step *= math.exp(rates[-1] - ACCEPTANCE)
        self.acceptance.append(sum(rates) / len(rates))

    def _target(self, thetas: Tensor, seen: list[tuple[Held, float]]) -> tuple[Tensor, Tensor]:
        """log p(theta) + sum power log p(y | theta), and its gradient, for each particle."""
        leaves = thetas.detach().requires_grad_()
        with torch.enable_grad():
            value = self.potential.log_priors(leaves)
            for batch, power in seen:
                value = value + power * self.potential.log_likelihoods(leaves, batch)
            slope = torch.autograd.grad(value[torch.isfinite(value)].sum(), leaves)[0]
        return value.detach().nan_to_num(nan=-torch.inf), torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)


def _said(cloud: Cloud) -> list[Finding]:
    found = [
        Finding(
            "info",
            f"log evidence {cloud.log_evidence:.4g} from {len(cloud.thetas)} particles, {len(cloud.acceptance)} times "
            f"resampled; {effective(cloud.log_weights):.0f} effective at the end",
        )
    ]
    if cloud.acceptance and min(cloud.acceptance) < SLOW:
        text = f"moves were accepted {min(cloud.acceptance):.0%} of the time: the particles hardly moved apart"
        found.append(Finding("warning", text, "more moves, more particles, or fewer stochastic weights"))
    return found
