"""Weights with a learned marginal law: a monotone spline of a standard normal, element by element."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.priors.base import Prior, fan_in

EDGE = 4.0  # beyond it the spline is the identity


@final
@dataclass(frozen=True, eq=False)
class Spline:
    """Odd, increasing map: rational quadratic in bins on [0, EDGE], the identity outside (Durkan et al. 2019).

    Attributes:
        widths, heights: `(B,)`, positive, each summing to EDGE.
        slopes: `(B + 1,)`, positive derivatives at the knots; the last is one.
    """

    widths: Tensor
    heights: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, raw: Tensor) -> Spline:
        """From unconstrained numbers `(3 B,)`; zeros give the identity."""
        if raw.dim() != 1 or raw.numel() % 3 or not raw.numel():
            raise ShapeError(f"a spline takes 3 numbers a bin in one vector, got shape {tuple(raw.shape)}")
        widths, heights, slopes = raw.chunk(3)
        # a floor keeps every bin open; softplus(log(e - 1)) = 1
        share = 1e-3
        count = len(widths)

        def parts(values: Tensor) -> Tensor:
            return EDGE * (share + (1.0 - share * count) * torch.softmax(values, 0))

        inner = torch.nn.functional.softplus(slopes + math.log(math.expm1(1.0 - share))) + share
        return cls(parts(widths), parts(heights), torch.cat([inner, inner.new_ones(1)]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """S(x) and log S'(x), in the shape of `x`."""
        inside, left, low, width, height, first, last = self._bin(x.abs(), self.widths)
        share = ((x.abs() - left) / width).clamp(0.0, 1.0)
        slope = height / width
        mixed = share * (1.0 - share)
        below = slope + (last + first - 2.0 * slope) * mixed
        value = low + height * (slope * share.square() + first * mixed) / below
        rise = slope.square() * (last * share.square() + 2.0 * slope * mixed + first * (1.0 - share).square())
        return torch.where(inside, value * x.sign(), x), torch.where(inside, (rise / below.square()).log(), 0.0)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """S^-1(y) and log S'(S^-1(y)), in closed form."""
        inside, low, left, height, width, first, last = self._bin(y.abs(), self.heights)
        slope = height / width
        above = (y.abs() - low).clamp(min=0.0)
        bend = last + first - 2.0 * slope
        a = height * (slope - first) + above * bend
        b = height * first - above * bend
        c = -slope * above
        share = (2.0 * c / (-b - (b.square() - 4.0 * a * c).clamp(min=0.0).sqrt())).clamp(0.0, 1.0)
        mixed = share * (1.0 - share)
        below = slope + bend * mixed
        rise = slope.square() * (last * share.square() + 2.0 * slope * mixed + first * (1.0 - share).square())
        value = (left + width * share) * y.sign()
        return torch.where(inside, value, y), torch.where(inside, (rise / below.square()).log(), 0.0)

    def _bin(self, magnitude: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Whether inside, then start and start of the image, size and size of the image, slopes at both ends."""
        other = self.heights if sizes is self.widths else self.widths
        zero = sizes.new_zeros(1)
        starts, images = torch.cat([zero, sizes.cumsum(0)]), torch.cat([zero, other.cumsum(0)])
        inside = magnitude < EDGE
        k = torch.searchsorted(starts[1:-1].detach().contiguous(), magnitude.detach().contiguous(), right=True)
        return inside, starts[k], images[k], sizes[k], other[k], self.slopes[k], self.slopes[k + 1]


@final
@dataclass(frozen=True)
class SplinePrior(Prior):
    """w = scale S(e) / sqrt(fan-in) with e ~ N(0, 1), independently for every weight of a tensor.

    The sampler and the density use the same map in opposite directions. Laplace approximations need a Gaussian prior.

    Args:
        scales: by parameter name.
        splines: 3 B unconstrained numbers by parameter name, see `Spline.of`.
        report: how it was found, where `bdl.functional.match` found it.
    """

    scales: Mapping[str, float]
    splines: Mapping[str, Sequence[float]]
    report: object = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "spline"

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=next(iter(parameters.values())).device)
        for name, value in parameters.items():
            scale, spline = self._law(name, value)
            base, stretch = spline.inverse(value.double() / scale)
            each = -0.5 * (base.square() + math.log(2.0 * math.pi)) - stretch - math.log(scale)
            total = total + each.sum().to(total.device)
        return total

    def sample(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        drawn = {}
        for name, value in parameters.items():
            scale, spline = self._law(name, value.cpu())
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            drawn[name] = (scale * spline.forward(noise)[0]).to(value)
        return drawn

    def _law(self, name: str, value: Tensor) -> tuple[float, Spline]:
        if name not in self.scales or name not in self.splines:
            raise ArgumentError(
                f"the prior has a law for {sorted(self.scales)} and none for {name!r}; select the same parameters "
                "that it was made for"
            )
        scale = self.scales[name] / math.sqrt(fan_in(value))
        return scale, Spline.of(torch.tensor(self.splines[name], device=value.device, dtype=torch.float64))
