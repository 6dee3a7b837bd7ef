"""The posterior of an earlier fit as the prior of the next one: continual learning without the earlier data.

    bayes = bdl.wrap(net, bdl.Laplace(structure="kron"), first, likelihood="categorical")
    prior = bayes.as_prior()
    # train on: the mean loss of a batch, and a share of the penalty (online EWC; Kronecker-factored where the fit was)
    loss = F.cross_entropy(net2(x), y) - prior.log_prob(dict(net2.named_parameters())) / num_data
    bayes = bdl.wrap(net2, bdl.Laplace(structure="kron"), second, likelihood="categorical", prior=prior)

Precisions add: P = H_second + P_first (Ritter, Botev and Barber 2018; Huszar 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from bayesdl.curvature.layout import Layout
from bayesdl.curvature.structure import Structure
from bayesdl.errors import ArgumentError
from bayesdl.posteriors.base import standard_normal
from bayesdl.priors.base import Prior
from bayesdl.priors.gaussian import GaussianPrior


@final
@dataclass(frozen=True, eq=False)
class PosteriorPrior(Prior):
    """N(mean, (H + diag(precision))^-1); from `BayesianModel.as_prior`.

    Attributes:
        curvature: H of everything seen so far, at its noise.
        precision: what the first prior adds: a scalar, one per block, or one per parameter.
        mean: the trained weights `(P,)`, in flat order.
    """

    curvature: Structure
    precision: Tensor
    mean: Tensor

    name: ClassVar[str] = "posterior"

    @property
    def diagonal(self) -> GaussianPrior:
        """The part without curvature."""
        return GaussianPrior(self.precision, self.mean)

    def log_prob(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """log p, a scalar, differentiable in the tensors; those of other names are not looked at.

        Raises:
            ArgumentError: a parameter that the earlier fit selected is missing, or has another shape.
        """
        layout = self.curvature.layout
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            found = tuple(parameters[name].shape) if name in parameters else "no"
            if found != tuple(shape):
                raise ArgumentError(
                    f"parameter {name!r} of the earlier fit has shape {tuple(shape)}, and {found} was given; pass "
                    "dict(network.named_parameters()) of a network of the same architecture"
                )
        offset = layout.flatten(parameters).double() - self.mean.double()
        return self._log_normaliser - 0.5 * (self.product(offset) * offset).sum()

    def product(self, vectors: Tensor) -> Tensor:
        """P v for flat vectors `(..., P)`, float64."""
        layout, like = self.curvature.layout, vectors.double()
        shifts = layout.shifts(self.precision, like)
        scaled = layout.join([v * s for v, s in zip(layout.split(like), shifts, strict=True)])
        return scaled + self.curvature.product(vectors).to(scaled)

    def sample(self, parameters: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        layout = self.curvature.layout
        noise = standard_normal((1, layout.numel), self.mean, generator)
        flat = self.mean + self.curvature.sample(noise, 1.0, self.precision)[0].to(self.mean)
        drawn = layout.to_dict(flat)
        return {name: drawn[name].to(value) for name, value in parameters.items() if name in drawn}

    def check_fits(self, layout: Layout) -> None:
        """Raise `ArgumentError` unless another fit has the same parameters in the same blocks."""
        mine = self.curvature.layout
        if (mine.names, mine.shapes) != (layout.names, layout.shapes):
            odd = sorted(set(mine.names) ^ set(layout.names)) or list(layout.names)
            raise ArgumentError(
                f"the prior comes from a fit of other parameters than these ({odd[0]!r} differs); select the same "
                "parameters of the same architecture"
            )
        if [b.parameters for b in mine.blocks] != [b.parameters for b in layout.blocks]:
            raise ArgumentError(
                'the prior comes from a fit with other blocks; give both fits the same bias="joint" option'
            )

    def map(self, function: Callable[[Tensor], Tensor]) -> PosteriorPrior:
        """Apply `function` to every tensor."""
        return replace(
            self, curvature=self.curvature.map(function), precision=function(self.precision), mean=function(self.mean)
        )

    @cached_property
    def _log_normaliser(self) -> Tensor:
        size = self.curvature.layout.numel
        return (0.5 * (self.curvature.logdet(1.0, self.precision) - size * math.log(2 * math.pi))).detach()
