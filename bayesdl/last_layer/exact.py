"""Exact Bayesian linear regression on features: closed form, hyper-parameters without a refit.

With C = Q diag(g) Q^T the scatter of the features and T = Q^T D, every prior precision lambda_k and noise variance
s_k^2 of output k enters through the ratio rho_k = lambda_k s_k^2 alone (Bishop 2006, section 3.3; MacKay 1992):

    w_k = Q T_k / (g + rho_k)        S_k = s_k^2 Q diag(1 / (g + rho_k)) Q^T
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bayesdl import linalg
from bayesdl.errors import ArgumentError
from bayesdl.last_layer.statistics import Statistics

INTERCEPTS = ("flat", "proper", "none")
FEWEST = 3  # a slope, an intercept and a spread cannot be told apart with fewer points


@final
@dataclass(frozen=True, eq=False)
class ConjugateRegression:
    """Posterior over the weights of K linear outputs, as eigen-coordinates.

    Attributes:
        statistics: of the data, as they were collected; what `updated` adds to.
        intercept: "flat" (improper uniform prior; exact shift equivariance), "proper" (one more weight) or "none".
        values: g, `(d',)`.
        vectors: Q, `(d', d')`.
        target: T = Q^T D, `(d', K)`.
        ratio: rho, `(K,)`.
        noise_variance: s^2, `(K,)`.
    """

    statistics: Statistics
    intercept: str
    values: Tensor
    vectors: Tensor
    target: Tensor
    ratio: Tensor
    noise_variance: Tensor

    @classmethod
    def decompose(cls, statistics: Statistics, *, intercept: str = "flat") -> ConjugateRegression:
        """Decompose once; ratio 1 and the noise that is best for it.

        Raises:
            ArgumentError: unknown intercept, or fewer than three examples.
            NumericalError: the eigensolver fails.
        """
        if intercept not in INTERCEPTS:
            raise ArgumentError(f"intercept={intercept!r}; choose one of {INTERCEPTS}")
        if statistics.count < FEWEST:
            raise ArgumentError(f"{statistics.count} examples; a regression needs at least {FEWEST}")
        used = _used(statistics, intercept)
        values, vectors = linalg.eigh(used.scatter, "scatter of the features")
        target = vectors.mT @ used.cross
        start = cls(statistics, intercept, values, vectors, target, torch.ones_like(used.residual), used.residual)
        return start.with_ratio(start.ratio)

    @property
    def num_outputs(self) -> int:
        """K."""
        return int(self.target.shape[1])

    @property
    def degrees(self) -> int:
        """Examples less one for a flat intercept."""
        return self.statistics.count - (self.intercept == "flat")

    @property
    def prior_precision(self) -> Tensor:
        """lambda = rho / s^2, `(K,)`."""
        return self.ratio / self.noise_variance

    def with_hyperparameters(self, ratio: Tensor, noise_variance: Tensor) -> ConjugateRegression:
        """The same data under another rho `(K,)` and s^2 `(K,)`."""
        for name, given in (("ratio", ratio), ("noise_variance", noise_variance)):
            if given.shape != self.target.shape[1:] or not bool(((given > 0) & torch.isfinite(given)).all()):
                raise ArgumentError(f"{name} is {given}; expected {self.num_outputs} positive numbers, one per output")
        return replace(self, ratio=ratio.to(self.values), noise_variance=noise_variance.to(self.values))

    def with_ratio(self, ratio: Tensor) -> ConjugateRegression:
        """Another rho, with the noise that maximises the evidence for it: s^2 = R(rho) / degrees."""
        variance = self.misfit(ratio) / self.degrees
        return self.with_hyperparameters(ratio, variance.clamp(min=torch.finfo(torch.float64).tiny))

    def misfit(self, ratio: Tensor) -> Tensor:
        """R_k(rho) = E_k - sum_i T_ik^2 / (g_i + rho_k) for rho `(..., K)`."""
        residual = _used(self.statistics, self.intercept).residual
        explained = (self.target.square() / (self.values.unsqueeze(1) + ratio.unsqueeze(-2))).sum(-2)
        return (residual - explained).clamp(min=0)

    def shrinkage(self, ratio: Tensor) -> Tensor:
        """sum_i log(rho / (g_i + rho)) for rho `(..., K)`."""
        return -torch.log1p(self.values.unsqueeze(1) / ratio.unsqueeze(-2)).sum(-2)

    def evidence(self, ratio: Tensor, noise_variance: Tensor) -> Tensor:
        """log p(y_k | features, rho, s^2) for each output, `(..., K)`; differentiable in both.

        With a flat intercept, per unit of its improper prior.
        """
        n, degrees = self.statistics.count, self.degrees
        constant = -0.5 * math.log(n) if self.intercept == "flat" else 0.0
        fit = self.misfit(ratio) / noise_variance
        spread = degrees * torch.log(2.0 * math.pi * noise_variance)
        return constant + 0.5 * (self.shrinkage(ratio) - spread - fit)

    def scale_evidence(self, shape: Tensor, rate: Tensor) -> Tensor:
        """log p(y_k | features, rho) with 1 / s_k^2 ~ Gamma over the noise integrated out, `(K,)`.

        Args:
            shape: a_n of the posterior over 1 / s^2, `(K,)`: a_0 + degrees / 2.
            rate: b_n, `(K,)`: b_0 + R(rho) / 2.

        A prior with a_0 = b_0 = 0, p(s^2) proportional to 1 / s^2, is improper: the value is then per unit of it.
        """
        n, degrees = self.statistics.count, self.degrees
        before = shape - 0.5 * degrees, rate - 0.5 * self.misfit(self.ratio)
        # differences of large numbers: less than their rounding counts as the reference prior
        proper = (before[0] > 1e-9 * shape) & (before[1] > 1e-9 * rate)
        a, b = (torch.where(proper, value, torch.ones_like(value)) for value in before)
        prior = torch.where(proper, a * b.log() - torch.lgamma(a), torch.zeros_like(a))
        constant = (math.log(n) if self.intercept == "flat" else 0.0) + degrees * math.log(2.0 * math.pi)
        fit = torch.lgamma(shape) - shape * rate.log()
        return prior + fit + 0.5 * (self.shrinkage(self.ratio) - constant)

    def profile(self, ratio: Tensor) -> Tensor:
        """`evidence` at the noise that is best for rho, up to a constant, `(..., K)`."""
        misfit = self.misfit(ratio).clamp(min=torch.finfo(torch.float64).tiny)
        return 0.5 * (self.shrinkage(ratio) - self.degrees * misfit.log())

    def log_evidence(self) -> Tensor:
        """Sum of `evidence` over the outputs, a scalar."""
        return self.evidence(self.ratio, self.noise_variance).sum()

    def effective_parameters(self) -> Tensor:
        """gamma_k = sum_i g_i / (g_i + rho_k), `(K,)` (MacKay 1992)."""
        return (self.values.unsqueeze(1) / (self.values.unsqueeze(1) + self.ratio)).sum(0)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Posterior mean as a linear layer: weight `(K, d)` and bias `(K,)`."""
        mean = (self.vectors @ (self.target / (self.values.unsqueeze(1) + self.ratio))).mT
        if self.intercept == "proper":
            return mean[:, :-1], mean[:, -1]
        if self.intercept == "none":
            return mean, mean.new_zeros(len(mean))
        return mean, self.statistics.target_mean - mean @ self.statistics.feature_mean

    def leverage(self, features: Tensor) -> Tensor:
        """phi^T S_k phi / s_k^2, intercept included, for features `(B, d)`: `(B, K)`. Two GEMMs for all outputs."""
        inverse = (1.0 / (self.values.unsqueeze(1) + self.ratio)).to(features)
        return self._rotated(features).square() @ inverse + self._free

    def cross(self, first: Tensor, second: Tensor) -> Tensor:
        """Covariance `(K, B, B')` of the noise-free outputs at features `(B, d)` with those at `(B', d)`."""
        inverse = (1.0 / (self.values.unsqueeze(1) + self.ratio)).mT.to(first)
        shared = (self._rotated(first) * inverse.unsqueeze(1)) @ self._rotated(second).mT
        return (shared + self._free) * self.noise_variance.view(-1, 1, 1).to(first)

    @property
    def _free(self) -> float:
        """Variance of a flat intercept, in units of the noise."""
        return 1.0 / self.statistics.count if self.intercept == "flat" else 0.0

    def _rotated(self, features: Tensor) -> Tensor:
        """Features in the eigenvectors of their scatter."""
        if self.intercept == "flat":
            features = features - self.statistics.feature_mean.to(features)
        vectors = self.vectors.to(features)
        return features @ vectors[:-1] + vectors[-1] if self.intercept == "proper" else features @ vectors

    def latent(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free outputs for features `(B, d)`: two `(B, K)`."""
        weight, bias = self.weights()
        mean = features @ weight.mT.to(features) + bias.to(features)
        return mean, self.leverage(features) * self.noise_variance.to(features)

    def draw(self, noise: Tensor, intercept_noise: Tensor) -> tuple[Tensor, Tensor]:
        """Linear layers drawn from the posterior.

        Args:
            noise: standard normal `(S, K, d')`.
            intercept_noise: standard normal `(S, K)`; used by a flat intercept.

        Returns:
            weights `(S, K, d)` and biases `(S, K)`.
        """
        mean, bias = self.weights()
        scale = (self.noise_variance.unsqueeze(1) / (self.values + self.ratio.unsqueeze(1))).sqrt()
        offset = (noise.to(scale) * scale) @ self.vectors.mT
        if self.intercept == "proper":
            return mean + offset[..., :-1], bias + offset[..., -1]
        if self.intercept == "none":
            return mean + offset, bias.expand(offset.shape[:2])
        spread = (self.noise_variance / self.statistics.count).sqrt() * intercept_noise.to(scale)
        return mean + offset, bias + spread - offset @ self.statistics.feature_mean

    def updated(self, statistics: Statistics) -> ConjugateRegression:
        """The posterior after more data, at the same rho and s^2; equal to a fit on all data at once."""
        merged = self.statistics + statistics
        fresh = ConjugateRegression.decompose(merged, intercept=self.intercept)
        return fresh.with_hyperparameters(self.ratio, self.noise_variance)


def _used(statistics: Statistics, intercept: str) -> Statistics:
    if intercept == "flat":
        return statistics
    return statistics.uncentred() if intercept == "none" else statistics.with_constant()
