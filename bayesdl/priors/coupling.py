"""Weights of a layer with a learned joint law: affine couplings of standard normals, one map in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.priors.base import Prior, fan_in

BOUND = 1.0  # of |log s|: no map stretches a coordinate by more than e


@final
@dataclass(frozen=True, eq=False)
class AffineCoupling:
    """Every second coordinate is scaled and shifted by functions of the others (Dinh et al. 2017).

    With x the coordinates that stay and h = tanh(A x): `log s = BOUND tanh(C h^2 + c)`, `t = B h`, and those that move
    become `s z + t`. h is odd, so s is even and t odd: the law of the result is that of its negative, of mean zero.

    Attributes:
        moves: 1 where coordinates 1, 3, ... move, 0 where 0, 2, ... do.
        inward: A `(r, stay)`.
        shift: B `(move, r)`.
        stretch: C `(move, r)`.
        offset: c `(move,)`.
    """

    moves: int
    inward: Tensor
    shift: Tensor
    stretch: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        stay, move = self.inward.shape[-1], len(self.offset)
        width = len(self.inward)
        if self.shift.shape != (move, width) or self.stretch.shape != (move, width) or abs(stay - move) > 1:
            raise ShapeError(
                f"a coupling of {stay} coordinates that stay and {move} that move takes shift and stretch of shape "
                f"{(move, width)}, got {tuple(self.shift.shape)} and {tuple(self.stretch.shape)}"
            )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The image of z `(..., d)` and the log-determinant of the map there `(...,)`."""
        stay, move = z[..., 1 - self.moves :: 2], z[..., self.moves :: 2]
        log_scale, shift = self._given(stay)
        return self._woven(stay, move * log_scale.exp() + shift), log_scale.sum(-1)

    def inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """z of an image `(..., d)`, and the log-determinant of the map at z `(...,)`."""
        stay, moved = w[..., 1 - self.moves :: 2], w[..., self.moves :: 2]
        log_scale, shift = self._given(stay)
        return self._woven(stay, (moved - shift) * torch.exp(-log_scale)), log_scale.sum(-1)

    def to(self, like: Tensor) -> AffineCoupling:
        """In the dtype and on the device of a tensor."""
        return AffineCoupling(
            self.moves, self.inward.to(like), self.shift.to(like), self.stretch.to(like), self.offset.to(like)
        )

    def _given(self, stay: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.tanh(stay @ self.inward.mT)
        return BOUND * torch.tanh(inner.square() @ self.stretch.mT + self.offset), inner @ self.shift.mT

    def _woven(self, stay: Tensor, move: Tensor) -> Tensor:
        both = (move, stay) if self.moves == 0 else (stay, move)
        size = stay.shape[-1] + move.shape[-1]
        if size % 2:  # the even places are one more
            pairs = torch.stack([both[0][..., :-1], both[1]], -1).flatten(-2)
            return torch.cat([pairs, both[0][..., -1:]], -1)
        return torch.stack(both, -1).flatten(-2)


@final
@dataclass(frozen=True, eq=False)
class LayerFlow:
    """The joint law of a layer's parameters: flat, one after another, divided by their scales, a flow of N(0, I).

    Attributes:
        names: of the parameters, in flat order.
        scales: of each; for weights the value times 1 / sqrt(fan-in).
        maps: applied one after another.
    """

    names: tuple[str, ...]
    scales: tuple[float, ...]
    maps: tuple[AffineCoupling, ...]


@final
@dataclass(frozen=True, eq=False)
class CouplingPrior(Prior):
    """[b; W] of each layer is an invertible flow of standard normals; layers are independent.

    The sampler and the density use the same map in opposite directions. Laplace approximations need a Gaussian prior.

    Args:
        layers: flows that together hold every selected parameter once.
        report: how it was found, where `bdl.functional.match` found it.
    """

    layers: tuple[LayerFlow, ...]
    report: object = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "coupling"

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=next(iter(parameters.values())).device)
        for layer in self._of(parameters):
            pieces, logs = [], torch.zeros_like(total)
            for name, scale in zip(layer.names, layer.scales, strict=True):
                value = parameters[name].double()
                unit = scale / math.sqrt(fan_in(value))
                pieces.append(value.reshape(-1) / unit)
                logs = logs - value.numel() * math.log(unit)
            flat = torch.cat(pieces)
            for coupling in reversed(layer.maps):
                flat, stretch = coupling.to(flat).inverse(flat)
                logs = logs - stretch
            total = total + logs - 0.5 * (flat.square() + math.log(2.0 * math.pi)).sum()
        return total

    def sample(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        drawn = {}
        for layer in self._of(parameters):
            values = [parameters[name] for name in layer.names]
            flat = torch.randn(sum(v.numel() for v in values), generator=generator, dtype=torch.float64)
            for coupling in layer.maps:
                flat = coupling.to(flat).forward(flat)[0]
            for name, scale, value, piece in zip(
                layer.names, layer.scales, values, flat.split([v.numel() for v in values]), strict=True
            ):
                drawn[name] = (piece.view(value.shape) * (scale / math.sqrt(fan_in(value)))).to(value)
        return {name: drawn[name] for name in parameters}

    def _of(self, parameters: Mapping[str, Tensor]) -> tuple[LayerFlow, ...]:
        """The layers, all of whose parameters are given, and no others."""
        mine = [name for layer in self.layers for name in layer.names]
        odd = sorted(set(mine) ^ set(parameters))
        if odd:
            raise ArgumentError(
                f"the prior has a joint law for {sorted(mine)}, and {sorted(parameters)} were given ({odd[0]!r} "
                "differs); select the same parameters that it was made for"
            )
        return self.layers
