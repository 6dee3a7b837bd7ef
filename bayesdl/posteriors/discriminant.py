"""Gaussian class densities with uncertain means: p(y | phi) by Bayes' rule, and the density of the features.

phi | y = k ~ N(mean_k, Sigma_k) with mean_k ~ N(mu_k, S_k), so that phi | y = k ~ N(mu_k, Sigma_k + S_k) (Bishop 2006,
section 2.3.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.posteriors.base import standard_normal
from bayesdl.posteriors.belief import Belief, Map


@final
@dataclass(frozen=True, eq=False)
class Discriminant(Belief):
    """K class densities. The outputs are log p(phi, y = k), whose softmax is p(y | phi), exactly.

    Attributes:
        mean: mu, `(K, d)`.
        noise: variances Sigma_k `(K, d)`; or the Cholesky factor `(d, d)` of one full Sigma.
        doubt: variances S_k `(K, d)`; or with a full Sigma factors `(K,)`, S_k = doubt_k Sigma.
        log_prior: log p(y = k), `(K,)`.
        full: which of the two it is.
    """

    mean: Tensor
    noise: Tensor
    doubt: Tensor
    log_prior: Tensor
    full: bool

    name: ClassVar[str] = "discriminant"

    def distances(self, phi: Tensor, *, predictive: bool) -> Tensor:
        """Squared Mahalanobis distances `(B, K)` of `(B, d)` under Sigma_k, or with `predictive` Sigma_k + S_k."""
        return self._distances(self.mean, phi, predictive)

    def _distances(self, mean: Tensor, phi: Tensor, predictive: bool) -> Tensor:
        centre = mean.mean(0)  # products of centred features keep their digits
        z, m = phi - centre, mean - centre
        if self.full:
            z = torch.linalg.solve_triangular(self.noise, z.mT, upper=False).mT
            m = torch.linalg.solve_triangular(self.noise, m.mT, upper=False).mT
            apart = z.square().sum(-1, keepdim=True) - 2.0 * z @ m.mT + m.square().sum(-1)
            return apart.clamp(min=0) / (1.0 + self.doubt if predictive else 1.0)
        inverse = 1.0 / (self.noise + self.doubt if predictive else self.noise)
        apart = z.square() @ inverse.mT - 2.0 * z @ (m * inverse).mT + (m.square() * inverse).sum(-1)
        return apart.clamp(min=0)

    def log_densities(self, phi: Tensor, *, predictive: bool) -> Tensor:
        """log N(phi | mu_k, Sigma_k), or with `predictive` log N(phi | mu_k, Sigma_k + S_k), `(B, K)`."""
        return -0.5 * (self.distances(phi, predictive=predictive) + self._volume(predictive))

    def _volume(self, predictive: bool) -> Tensor:
        width = self.mean.shape[1]
        if self.full:
            volume = 2.0 * self.noise.diagonal().log().sum() + torch.zeros_like(self.doubt)
            volume = volume + width * torch.log1p(self.doubt) if predictive else volume
        else:
            volume = (self.noise + self.doubt if predictive else self.noise).log().sum(-1)
        return volume + width * math.log(2.0 * math.pi)

    def log_joint(self, phi: Tensor) -> Tensor:
        """log p(phi, y = k), `(B, K)`."""
        return self.log_prior + self.log_densities(phi, predictive=True)

    def latent(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        joint = self.log_joint(phi.to(self.mean.dtype))
        return joint, torch.zeros_like(joint)

    def functions(self, n: int, generator: torch.Generator | None) -> list[Map]:
        base = standard_normal((n, *self.mean.shape), self.mean, generator)
        if self.full:
            means = self.mean + (base @ self.noise.mT) * self.doubt.sqrt().unsqueeze(-1)
        else:
            means = self.mean + base * self.doubt.sqrt()

        def density(mean: Tensor) -> Map:
            def outputs(phi: Tensor) -> Tensor:
                rows = phi.flatten(0, -2).to(mean.dtype)
                found = self.log_prior - 0.5 * (self._distances(mean, rows, False) + self._volume(False))
                return found.reshape(*phi.shape[:-1], -1)

            return outputs

        return [density(mean) for mean in means]

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "noise": self.noise, "doubt": self.doubt, "log_prior": self.log_prior}

    def config(self) -> dict[str, Any]:
        return {"full": self.full}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        return cls(**tensors, full=bool(config["full"]))
