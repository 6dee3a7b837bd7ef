"""Generative head: Bayesian Gaussian discriminant analysis, trained with its features or fitted to them in one pass."""

from __future__ import annotations

import math
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from bayesdl import linalg
from bayesdl.errors import ArgumentError, NotFittedError, ShapeError, UnknownNameError
from bayesdl.last_layer.class_statistics import ClassStatistics
from bayesdl.last_layer.densities import DensityHead
from bayesdl.last_layer.head import HeadOutput
from bayesdl.posteriors.discriminant import Discriminant

COVARIANCES = ("diag", "full")


@final
class Generative(DensityHead):
    """phi | y = k ~ N(mean_k, Sigma), q(mean_k) = N(mu_k, S_k), class probabilities Dirichlet (Harrison et al. 2024).

    The bound E_q[log p(phi, y)] - log E_q[sum_k p(phi, k)] is closed form (Jensen), and so is the predictive.

    Args:
        in_features: d.
        out_features: K.
        num_data: N.
        covariance: of Sigma: "diag", with diagonal S_k; or "full", one matrix, with S_k a multiple of it.
        counts: examples of each class, `(K,)`; None gives uniform class probabilities.
        concentration: of each class in the Dirichlet, before the counts.
        prior_precision: 1 / tau^2 of the class means, whose prior mean is zero.
        init_noise: standard deviation of the features within a class at the start.
        init_doubt: variance of a class mean at the start, over that of the noise.
        noise_prior: (a, b) of the gamma prior over each feature's 1 / Sigma_jj ("full": a on the determinant, b on the
            trace of the inverse); None for none.
        options: see `Head`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_data: int,
        covariance: str = "diag",
        counts: Tensor | None = None,
        concentration: float = 1.0,
        prior_precision: float = 1e-2,
        init_noise: float = 1.0,
        init_doubt: float = 1e-2,
        noise_prior: tuple[float, float] | None = (0.5, 0.05),
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, num_data=num_data, **options)
        if covariance not in COVARIANCES:
            raise UnknownNameError(f"covariance {covariance!r} is not known; choose one of {COVARIANCES}")
        positive = (concentration, prior_precision, init_noise, init_doubt, *(noise_prior or ()))
        if not min(positive) > 0 or out_features < 2:
            raise ArgumentError(
                f"{out_features} classes, and {positive} for concentration, prior_precision, init_noise, init_doubt, "
                "noise_prior; expected at least 2 classes, positive numbers"
            )
        self.full, self.noise_prior = covariance == "full", noise_prior
        self.prior_precision, self.concentration = float(prior_precision), float(concentration)
        alpha = torch.full((out_features,), float(concentration))
        if counts is not None:
            if counts.shape != alpha.shape or bool((counts < 0).any()):
                raise ArgumentError(f"counts={counts}; expected {out_features} numbers, none of them negative")
            alpha = alpha + counts
        self.alpha: Tensor
        self.register_buffer("alpha", alpha)
        self.known = counts is not None
        # equal means would stay equal
        fixed = torch.Generator().manual_seed(0)
        start = torch.randn(out_features, in_features, generator=fixed) * init_noise / in_features**0.5
        self.mean = nn.Parameter(start)
        self.log_noise = nn.Parameter(torch.full((in_features,), math.log(init_noise)))
        level = math.log(init_doubt) + (0.0 if self.full else 2.0 * math.log(init_noise))
        self.log_doubt = nn.Parameter(torch.full((out_features,) if self.full else (out_features, in_features), level))
        if self.full:
            self.lower = nn.Parameter(torch.zeros(in_features, in_features))

    def discriminant(self) -> Discriminant:
        doubt = self.log_doubt.exp()
        share = (self.alpha / self.alpha.sum()).log()
        if self.full:
            factor = self.lower.tril(-1) + torch.diag(self.log_noise.exp())
            return Discriminant(self.mean, factor, doubt, share, True)
        noise = (2.0 * self.log_noise).exp().expand_as(self.mean)
        return Discriminant(self.mean, noise, doubt, share, False)

    def class_counts(self) -> Tensor:
        if self.known:
            return self.alpha - self.concentration
        return torch.full_like(self.alpha, self.num_data / self.out_features)

    def _mismatch(self) -> Tensor:
        """tr(S_k Sigma^-1), `(K,)`."""
        doubt = self.log_doubt.exp()
        return self.in_features * doubt if self.full else (doubt * (-2.0 * self.log_noise).exp()).sum(-1)

    def terms(self, output: HeadOutput, y: Tensor) -> Tensor:
        own = self.discriminant()
        phi = output.features.flatten(0, -2).to(own.mean.dtype)
        share = torch.digamma(self.alpha) - torch.digamma(self.alpha.sum())
        expected = own.log_densities(phi, predictive=False) - 0.5 * self._mismatch() + share
        joint = output.mean.flatten(0, -2)
        return (y * expected).sum(-1) - y.sum(-1) * torch.logsumexp(joint, -1)

    def divergence(self) -> Tensor:
        width, tau = self.in_features, self.prior_precision
        if self.full:
            factor = self.discriminant().noise
            trace = self.log_doubt.exp() * factor.square().sum()
            logdet = width * self.log_doubt + 2.0 * self.log_noise.sum()
            inverse = torch.linalg.solve_triangular(
                factor, torch.eye(width, dtype=factor.dtype, device=factor.device), upper=False
            )
            rest = inverse.square().sum()
        else:
            trace, logdet = self.log_doubt.exp().sum(-1), self.log_doubt.sum(-1)
            rest = (-2.0 * self.log_noise).exp().sum()
        distance = tau * (self.mean.square().sum(-1) + trace)
        total = 0.5 * (distance - width * math.log(tau) - logdet - width).sum()
        if self.noise_prior is None:
            return total
        a, b = self.noise_prior
        return total + (a + 1.0) * 2.0 * self.log_noise.sum() + b * rest

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, *, prior_count: float = 1e-2, shrinkage: float = 0.0) -> Self:
        """Fit to features of a trained network `(N, d)` in closed form, one pass; in place, returns itself.

        mu_k = sum phi / (k0 + n_k), Sigma the pooled within-class scatter, S_k = Sigma / (k0 + n_k), class
        probabilities from the counts.

        Args:
            features: `(N, d)`.
            labels: `(N,)`.
            prior_count: k0, by which the means shrink to zero.
            shrinkage: a, Sigma = (1 - a) S + a tr(S) / d I; "full".

        Raises:
            ShapeError: another number of classes.
            NotFittedError: no more examples than classes.
        """
        self.check_features(features)
        seen = ClassStatistics.of(features, labels, self.out_features, diagonal=not self.full)
        if len(seen.counts) != self.out_features:
            raise ShapeError(f"the labels hold {len(seen.counts)} classes and the head {self.out_features}")
        if seen.degrees < 1:
            raise NotFittedError(f"{seen.total} examples say nothing about the spread within a class; give more")
        strength = prior_count + seen.counts.double()
        pooled = seen.scatter / seen.degrees
        self.alpha.copy_(self.concentration + seen.counts)
        self.known = True
        self.mean.copy_(seen.mean * (seen.counts / strength).unsqueeze(1))
        if self.full:
            eye = torch.eye(self.in_features, dtype=pooled.dtype, device=pooled.device)
            spread = (1.0 - shrinkage) * pooled + shrinkage * pooled.diagonal().mean() * eye
            factor = linalg.cholesky(spread, "scatter within classes")
            self.log_noise.copy_(factor.diagonal().log())
            self.lower.copy_(factor.tril(-1))
            self.log_doubt.copy_(-strength.log())
        else:
            pooled = pooled.clamp(min=1e-12 * float(pooled.mean()))
            self.log_noise.copy_(0.5 * pooled.log())
            self.log_doubt.copy_(pooled.log() - strength.log().unsqueeze(1))
        return self
