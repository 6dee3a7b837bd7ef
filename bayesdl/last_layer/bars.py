"""Bars: regression as a distribution over bins (Mueller et al. 2022), with skew, modes and tails in closed form."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from bayesdl.errors import ArgumentError, LabelError, NonFiniteError, ShapeError, UnknownNameError, UnsupportedError
from bayesdl.last_layer.head import Head
from bayesdl.last_layer.output import HeadOutput
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Likelihood
from bayesdl.posteriors.last_layer import LastLayerPosterior

TAILS = ("none", "half-normal")
HALF = 0.6744897501960817  # half of a half-normal's mass lies within this many scales


@final
class Binned(Distribution):
    """Density softmax_j / width_j on J bins; with half-normal tails the outer two reach to infinity.

    A half-normal outer bin starts at its inner border and has half of its mass within the width of the bin.

    Args:
        logits: `(..., J)`; the batch shape is `(...)`.
        borders: `(J + 1,)`, strictly increasing.
        tails: "none" or "half-normal".
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real

    def __init__(self, logits: Tensor, borders: Tensor, *, tails: str = "none") -> None:
        self.borders, self.tails = borders.to(logits), tails
        self.log_mass = torch.log_softmax(logits, -1)
        self.widths = self.borders.diff()
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def mass(self) -> Tensor:
        """Probability of each bin, `(..., J)`."""
        return self.log_mass.exp()

    def _bin_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance within each bin, `(J,)`."""
        centre = self.borders[:-1] + 0.5 * self.widths
        variance = self.widths.square() / 12.0
        if self.tails == "none":
            return centre, variance
        scale = self._scales()
        shift = scale * math.sqrt(2.0 / math.pi)
        ends = torch.stack([self.borders[1] - shift[0], self.borders[-2] + shift[1]])
        spread = scale.square() * (1.0 - 2.0 / math.pi)
        return (
            torch.cat([ends[:1], centre[1:-1], ends[1:]]),
            torch.cat([spread[:1], variance[1:-1], spread[1:]]),
        )

    def _scales(self) -> Tensor:
        return self.widths[[0, -1]] / HALF

    def _tail_distance(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Scales from the inner border into the left and the right tail, zero outside them."""
        left, right = self._scales()
        return ((self.borders[1] - value) / left).clamp(min=0), ((value - self.borders[-2]) / right).clamp(min=0)

    @property
    def mean(self) -> Tensor:
        return (self.mass * self._bin_moments()[0]).sum(-1)

    @property
    def variance(self) -> Tensor:
        centre, within = self._bin_moments()
        return (self.mass * (within + (centre - self.mean.unsqueeze(-1)).square())).sum(-1)

    def _index(self, value: Tensor) -> Tensor:
        return (torch.searchsorted(self.borders, value.contiguous(), right=True) - 1).clamp(0, len(self.widths) - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value); minus infinity outside the borders where there are no tails."""
        value, _ = torch.broadcast_tensors(value, self.log_mass[..., 0])
        index = self._index(value.detach())
        mass = self.log_mass.expand(*value.shape, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
        flat = mass - self.widths.log()[index]
        if self.tails == "none":
            return flat.masked_fill((value < self.borders[0]) | (value > self.borders[-1]), -math.inf)
        scale, (left, right) = self._scales(), self._tail_distance(value)
        first, last = index == 0, index == len(self.widths) - 1
        own = torch.where(first, scale[0], scale[1])
        normal = mass + 0.5 * math.log(2.0 / math.pi) - own.log() - 0.5 * torch.where(first, left, right).square()
        return torch.where(first | last, normal, flat)

    def cdf(self, value: Tensor) -> Tensor:
        value, _ = torch.broadcast_tensors(value, self.log_mass[..., 0])
        inside = (value.unsqueeze(-1) - self.borders[:-1]) / self.widths
        share = inside.clamp(0, 1)
        if self.tails != "none":
            left, right = self._tail_distance(value)
            low = torch.erfc(left / math.sqrt(2.0))
            high = torch.erf(right / math.sqrt(2.0))
            share = torch.cat([low.unsqueeze(-1), share[..., 1:-1], high.unsqueeze(-1)], -1)
        return (self.mass * share).sum(-1)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles at levels that broadcast with the batch shape."""
        level = torch.as_tensor(value).to(self.log_mass)
        level, _ = torch.broadcast_tensors(level, self.log_mass[..., 0])
        mass = self.mass.expand(*level.shape, -1)
        upper = mass.cumsum(-1)
        index = torch.searchsorted(upper.contiguous(), level.unsqueeze(-1).contiguous())
        index = index.clamp(max=len(self.widths) - 1)
        own = mass.gather(-1, index).squeeze(-1)
        below = upper.gather(-1, index).squeeze(-1) - own
        index = index.squeeze(-1)
        share = ((level - below) / own).clamp(0, 1)
        flat = self.borders[index] + share * self.widths[index]
        if self.tails == "none":
            return flat
        scale = self._scales()
        left = self.borders[1] + scale[0] * torch.special.ndtri(0.5 * share)
        right = self.borders[-2] - scale[1] * torch.special.ndtri(0.5 * (1.0 - share))
        return torch.where(index == 0, left, torch.where(index == len(self.widths) - 1, right, flat))

    def crps(self, value: Tensor) -> Tensor:
        """Continuous ranked probability score: the integral of F^2 left of the value and (1 - F)^2 right of it."""
        value, _ = torch.broadcast_tensors(value, self.log_mass[..., 0])
        mass = self.mass.expand(*value.shape, -1)
        left, right = self.borders[:-1], self.borders[1:]
        cut = torch.minimum(torch.maximum(value.unsqueeze(-1), left), right)
        upper = mass.cumsum(-1)
        lower = upper - mass
        at = lower + mass * (cut - left) / self.widths
        each = (cut - left) * _squares(lower, at) + (right - cut) * _squares(1.0 - at, 1.0 - upper)
        if self.tails == "none":
            outside = (self.borders[0] - value).clamp(min=0) + (value - self.borders[-1]).clamp(min=0)
            return each.sum(-1) + outside
        scale, (low, high) = self._scales(), self._tail_distance(value)
        tails = scale[0] * _tail_score(mass[..., 0], low) + scale[1] * _tail_score(mass[..., -1], high)
        return each[..., 1:-1].sum(-1) + tails

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            tiny = torch.finfo(self.log_mass.dtype).eps
            level = torch.rand(shape, dtype=self.log_mass.dtype, device=self.log_mass.device)
            return self.icdf(level.clamp(tiny, 1.0 - tiny))


def _squares(start: Tensor, end: Tensor) -> Tensor:
    """Mean of the square of a linear function between two values."""
    return (start.square() + start * end + end.square()) / 3.0


def _tail_score(mass: Tensor, t: Tensor) -> Tensor:
    """CRPS in a half-normal tail in scales, from its end at infinity to the border, for a value t scales inside.

    With Q the normal survival function: int_t^oo (2 m Q)^2 du + int_0^t (1 - 2 m Q)^2 du.
    """
    zero = torch.zeros_like(t)
    square, plain = _survival_square(t), _survival(t)
    inner = t - 4.0 * mass * (_survival(zero) - plain) + 4.0 * mass.square() * (_survival_square(zero) - square)
    return 4.0 * mass.square() * square + inner


def _density(t: Tensor) -> Tensor:
    return (-0.5 * t.square()).exp() / math.sqrt(2.0 * math.pi)


def _survival(t: Tensor) -> Tensor:
    """int_t^oo Q(u) du = phi(t) - t Q(t)."""
    return _density(t) - t * torch.special.ndtr(-t)


def _survival_square(t: Tensor) -> Tensor:
    """int_t^oo Q(u)^2 du = 2 phi Q - t Q^2 - Q(sqrt(2) t) / sqrt(pi)."""
    q = torch.special.ndtr(-t)
    return 2.0 * _density(t) * q - t * q.square() - torch.special.ndtr(-math.sqrt(2.0) * t) / math.sqrt(math.pi)


@final
class BarsLikelihood(Likelihood):
    """p(y | f) = `Binned(f)` for one number y; the curvature is that of a categorical over the bins."""

    name = "bars"
    task = "regression"

    def __init__(self, borders: Tensor, *, tails: str = "none") -> None:
        self.borders, self.tails = borders, tails

    def distribution(self, f: Tensor) -> Binned:
        return Binned(f.unsqueeze(-2), self.borders, tails=self.tails)

    def num_targets(self, outputs: int) -> int:
        return 1

    def hessian_root(self, f: Tensor) -> Tensor:
        # within a bin the density does not depend on the logits: Lambda = diag(p) - p p^T, as for classes
        p = torch.softmax(f, -1)
        columns = torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
        return columns.permute(2, 0, 1)


@final
class Bars(Head):
    """A linear map of the features to the logits of bins; the loss is -log(softmax_j / width_j) at the target.

    Nothing here is Bayesian: the belief is one density, its variance aleatoric. `head.likelihood()` is what a posterior
    over the weights of `head.linear` takes.

    Args:
        in_features: d.
        borders: `(J + 1,)`, strictly increasing; `Bars.quantiles(y, J)` makes them from training targets.
        tails: "half-normal" gives the outer bins half-normal tails with half of their mass inside the bin; with "none"
            targets outside the borders are errors.
        bias: whether there is an intercept.
        tensor_output: see `Head`.

    Raises:
        ArgumentError: borders that do not increase, or too few of them.
        UnknownNameError: unknown tails.
    """

    def __init__(
        self,
        in_features: int,
        borders: Tensor,
        *,
        tails: str = "half-normal",
        bias: bool = True,
        tensor_output: bool = False,
    ) -> None:
        if tails not in TAILS:
            raise UnknownNameError(f"tails {tails!r} are not known; choose one of {TAILS}")
        least = 2 if tails == "none" else 3
        if borders.dim() != 1 or len(borders) < least or not bool((borders.diff() > 0).all()):
            raise ArgumentError(
                f"borders of shape {tuple(borders.shape)}; expected {least} or more that increase strictly"
            )
        if not bool(torch.isfinite(borders).all()):
            raise ArgumentError("borders hold NaN or infinity; expected finite numbers")
        super().__init__(in_features, len(borders) - 1, num_data=1, kl_weight=0.0, tensor_output=tensor_output)
        self.tails = tails
        self.linear = nn.Linear(in_features, self.out_features, bias=bias)
        with torch.no_grad():  # equal mass in every bin: where borders are quantiles, the targets' own distribution
            self.linear.weight.zero_()
            if self.linear.bias is not None:
                self.linear.bias.zero_()
        self.borders: Tensor
        self.register_buffer("borders", borders.detach().clone())

    @staticmethod
    def quantiles(y: Tensor, bins: int) -> Tensor:
        """Borders `(J + 1,)` with equal shares of the targets between them; J < bins where targets repeat.

        Args:
            y: training targets, any shape.
            bins: how many, at least 1.

        Raises:
            ArgumentError: no bins, or fewer than two different targets.
            NonFiniteError: NaN or infinity among the targets.
        """
        if bins < 1:
            raise ArgumentError(f"bins={bins}; expected at least 1")
        if not bool(torch.isfinite(y).all()):
            raise NonFiniteError("targets: NaN or infinity")
        if y.numel() == 0 or not bool(y.min() < y.max()):
            raise ArgumentError("fewer than two different targets have no bins between them")
        ordered = y.detach().flatten().double().sort().values
        place = torch.linspace(0, len(ordered) - 1, bins + 1, dtype=torch.float64, device=y.device)
        low = place.floor().long()
        high = (low + 1).clamp(max=len(ordered) - 1)
        found = torch.lerp(ordered[low], ordered[high], place - low)
        return found.to(y.dtype if y.is_floating_point() else torch.float32).unique()

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and zeros for `(..., d)`: two `(..., J)`."""
        self.check_features(features)
        with torch.autocast(features.device.type, enabled=False):
            logits = self.linear(features.to(self.linear.weight.dtype))
            return logits, torch.zeros_like(logits)

    def latent(self, mean: Tensor, variance: Tensor) -> GaussianLatent:
        return GaussianLatent(mean, variance)

    def likelihood(self) -> BarsLikelihood:
        return BarsLikelihood(self.borders, tails=self.tails)

    def targets(self, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        if y.numel() != len(mean):
            raise ShapeError(f"targets have shape {tuple(y.shape)}; expected one number for each of {len(mean)} inputs")
        flat = y.reshape(-1).to(mean)
        outside = (flat < self.borders[0]) | (flat > self.borders[-1])
        if self.tails == "none" and bool(outside.any()):
            place = int(outside.nonzero()[0])
            raise LabelError(
                f"target {float(flat[place])} at index {place} is outside the borders {float(self.borders[0])} to "
                f'{float(self.borders[-1])}; widen them or pass tails="half-normal"'
            )
        return flat, torch.ones(len(mean), dtype=torch.bool, device=mean.device)

    def terms(self, output: HeadOutput, y: Tensor) -> Tensor:
        return Binned(output.mean.flatten(0, -2), self.borders, tails=self.tails).log_prob(y)

    def divergence(self) -> Tensor:
        return self.linear.weight.new_zeros(())

    def takes(self, layer: nn.Linear) -> bool:
        return layer.in_features == self.in_features

    def start_from(self, layer: nn.Linear) -> Self:
        """Nothing to take: the weights of a regression layer are no logits of bins."""
        return self

    def posterior(self, layer: str | None = None) -> LastLayerPosterior:
        """Raises `UnsupportedError`: the weights of this head have no distribution."""
        raise UnsupportedError("a bar head has no posterior over its weights; use head.linear with head.likelihood()")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, bins={self.out_features}, tails={self.tails!r}"
