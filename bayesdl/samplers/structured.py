"""Structured SG-MCMC (Alexos, Boyd and Mandt 2022): independent laws of groups of weights, the best such product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, FileFormatError
from bayesdl.samplers.base import Sampler

LossFn = Callable[[dict[str, Tensor]], Tensor]


@final
class Structured:
    """Each group of parameters sees the others drawn independently, group by group, from its own past.

    Args:
        sampler: over (name, tensor) pairs; its parameters move.
        groups: "layer" (by the module that owns them), lists of names, or a function name -> key.
        reservoir: past values kept of each group, a ring.
        thin: steps between two of them.
        burn_in: steps before the first; until then the others are as they are now.
        live: None makes one forward pass a group; a probability makes `masks` passes in which each group is live with
            that probability and drawn otherwise (the dropout form).
        masks: passes of the dropout form.
        generator: of draws and masks; None draws its seed from torch's global generator.

    Raises:
        ArgumentError: parameters without names, groups that are no partition of them, numbers out of range.
    """

    def __init__(
        self,
        sampler: Sampler,
        groups: str | Sequence[Sequence[str]] | Callable[[str], Any] = "layer",
        *,
        reservoir: int = 32,
        thin: int = 50,
        burn_in: int = 0,
        live: float | None = None,
        masks: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if min(reservoir, thin, masks) < 1 or burn_in < 0 or (live is not None and not 0 < live <= 1):
            raise ArgumentError(
                f"reservoir={reservoir}, thin={thin}, masks={masks}, burn_in={burn_in}, live={live}; expected at "
                "least 1 (burn_in: 0), and a live probability above 0 and at most 1, or None"
            )
        self.sampler, self.reservoir, self.thin, self.burn_in = sampler, reservoir, thin, burn_in
        self.live, self.masks = live, masks
        self._parameters = _parameters(sampler)
        self.groups = _partition(list(self._parameters), groups)
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self._generator = generator
        self._past: list[list[dict[str, Tensor]]] = [[] for _ in self.groups]
        self._stored = 0
        self.steps = 0

    @property
    def span(self) -> int:
        """Steps from the oldest value kept to the newest; the law is biased if that is few autocorrelation times."""
        return max(len(self._past[0]) - 1, 0) * self.thin

    def step(self, loss_fn: LossFn) -> Tensor:
        """One step of the sampler with gradients of structured losses.

        Args:
            loss_fn: parameters by name -> MEAN loss of the current batch (as by `functional_call`).

        Returns:
            The mean of the losses computed.
        """
        grads, loss = self._per_group(loss_fn) if self.live is None else self._masked(loss_fn, self.live)
        before = {name: parameter.grad for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.grad = grads[name]
        try:
            self.sampler.step()
        finally:
            for name, parameter in self._parameters.items():
                parameter.grad = before[name]
        self.steps += 1
        if self.steps > self.burn_in and (self.steps - self.burn_in) % self.thin == 0:
            self._store()
        return loss

    def draw(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One network: every group drawn independently from its past."""
        source = self._generator if generator is None else generator
        found: dict[str, Tensor] = {}
        for index in range(len(self.groups)):
            found.update(self._others(index, source))
        return {name: found[name] for name in self._parameters}

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state, the reservoir and the generator."""
        past: dict[str, Tensor] = {}
        for values in self._past:
            for name in values[0] if values else ():
                past[name] = torch.stack([value[name] for value in values])
        numbers = {"steps": self.steps, "stored": self._stored, "groups": [list(group) for group in self.groups]}
        return {
            **numbers,
            "past": past,
            "generator": self._generator.get_state(),
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was taken. Raises `FileFormatError` for other groups."""
        if state_dict.get("groups") != [list(group) for group in self.groups]:
            raise FileFormatError(f"the state has the groups {state_dict.get('groups')}; expected {self.groups}")
        self.sampler.load_state_dict(state_dict["sampler"])
        self.steps, self._stored = int(state_dict["steps"]), int(state_dict["stored"])
        self._generator.set_state(state_dict["generator"].cpu())
        past = state_dict["past"]
        for index, group in enumerate(self.groups):
            length = len(past[group[0]]) if past else 0
            self._past[index] = [
                {name: past[name][i].to(self._parameters[name].device, copy=True) for name in group}
                for i in range(length)
            ]

    def _per_group(self, loss_fn: LossFn) -> tuple[dict[str, Tensor], Tensor]:
        grads, losses = {}, []
        for index, group in enumerate(self.groups):
            values = {name: self._parameters[name].detach() for name in group}
            for other in range(len(self.groups)):
                if other != index:
                    values.update(self._others(other, self._generator))
            found, loss = self._gradient(loss_fn, values, group)
            grads.update(found)
            losses.append(loss)
        return grads, torch.stack(losses).mean()

    def _masked(self, loss_fn: LossFn, probability: float) -> tuple[dict[str, Tensor], Tensor]:
        grads = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}
        losses = []
        for _ in range(self.masks):
            alive = torch.rand(len(self.groups), generator=self._generator, device=self._generator.device) < probability
            values: dict[str, Tensor] = {}
            names: list[str] = []
            for index, group in enumerate(self.groups):
                if bool(alive[index]):
                    values.update({name: self._parameters[name].detach() for name in group})
                    names.extend(group)
                else:
                    values.update(self._others(index, self._generator))
            found, loss = self._gradient(loss_fn, values, names)
            for name, grad in found.items():
                grads[name].add_(grad, alpha=1 / (self.masks * probability))
            losses.append(loss)
        return grads, torch.stack(losses).mean()

    def _gradient(
        self, loss_fn: LossFn, values: Mapping[str, Tensor], names: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        ordered = {name: leaves.get(name, values[name]) for name in self._parameters}
        with torch.enable_grad():
            loss = loss_fn(ordered)
        if not names:
            return {}, loss.detach()
        found = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(leaves, found, strict=True)), loss.detach()

    def _others(self, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        past = self._past[index]
        if not past:
            return {name: self._parameters[name].detach() for name in self.groups[index]}
        pick = int(torch.randint(len(past), (), generator=generator, device=generator.device))
        return past[pick]

    def _store(self) -> None:
        place = self._stored % self.reservoir
        for group, past in zip(self.groups, self._past, strict=True):
            value = {name: self._parameters[name].detach().clone() for name in group}
            if place < len(past):
                past[place] = value
            else:
                past.append(value)
        self._stored += 1


def _parameters(sampler: Sampler) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for group in sampler.param_groups:
        if "param_names" not in group:
            raise ArgumentError("the sampler's parameters have no names: build it from net.named_parameters()")
        found.update(zip(group["param_names"], group["params"], strict=True))
    return found


def _partition(names: list[str], groups: Any) -> list[list[str]]:
    if groups == "layer":
        groups = lambda name: name.rpartition(".")[0]  # noqa: E731
    if callable(groups):
        keys: dict[Any, list[str]] = {}
        for name in names:
            keys.setdefault(groups(name), []).append(name)
        return list(keys.values())
    if isinstance(groups, str):
        raise ArgumentError(f'groups={groups!r}; expected "layer", lists of names, or a function of the name')
    found = [list(group) for group in groups]
    if sorted(name for group in found for name in group) != sorted(names) or not all(found):
        raise ArgumentError(f"groups={found} is no partition of the sampler's parameters {names}")
    return found
