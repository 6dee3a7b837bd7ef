"""Targets of a regression in standard units while a network learns them, and predictives back in the user's units."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self, final

import torch
from torch import Tensor

from bayesdl.integrations.sklearn.training import spread
from bayesdl.latent import GaussianLatent, Latent, SampleLatent
from bayesdl.likelihoods import Gaussian, Heteroscedastic, Likelihood, NormalGamma
from bayesdl.predictive import Predictive

SCALED = (Gaussian, Heteroscedastic, NormalGamma)


@final
@dataclass(frozen=True)
class Units:
    """y = mean + scale z, `(D,)` each, with z what the network learns.

    Only where the likelihood is that of z with other parameters; of any other, counts for one, `z = y`.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, y: Tensor, likelihood: Likelihood, standardize: bool) -> Self:
        """The units of targets `(N, D)`."""
        if standardize and isinstance(likelihood, SCALED):
            return cls(y.mean(0), spread(y))
        return cls(torch.zeros_like(y[0]), torch.ones_like(y[0]))

    def standard(self, y: Tensor) -> Tensor:
        """z of y."""
        return (y - self.mean) / self.scale

    def likelihood_in(self, likelihood: Likelihood) -> Likelihood:
        """p(z | f) of a p(y | f) that the user gave."""
        return _rescaled(likelihood, 1 / self.scale)

    def predictive(self, found: Predictive) -> Predictive:
        """p(y | x) of p(z | x)."""
        shift, factor = self.mean, self.scale
        if isinstance(found.likelihood, Heteroscedastic):  # outputs are means, then log-variances
            shift, factor = torch.cat([shift, 2 * factor.log()]), torch.cat([factor, torch.ones_like(factor)])
        latent = _affine(found.latent, shift.to(found.latent.mean), factor.to(found.latent.mean))
        return replace(found, likelihood=_rescaled(found.likelihood, self.scale), latent=latent)


def _rescaled(likelihood: Likelihood, factor: Tensor) -> Likelihood:
    if isinstance(likelihood, Gaussian) and likelihood.noise is not None:
        return likelihood.with_noise(torch.as_tensor(likelihood.noise).to(factor) * factor)
    if isinstance(likelihood, NormalGamma) and likelihood.rate is not None:
        return replace(likelihood, rate=torch.as_tensor(likelihood.rate).to(factor) * factor.square())
    return likelihood


def _affine(latent: Latent, shift: Tensor, factor: Tensor) -> Latent:
    if isinstance(latent, SampleLatent):
        spreads = None if latent.spreads is None else latent.spreads * factor.square()
        return SampleLatent(shift + factor * latent.samples, latent.weights, spreads)
    covariance = None if latent.covariance is None else latent.covariance * torch.outer(factor, factor)
    return GaussianLatent(shift + factor * latent.mean, latent.variance * factor.square(), covariance)
