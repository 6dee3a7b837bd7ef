"""Gaussian noise of unknown size: y given the latent is Student-t."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.distributions import Distribution, StudentT

from bayesdl.errors import ArgumentError, NotFittedError, ShapeError, as_numbers
from bayesdl.latent import GaussianLatent, Latent
from bayesdl.likelihoods.base import Likelihood
from bayesdl.predictive import Split


@final
@dataclass(frozen=True)
class NormalGamma(Likelihood):
    """y ~ N(f, s^2) with 1 / s^2 ~ Gamma(shape, rate), one s per output, shared by weights and noise.

    A Gaussian latent with variance E[s^2] c, whose spread scales with the same s, gives the predictive
    StudentT(2 shape, mean, sqrt((1 + c) rate / shape)) (Bishop 2006, section 2.3.7).

    Args:
        shape: positive, a number or `(C,)`. Variances are infinite for shapes of at most 1. None: not known yet.
        rate: positive, a number or `(C,)`.
    """

    shape: float | Sequence[float] | Tensor | None = None
    rate: float | Sequence[float] | Tensor | None = None

    name: ClassVar[str] = "normal_gamma"
    task: ClassVar[str] = "regression"

    def __post_init__(self) -> None:
        for name, given in (("shape", self.shape), ("rate", self.rate)):
            if given is None:
                continue
            value = as_numbers(given, name)
            if value.dim() > 1 or not value.numel() or not bool((torch.isfinite(value) & (value > 0)).all()):
                raise ArgumentError(f"{name}={given!r}; expected a positive number, or one per output in a vector")

    def parameters(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Shape and rate, `(C,)` each, in the dtype and on the device of `f`."""
        found = []
        for given in (self.shape, self.rate):
            if given is None:
                raise NotFittedError("the noise is not known: pass bdl.likelihoods.NormalGamma(shape=..., rate=...)")
            value = torch.as_tensor(given, dtype=f.dtype, device=f.device)
            if value.dim() == 1 and value.shape[0] not in (1, f.shape[-1]):
                raise ShapeError(f"{value.shape[0]} noises were given and there are {f.shape[-1]} outputs")
            found.append(value.expand(f.shape[-1]))
        return found[0], found[1]

    def noise_variance(self, f: Tensor) -> Tensor:
        """E[s^2] = rate / (shape - 1), `(C,)`; infinite for shapes of at most 1."""
        shape, rate = self.parameters(f)
        return torch.where(shape > 1, rate / (shape - 1).clamp(min=torch.finfo(f.dtype).tiny), torch.inf)

    def distribution(self, f: Tensor) -> Distribution:
        shape, rate = self.parameters(f)
        return StudentT((2.0 * shape).expand_as(f), f, (rate / shape).sqrt().expand_as(f))

    def hessian_root(self, f: Tensor) -> Tensor:
        # the Fisher information of a Student-t location (Lange, Little and Taylor 1989); the Hessian has both signs
        shape, rate = self.parameters(f)
        fisher = (2.0 * shape + 1.0) / (2.0 * shape + 3.0) * shape / rate
        return torch.diag(fisher.sqrt()).unsqueeze(1).expand(-1, f.shape[0], -1)

    def marginal(self, latent: Latent, noise: Tensor) -> Distribution:
        if not isinstance(latent, GaussianLatent):
            return super().marginal(latent, noise)
        shape, rate = self.parameters(latent.mean)
        spread = latent.variance / self.noise_variance(latent.mean)
        return StudentT((2.0 * shape).expand_as(latent.mean), latent.mean, ((1.0 + spread) * rate / shape).sqrt())

    def components(self, latent: Latent, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(latent, GaussianLatent):
            return super().components(latent, noise)
        variance = latent.variance + self.noise_variance(latent.mean)
        return latent.mean.new_ones(1), latent.mean.unsqueeze(0), variance.unsqueeze(0)

    def split(self, latent: Latent, noise: Tensor) -> Split:
        if not isinstance(latent, GaussianLatent):
            return super().split(latent, noise)
        return Split(self.noise_variance(latent.mean).expand_as(latent.mean), latent.variance)

    def map(self, function: Callable[[Tensor], Tensor]) -> NormalGamma:
        moved = {n: function(v) for n in ("shape", "rate") if isinstance(v := getattr(self, n), Tensor)}
        return replace(self, **moved)

    def config(self) -> dict[str, object]:
        held = {"shape": self.shape, "rate": self.rate}
        return {n: None if v is None else torch.as_tensor(v, dtype=torch.float64).tolist() for n, v in held.items()}
