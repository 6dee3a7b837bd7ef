"""Sample posterior: snapshots of parameters and buffers (ensembles, SWAG, chains), with weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, FileFormatError, NotFittedError, ShapeError, check_finite
from bayesdl.latent import Latent, SampleLatent
from bayesdl.network import Network
from bayesdl.posteriors.base import Function, Posterior, frozen
from bayesdl.posteriors.heads import bayesian_head, head_functions, head_latent


@final
@dataclass(frozen=True, eq=False)
class SamplePosterior(Posterior):
    """S snapshots.

    Attributes:
        snapshots: `(S, *shape)` by tensor name; names that do not vary may be left out.
        weights: `(S,)`, summing to one.
        chains: `(S,)`, integers: the Markov chain that each sample is from; None where there are none.
    """

    snapshots: Mapping[str, Tensor]
    weights: Tensor
    chains: Tensor | None = None

    kind: ClassVar[str] = "samples"

    def __post_init__(self) -> None:
        if self.chains is not None and self.chains.shape != self.weights.shape:
            raise ShapeError(f"{tuple(self.chains.shape)} chain ids for {len(self.weights)} samples")
        for name, value in self.snapshots.items():
            if value.shape[0] != len(self.weights):
                raise ShapeError(
                    f"snapshot {name!r} holds {value.shape[0]} samples and there are {len(self.weights)} weights"
                )
            check_finite(value, f"snapshot {name!r}")

    @classmethod
    def from_states(cls, states: Sequence[Mapping[str, Tensor]], weights: Tensor | None = None) -> Self:
        """From one mapping of tensors per sample (copied).

        Raises:
            NotFittedError: no sample.
            ArgumentError: the samples hold different tensors.
        """
        if not states:
            raise NotFittedError("no sample was collected: lower burn_in or thin, or run longer")
        for number, state in enumerate(states):
            odd = set(state) ^ set(states[0])
            if odd:
                raise ArgumentError(f"sample {number} differs from sample 0 in tensor {sorted(odd)[0]!r}")
            for name, value in state.items():
                if value.shape != states[0][name].shape:
                    raise ShapeError(
                        f"{name!r} has shape {tuple(value.shape)} in sample {number} and "
                        f"{tuple(states[0][name].shape)} in sample 0; all members must have one architecture"
                    )
        stacked = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
        share = torch.full((len(states),), 1.0 / len(states)) if weights is None else weights
        return cls(stacked, share)

    def __len__(self) -> int:
        return len(self.weights)

    def push(self, network: Network, inputs: Any, state: Any) -> Latent:
        call = network.prepare(inputs)
        held = self._cast(network)
        name = bayesian_head(network)
        if name is not None:
            beliefs = [head_latent(network, name, call, {k: v[i] for k, v in held.items()}) for i in range(len(self))]
            means, variances = (torch.stack(part) for part in zip(*beliefs, strict=True))
            return SampleLatent(means, self.weights.to(means), variances)
        outputs = torch.stack([network(call, {k: v[i] for k, v in held.items()}) for i in range(len(self))])
        return SampleLatent(outputs, self.weights.to(outputs))

    def draw(self, network: Network, n: int, generator: torch.Generator | None) -> list[Function]:
        """Distinct members while n <= S and all weigh the same; resampled by weight otherwise.

        A member that ends in a Bayesian head is a function drawn from that head.
        """
        source = generator or torch.Generator().manual_seed(0)
        if n <= len(self) and bool((self.weights == self.weights[0]).all()):
            order = torch.randperm(len(self), generator=source, device=source.device)[:n]
        else:
            shares = self.weights.float().to(source.device)
            order = torch.multinomial(shares, n, replacement=True, generator=source)
        held = self._cast(network)
        name = bayesian_head(network)
        if name is not None:
            states = [{key: value[int(i)] for key, value in held.items()} for i in order]
            return head_functions(network, name, states, source)
        return [frozen(network, {name: value[int(i)] for name, value in held.items()}) for i in order]

    def _cast(self, network: Network) -> dict[str, Tensor]:
        # the network may have been moved to half precision, where samples are not kept
        own = network.tensors
        return {name: value.to(own[name].dtype) for name, value in self.snapshots.items()}

    @property
    def forward_passes(self) -> float:
        return float(len(self))

    @property
    def over_weights(self) -> bool:
        return True

    def check(self, network: Network) -> None:
        """Raise `FileFormatError` where a snapshot is of another network, or a weight is no weight."""
        for name, value in self.snapshots.items():
            own = network.tensors.get(name)
            if own is None or own.shape != value.shape[1:] or own.is_floating_point() != value.is_floating_point():
                shape = "absent" if own is None else tuple(own.shape)
                raise FileFormatError(f"snapshot {name!r} is {tuple(value.shape)[1:]}; in the network it is {shape}")
        weights = self.weights
        if weights.dim() != 1 or not weights.is_floating_point() or not bool((weights >= 0).all() and weights.any()):
            raise FileFormatError("the weights of the samples are no vector of positive numbers")
        if self.chains is not None and self.chains.is_floating_point():
            raise FileFormatError(f"chain ids are of {self.chains.dtype}; expected integers")

    def tensors(self) -> dict[str, Tensor]:
        chains = {} if self.chains is None else {"chains": self.chains}
        snapshots = {f"snapshot.{name}": value for name, value in self.snapshots.items()}
        return {"weights": self.weights, **chains, **snapshots}

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        prefix = "snapshot."
        snapshots = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        return cls(snapshots, tensors["weights"], tensors.get("chains"))
