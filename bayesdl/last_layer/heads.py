"""Regression and classification heads: the kinds of `Head` with a point or a gamma noise."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn

from bayesdl.errors import ArgumentError, ShapeError, UnknownNameError
from bayesdl.last_layer import bounds
from bayesdl.last_layer.head import LinearHead
from bayesdl.last_layer.labels import class_labels, soft_labels
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, NormalGamma

NOISES = ("point", "gamma")
LIKELIHOODS = ("categorical", "bernoulli")


class NoisyHead(LinearHead):
    """A head whose outputs carry noise of variance s_k^2: learned as a number, or as Gamma(a_k, b_k) over 1 / s_k^2.

    Args:
        noise: "point" or "gamma".
        noise_prior: (a, b) of the gamma prior over 1 / s^2; None for none (point only).
        init_noise: s at the start, a number or one per output.
        fixed_noise: keep `init_noise` as it is (point only).
        options: see `LinearHead`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_data: int,
        noise: str = "point",
        noise_prior: tuple[float, float] | None = (0.5, 0.05),
        init_noise: float | Tensor = 1.0,
        fixed_noise: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, num_data=num_data, **options)
        if noise not in NOISES:
            raise UnknownNameError(f"noise {noise!r} is not known; choose one of {NOISES}")
        start = torch.as_tensor(init_noise, dtype=torch.get_default_dtype()).expand(out_features).clone()
        if not bool((start > 0).all()) or (noise_prior is not None and not min(noise_prior) > 0):
            raise ArgumentError(f"init_noise={init_noise} and noise_prior={noise_prior}; expected positive numbers")
        if noise == "gamma" and (noise_prior is None or fixed_noise):
            raise ArgumentError(
                'noise="gamma" infers the noise: it needs a noise_prior=(shape, rate) and no fixed_noise'
            )
        self.noise, self.noise_prior = noise, noise_prior
        if noise == "point":
            self.log_noise = nn.Parameter(start.log(), requires_grad=not fixed_noise)
        else:
            # shape above 1 keeps the expected variance finite: E[s^2] = rate / (shape - 1)
            self.raw_shape = nn.Parameter(torch.full((out_features,), _inverse_softplus(1.0)))
            square = start.square()
            self.raw_rate = nn.Parameter(square + torch.log(-torch.expm1(-square)))

    def gamma(self) -> tuple[Tensor, Tensor]:
        """Shape and rate of q(1 / s^2), `(K,)`; only for noise="gamma"."""
        return 1.0 + nn.functional.softplus(self.raw_shape), nn.functional.softplus(self.raw_rate)

    def variance_and_precision(self) -> tuple[Tensor, Tensor]:
        """E[s^2] and E[1 / s^2], `(K,)`."""
        if self.noise == "point":
            variance = (2.0 * self.log_noise).exp()
            return variance, 1.0 / variance
        shape, rate = self.gamma()
        return rate / (shape - 1.0), shape / rate

    @property
    @abstractmethod
    def scaled(self) -> bool:
        """Whether S is in units of the noise: w_k | s_k^2 ~ N(mu_k, s_k^2 S_k), and so is the prior."""

    def divergence(self) -> Tensor:
        weight = self.variance_and_precision()[1] if self.scaled else 1.0
        total = self.gaussian_divergence(weight).sum()
        if self.noise_prior is None:
            return total
        a0, b0 = self.noise_prior
        if self.noise == "point":
            return total + ((a0 + 1.0) * 2.0 * self.log_noise + b0 * (-2.0 * self.log_noise).exp()).sum()
        shape, rate = self.gamma()
        gamma = (
            (shape - a0) * torch.digamma(shape)
            - torch.lgamma(shape)
            + math.lgamma(a0)
            + a0 * (rate.log() - math.log(b0))
            + shape * (b0 - rate) / rate
        )
        return total + gamma.sum()


@final
class Regression(NoisyHead):
    """y_k ~ N(w_k^T phi, s_k^2), one noise per output.

    With noise="gamma" the noise has a posterior too and the predictive is Student-t: heavier tails where there are few
    data. Arguments as `NoisyHead` and `LinearHead`.
    """

    @property
    def scaled(self) -> bool:
        return self.noise == "gamma"

    def targets(self, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        if y.shape == mean.shape:
            flat = y
        elif y.numel() == mean.numel():  # (...,) for one output, or (..., K) with its leading axes
            flat = y.reshape(mean.shape)
        else:
            raise ShapeError(
                f"targets have shape {tuple(y.shape)} and the outputs {tuple(mean.shape)} (B, K); they must agree"
            )
        return flat.to(mean.dtype), torch.ones(len(mean), dtype=torch.bool, device=mean.device)

    def expected_log_likelihood(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        if self.noise == "point":
            precision = (-2.0 * self.log_noise).exp()
            each = (y - mean).square() * precision + 2.0 * self.log_noise + variance * precision
        else:
            shape, rate = self.gamma()
            each = shape / rate * (y - mean).square() + variance - torch.digamma(shape) + rate.log()
        return -0.5 * (each + math.log(2.0 * math.pi)).sum(-1)

    def latent(self, mean: Tensor, variance: Tensor) -> GaussianLatent:
        return GaussianLatent(mean, variance * self.variance_and_precision()[0] if self.scaled else variance)

    def likelihood(self) -> Likelihood:
        if self.noise == "point":
            return Gaussian(noise=self.log_noise.detach().exp())
        shape, rate = self.gamma()
        return NormalGamma(shape.detach(), rate.detach())


@final
class Classification(NoisyHead):
    """Logits z_k = w_k^T phi + eps_k, y ~ softmax(z); trained on a lower bound, no sampling.

    Args:
        bound: "km" (adaptive tilt, the tightest), "jensen" or "km_reduced" (weights scale with the noise; needed for
            noise="gamma"). See `bayesdl.last_layer.bounds`.
        likelihood: "categorical", one of K classes; or "bernoulli", K labels that are 0 or 1, each a softmax of its
            logit and one that is pinned at zero.
        link: of the predictive: "probit", "bridge" (categorical) or "mc".
        ignore_index: label of elements that do not count.
        options: see `NoisyHead` and `LinearHead`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_data: int,
        bound: str = "km",
        likelihood: str = "categorical",
        link: str = "probit",
        ignore_index: int = -100,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, num_data=num_data, **options)
        if likelihood not in LIKELIHOODS:
            raise UnknownNameError(f"likelihood {likelihood!r} has no such head; choose one of {sorted(LIKELIHOODS)}")
        self.binary = likelihood == "bernoulli"
        if out_features < 2 and not self.binary:
            raise ArgumentError(f'{out_features} classes; expected at least 2 (one label: likelihood="bernoulli")')
        self.bound, self.link, self.ignore_index = bounds.check_bound(bound), link, ignore_index
        self.likelihood()  # raises on an unknown link
        if self.noise == "gamma" and bound != "km_reduced":
            raise ArgumentError(f'noise="gamma" has a finite expectation only under bound="km_reduced"; got {bound!r}')
        if bound == "km_reduced":
            self.alpha = nn.Parameter(torch.tensor(0.1))

    @property
    def scaled(self) -> bool:
        return self.bound == "km_reduced"

    def targets(self, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        if self.binary:
            return soft_labels(y, mean), torch.ones(len(mean), dtype=torch.bool, device=mean.device)
        return class_labels(y, mean, self.ignore_index)

    def expected_log_likelihood(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        noise, precision = self.variance_and_precision()
        if self.bound == "km_reduced":
            # E[1/s^2] and E[s^2] stand in for a noise that is known only as a gamma
            inner = noise / 4.0 - self.alpha + self.alpha.square() * precision
            spread = 1.0 + variance
            shifted, rest = mean + self.alpha * spread, 0.5 * (spread * inner).sum(-1)
            upper = rest + (nn.functional.softplus(shifted).sum(-1) if self.binary else torch.logsumexp(shifted, -1))
        else:
            upper = bounds.Normaliser(self.bound, self.binary).upper(mean, variance + noise)
        return (y * mean).sum(-1) - (upper if self.binary else y.sum(-1) * upper)

    def latent(self, mean: Tensor, variance: Tensor) -> GaussianLatent:
        noise = self.variance_and_precision()[0]
        spread = variance * noise if self.scaled else variance
        # logit noise is aleatoric: the probit of the shrunk logits is the probit of both variances together
        shrink = 1.0 + math.pi / 8.0 * noise
        return GaussianLatent(mean / shrink.sqrt(), spread / shrink)

    def likelihood(self) -> Likelihood:
        return Bernoulli(link=self.link) if self.binary else Categorical(link=self.link, ignore_index=self.ignore_index)


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
