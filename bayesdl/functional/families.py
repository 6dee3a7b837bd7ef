"""Families of weight priors that `match` learns; weights are scaled by 1 / sqrt(fan-in)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from bayesdl.errors import NonFiniteError, UnknownNameError, UnsupportedError
from bayesdl.priors import CouplingPrior, GaussianPrior, HierarchicalPrior, Prior, SplinePrior
from bayesdl.priors.coupling import AffineCoupling, LayerFlow
from bayesdl.priors.spline import Spline

BINS = 8  # of a spline
SETTLED = 0.25  # std of hidden weights around their means at the start, where the means have size one
MAPS, INNER = 4, 8  # couplings of a layer; inner units of each
LARGEST = 10_000  # parameters of a layer under couplings
WIDEST = 1e6  # variances beyond it are cut: their functions overflow, and no target asks for them


@final
@dataclass(frozen=True)
class Slot:
    """One parameter tensor: its name, shape, and the fan-in that divides its variance (1 for a bias).

    Attributes:
        output: whether it belongs to the layer whose outputs are the network's.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    output: bool = False


class Family(nn.Module, ABC):
    """Parameterised law of the selected weights.

    Args:
        slots: the parameter tensors, in order.
    """

    name: ClassVar[str]

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        super().__init__()
        self.slots = slots

    def start(self, generator: torch.Generator) -> None:
        """Draw what the law starts from; most laws draw nothing."""
        del generator

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`n` draws `(n, *shape)` by name, differentiable in the family's parameters."""

    @abstractmethod
    def prior(self) -> Prior:
        """The law as it stands, detached."""

    @abstractmethod
    def describe(self) -> dict[str, dict[str, float]]:
        """Learned quantities by parameter name, readable."""

    def check(self, step: int) -> None:
        """Raise `NonFiniteError` that names the layer whose parameters are no longer numbers."""
        for name, values in self.describe().items():
            for key, value in values.items():
                if not math.isfinite(value):
                    raise NonFiniteError(f"matching: {key} of {name!r} became {value} at step {step}: lower lr")


@final
class GaussianFamily(Family):
    """w = std eps / sqrt(fan-in), one std for each tensor."""

    name: ClassVar[str] = "gaussian"

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        super().__init__(slots)
        self.raw = nn.Parameter(torch.full((len(slots),), _inverse_softplus(1.0), dtype=torch.float64))

    def deviations(self) -> Tensor:
        """std, one for each slot."""
        return nn.functional.softplus(self.raw)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        scales = self.deviations().float()
        return {
            slot.name: torch.randn(n, *slot.shape, generator=generator) * (scale / math.sqrt(slot.fan_in))
            for slot, scale in zip(self.slots, scales, strict=True)
        }

    def prior(self) -> Prior:
        precision = {
            slot.name: slot.fan_in / float(scale) ** 2
            for slot, scale in zip(self.slots, self.deviations().detach(), strict=True)
        }
        return GaussianPrior(precision=precision)

    def describe(self) -> dict[str, dict[str, float]]:
        found = self.deviations().detach()
        return {slot.name: {"std": float(value)} for slot, value in zip(self.slots, found, strict=True)}


@final
class LocatedFamily(Family):
    """w = (m + std eps) / sqrt(fan-in): one std for each tensor, and a mean for each weight before the output layer.

    The means of hidden layers are drawn standard normal and then learned: a network whose features are settled within
    their std, and whose last layer, of mean zero, mixes them. With many of them its functions are nearly Gaussian, of a
    covariance that independent weights of mean zero cannot have.
    """

    name: ClassVar[str] = "located"

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        super().__init__(slots)
        starts = [_inverse_softplus(1.0 if slot.output else SETTLED) for slot in slots]
        self.raw = nn.Parameter(torch.tensor(starts, dtype=torch.float64))
        self.means = nn.ParameterList(torch.zeros(slot.shape) for slot in slots if not slot.output)

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for mean in self.means:
                mean.copy_(torch.randn(mean.shape, generator=generator))

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn, means = {}, iter(self.means)
        for slot, scale in zip(self.slots, nn.functional.softplus(self.raw).float(), strict=True):
            value = torch.randn(n, *slot.shape, generator=generator) * scale
            drawn[slot.name] = (value if slot.output else value + next(means)) / math.sqrt(slot.fan_in)
        return drawn

    def prior(self) -> Prior:
        scales, means = nn.functional.softplus(self.raw.detach()).tolist(), iter(self.means)
        precision = {slot.name: slot.fan_in / scale**2 for slot, scale in zip(self.slots, scales, strict=True)}
        if not len(self.means):
            return GaussianPrior(precision=precision)
        centres = {
            slot.name: torch.zeros(slot.shape) if slot.output else next(means).detach() / math.sqrt(slot.fan_in)
            for slot in self.slots
        }
        return GaussianPrior(precision=precision, mean=centres)

    def describe(self) -> dict[str, dict[str, float]]:
        found, means = {}, iter(self.means)
        for slot, scale in zip(self.slots, nn.functional.softplus(self.raw.detach()).tolist(), strict=True):
            found[slot.name] = {"std": scale}
            if not slot.output:
                found[slot.name]["size of means"] = float(next(means).detach().square().mean().sqrt())
        return found


@final
class HierarchicalFamily(Family):
    """w = sqrt(v / fan-in) eps, v ~ InverseGamma(shape, rate), one v for each tensor AND each function."""

    name: ClassVar[str] = "hierarchical"

    def __init__(self, slots: tuple[Slot, ...], start: float = 3.0) -> None:
        super().__init__(slots)
        self.raw_shape = nn.Parameter(torch.full((len(slots),), _inverse_softplus(start), dtype=torch.float64))
        self.raw_rate = nn.Parameter(torch.full((len(slots),), _inverse_softplus(start), dtype=torch.float64))

    def hyper(self) -> tuple[Tensor, Tensor]:
        """Shape and rate, constrained, one for each slot."""
        return nn.functional.softplus(self.raw_shape), nn.functional.softplus(self.raw_rate)

    def variances(self, n: int, generator: torch.Generator) -> Tensor:
        """v, `(n, slots)`: every function has its own, or its law would be a conditional one."""
        shape, rate = self.hyper()
        # implicit reparameterisation: the derivative of a gamma draw in its shape
        gamma = torch._standard_gamma(shape.expand(n, -1), generator)
        return (rate / gamma.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=WIDEST)

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = {}
        for slot, v in zip(self.slots, self.variances(n, generator).float().unbind(1), strict=True):
            noise = torch.randn(n, *slot.shape, generator=generator)
            drawn[slot.name] = noise * (v / slot.fan_in).sqrt().reshape(n, *(1,) * len(slot.shape))
        return drawn

    def prior(self) -> Prior:
        shape, rate = (value.detach() for value in self.hyper())
        names = [slot.name for slot in self.slots]
        return HierarchicalPrior(
            shape=dict(zip(names, shape.tolist(), strict=True)),
            rate=dict(zip(names, rate.tolist(), strict=True)),
            fan_in=True,
        )

    def describe(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for slot, shape, rate in zip(self.slots, *(v.detach().tolist() for v in self.hyper()), strict=True):
            mean = rate / (shape - 1.0) if shape > 1.0 else math.inf
            found[slot.name] = {"shape": shape, "rate": rate}
            if math.isfinite(mean):
                found[slot.name]["mean variance"] = mean
        return found


@final
class SplineFamily(Family):
    """w = std S(eps) / sqrt(fan-in), S an odd monotone spline for each tensor: weights of a learned shape."""

    name: ClassVar[str] = "spline"

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        super().__init__(slots)
        self.raw = nn.Parameter(torch.full((len(slots),), _inverse_softplus(1.0), dtype=torch.float64))
        self.shapes = nn.Parameter(torch.zeros(len(slots), 3 * BINS, dtype=torch.float64))

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = {}
        for slot, scale, raw in zip(self.slots, nn.functional.softplus(self.raw), self.shapes, strict=True):
            noise = torch.randn(n, *slot.shape, generator=generator)
            bent, _ = Spline.of(raw.float()).forward(noise)
            drawn[slot.name] = bent * (scale.float() / math.sqrt(slot.fan_in))
        return drawn

    def prior(self) -> Prior:
        scales = nn.functional.softplus(self.raw.detach())
        return SplinePrior(
            {slot.name: float(value) for slot, value in zip(self.slots, scales, strict=True)},
            {slot.name: tuple(raw.tolist()) for slot, raw in zip(self.slots, self.shapes.detach(), strict=True)},
        )

    def describe(self) -> dict[str, dict[str, float]]:
        scales = nn.functional.softplus(self.raw.detach())
        at = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        found = {}
        for slot, scale, raw in zip(self.slots, scales, self.shapes.detach(), strict=True):
            values = Spline.of(raw).forward(at)[0]
            bent = {f"S({int(a)})": float(v) for a, v in zip(at, values, strict=True)}
            found[slot.name] = {"scale": float(scale), **bent}
        return found


@final
class CouplingFamily(Family):
    """[b; W] of each layer is a flow of standard normals by affine couplings: weights that depend on each other.

    Raises:
        UnsupportedError: a layer of more than 10,000 parameters.
    """

    name: ClassVar[str] = "coupling"

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        super().__init__(slots)
        self.raw = nn.Parameter(torch.full((len(slots),), _inverse_softplus(1.0), dtype=torch.float64))
        layers: dict[str, list[int]] = {}
        for index, slot in enumerate(slots):
            layers.setdefault(slot.name.rpartition(".")[0], []).append(index)
        # [b; W]: vectors in front
        self.layers = tuple(tuple(sorted(own, key=lambda i: len(slots[i].shape))) for own in layers.values())
        self.numbers = nn.ModuleList()
        source = torch.Generator().manual_seed(0)
        for own in self.layers:
            size = sum(math.prod(slots[i].shape) for i in own)
            if size > LARGEST:
                raise UnsupportedError(
                    f"{slots[own[0]].name!r} belongs to a layer of {size} parameters, and couplings are for up to "
                    f'{LARGEST}: use family="spline" or "hierarchical"'
                )
            self.numbers.extend(_coupling_numbers(size, 1 - step % 2, source) for step in range(MAPS))

    def scales(self) -> Tensor:
        """One for each slot."""
        return nn.functional.softplus(self.raw)

    def maps(self, layer: int) -> tuple[AffineCoupling, ...]:
        """Of one layer, with their graph."""
        own = list(self.numbers)[MAPS * layer : MAPS * (layer + 1)]
        keys = ("inward", "shift", "stretch", "offset")
        return tuple(AffineCoupling(1 - step % 2, *(n.get_parameter(k) for k in keys)) for step, n in enumerate(own))

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn, scales = {}, self.scales().float()
        for layer, own in enumerate(self.layers):
            sizes = [math.prod(self.slots[i].shape) for i in own]
            flat = torch.randn(n, sum(sizes), generator=generator)
            for coupling in self.maps(layer):
                flat = coupling.to(flat).forward(flat)[0]
            for i, piece in zip(own, flat.split(sizes, 1), strict=True):
                slot = self.slots[i]
                drawn[slot.name] = piece.view(n, *slot.shape) * (scales[i] / math.sqrt(slot.fan_in))
        return {slot.name: drawn[slot.name] for slot in self.slots}

    def prior(self) -> Prior:
        flows, scales = [], self.scales().tolist()
        for layer, own in enumerate(self.layers):
            maps = tuple(
                AffineCoupling(m.moves, *(t.detach().clone() for t in (m.inward, m.shift, m.stretch, m.offset)))
                for m in self.maps(layer)
            )
            flows.append(LayerFlow(tuple(self.slots[i].name for i in own), tuple(scales[i] for i in own), maps))
        return CouplingPrior(tuple(flows))

    def describe(self) -> dict[str, dict[str, float]]:
        scales = nn.functional.softplus(self.raw.detach())
        return {slot.name: {"scale": float(value)} for slot, value in zip(self.slots, scales, strict=True)}


def _coupling_numbers(size: int, moves: int, source: torch.Generator) -> nn.ParameterDict:
    """Numbers of one map that starts as the identity."""
    move = size // 2 if moves else (size + 1) // 2
    stay = size - move
    inward = torch.randn(INNER, stay, generator=source, dtype=torch.float64) / math.sqrt(max(1, stay))
    zeros = torch.zeros(move, INNER, dtype=torch.float64)
    return nn.ParameterDict(
        {
            "inward": nn.Parameter(inward),
            "shift": nn.Parameter(zeros.clone()),
            "stretch": nn.Parameter(zeros.clone()),
            "offset": nn.Parameter(zeros[:, 0].clone()),
        }
    )


FAMILIES: dict[str, type[Family]] = {
    "gaussian": GaussianFamily,
    "located": LocatedFamily,
    "hierarchical": HierarchicalFamily,
    "spline": SplineFamily,
    "coupling": CouplingFamily,
}


def make(name: str, slots: tuple[Slot, ...]) -> Family:
    """A family by name. Raises `UnknownNameError`."""
    if name not in FAMILIES:
        raise UnknownNameError(f"family {name!r} is not known; choose one of {sorted(FAMILIES)}")
    return FAMILIES[name](slots)


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
