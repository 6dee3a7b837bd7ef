"""What every sampler shares: a `torch.optim.Optimizer` whose steps draw from the posterior."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from bayesdl.errors import ArgumentError, FileFormatError, NonFiniteError, StepSizeError
from bayesdl.samplers.arguments import (
    Schedule,
    Shared,
    as_rate,
    at_least_one,
    check_dtype,
    check_precision,
    check_ranks,
    check_temperature,
    named,
    refuse_unknown,
    weight_decay_message,
)
from bayesdl.samplers.counts import StepCounts
from bayesdl.samplers.forces import Block, force_of
from bayesdl.samplers.gathering import adopt, finite_norm, gather
from bayesdl.samplers.noise import NoiseStream
from bayesdl.samplers.record import StepRecord
from bayesdl.samplers.restoring import check_state

_log = logging.getLogger(__name__)
_PER_SAMPLER = ("temperature", "num_data", "prior", "generator")


class Sampler(Optimizer, ABC):
    """Base of the samplers: gradient of the MEAN loss in, a step of a chain whose law is p(theta | data)^(1/T) out.

    A step: closure; one global gradient norm, an error if it is not finite, before anything is written; the gradient of
    the mean potential `grad - grad log p / N`; step sizes and pre-update hooks; noise; update in place; Gibbs update of
    prior scales. Accumulate, unscale (AMP) and clip gradients before `step()`, as with any optimiser. Under
    `torch.compile` the step itself runs eagerly, fused over tensors; forward and backward are compiled.

    Args:
        params: tensors, (name, tensor) pairs, or groups of them; groups may have `lr`, `prior_precision` and the
            sampler's own options. Another lr per group is a fixed diagonal preconditioner: the law stays the same.
        lr: learning rate on the mean loss, or a function of the step (from 0); the Langevin step is `h = lr / N`.
        num_data: N, number of training points.
        shared: see `Shared`.
        own: default options of the sampler's groups.

    Raises:
        ArgumentError: a weight decay, a temperature of one group alone, prior and prior precision together, and values
            out of range.
        UnsupportedError: half-precision parameters without `master`, complex or integer parameters.
    """

    name: ClassVar[str]
    underdamped: bool = False
    variables: tuple[str, ...] = ("theta",)  # what a chain keeps, a sample each; see Entropy-MCMC
    collect: ClassVar[str] = "steps"  # how a chain should choose samples: every so many steps, or in equal "time"

    def __init__(
        self,
        params: Any,
        lr: Schedule,
        num_data: int,
        shared: Shared,
        own: dict[str, Any] | None = None,
    ) -> None:
        refuse_unknown(type(self).__name__, shared, num_data)
        prior, precision = shared.get("prior"), shared.get("prior_precision")
        if prior is not None and precision is not None:
            raise ArgumentError(
                f"prior={prior!r} and prior_precision={precision!r}: give one of them "
                f"(a weight decay wd on the mean loss is a precision of N wd, here {num_data} wd)"
            )
        if isinstance(num_data, bool) or int(num_data) != num_data or num_data < 1:
            raise ArgumentError(f"num_data={num_data!r}; expected the number of training points, at least 1")
        self.num_data = int(num_data)
        self.prior = prior
        self.iteration = 0
        self.counts = StepCounts()
        self.temperature_schedule: Schedule = shared.get("temperature", 1.0)
        self.gibbs_every = at_least_one(shared.get("gibbs_every", 20), "gibbs_every")
        self.allow_unused = shared.get("allow_unused", False)
        self.master = shared.get("master", False)
        self._force = force_of(prior)
        check_ranks(shared.get("generator"))
        self._noise = NoiseStream(shared.get("generator"))
        self._gibbs = self._noise.spawn()
        self._scalars: dict[str, float] = {"time": 0.0}
        self._hooks: OrderedDict[int, Callable[[Sampler], None]] = OrderedDict()
        self._record: StepRecord | None = None
        self._chains: Sequence[Sampler] = ()  # whose parameters are rows of this one's; see `bayesdl.samplers.stacked`
        self._lr_functions: list[Callable[[int], float] | None] = []
        defaults = {"lr": lr, "prior_precision": (1.0 if precision is None else precision) if prior is None else None}
        super().__init__(params, {**defaults, **(own or {})})
        check_temperature(self.temperature)
        if any(group["prior_precision"] == 0 for group in self.param_groups):
            _log.info("prior_precision=0: the prior is flat, and the posterior proper only where the data make it so")

    # --- what a sampler defines -----------------------------------------------------------------------------------

    @abstractmethod
    def _update(self, blocks: list[Block], temperature: float) -> None:
        """Move the parameters in place; `temperature` is T / N, in the units of the mean loss.

        Forces are gone once noise is drawn: it takes their memory.
        """

    def _monitor(self, blocks: list[Block]) -> None:
        """Look at gradients before any noise exists; set `block.scales` for a preconditioner."""

    def _psi(self) -> float:
        """Adaptive factor of the time step about to be made."""
        return 1.0

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise for options of a group that are out of range."""

    # --- the optimiser --------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the chain.

        Args:
            closure: clears the gradients, computes the mean loss, calls `backward` and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            NonFiniteError: NaN or infinity in a gradient; parameters, state and noise stream are as before the call.
            UnreachedParameterError: a parameter has no gradient (see `allow_unused`).
            StepSizeError: the scheme cannot take a step of this size.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._apply_schedules()
        blocks = gather(self.param_groups, self.iteration, self.allow_unused)
        try:
            norm, temperature = self._prepare(blocks)
        except (NonFiniteError, StepSizeError):
            self.counts.refused += 1
            raise
        self.counts.note(norm)
        self._record = (self._chains[0] if self._chains else self)._describe(blocks[0].lr, temperature)
        for hook in list(self._hooks.values()):
            hook(self)
        self._update(blocks, temperature / self.num_data)
        for block in blocks:
            for parameter, moved in zip(block.group["params"], block.params, strict=True):
                if parameter is not moved:
                    parameter.copy_(moved)
        self.iteration += 1
        self._scalars["time"] += self._record.weight
        if self.iteration % self.gibbs_every == 0:
            self._update_prior(blocks, temperature)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; called by the constructor for each group too."""
        where = f"parameter group {len(self.param_groups)}"
        if "weight_decay" in param_group:
            raise ArgumentError(weight_decay_message(param_group["weight_decay"], self.num_data))
        for key in _PER_SAMPLER:
            if key in param_group:
                raise ArgumentError(f"{where} has its own {key}: {key} belongs to the whole sampler (the law of a "
                                    "chain with several is none that is known)")  # fmt: skip
        group = dict(param_group)
        names, tensors = named(group["params"])
        group["params"] = tensors
        if names is not None:
            group["param_names"] = names
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ArgumentError(f"{where} holds a parameter twice: it would move twice a step, with the noise of both")
        if self.prior is not None and group.get("prior_precision") is not None:
            raise ArgumentError(f"{where} has prior_precision={group['prior_precision']!r} beside prior={self.prior!r}")
        rate = group.get("lr", self.defaults["lr"])
        group["lr"] = as_rate(rate(self.iteration) if callable(rate) else rate, where)
        for tensor in tensors:
            check_dtype(tensor, self.master)
        super().add_param_group(group)
        try:
            check_precision(group["prior_precision"], where)
            self._check_group(group)
        except ArgumentError:
            self.param_groups.pop()
            raise
        self._lr_functions.append(rate if callable(rate) else None)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the steps to come: torch's entries, and the sampler's own under "sampler"."""
        found = super().state_dict()
        found["sampler"] = {
            "name": self.name,
            "num_data": self.num_data,
            "iteration": self.iteration,
            "scalars": dict(self._scalars),
            "counts": self.counts.state(),
            "noise": self._noise.state(),
            "gibbs": self._gibbs.get_state(),
            "prior": self._force.state(),
        }
        if not callable(self.temperature_schedule):
            found["sampler"]["temperature"] = self.temperature_schedule
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit.

        Raises:
            FileFormatError: the state of another optimiser, sampler or number of data.
        """
        own = state_dict.get("sampler")
        expected = {"name": self.name, "num_data": self.num_data}
        given = {key: own.get(key) for key in expected} if isinstance(own, dict) else None
        if own is None or given != expected:
            raise FileFormatError(f"the state is of {given or 'another optimiser'}; expected one of {expected}")
        parameters = [p for group in self.param_groups for p in group["params"]]
        check_state(state_dict, self.param_groups, parameters)
        super().load_state_dict(state_dict)
        for index, values in state_dict["state"].items():
            parameter = parameters[index]
            for key, value in values.items():  # torch has cast these to the parameter's dtype: take them as they were
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.detach().to(parameter.device, copy=True)
        self.iteration = int(own["iteration"])
        self._scalars = dict(own["scalars"])
        self.counts = StepCounts.from_state(own.get("counts"))
        self._noise.load(own["noise"])
        self._gibbs.set_state(own["gibbs"].cpu())
        self._force.load(own["prior"])
        if "temperature" in own:
            self.temperature_schedule = own["temperature"]

    def register_pre_update_hook(self, hook: Callable[[Sampler], None]) -> RemovableHandle:
        """Call `hook(sampler)` in every step when theta_k and `sampler.record` are known and nothing has moved yet."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def follow(self, record: StepRecord) -> None:
        """Count a step that another sampler makes with these parameters; called before it moves them, as hooks are."""
        self._record = record
        for hook in list(self._hooks.values()):
            hook(self)
        self.iteration += 1
        self._scalars["time"] += record.weight

    @property
    def record(self) -> StepRecord:
        """The step being made, or the last one made."""
        if self._record is None:
            raise ArgumentError("the sampler has made no step yet: there is nothing to report")
        return self._record

    @property
    def temperature(self) -> float:
        """T of the next step."""
        schedule = self.temperature_schedule
        return float(schedule(self.iteration)) if callable(schedule) else float(schedule)

    @temperature.setter
    def temperature(self, value: Schedule) -> None:
        check_temperature(float(value(self.iteration)) if callable(value) else float(value))
        self.temperature_schedule = value

    @property
    def time(self) -> float:
        """Sum of the weights of the steps made."""
        return self._scalars["time"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": OrderedDict(), "_record": None}

    def __repr__(self) -> str:
        group = self.param_groups[0]
        lr, n = group["lr"], self.num_data
        prior = f"prior={self.prior!r}"
        if group["prior_precision"] is not None:
            lam = group["prior_precision"]
            prior = f"prior_precision={lam:.6g} (prior sd {lam**-0.5 if lam else math.inf:.6g})"
        tensors = [p for g in self.param_groups for p in g["params"]]
        return (
            f"{type(self).__name__}(T_eff={self.temperature:.6g}, {prior}, h={lr / n:.6g} (lr={lr:.6g}, "
            f"num_data={n}){self._remark()}, {sum(t.numel() for t in tensors)} parameters in {len(tensors)} tensors)"
        )

    # --- pieces of a step -----------------------------------------------------------------------------------------

    def _remark(self) -> str:
        """What the repr says beyond the shared line."""
        return ""

    def _describe(self, lr: float, temperature: float) -> StepRecord:
        psi = self._psi()
        weight = psi * math.sqrt(lr) if self.underdamped else psi * lr
        h = lr / self.num_data * (psi * psi if self.underdamped else psi)
        return StepRecord(self.iteration, lr, h, temperature, psi, weight, self._scalars["time"])

    def _prepare(self, blocks: list[Block]) -> tuple[float, float]:
        """Forces and preconditioners of the blocks; the norm of the gradients, and T."""
        norm = finite_norm(blocks, self.iteration)
        temperature = self.temperature
        check_temperature(temperature)
        for block in blocks:
            adopt(block, self.state)
        self._force.prepare(blocks, self._gibbs)
        room = iter(self._noise.workspace([p for block in blocks for p in block.params]))
        for block in blocks:
            block.forces = self._force(block, self.num_data, [next(room) for _ in block.params])
        self._monitor(blocks)
        self._precondition(blocks)
        return norm, temperature

    def _apply_schedules(self) -> None:
        for index, (group, function) in enumerate(zip(self.param_groups, self._lr_functions, strict=True)):
            if function is not None:
                group["lr"] = function(self.iteration)
            group["lr"] = as_rate(group["lr"], f"parameter group {index}")

    def _rows(self, tensors: Sequence[Tensor], *, cut: bool = False) -> list[tuple[Sampler, list[Tensor]]]:
        """Tensors of the parameters by chain: this sampler's own, or a row for each of the chains that it moves.

        With `cut` a row comes as the chain's parameters, for norms that have to be rounded as the chain would alone.
        """
        if not self._chains:
            return [(self, list(tensors))]
        (matrix,) = tensors
        sizes = [p.numel() for group in self._chains[0].param_groups for p in group["params"]]
        return [(one, list(row.split(sizes)) if cut else [row]) for one, row in zip(self._chains, matrix, strict=True)]

    def _precondition(self, blocks: list[Block]) -> None:
        """Multiply forces by the diagonal preconditioner D of the sampler and of the prior's scales."""
        for block in blocks:
            prior = self._force.scales(block)
            if prior is not None:
                block.scales = prior if block.scales is None else list(torch._foreach_mul(block.scales, prior))
            if block.scales is not None:
                block.forces = list(torch._foreach_mul(block.forces, block.scales))

    def _update_prior(self, blocks: list[Block], temperature: float) -> None:
        """Gibbs update of the prior's scales; momenta keep their velocity in the new step sizes."""
        before = [self._force.scales(block) for block in blocks]
        self._force.gibbs(blocks, temperature, self._gibbs)
        for block, old in zip(blocks, before, strict=True):
            new = self._force.scales(block)
            if old is None or new is None:
                continue
            for parameter, ratio in zip(block.group["params"], torch._foreach_div(new, old), strict=True):
                if "momentum" in self.state[parameter]:
                    self.state[parameter]["momentum"].mul_(ratio.sqrt())

    def _drawn(self, blocks: list[Block], temperature: float) -> list[tuple[Block, list[Tensor]]]:
        """sqrt(D) xi for every parameter, in the memory of the forces: use those first. Nothing at T = 0."""
        if temperature == 0:
            return []
        flat = iter(self._noise.draw([p for block in blocks for p in block.params]))
        drawn = []
        for block in blocks:
            part = [next(flat) for _ in block.params]
            if block.scales is not None:
                torch._foreach_mul_(part, list(torch._foreach_sqrt(block.scales)))
            drawn.append((block, part))
        return drawn
