"""Kinetic and configurational temperature of a running chain, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import NotFittedError, UnsupportedError
from bayesdl.priors import ScaleMixturePrior
from bayesdl.samplers.base import Sampler

MOST, FEWEST = 64, 16  # batches of steps


@dataclass
class _Batches:
    """A sum over steps, in batches that double in length so that there are never more than `MOST`."""

    total: float = 0.0
    steps: int = 0
    length: int = 1
    done: list[float] = field(default_factory=list)  # sums of whole batches
    part: float = 0.0

    def add(self, value: float) -> None:
        self.total, self.part, self.steps = self.total + value, self.part + value, self.steps + 1
        if self.steps % self.length == 0:
            self.done.append(self.part)
            self.part = 0.0
        if len(self.done) == MOST:
            self.done = [a + b for a, b in zip(self.done[::2], self.done[1::2], strict=True)]
            self.length *= 2

    def error(self) -> float:
        """Standard error of the mean over the steps, by the means of the batches."""
        means = torch.tensor(self.done, dtype=torch.float64) / self.length
        return float(means.std()) / math.sqrt(len(means))


@dataclass
class _Sums:
    """Of one parameter, over the steps seen."""

    kinetic: _Batches = field(default_factory=_Batches)  # |m|^2 / h
    product: float = 0.0  # sum of theta . g
    theta: Tensor | None = None
    force: Tensor | None = None


@dataclass
class _Group:
    """One parameter group."""

    names: list[str]
    before: float | None = None  # h of the momentum held
    sums: dict[str, _Sums] = field(default_factory=dict)


@final
class Thermometer:
    """Watches every step of a sampler and tells at which temperature each parameter moves.

        meter = Thermometer(opt)   # after burn-in; then train on
        meter.kinetic(); meter.kinetic_error(); meter.configurational(); meter.close()

    Kinetic: `E |m|^2 / (h d)`, of samplers with momentum; what is expected of one step size see `expected_kinetic`.
    Configurational: `E[(theta - c) . grad U] / d` for a constant c, of every sampler; T at small steps,
    `T / (1 - a / 2)` of SGLD on a Gaussian with a = h / s^2. Minibatch gradients leave it without bias. Either has the
    relative standard error `sqrt(2 / (d ess))`, ess the effective number of steps. Two tensors of the parameters' size
    are kept beside them.

    Args:
        sampler: read before each of its updates, never written to.
        centre: c by parameter name; None takes the mean of the steps watched, which is no constant: the configurational
            temperature is then low by the factor 1 - tau / n, tau the autocorrelation time of theta in n steps.

    Raises:
        UnsupportedError: a sampler or prior with a preconditioner, whose momenta have no common mass.
    """

    def __init__(self, sampler: Sampler, centre: Mapping[str, Tensor] | None = None) -> None:
        if getattr(sampler, "adapt", False) or isinstance(sampler.prior, ScaleMixturePrior) or sampler.master:
            raise UnsupportedError(
                f"{sampler!r} has a preconditioner or copies in float32: temperatures of its parameters are not "
                "defined by their momenta and gradients alone"
            )
        self.steps = 0
        self._groups: list[_Group] = []
        self._centre = centre
        self._handle = sampler.register_pre_update_hook(self._look)

    def kinetic(self) -> dict[str, float]:
        """By parameter name ("group.index" without names).

        Raises:
            NotFittedError: no step of a sampler with momentum has been seen.
        """
        found = {
            name: s.kinetic.total / (s.kinetic.steps * s.theta.numel())
            for name, s in self._sums().items()
            if s.kinetic.steps and s.theta is not None
        }
        if not found:
            raise NotFittedError("no momentum was seen: the sampler has none, or has made fewer than two steps")
        return found

    def kinetic_error(self) -> dict[str, float]:
        """Standard errors of `kinetic` by parameter name, from the means of up to 64 batches of steps.

        Raises:
            NotFittedError: fewer than 16 steps of a sampler with momentum have been seen.
        """
        known = {name: s for name, s in self._sums().items() if len(s.kinetic.done) >= FEWEST}
        if not known:
            raise NotFittedError(f"fewer than {FEWEST} momenta were seen: too few for a standard error")
        return {name: s.kinetic.error() / s.theta.numel() for name, s in known.items() if s.theta is not None}

    def configurational(self) -> dict[str, float]:
        """By parameter name.

        Raises:
            NotFittedError: fewer than two steps have been seen.
        """
        if self.steps < 2:
            raise NotFittedError(f"{self.steps} steps were seen; a temperature takes two or more")
        found = {}
        for name, s in self._sums().items():
            assert s.theta is not None and s.force is not None
            centre = s.theta / self.steps if self._centre is None else self._centre[name].to(s.force)
            found[name] = (s.product - float((centre * s.force).sum())) / (self.steps * s.theta.numel())
        return found

    def close(self) -> None:
        """Stop watching."""
        self._handle.remove()

    def _sums(self) -> dict[str, _Sums]:
        return {name: sums for group in self._groups for name, sums in group.sums.items()}

    @torch.no_grad()
    def _look(self, sampler: Sampler) -> None:
        if not self._groups:
            self._groups = [_Group(list(_names(index, group))) for index, group in enumerate(sampler.param_groups)]
        named = {
            name: p
            for own, group in zip(self._groups, sampler.param_groups, strict=True)
            for name, p in zip(own.names, group["params"], strict=True)
        }
        of_prior = None if sampler.prior is None else sampler.prior.grad(named)
        for own, group in zip(self._groups, sampler.param_groups, strict=True):
            for name, parameter in zip(own.names, group["params"], strict=True):
                sums = own.sums.setdefault(name, _Sums())
                slope = float(group["prior_precision"]) * parameter if of_prior is None else -of_prior[name]
                gradient = slope if parameter.grad is None else slope + sampler.num_data * parameter.grad
                self._add(sums, parameter, gradient, sampler.state[parameter].get("momentum"), own.before)
            psi = sampler.record.psi
            own.before = float(group["lr"]) / sampler.num_data * psi * psi
        self.steps += 1

    @staticmethod
    def _add(sums: _Sums, theta: Tensor, gradient: Tensor, momentum: Tensor | None, h: float | None) -> None:
        if sums.theta is None or sums.force is None:
            sums.theta, sums.force = theta.detach().double(), gradient.double()
        else:
            sums.theta, sums.force = sums.theta + theta, sums.force + gradient
        sums.product += float((theta.double() * gradient).sum())
        if momentum is not None and h:
            sums.kinetic.add(float(momentum.double().square().sum()) / h)


def expected_kinetic(sampler: Sampler, a: float = 0.0) -> float:
    """What a thermometer reads before a step, on a Gaussian coordinate with a = h / s^2; 0 is the limit of small steps.

    SGHMC with friction f: `T / (1 - f / 2 - a / 4)`. BAOAB, SGNHT and SA-SGLD with momentum: T.

    Raises:
        UnsupportedError: a sampler without momentum.
    """
    if not sampler.underdamped:
        raise UnsupportedError(f"{type(sampler).__name__} has no momentum, and no kinetic temperature")
    if sampler.name == "sghmc":
        friction = 1 - float(sampler.param_groups[0]["momentum"])
        return sampler.temperature / (1 - friction / 2 - a / 4)
    return sampler.temperature


def _names(index: int, group: dict[str, Any]) -> list[str]:
    return list(group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))])
