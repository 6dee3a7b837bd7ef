"""Deep ensemble (Lakshminarayanan et al. 2017) of networks or checkpoints that exist already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from torch import Tensor, nn

from bayesdl.checkpoint import read_checkpoint
from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.methods.base import Fitted, Method, Task, with_residual_noise
from bayesdl.network import Network
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
        states: list[Mapping[str, Tensor]] = [model.state_dict() for model in task.models]
        if self.checkpoints:
            loaded = [read_checkpoint(c) if isinstance(c, (str, Path)) else c for c in self.checkpoints]
            states = (states if self.include else []) + loaded
        if len(states) < 2:
            raise ArgumentError(
                f"an ensemble of {len(states)} member was asked for; pass a list of at least two networks to wrap, or "
                "bdl.Ensemble(checkpoints=[...])"
            )
        names = _Names(task.network, task.models[0])
        posterior = SamplePosterior.from_states([names.matched(state, n) for n, state in enumerate(states)])
        likelihood, findings = with_residual_noise(task, posterior)
        return Fitted(posterior, likelihood, findings, cost=(("members", float(len(states))),))


class _Names:
    """The names that a member's tensors may have, and what they are called in the network."""

    def __init__(self, network: Network, model: nn.Module) -> None:
        self.own = network.tensors
        # a submodule of the user's own may be called "module", as the one inside a data-parallel wrapper is
        self.wrapped = not any(name.startswith("module.") for name in self.own)
        first = {id(value): name for name, value in reversed(list(self.own.items()))}
        template = network.template
        every = [*template.named_parameters(remove_duplicate=False), *template.named_buffers(remove_duplicate=False)]
        self.names = {name: first[id(value)] for name, value in every}  # tied tensors have several
        stored = {self.names.get(self.plain(name)) for name in model.state_dict()}
        self.needed = [n for n in self.own if n in stored and not n.endswith("num_batches_tracked")]

    def plain(self, name: str) -> str:
        """Without what compile and data-parallel wrappers add."""
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        return ".".join(parts[1:] if self.wrapped and parts[0] == "module" else parts)

    def matched(self, state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """The tensors of one member under the network's names.

        Raises:
            ArgumentError: a tensor too many or too few.
            ShapeError: a tensor of another shape.
        """
        member: dict[str, Tensor] = {}
        for name, value in state.items():
            own = self.names.get(self.plain(name))
            if name.endswith("_extra_state"):
                continue
            if own is None or not isinstance(value, Tensor):
                raise ArgumentError(
                    f"member {number} holds {name!r}, which the first network lacks; all members must have one "
                    "architecture"
                )
            expected = self.own[own]
            if value.shape != expected.shape:
                raise ShapeError(
                    f"member {number}: {name!r} has shape {tuple(value.shape)}, expected {tuple(expected.shape)}; all "
                    "members must have one architecture"
                )
            member[own] = value.detach().to(expected)
        missing = [name for name in self.needed if name not in member]
        if missing:
            raise ArgumentError(f"member {number} lacks tensor {missing[0]!r}; all members must have one architecture")
        # older files lack the counters of batch norm, which a prediction does not use
        return {name: member.get(name, value.detach()) for name, value in self.own.items()}
