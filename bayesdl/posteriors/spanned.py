"""A Gaussian posterior in the span of the Jacobians at some context points, with a prior of its own there.

theta = theta* + J_C^T M z for z ~ N(0, diag(1 / (1 + g / noise^2))): the features of an input are J(x) J_C^T M,
products of layer factors, and nothing of the size of the weights is held beside the factors at the context points.
Everything runs in float64: smooth kernels weigh directions in function space that float32 passes do not resolve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.batch import batch_size, flatten_tensors, index_batch
from bayesdl.curvature.chunking import chunk_size
from bayesdl.curvature.cross import cross
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.pieces import factors_named, in_double, named_factors
from bayesdl.errors import ArgumentError, UnsupportedError, check_finite
from bayesdl.latent import GaussianLatent, Latent
from bayesdl.network import Network
from bayesdl.posteriors.base import Function, Posterior, standard_normal
from bayesdl.posteriors.gaussian import wants_gradient


@final
@dataclass(frozen=True, eq=False)
class SpannedPosterior(Posterior):
    """N(theta*, A A^T), A = J_C^T M diag(1 + g / noise^2)^-1/2.

    Attributes:
        layout: blocks of the selection.
        pieces: factors of J_C, the Jacobian at the context points; r rows, examples slower than outputs.
        mixing: M `(r, R)`, float64: the prior's own coordinates, turned so that the data's curvature in them is g.
        gains: g `(R,)`, float64, at unit noise where `noise` is set.
        noise: standard deviation, a scalar, that still scales g; None where g contains the likelihood's noise.
        energy: twice the prior's energy of theta*, the squared length of its mean in these coordinates.
        num_data, log_likelihood, squared_error: of the training data; log p at unit noise, and the sum of squared
            residuals `(C,)`, where `noise` is set.
        memory: bytes that may live at once while predicting; None: chosen.
    """

    layout: Layout
    pieces: list[list[Factor]]
    mixing: Tensor
    gains: Tensor
    noise: Tensor | None
    energy: Tensor
    num_data: int
    log_likelihood: float
    squared_error: Tensor | None
    memory: int | None = None

    kind: ClassVar[str] = "spanned"

    @property
    def shrinkage(self) -> Tensor:
        """Variances of the coordinates under the posterior over those under the prior, `(R,)`."""
        return 1.0 / (1.0 + self.scaled_gains(self.noise))

    def scaled_gains(self, noise: Tensor | None) -> Tensor:
        """g at another noise."""
        return self.gains if noise is None else self.gains / noise.square()

    def log_evidence(self, noise: Tensor | None = None) -> Tensor:
        """log p(D | theta*) - 1/2 (energy + sum log(1 + g / noise^2)), float64; exact for linear models at their mode.

        Differentiable in `noise`.
        """
        level = self.noise if noise is None else noise
        total = self.gains.new_tensor(self.log_likelihood)
        if level is not None and self.squared_error is not None:
            error = self.squared_error
            terms = error / level.square() + self.num_data * (2 * level.log() + math.log(2 * math.pi))
            total = -0.5 * terms.sum()
        return total - 0.5 * (self.energy + torch.log1p(self.scaled_gains(level)).sum())

    def prepare(self, network: Network, num_samples: int | None, generator: torch.Generator | None) -> Network:
        """The network in float64."""
        return in_float64(network)

    def push(self, network: Network, inputs: Any, state: Network) -> Latent:
        network.check_fresh()
        found = []
        for piece in self._parts(state, inputs):
            mean, features = self._features(state, piece)
            root = features * self.shrinkage.sqrt()
            covariance = root @ root.mT
            variance = covariance.diagonal(dim1=-2, dim2=-1)
            check_finite(variance, "the posterior variances of the outputs")
            found.append(GaussianLatent(*(value.to(_kind(network)) for value in (mean, variance, covariance))))
        return GaussianLatent.cat(found) if len(found) > 1 else found[0]

    def covariance(self, network: Network, first: Any, second: Any, state: Network) -> tuple[Tensor, Tensor]:
        network.check_fresh()
        means, rows = self._all(state, first)
        columns = rows if second is None else self._all(state, second)[1]
        found = torch.einsum("bkr,r,clr->bkcl", rows, self.shrinkage, columns)
        check_finite(found, "the posterior covariances of the outputs")
        return means.to(_kind(network)), found.to(_kind(network))

    def draw(self, network: Network, n: int, generator: torch.Generator | None) -> list[Function]:
        """Functions of the network linearised at theta*, one draw of the coordinates each."""
        if n < 1:
            raise ArgumentError(f"{n} draws were asked for; expected at least 1")
        noise = standard_normal((n, len(self.gains)), self.gains, generator) * self.shrinkage.sqrt()
        wide = in_float64(network)

        def function(z: Tensor) -> Function:
            def call(inputs: Any) -> Tensor:
                network.check_fresh()
                mean, features = self._all(wide, inputs)
                return (mean + features @ z).to(_kind(network))

            return call

        return [function(z) for z in noise]

    @property
    def forward_passes(self) -> float:
        return 1.0 + self.layout.outputs

    @property
    def over_weights(self) -> bool:
        return True

    def tensors(self) -> dict[str, Tensor]:
        named = {f"context.{name}": value for name, value in named_factors(self.pieces).items()}
        named |= {"mixing": self.mixing, "gains": self.gains, "energy": self.energy}
        if self.noise is not None:
            named["noise"] = self.noise
        return named if self.squared_error is None else {**named, "squared_error": self.squared_error}

    def config(self) -> dict[str, Any]:
        return {
            "layout": self.layout.to_json(),
            "num_data": self.num_data,
            "log_likelihood": self.log_likelihood,
            "memory": self.memory,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        layout, prefix = Layout.from_json(config["layout"]), "context."
        inner = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        return cls(
            layout,
            factors_named(inner, layout),
            tensors["mixing"].double(),
            tensors["gains"].double(),
            None if "noise" not in tensors else tensors["noise"].double(),
            tensors["energy"].double(),
            int(config["num_data"]),
            float(config["log_likelihood"]),
            None if "squared_error" not in tensors else tensors["squared_error"].double(),
            config.get("memory"),
        )

    def _all(self, network: Network, inputs: Any) -> tuple[Tensor, Tensor]:
        parts = self._parts(network, inputs)
        means, rows = zip(*(self._features(network, piece) for piece in parts), strict=True)
        return torch.cat(means), torch.cat(rows)

    def _features(self, network: Network, inputs: Any) -> tuple[Tensor, Tensor]:
        """Outputs `(B, C)` and phi `(B, C, R)`: the prior's covariance is phi phi'^T."""
        graph = wants_gradient(inputs)
        with torch.set_grad_enabled(graph):
            mean, factors = layer_factors(network, self.layout, inputs, identity_cotangents, torch.float64, graph)
            return mean, between(factors, self.pieces) @ self.mixing

    def _parts(self, network: Network, inputs: Any) -> list[Any]:
        """Prepared inputs, few enough at a time for their factors to fit."""
        if self.layout.positions:
            raise UnsupportedError("a prior over functions is for outputs of shape (B, C), and these have positions")
        call = network.prepare(inputs)
        size = max(1, batch_size(call)) if flatten_tensors(call)[0] else 1
        step = chunk_size(self.layout, "dual", torch.float64, memory=self.memory, device=network.device)
        if step >= size:
            return [call]
        return [index_batch(call, slice(start, min(start + step, size))) for start in range(0, size, step)]


def between(factors: Sequence[Factor], pieces: Sequence[Sequence[Factor]]) -> Tensor:
    """J J_C^T `(B, K, r)`, float64, of some examples with the context points."""
    wide = [in_double(factor) for factor in factors]
    found = []
    for piece in pieces:
        parts = [cross(mine, in_double(other)).flatten(2) for mine, other in zip(wide, piece, strict=True)]
        found.append(torch.stack(parts).sum(0))
    return torch.cat(found, 2)


def in_float64(network: Network) -> Network:
    """The network, or a copy of it in float64."""
    if network.dtype == torch.float64:
        return network
    return network.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _kind(network: Network) -> torch.dtype:
    """Of predictions: the network's own, at least float32."""
    return torch.promote_types(network.dtype or torch.float32, torch.float32)
