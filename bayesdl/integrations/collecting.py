"""A chain inside a trainer that owns the loop: what the callbacks of the trainers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import nn

from bayesdl.errors import ArgumentError, NotFittedError
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers import Chain, Cyclical, Sampler

Schedule = Callable[[Sampler], Cyclical]


@final
class Collector:
    """Makes a chain once network and optimiser are there, and steps it after each step of the optimiser.

    Args:
        schedule: sampler -> cyclical schedule around it, which is stepped along; None has none.
        options: of `bdl.Chain`.
    """

    def __init__(self, schedule: Schedule | None, options: dict[str, Any]) -> None:
        for name in ("sampler", "schedule"):
            if name in options:
                raise ArgumentError(f"{name}= is found in the trainer; give the trainer the sampler as its optimiser")
        self._schedule_of, self._options = schedule, options
        self._schedule: Cyclical | None = None
        self._chain: Chain | None = None
        self._seen = 0

    @property
    def chain(self) -> Chain:
        """The chain. Raises `NotFittedError` before training."""
        if self._chain is None:
            raise NotFittedError("the trainer has not begun: there is no chain yet")
        return self._chain

    def begin(self, net: nn.Module, optimizer: Any, steps: int) -> None:
        """Call when training begins or goes on, after `steps` steps of the optimiser."""
        self._seen = steps
        if self._chain is not None:
            return
        while not isinstance(optimizer, Sampler) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        sampler = optimizer if isinstance(optimizer, Sampler) else None
        if self._schedule_of is not None:
            if sampler is None:
                raise ArgumentError(f"schedule= needs a sampler, and the optimiser is {type(optimizer).__name__}")
            self._schedule = self._schedule_of(sampler)
        self._chain = Chain(net, sampler=sampler, schedule=self._schedule, **self._options)

    def step(self, steps: int, loss: Any = None) -> None:
        """Call when the optimiser has made `steps` steps; nothing happens where it made none since."""
        if steps == self._seen:
            return
        self._seen = steps
        if self._schedule is None:
            self.chain.step(loss=loss)
        elif not self._schedule.finished:
            self._schedule.step()
            self.chain.step(self._schedule.sampling, loss=loss)

    def posterior(self) -> SamplePosterior:
        """The samples. Raises `NotFittedError` where there are fewer than two."""
        return self.chain.posterior()

    def state_dict(self) -> dict[str, Any]:
        """Counters of chain and schedule, and samples in memory; empty before training."""
        if self._chain is None or not self._chain.steps:
            return {}
        schedule = {} if self._schedule is None else self._schedule.state_dict()
        return {"chain": self._chain.state_dict(), "schedule": schedule}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`, after `begin`."""
        if state_dict:
            if self._schedule is not None:
                self._schedule.load_state_dict(state_dict["schedule"])
            self.chain.load_state_dict(state_dict["chain"])
