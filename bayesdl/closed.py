"""Predictives of mixtures of Gaussian beliefs: each part in its closed form, then their mixture.

A Bayesian last layer on features that are uncertain themselves (an ensemble, SWAG or a chain over the trunk) gives a
Gaussian belief for every sample of the features; the law of total variance joins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, MixtureSameFamily, Normal, StudentT

from bayesdl.latent import SampleLatent

if TYPE_CHECKING:
    from bayesdl.likelihoods import Likelihood


@dataclass(frozen=True)
class Split:
    """total = aleatoric + epistemic; nats for classes `(B,)`, target units squared for regression `(B, C)`."""

    aleatoric: Tensor
    epistemic: Tensor


def marginal(likelihood: Likelihood, latent: SampleLatent, noise: Tensor) -> Distribution:
    """The mixture of the parts' closed-form predictives; over draws where their family has no mixture here."""
    parts = [likelihood.marginal(part, noise) for part in latent.parts()]
    weights = latent.weights
    if all(isinstance(part, Categorical) for part in parts):
        shares = torch.stack([torch.log_softmax(part.logits, -1) for part in parts])  # type: ignore[attr-defined]
        return Categorical(logits=torch.logsumexp(_log(weights, shares) + shares, 0))
    if all(isinstance(part, Bernoulli) for part in parts):
        logits = torch.stack([part.logits for part in parts])  # type: ignore[attr-defined]
        positive = torch.logsumexp(_log(weights, logits) + torch.nn.functional.logsigmoid(logits), 0)
        return Bernoulli(
            logits=positive - torch.logsumexp(_log(weights, logits) + torch.nn.functional.logsigmoid(-logits), 0)
        )
    share = Categorical(weights.expand(len(latent.mean), -1))
    if all(isinstance(part, Normal) for part in parts):
        normal = Normal(_stacked(parts, "loc"), _stacked(parts, "scale"))
        return MixtureSameFamily(share, Independent(normal, 1))
    if all(isinstance(part, StudentT) for part in parts):
        heavy = StudentT(_stacked(parts, "df"), _stacked(parts, "loc"), _stacked(parts, "scale"))
        return MixtureSameFamily(share, Independent(heavy, 1))
    return likelihood.marginal(latent, noise)


def components(likelihood: Likelihood, latent: SampleLatent, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `(S,)`, means and variances `(S, B, C)` of all parts' components."""
    found = [likelihood.components(part, noise) for part in latent.parts()]
    weights = torch.cat([share * part[0] for share, part in zip(latent.weights, found, strict=True)])
    return weights, torch.cat([part[1] for part in found]), torch.cat([part[2] for part in found])


def split(likelihood: Likelihood, latent: SampleLatent, noise: Tensor) -> Split:
    """Regression: law of total variance over the parts, closed form. Classes: from draws of all parts together."""
    if likelihood.task != "regression":
        return likelihood.split(latent, noise)
    parts = [likelihood.split(part, noise) for part in latent.parts()]
    means = []
    for part in latent.parts():
        shares, mean, _ = likelihood.components(part, noise)
        means.append(torch.einsum("s,s...->...", shares, mean))
    mean = torch.stack(means)
    centre = torch.einsum("s,s...->...", latent.weights, mean)
    within = torch.stack([part.epistemic for part in parts]) + (mean - centre).square()
    aleatoric = torch.stack([part.aleatoric for part in parts])
    return Split(
        torch.einsum("s,s...->...", latent.weights, aleatoric), torch.einsum("s,s...->...", latent.weights, within)
    )


def _log(weights: Tensor, like: Tensor) -> Tensor:
    return weights.log().view(-1, *(1,) * (like.dim() - 1))


def _stacked(parts: Sequence[Distribution], name: str) -> Tensor:
    return torch.stack([getattr(part, name) for part in parts], 1)
