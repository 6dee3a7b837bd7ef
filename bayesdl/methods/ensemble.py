"""Deep ensemble (Lakshminarayanan et al. 2017) of networks or checkpoints that exist already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.clone import unwrap
from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.files import read_checkpoint
from bayesdl.methods.base import Fitted, Method, Task, with_residual_noise
from bayesdl.posteriors import SamplePosterior

Checkpoint = Mapping[str, Tensor] | str | Path


@final
@dataclass(frozen=True)
class Ensemble(Method):
    """An equal mixture of networks of one architecture.

    Call `bdl.wrap([net1, net2, ...], "ensemble", likelihood=...)`, or give one network and the checkpoints.

    Args:
        checkpoints: state dicts, or paths of .safetensors / .pt files, each a member. The network passed to `wrap`
            is then only the architecture, unless `include` is set.
        include: count the network itself as a member too.
    """

    checkpoints: Sequence[Checkpoint] = ()
    include: bool = False

    name: ClassVar[str] = "ensemble"

    def fit(self, task: Task) -> Fitted:
        states = [_state(model.state_dict()) for model in map(unwrap, task.models)]
        if self.checkpoints:
            loaded = [_state(read_checkpoint(c) if isinstance(c, (str, Path)) else c) for c in self.checkpoints]
            states = (states if self.include else []) + loaded
        if len(states) < 2:
            raise ArgumentError(
                f"an ensemble of {len(states)} member was asked for; pass a list of at least two networks to wrap, or "
                "bdl.Ensemble(checkpoints=[...])"
            )
        own = task.network.tensors
        members = [_matched(state, own, number) for number, state in enumerate(states)]
        posterior = SamplePosterior.from_states(members)
        likelihood, findings = with_residual_noise(task, posterior)
        return Fitted(posterior, likelihood, findings, cost=(("members", float(len(members))),))


def _state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that compile and data-parallel wrappers add."""
    cleaned = {}
    for name, value in state.items():
        for prefix in ("_orig_mod.", "module."):
            name = name.removeprefix(prefix)
        cleaned[name] = value
    return cleaned


def _matched(state: Mapping[str, Tensor], own: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    missing = [name for name in own if name not in state]
    if missing:
        # a tied parameter appears once in the network and under several names in state dicts; buffers outside the
        # state dict (persistent=False) stay as they are
        absent = [name for name in missing if not _is_transient(name, own)]
        if absent:
            raise ArgumentError(
                f"member {number} lacks tensor {absent[0]!r}: its architecture differs from the first network's"
            )
    member = {}
    for name, value in own.items():
        if name not in state:
            continue
        if state[name].shape != value.shape:
            raise ShapeError(
                f"member {number}: {name!r} has shape {tuple(state[name].shape)}, expected "
                f"{tuple(value.shape)}; all members "
                "must have one architecture"
            )
        member[name] = torch.as_tensor(state[name]).to(value)
    return member


def _is_transient(name: str, own: Mapping[str, Tensor]) -> bool:
    return not isinstance(own[name], torch.nn.Parameter)
