"""The No-U-Turn sampler through Pyro, on a potential over one flat vector of weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, NonFiniteError, require

Potential = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class NutsRun:
    """What chains of NUTS left.

    Attributes:
        samples: `(chains, S, P)`.
        step_size: of each chain after warm-up.
        divergences: number in each chain after warm-up.
        moved: share of its steps that moved the weights.
    """

    samples: Tensor
    step_size: tuple[float, ...]
    divergences: tuple[int, ...]
    moved: tuple[float, ...]


def nuts(
    potential: Potential,
    starts: Sequence[Tensor],
    num_samples: int,
    warmup: int,
    *,
    seeds: Sequence[int],
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    full_mass: bool = False,
    workers: int = 1,
    progress: bool = True,
) -> NutsRun:
    """Chains of NUTS (Hoffman and Gelman 2014) on a potential U, the law exp(-U).

    Each chain is seeded by its own number, and is the same whatever runs it. Pyro draws from torch's, NumPy's and
    Python's global generators: all three are put back afterwards. Its parameter store is not touched.

    Args:
        potential: flat weights `(P,)` -> U, a differentiable scalar.
        starts: first weights of each chain, `(P,)`.
        num_samples, warmup: steps of each chain that are kept, and before those.
        seeds: one for each chain.
        target_accept, max_tree_depth, full_mass: of the sampler; a full mass matrix suits up to a few hundred weights.
        workers: processes that run chains, of one thread each. They are spawned, so that the potential must be
            picklable, and a script needs its `if __name__ == "__main__":`. 1 runs them here, one after another.
        progress: show a bar for each chain that runs here.

    Raises:
        MissingDependencyError: Pyro is absent.
        NonFiniteError: U or its gradient is not finite at a start.
        ArgumentError: not one seed for each start.
    """
    if len(seeds) != len(starts) or not starts:
        raise ArgumentError(f"{len(seeds)} seeds and {len(starts)} starts; expected one of each for every chain")
    require("pyro.infer.mcmc")
    for start in starts:
        _check_start(potential, start)
    here = workers == 1 or len(starts) == 1
    settings = _Settings(num_samples, warmup, target_accept, max_tree_depth, full_mass, progress and here)
    each = [(potential, start, seed, settings) for start, seed in zip(starts, seeds, strict=True)]
    if here:
        found = [_chain(*one) for one in each]
    else:
        pool = ProcessPoolExecutor(min(workers, len(each)), get_context("spawn"), torch.set_num_threads, (1,))
        with pool:
            remote = list(pool.map(_remote, each))
        found = [(torch.from_numpy(samples).to(starts[0]), a, b, c) for samples, a, b, c in remote]
    samples, steps, divergences, moved = zip(*found, strict=True)
    return NutsRun(torch.stack(samples), steps, divergences, moved)


@dataclass(frozen=True)
class _Settings:
    """What all chains share."""

    num_samples: int
    warmup: int
    target_accept: float
    max_tree_depth: int
    full_mass: bool
    progress: bool


def _chain(potential: Potential, start: Tensor, seed: int, settings: _Settings) -> tuple[Tensor, float, int, float]:
    """Samples `(S, P)`, step size, divergences and the share of steps that moved."""
    mcmc = require("pyro.infer.mcmc")
    with global_randomness(seed):
        kernel = mcmc.NUTS(
            potential_fn=_Named(potential),
            target_accept_prob=settings.target_accept,
            max_tree_depth=settings.max_tree_depth,
            full_mass=settings.full_mass,
        )
        run = mcmc.MCMC(
            kernel,
            num_samples=settings.num_samples,
            warmup_steps=settings.warmup,
            initial_params={"theta": start.detach().clone()},
            disable_progbar=not settings.progress,
        )
        run.run()
    said = run.diagnostics()
    divergences, moved = len(said["divergences"]["chain 0"]), float(said["acceptance rate"]["chain 0"])
    return run.get_samples()["theta"].detach(), float(kernel.step_size), divergences, moved


def _remote(arguments: tuple[Potential, Tensor, int, _Settings]) -> tuple[Any, float, int, float]:
    # an array: shared memory of tensors would have to outlive this process
    samples, step_size, divergences, moved = _chain(*arguments)
    return samples.cpu().numpy(), step_size, divergences, moved


@contextmanager
def global_randomness(seed: int) -> Iterator[None]:
    """Seed torch's, NumPy's and Python's global generators inside, and put their states back."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002  Pyro draws from it
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002


class _Named:
    """A potential as Pyro calls it: with a dictionary of its variables."""

    def __init__(self, potential: Potential) -> None:
        self._potential = potential

    def __call__(self, values: dict[str, Any]) -> Tensor:
        return self._potential(values["theta"])


def _check_start(potential: Potential, start: Tensor) -> None:
    leaf = start.detach().clone().requires_grad_()
    value = potential(leaf)
    gradient = torch.autograd.grad(value, leaf)[0]
    if not bool(torch.isfinite(value)) or not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError("the potential or its gradient is NaN or infinite where a chain of NUTS starts")
