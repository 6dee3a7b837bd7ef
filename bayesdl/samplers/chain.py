"""Chain: samples from the user's own training loop, with weights, kept in memory or in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.batch import BatchAdapter
from bayesdl.diagnose import Diagnosis
from bayesdl.errors import ArgumentError, BayesDLError, FileFormatError, UnsupportedError
from bayesdl.likelihoods import Likelihood, resolve
from bayesdl.posteriors import SamplePosterior
from bayesdl.samplers.assembling import PROBE
from bayesdl.samplers.base import Sampler
from bayesdl.samplers.collecting import RULES, Rule
from bayesdl.samplers.counts import step_findings
from bayesdl.samplers.cyclical import Cyclical
from bayesdl.samplers.log_prior import log_prior
from bayesdl.samplers.memory import MemorySamples
from bayesdl.samplers.noticing import miscounted, notice_stochastic_passes, notice_unrestored
from bayesdl.samplers.options import at_least, check_states, one_of, writes
from bayesdl.samplers.packing import has_state, load_state, state_of
from bayesdl.samplers.pooling import pooled
from bayesdl.samplers.recording import Extras, Pending, described
from bayesdl.samplers.records import SampleRecord
from bayesdl.samplers.replicas import Replicas
from bayesdl.samplers.retention import Retention
from bayesdl.samplers.sampled import BUFFERS, DTYPES, Sampled
from bayesdl.samplers.storing import StoredSamples
from bayesdl.samplers.structured import Structured
from bayesdl.tensorfile import DAMAGE


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

    With `store=` every sample is on disk before `step` returns, and a chain that was killed goes on bit for bit:

        chain = bdl.Chain(net, burn_in=500, thin=50, sampler=opt, store="chain-0")
        chain.resume()                                    # False, and nothing happens, at the first start
        for k in range(chain.steps, total): ...

    Args:
        net: the network; read, never written to (except by `resume`). In `DistributedDataParallel` every rank has
            a chain and calls its `step`: the first rank writes the store, and the ranks' parameters are compared.
        burn_in: calls of `step` before the first sample.
        thin: calls of `step(sampling=True)` between samples.
        sampler: what moves the network: a `bdl.samplers` sampler, `Structured` or `Cyclical` around one. Its parameters
            are the sampled ones (a last layer, LoRA); None samples all that require a gradient.
        collect: "steps", or "time" (equal distances in the time of a sampler that adapts its step, so that all samples
            weigh the same). None: the sampler's own, "steps" in a schedule.
        store: folder of this chain; None keeps samples in memory.
        max_samples: at most so many are kept.
        keep: "last", or "reservoir" (a uniform draw from all samples).
        buffers: "keep" stores those that training has changed with each sample; "refresh" recomputes batch-norm
            statistics at theta_k in one pass over `data`; "shared" leaves buffers out.
        dtype: "float32", "float64", or "bfloat16-delta": the difference to the network at the first step.
        chain_id: number of the chain, from 0.
        probe: inputs at which the outputs of each sample are recorded; see `probes`.
        schedule: `Cyclical` or any object with `state_dict`; cycles and phases go into the records.
        loader: the training loader, whose `state_dict` the store keeps.
        also: more to keep in the store by name: objects with `state_dict`, or `torch.Generator`s.
        data: a loader for "refresh", of its own: iterating over it must not shift the order of the training data.
        batch: batch adapter for `data` and `probe`, as in `wrap`.
        checkpoint_every: steps between resume files while no sample is collected; None writes them with samples alone.

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
        store: str | Path | None = None,
        max_samples: int | None = None,
        keep: str = "last",
        buffers: str = "keep",
        dtype: str = "float32",
        chain_id: int = 0,
        probe: Any = None,
        schedule: Any = None,
        loader: Any = None,
        also: Mapping[str, Any] | None = None,
        data: Iterable[Any] | None = None,
        batch: str | BatchAdapter | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        for name, value, least in (("burn_in", burn_in, 0), ("thin", thin, 1), ("chain_id", chain_id, 0)):
            at_least(name, value, least)
        at_least("checkpoint_every", 1 if checkpoint_every is None else checkpoint_every, 1)
        one_of("buffers", buffers, BUFFERS)
        one_of("dtype", dtype, DTYPES)
        if (buffers == "refresh") != (data is not None):
            raise ArgumentError(f'buffers={buffers!r} with data={data!r}; buffers="refresh" and data= belong together')
        if isinstance(sampler, Cyclical):
            sampler, schedule = sampler.sampler, sampler
        self.sampler, self.schedule, self.chain_id = sampler, schedule, int(chain_id)
        self._mover: Sampler | None = sampler.sampler if isinstance(sampler, Structured) else sampler
        self._net, self._extras = net, Extras(net, probe, data, batch)
        self._checkpoint_every, self._loader, self._also = checkpoint_every, loader, dict(also or {})
        check_states(self._states())
        self._tensors = Sampled(net, self._mover, buffers, dtype)
        self._rule = self._chosen_rule(collect)(int(burn_in), int(thin))
        self._retention = Retention(max_samples, keep, self.chain_id)
        self._samples = MemorySamples() if store is None else StoredSamples(store, writes(net))
        self._settings = {
            **{"chain": self.chain_id, "burn_in": burn_in, "thin": thin, "collect": self.collect, "dtype": dtype},
            **{"max_samples": max_samples, "keep": keep, "buffers": buffers},
            "sampler": None if self._mover is None else self._mover.name,
        }
        self._replicas = Replicas(net)
        self._pending: list[Pending] = []
        self._moved = self._begun = False
        self._idle = 0  # calls of step before which nothing had moved
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

    @property
    def kept(self) -> list[SampleRecord]:
        """Of the samples in the posterior, in its order."""
        return self._samples.kept()

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
            DistributedError: the ranks of a data-parallel network have come apart (compared every 1000 steps).
            OSError: the disk is full; the samples written before are whole, and the last resume file is.
        """
        if self._mover is None:
            self._before_update(None)
        if not self._moved:
            self._idle += 1
            return False
        pending, self._pending, self._moved = self._pending, [], False
        self._rule.call(bool(sampling))
        self._replicas.check(self.steps, self._tensors.parameters)
        if not sampling:
            pending = []
        for found in pending:
            self._commit(found, loss)
        every = self._checkpoint_every
        if pending or (every is not None and self.steps % every == 0):
            self._checkpoint()
        return bool(pending)

    def posterior(self) -> SamplePosterior:
        """The samples kept, with their weights and chain ids, where the network is.

        Raises:
            NotFittedError: fewer than two samples.
        """
        return pooled([self])

    def probes(self) -> Tensor:
        """Outputs at the probe inputs of the samples kept, `(S, P, C)`.

        Raises:
            UnsupportedError: the chain has no probe.
        """
        if self._extras.probe is None:
            raise UnsupportedError("the chain records no outputs: pass probe=inputs to bdl.Chain")
        return torch.stack([self._samples.read(record)[PROBE] for record in self.kept])

    def summary(self, likelihood: str | Likelihood | None = None, targets: Tensor | None = None) -> Diagnosis:
        """What the chain did and what looks wrong with it, in words; of the probe's outputs too, where there is one.

        Args:
            likelihood: turns those outputs into probabilities or means; None compares the outputs themselves.
            targets: of the probe inputs, `(P,)` or `(P, C)`.
        """
        from bayesdl.samplers.diagnostics import summary

        outputs = None if self._extras.probe is None or not self.kept else self.probes()
        found = summary(self.kept, outputs, None if likelihood is None else resolve(likelihood), targets)
        odd = [] if self._mover is None else miscounted(self._loader, self._mover.num_data)
        steps = step_findings(getattr(self._mover, "counts", None), self.steps + self._idle, self._idle)
        return Diagnosis((*found.findings, *odd, *steps))

    def checkpoint(self) -> None:
        """Write the resume file now, between two steps; `step` does so with every sample.

        Raises:
            ArgumentError: the chain has no store, or has made no step.
        """
        if not isinstance(self._samples, StoredSamples) or not self._begun or self._moved:
            raise ArgumentError("checkpoint() needs store=, and comes after chain.step(), not before it")
        self._checkpoint()

    def resume(self) -> bool:
        """Go on where the store's chain was when it wrote its last sample; call before the first step.

        Writes parameters and buffers into the network, and restores the sampler, the schedule, the loader and whatever
        `also` names. The global random state is never set. Samples written after the last resume file are cut, and come
        back bit for bit. A loop of the same total length then runs `range(chain.steps, total)`.

        Returns:
            False, and nothing happens, where the folder holds no chain yet.

        Raises:
            ArgumentError: no store, the chain has begun, or another process writes there.
            FileFormatError: the chain of another network, other settings, or a damaged folder.
        """
        if not isinstance(self._samples, StoredSamples):
            raise ArgumentError("resume() needs the folder of a chain: pass store=")
        if self._begun:
            raise ArgumentError("the chain has begun already; resume() comes before the first step")
        tree = self._samples.resume(self._tensors, self._settings)
        if tree is None:
            return False
        try:
            self._restore(tree)
        except BayesDLError:
            raise
        except DAMAGE as error:
            raise FileFormatError(f"{self._samples.path} is damaged: {error!r} while its chain was resumed") from error
        self._tensors.begin(self._tensors.base)  # the parameters' versions as they are now
        self._begun = True
        notice_unrestored(self._loader)
        return True

    def _restore(self, tree: Mapping[str, Any]) -> None:
        self._tensors.load(tree["parameters"], tree["buffers"])
        for name, thing in self._states().items():
            if name not in tree["states"]:
                raise ArgumentError(f"the store holds no state of {name!r}, which was added since the chain began")
            load_state(thing, tree["states"][name])
        self._rule.load(tree["rule"])
        self._idle = int(tree.get("idle", 0))  # stores of earlier versions did not count them

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints of somebody else's, beside those of network and sampler: counters, and samples in memory."""
        if not self._begun:
            return {}
        held = isinstance(self._samples, MemorySamples)
        base = dict(self._tensors.base) if held else {}
        return {"rule": self._rule.state(), "samples": self._samples.state(), "base": base, "idle": self._idle}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken; network and sampler must be as they were then.

        Raises:
            ArgumentError: the chain has begun already.
            FileFormatError: the chain's folder does not go back to that moment.
        """
        if self._begun:
            raise ArgumentError("the chain has begun already; load_state_dict() comes before the first step")
        if not state_dict:
            return
        self._rule.load(state_dict["rule"])
        self._idle = int(state_dict.get("idle", 0))
        if isinstance(self._samples, MemorySamples):
            self._samples.load(state_dict["samples"])
            self._tensors.begin(state_dict["base"])
        else:
            self._samples.load(state_dict["samples"], self._tensors, self._settings, self._tree)
        self._begun = True

    def close(self) -> None:
        """Let go of the sampler and of the folder; the samples stay."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if isinstance(self._samples, StoredSamples):
            self._samples.close()

    def __repr__(self) -> str:
        own = f"chain_id={self.chain_id}, {len(self)} samples, {self.steps} steps, collect={self.collect!r}"
        around = self.sampler if self.schedule is None else self.schedule
        return f"Chain({own}, burn_in={self._rule.burn_in}, thin={self._rule.thin}, sampler={around!r})"

    # --- a step -----------------------------------------------------------------------------------------------------

    def _before_update(self, sampler: Sampler | None) -> None:
        if not self._begun:
            self._begin()
        record = None if sampler is None else sampler.record
        copies = self._rule.ahead(record)
        self._moved = True
        if self.collect == "steps":
            self._pending = []  # of several steps between two calls, the last
        if copies:
            for variable in ("theta",) if sampler is None else sampler.variables:
                self._pending.append(Pending(self._tensors.snapshot(sampler, variable), record, copies))

    def _begin(self) -> None:
        if self._mover is not None:
            notice_stochastic_passes(self._net)
        self._tensors.begin()
        if isinstance(self._samples, StoredSamples):
            self._samples.begin(self._tensors, self._settings, self._retention.max_samples)
        self._begun = True

    def _commit(self, found: Pending, loss: float | Tensor | None) -> None:
        prior = None if self._mover is None else log_prior(self._mover, self._tensors.by_id(found.snapshot))
        values: dict[str, Tensor] | None = None
        for _ in range(found.copies):
            number = len(self._samples.records())
            kept, drops = self._retention.admit(number, [record.id for record in self._samples.kept()])
            record = described(
                found.record,
                self.steps,
                self.schedule,
                id=number,
                chain=self.chain_id,
                weight=self._rule.weight(found.record),
                drops=drops,
                log_prior=prior,
                loss=loss,
            )
            if kept:
                if values is None:
                    values = self._extras.added(self._tensors.encoded(found.snapshot), self._tensors.base)
                self._samples.add(record, values)
            else:
                self._samples.skip(record)

    # --- the store --------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        if isinstance(self._samples, StoredSamples):
            self._samples.checkpoint(self._tree())

    def _tree(self) -> dict[str, Any]:
        return {
            "rule": self._rule.state(),
            "idle": self._idle,
            "parameters": dict(self._tensors.parameters),
            "buffers": self._tensors.buffers(),
            "states": {name: state_of(thing) for name, thing in self._states().items()},
        }

    def _states(self) -> dict[str, Any]:
        found = {"sampler": self.sampler, "schedule": self.schedule}
        if has_state(self._loader):
            found["loader"] = self._loader
        return {name: thing for name, thing in found.items() if thing is not None} | {
            f"also {name}": thing for name, thing in self._also.items()
        }

    def _chosen_rule(self, collect: str | None) -> type[Rule]:
        if collect is None:
            collect = "steps" if self._mover is None or self.schedule is not None else self._mover.collect
        one_of("collect", collect, tuple(RULES))
        if collect == "time" and self._mover is None:
            raise ArgumentError('collect="time" needs the sampler whose time it is: pass sampler=')
        return RULES[collect]
