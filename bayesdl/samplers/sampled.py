"""What a sample consists of: the sampled parameters by name, and the buffers that training changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bayesdl.clone import structural_clone, unwrap
from bayesdl.errors import ArgumentError, NonFiniteError, StaleModelError, UnsupportedError
from bayesdl.samplers.base import Sampler
from bayesdl.sharded import made_by_fsdp

DTYPES = ("float32", "float64", "bfloat16-delta")
BUFFERS = ("keep", "refresh", "shared")
_COUNTER = "num_batches_tracked"  # counts batches in training; a prediction does not use it


@final
@dataclass(frozen=True)
class Snapshot:
    """Sampled parameters and buffers at one moment."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


@final
class Sampled:
    """The tensors of a user's network that a chain reads.

    Names are those of `bayesdl.network.Network`, without what `torch.compile` and data-parallel wrappers add.

    Args:
        net: the user's network; read, never written to.
        sampler: its parameters are the sampled ones; names; or None for all that require a gradient.
        buffers: "shared" leaves buffers out.
        dtype: of what is kept, see `Chain`.
    """

    def __init__(self, net: nn.Module, sampler: Sampler | Sequence[str] | None, buffers: str, dtype: str) -> None:
        if not isinstance(net, nn.Module):
            raise ArgumentError(f"a torch.nn.Module is expected, got {type(net).__name__}")
        self._net = unwrap(net)
        if made_by_fsdp(self._net):
            raise UnsupportedError("the network's parameters are sharded over processes (FSDP2), and a chain reads "
                                   "whole ones: sample a plain or a DistributedDataParallel network")  # fmt: skip
        everything: dict[str, Tensor] = dict(_plain(self._net).named_parameters())
        self.parameters = _chosen(everything, sampler)
        self.others = {name: p for name, p in everything.items() if name not in self.parameters}
        self._buffers, self.dtype = buffers, dtype
        self._norms = norms = [
            name for name, m in self._net.named_modules() if isinstance(m, _NormBase) and m.running_mean is not None
        ]
        if buffers == "shared" and norms:
            raise ArgumentError(
                f"buffers='shared', and {norms[0]!r} has running statistics, which belong to the weights they were "
                "computed at: buffers='keep' or 'refresh'"
            )
        self.base: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}

    @property
    def device(self) -> torch.device:
        """Of the first sampled parameter."""
        return next(iter(self.parameters.values())).device

    def begin(self, base: Mapping[str, Tensor] | None = None) -> None:
        """Take the present values, or those of a store, as those that samples are differences from."""
        if base is None:
            base = {name: value.detach().clone() for name, value in self.buffers().items()}
            if self.dtype == "bfloat16-delta":
                base |= {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.base = {name: value.to(self.device) for name, value in base.items()}
        self._versions = {name: p._version for name, p in self.others.items()}

    def buffers(self) -> dict[str, Tensor]:
        """All buffers of the network as they are now."""
        return dict(_plain(self._net).named_buffers())

    def snapshot(self, sampler: Sampler | None, variable: str = "theta") -> Snapshot:
        """Parameters and buffers as they are now, in memory of their own; `variable` is one of the sampler's.

        Raises:
            StaleModelError: a parameter that is not sampled was trained on.
            ArgumentError: an anchor in a network with running statistics, which are those of theta.
        """
        if variable != "theta" and self._norms and self._buffers != "refresh":
            raise ArgumentError(
                f"the chain collects the sampler's {variable}, and the running statistics of {self._norms[0]!r} belong "
                "to theta: pass buffers='refresh' and data= to Chain"
            )
        for name, other in self.others.items():
            if other._version != self._versions[name]:
                raise StaleModelError(
                    f"parameter {name!r} is not sampled and was written to while the chain ran: its samples would "
                    "belong to networks that are gone. Give it to the sampler, or freeze it (requires_grad=False)"
                )
        buffers = {} if self._buffers == "shared" else self.buffers()
        return Snapshot(
            {name: _moving(p, sampler, variable).clone() for name, p in self.parameters.items()},
            {name: value.detach().clone() for name, value in buffers.items() if not name.endswith(_COUNTER)},
        )

    def encoded(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """What is kept: parameters in the dtype of the chain, and the buffers that are not what they were at `begin`.

        Raises:
            NonFiniteError: NaN or infinity in a parameter.
        """
        _check_finite(snapshot.parameters)
        values = {name: self._kept(name, value) for name, value in snapshot.parameters.items()}
        return values | {
            name: value for name, value in snapshot.buffers.items() if not torch.equal(value, self.base[name])
        }

    def by_id(self, snapshot: Snapshot) -> dict[int, Tensor]:
        """A snapshot's parameters by the `id` of the network's own."""
        return {id(p): snapshot.parameters[name] for name, p in self.parameters.items()}

    def load(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Write a stored state into the network."""
        own = {**self.parameters, **self.buffers()}
        with torch.no_grad():
            for name, value in (*parameters.items(), *buffers.items()):
                own[name].copy_(value)

    def shapes(self) -> dict[str, Any]:
        """Shape and dtype of the sampled parameters by name, as JSON."""
        return {name: [list(p.shape), str(p.dtype)] for name, p in self.parameters.items()}

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, dtypes and values of the parameters that are not sampled."""
        digest = hashlib.sha256()
        for name, tensor in self.others.items():
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
            digest.update(tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def planned(self, max_samples: int | None) -> int:
        """Bytes on disk of so many samples (None: one), one more while it replaces another, base and resume files."""
        width = {"float32": 4, "float64": 8, "bfloat16-delta": 2}[self.dtype]
        count = sum(p.numel() for p in self.parameters.values())
        buffers = sum(b.numel() * b.element_size() for b in self.buffers().values())
        # a resume file holds the parameters and mostly one tensor of state for each, and is there twice while replaced
        return ((max_samples or 1) + 1) * (width * count + buffers) + 4 * 4 * count + 2 * buffers

    def _kept(self, name: str, value: Tensor) -> Tensor:
        if self.dtype == "bfloat16-delta":
            return (value.float() - self.base[name]).to(torch.bfloat16)
        kept: Tensor = value.to(getattr(torch, self.dtype))
        return kept


def _plain(net: nn.Module) -> nn.Module:
    """A module tree over the same tensors, with wrappers at every level peeled off."""
    return structural_clone(net, lambda tensor: tensor, lambda tensor: tensor)


def _chosen(everything: dict[str, Tensor], sampler: Sampler | Sequence[str] | None) -> dict[str, Tensor]:
    if sampler is None:
        found = {name: p for name, p in everything.items() if p.requires_grad}
        if not found:
            raise ArgumentError("no parameter of the network requires a gradient: there is nothing to sample")
        return found
    if not isinstance(sampler, Sampler):
        return {name: everything[name] for name in sampler if name in everything}
    own = {id(p) for group in sampler.param_groups for p in group["params"]}
    found = {name: p for name, p in everything.items() if id(p) in own}
    if len(found) != len(own):
        raise ArgumentError(
            f"{len(own) - len(found)} of the sampler's {len(own)} parameters are none of this network's: build the "
            "sampler from the parameters of the network that the chain collects"
        )
    return found


def _moving(parameter: Tensor, sampler: Sampler | None, variable: str = "theta") -> Tensor:
    """The parameter, the float32 copy that moves in its place, or another variable of the sampler's (an anchor)."""
    if sampler is not None and variable != "theta" and parameter in sampler.state:
        held: Tensor | None = sampler.state[parameter].get(variable)
        if held is not None:  # before the first step every variable is at the parameter
            return held
    if sampler is not None and parameter in sampler.state and "master" in sampler.state[parameter]:
        master: Tensor = sampler.state[parameter]["master"]
        return master
    return parameter.detach()


def _check_finite(values: Mapping[str, Tensor]) -> None:
    norms = torch._foreach_norm([value.float() for value in values.values()])
    if bool(torch.isfinite(torch.stack([norm.to(norms[0]) for norm in norms]).sum())):
        return
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"parameter {name!r} holds NaN or infinity; nothing was collected (look at the loss and the learning "
                "rate)"
            )
