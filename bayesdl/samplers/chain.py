"""Chain: samples from the user's own training loop, with weights, kept in memory or in a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, NotFittedError
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers.base import Sampler
from bayesdl.samplers.collecting import RULES, Rule
from bayesdl.samplers.cyclical import Cyclical
from bayesdl.samplers.memory import MemorySamples, stacked
from bayesdl.samplers.record import StepRecord
from bayesdl.samplers.records import SampleRecord
from bayesdl.samplers.retention import Retention
from bayesdl.samplers.sampled import BUFFERS, DTYPES, Sampled
from bayesdl.samplers.structured import Structured


@dataclass
class _Pending:
    """theta_k, taken before the step from it; kept if the next call of `chain.step` is one of sampling."""

    values: dict[str, Tensor]
    record: StepRecord | None
    copies: int


@final
class Chain:
    """Collects samples in a training loop of one's own.

        opt = bdl.samplers.SGLD(net.parameters(), lr=1e-2, num_data=N)
        chain = bdl.Chain(net, burn_in=500, thin=50, sampler=opt)
        for x, y in loader:
            opt.zero_grad(); loss_fn(net(x), y).backward(); opt.step(); chain.step()
        bayes = bdl.BayesianModel(net, chain.posterior(), "categorical")

    With `sampler=` samples are theta_k exactly, with the buffers of its forward pass and the weight of the step that
    leaves it, and calls without a step of the sampler between (gradient accumulation, steps that AMP skipped) do not
    count. Without, a sample is the network as it is when `step` is called.

    Args:
        net: the network; read, never written to (except by `resume`).
        burn_in: calls of `step` before the first sample.
        thin: calls of `step(sampling=True)` between samples.
        sampler: what moves the network: a `bdl.samplers` sampler, `Structured` or `Cyclical` around one. Its parameters
            are the sampled ones (a last layer, LoRA); None samples all that require a gradient.
        collect: "steps", or "time" (equal distances in the time of a sampler that adapts its step, so that all samples
            weigh the same). None: the sampler's own, "steps" in a cyclical schedule.
        store: folder of the chain; None keeps samples in memory.
        max_samples: at most so many are kept.
        keep: "last", or "reservoir" (a uniform draw from all samples).
        buffers: "keep" stores those that training has changed with each sample; "shared" leaves them out.
        dtype: "float32", "float64", or "bfloat16-delta": the difference to the network at the first step.
        chain_id: number of the chain, from 0.
        probe: inputs at which the outputs of each sample are recorded.
        schedule: the `Cyclical` schedule around the sampler, for cycles and phases in the records.

    Raises:
        ArgumentError: values out of range, or a sampler of another network.
        UnsupportedError: sharded parameters.
    """

    def __init__(
        self,
        net: nn.Module,
        burn_in: int = 0,
        thin: int = 1,
        *,
        sampler: Sampler | Structured | Cyclical | None = None,
        collect: str | None = None,
        store: Any = None,
        max_samples: int | None = None,
        keep: str = "last",
        buffers: str = "keep",
        dtype: str = "float32",
        chain_id: int = 0,
        probe: Any = None,
        schedule: Any = None,
    ) -> None:
        _check("burn_in", burn_in, 0)
        _check("thin", thin, 1)
        _check("chain_id", chain_id, 0)
        _one_of("buffers", buffers, BUFFERS)
        _one_of("dtype", dtype, DTYPES)
        if isinstance(sampler, Cyclical):
            sampler, schedule = sampler.sampler, sampler
        self.sampler, self.schedule = sampler, schedule
        self._mover: Sampler | None = sampler.sampler if isinstance(sampler, Structured) else sampler
        self.chain_id = int(chain_id)
        self._tensors = Sampled(net, self._mover, buffers, dtype)
        self._rule = self._chosen_rule(collect)(int(burn_in), int(thin))
        self._retention = Retention(max_samples, keep, self.chain_id)
        self._samples = MemorySamples()
        self._pending: list[_Pending] = []
        self._moved = self._begun = False
        self._handle = None if self._mover is None else self._mover.register_pre_update_hook(self._before_update)

    @property
    def collect(self) -> str:
        """ "steps" or "time"."""
        return self._rule.name

    @property
    def steps(self) -> int:
        """Calls of `step` that counted: where a loop goes on after `resume`."""
        return self._rule.calls

    @property
    def records(self) -> list[SampleRecord]:
        """Of all samples collected, those dropped again among them."""
        return self._samples.records()

    def __len__(self) -> int:
        """Samples kept."""
        return len(self._samples.kept())

    def step(self, sampling: bool = True, *, loss: float | Tensor | None = None) -> bool:
        """Call after each step of the sampler (and of its schedule).

        Args:
            sampling: False while exploring: the call counts for burn-in and not for thinning.
            loss: mean loss of the batch, for the records.

        Returns:
            Whether a sample was collected.

        Raises:
            NonFiniteError: the network holds NaN or infinity.
            StaleModelError: a parameter that is not sampled was trained on.
        """
        if self._mover is None:
            self._before_update(None)
        if not self._moved:
            return False
        pending, self._pending, self._moved = self._pending, [], False
        self._rule.call(bool(sampling))
        if not sampling:
            return False
        for found in pending:
            self._commit(found, loss)
        return bool(pending)

    def posterior(self) -> SamplePosterior:
        """The samples kept, with their weights and chain ids, where the network is.

        Raises:
            NotFittedError: fewer than two samples.
        """
        return pooled([self])

    def close(self) -> None:
        """Let go of the sampler; the samples stay."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __repr__(self) -> str:
        own = f"chain_id={self.chain_id}, {len(self)} samples, {self.steps} steps, collect={self.collect!r}"
        around = self.sampler if self.schedule is None else self.schedule
        return f"Chain({own}, burn_in={self._rule.burn_in}, thin={self._rule.thin}, sampler={around!r})"

    def _before_update(self, sampler: Sampler | None) -> None:
        if not self._begun:
            self._tensors.begin()
            self._begun = True
        record = None if sampler is None else sampler.record
        copies = self._rule.ahead(record)
        self._moved = True
        if self.collect == "steps":
            self._pending = []  # of several steps between two calls, the last
        if copies:
            self._pending.append(_Pending(self._tensors.copy(sampler), record, copies))

    def _commit(self, found: _Pending, loss: float | Tensor | None) -> None:
        for _ in range(found.copies):
            number = len(self._samples.records())
            kept, drops = self._retention.admit(number, [record.id for record in self._samples.kept()])
            record = self._described(number, found.record, drops, loss)
            if kept:
                self._samples.add([record], found.values)
            else:
                self._samples.skip(record)

    def _described(
        self, number: int, of: StepRecord | None, drops: tuple[int, ...], loss: float | Tensor | None
    ) -> SampleRecord:
        known: dict[str, Any] = {"step": self.steps}
        if of is not None:
            names = ("step", "lr", "h", "temperature", "psi", "time")
            known = {name: getattr(of, name) for name in names}
        if isinstance(self.schedule, Cyclical):
            known |= {"cycle": self.schedule.index, "phase": self.schedule.phase}
        value = None if loss is None else float(loss)
        return SampleRecord(number, self.chain_id, weight=self._rule.weight(of), drops=drops, loss=value, **known)

    def _chosen_rule(self, collect: str | None) -> type[Rule]:
        if collect is None:
            collect = "steps" if self._mover is None or self.schedule is not None else self._mover.collect
        _one_of("collect", collect, tuple(RULES))
        if collect == "time" and self._mover is None:
            raise ArgumentError('collect="time" needs the sampler whose time it is: pass sampler=')
        return RULES[collect]


def pooled(chains: Sequence[Chain]) -> SamplePosterior:
    """The samples of several chains of one network as one posterior; every chain has the weight of its samples.

    Raises:
        NotFittedError: fewer than two samples in all.
    """
    parts: list[dict[str, Tensor]] = []
    weights: list[float] = []
    ids: list[int] = []
    for chain in chains:
        kept = chain._samples.kept()
        parts += [chain._tensors.decoded(chain._samples.read(record)) for record in kept]
        weights += relative_weights(kept)
        ids += [chain.chain_id] * len(kept)
    if len(parts) < 2:
        one = chains[0]
        raise NotFittedError(
            f"{len(parts)} sample(s) were collected in {[chain.steps for chain in chains]} steps with "
            f"burn_in={one._rule.burn_in} and thin={one._rule.thin}, and a posterior takes two or more: lower burn_in "
            "or thin, raise max_samples, or run longer"
        )
    tensors = chains[0]._tensors
    device = tensors.device
    share = torch.tensor(weights, dtype=torch.float64)
    return SamplePosterior(
        stacked(parts, tensors.base, device),
        (share / share.sum()).float().to(device),
        torch.tensor(ids).to(device),
    )


def relative_weights(records: Sequence[SampleRecord]) -> list[float]:
    """Weights of samples: those of their steps within a cycle, of mean 1 in each cycle."""
    cycles: dict[int | None, list[float]] = {}
    for record in records:
        cycles.setdefault(record.cycle, []).append(record.weight)
    means = {cycle: sum(found) / len(found) for cycle, found in cycles.items()}
    return [record.weight / means[record.cycle] if means[record.cycle] > 0 else 1.0 for record in records]


def _check(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or int(value) != value or value < least:
        raise ArgumentError(f"{name}={value!r}; expected a whole number of at least {least}")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r}; expected one of {allowed}")
