"""Gaussian likelihoods: one noise scale per output, or a noise that the network itself predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal, Normal

from bayesdl.errors import ArgumentError, NotFittedError, ShapeError, as_numbers
from bayesdl.latent import GaussianLatent, Latent
from bayesdl.likelihoods.base import Likelihood
from bayesdl.linalg import cholesky
from bayesdl.predictive import Split


@final
@dataclass(frozen=True)
class Gaussian(Likelihood):
    """y ~ N(f, diag(noise^2)); f and targets `(B, C)`, or targets `(B,)` where C = 1.

    Args:
        noise: standard deviation, a positive number or one per output `(C,)`. None: chosen by the method
            (residuals or evidence) when it is fitted.
    """

    noise: float | Sequence[float] | Tensor | None = None

    name: ClassVar[str] = "gaussian"
    task: ClassVar[str] = "regression"

    def __post_init__(self) -> None:
        if self.noise is None:
            return
        value = as_numbers(self.noise, "noise")
        if value.dim() > 1 or not value.numel() or not bool((torch.isfinite(value) & (value > 0)).all()):
            raise ArgumentError(
                f"noise={self.noise!r}; expected a positive finite standard deviation, or one per output in a vector"
            )

    def scale(self, f: Tensor) -> Tensor:
        """The standard deviations `(C,)` in the dtype and on the device of `f`."""
        if self.noise is None:
            raise NotFittedError(
                "the gaussian likelihood has no noise yet: pass bdl.Gaussian(noise=...), or give the method data "
                "so that it can choose one"
            )
        value = torch.as_tensor(self.noise, dtype=f.dtype, device=f.device)
        if value.dim() == 1 and value.shape[0] not in (1, f.shape[-1]):
            raise ShapeError(f"noise has {value.shape[0]} entries and the network {f.shape[-1]} outputs; give one each")
        return value.expand(f.shape[-1])

    def with_noise(self, noise: Tensor | float) -> Gaussian:
        """The same likelihood with another noise."""
        return replace(self, noise=noise.detach() if isinstance(noise, Tensor) else noise)

    def distribution(self, f: Tensor) -> Distribution:
        return Normal(f, self.scale(f).expand_as(f))

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        # not through the distribution, which older versions of torch cannot make inside vmap
        scale = self.scale(f)
        return (-(y - f).square() / (2.0 * scale.square()) - scale.log() - 0.5 * math.log(2.0 * math.pi)).sum(-1)

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y) / self.scale(f).square()

    def hessian_root(self, f: Tensor) -> Tensor:
        return torch.diag(1.0 / self.scale(f)).unsqueeze(1).expand(-1, f.shape[0], -1)

    def marginal(self, latent: Latent, noise: Tensor) -> Distribution:
        if not isinstance(latent, GaussianLatent):
            return super().marginal(latent, noise)
        observation = self.scale(latent.mean).square()
        if latent.covariance is None or latent.mean.shape[-1] == 1:
            return Normal(latent.mean, (latent.variance + observation).sqrt())
        covariance = 0.5 * (latent.covariance + latent.covariance.mT) + torch.diag(observation)
        return MultivariateNormal(latent.mean, scale_tril=cholesky(covariance, "covariance of the predictive"))

    def components(self, latent: Latent, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(latent, GaussianLatent):
            return super().components(latent, noise)
        variance = latent.variance + self.scale(latent.mean).square()
        return latent.mean.new_ones(1), latent.mean.unsqueeze(0), variance.unsqueeze(0)

    def split(self, latent: Latent, noise: Tensor) -> Split:
        if not isinstance(latent, GaussianLatent):
            return super().split(latent, noise)
        return Split(self.scale(latent.mean).square().expand_as(latent.mean), latent.variance)

    def map(self, function: Callable[[Tensor], Tensor]) -> Gaussian:
        return replace(self, noise=function(self.noise)) if isinstance(self.noise, Tensor) else self

    def config(self) -> dict[str, object]:
        return {"noise": None if self.noise is None else torch.as_tensor(self.noise, dtype=torch.float64).tolist()}


@final
@dataclass(frozen=True)
class Heteroscedastic(Likelihood):
    """y ~ N(m, diag(exp(s))) where the network's outputs are (m, s): `(B, 2 D)` for targets `(B, D)`.

    The first D outputs are means, the last D log-variances. Curvature uses the Fisher information
    diag(exp(-s), 1/2), which is positive semi-definite where the Hessian is not.

    Args:
        nodes: of the Gauss-Hermite quadrature over s that makes the predictive of a Gaussian latent a mixture of
            normals for each output; None matches its moments with one normal.
    """

    nodes: int | None = None

    name: ClassVar[str] = "heteroscedastic"
    task: ClassVar[str] = "regression"

    def __post_init__(self) -> None:
        if self.nodes is not None and not 1 <= self.nodes <= 64:
            raise ArgumentError(f"nodes={self.nodes}; expected None or a number of nodes from 1 to 64")

    def num_targets(self, outputs: int) -> int:
        return outputs // 2

    def check_outputs(self, f: Tensor) -> Tensor:
        if f.shape[-1] % 2:
            raise ShapeError(
                f"the outputs have shape {tuple(f.shape)}; the heteroscedastic likelihood needs an even "
                "number: means, then "
                'log-variances. For means alone use likelihood="gaussian"'
            )
        return super().check_outputs(f)

    def distribution(self, f: Tensor) -> Distribution:
        mean, log_variance = f.chunk(2, -1)
        return Normal(mean, _exponential(log_variance).sqrt())

    def hessian_root(self, f: Tensor) -> Tensor:
        _, log_variance = f.detach().chunk(2, -1)
        root = torch.cat([_exponential(-log_variance).sqrt(), torch.full_like(log_variance, 0.5**0.5)], -1)
        return torch.diag_embed(root).permute(2, 0, 1)

    def marginal(self, latent: Latent, noise: Tensor) -> Distribution:
        """Moment-matched normal of a Gaussian latent, or with `nodes` a mixture for each output; the mixture over draws
        otherwise."""
        if not isinstance(latent, GaussianLatent):
            return super().marginal(latent, noise)
        weights, mean, variance = self.components(latent, noise)
        if self.nodes is not None:
            parts = Normal(mean.movedim(0, -1), variance.sqrt().movedim(0, -1))
            return MixtureSameFamily(Categorical(weights.expand_as(parts.loc)), parts)
        return Normal(mean[0], variance[0].sqrt())

    def components(self, latent: Latent, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(latent, GaussianLatent):
            return super().components(latent, noise)
        mean, _ = latent.mean.chunk(2, -1)
        if self.nodes is not None:
            weights, levels = self._levels(latent)
            spread, _ = latent.variance.chunk(2, -1)
            return weights, mean.expand_as(levels), levels + spread
        split = self.split(latent, noise)
        return mean.new_ones(1), mean.unsqueeze(0), (split.aleatoric + split.epistemic).unsqueeze(0)

    def split(self, latent: Latent, noise: Tensor) -> Split:
        """For a Gaussian latent E[exp(s)] = exp(mean + var/2) is the aleatoric, var(m) the epistemic variance."""
        if not isinstance(latent, GaussianLatent):
            return super().split(latent, noise)
        _, log_variance = latent.mean.chunk(2, -1)
        spread, doubt = latent.variance.chunk(2, -1)
        if self.nodes is not None:
            weights, levels = self._levels(latent)
            return Split(torch.einsum("s,s...->...", weights, levels), spread)
        return Split(_exponential(log_variance + 0.5 * doubt), spread)

    def _levels(self, latent: GaussianLatent) -> tuple[Tensor, Tensor]:
        """Weights `(S,)` and noise variances `(S, B, D)` at the nodes of the quadrature over s."""
        points, weights = np.polynomial.hermite_e.hermegauss(self.nodes or 1)
        _, log_variance = latent.mean.chunk(2, -1)
        _, doubt = latent.variance.chunk(2, -1)
        nodes = torch.as_tensor(points).to(log_variance).view(-1, *(1,) * log_variance.dim())
        shares = torch.as_tensor(weights / weights.sum()).to(log_variance)
        return shares, (log_variance + nodes * doubt.clamp(min=0).sqrt()).exp()

    def config(self) -> dict[str, object]:
        return {"nodes": self.nodes}


def _exponential(logs: Tensor) -> Tensor:
    """Variances or precisions, neither zero nor infinite whatever a network or a wide posterior says."""
    bound = 0.95 * math.log(torch.finfo(logs.dtype).max)
    return logs.clamp(-bound, bound).exp()
