"""Heads that model the features of every class: p(y | phi) by Bayes' rule, and the density of the features for free."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor, nn

from bayesdl.last_layer.head import Head
from bayesdl.last_layer.labels import class_labels
from bayesdl.latent import GaussianLatent
from bayesdl.likelihoods import Categorical, Likelihood
from bayesdl.likelihoods.categorical import entropy
from bayesdl.posteriors.discriminant import Discriminant
from bayesdl.posteriors.last_layer import LastLayerPosterior

IGNORED = -100


@final
@dataclass(frozen=True, eq=False)
class PseudoCounts:
    """A Dirichlet over class probabilities from the density of the features (Charpentier et al. 2020).

    Attributes:
        alpha: concentrations, `(..., K)`: prior plus counts.
    """

    alpha: Tensor

    @property
    def mean(self) -> Tensor:
        """Expected probabilities, `(..., K)`."""
        return self.alpha / self.alpha.sum(-1, keepdim=True)

    @property
    def vacuity(self) -> Tensor:
        """K / alpha_0, `(...,)`: one where nothing was counted (prior 1)."""
        return self.alpha.shape[-1] / self.alpha.sum(-1)

    @property
    def aleatoric(self) -> Tensor:
        """Expected entropy in nats, `(...,)`."""
        strength = self.alpha.sum(-1, keepdim=True)
        return -(self.mean * (torch.digamma(self.alpha + 1.0) - torch.digamma(strength + 1.0))).sum(-1)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information between y and the probabilities in nats, `(...,)`."""
        return (entropy(self.mean) - self.aleatoric).clamp(min=0)


class DensityHead(Head):
    """A head of class densities; its outputs are log p(phi, y = k), whose softmax is the predictive, exactly."""

    @abstractmethod
    def discriminant(self) -> Discriminant:
        """The densities as they are now; differentiable where they are trained."""

    @abstractmethod
    def class_counts(self) -> Tensor:
        """Examples of each class, `(K,)`."""

    def takes(self, layer: nn.Linear) -> bool:
        return layer.in_features == self.in_features

    def start_from(self, layer: nn.Linear) -> Self:
        """Nothing to take: the weights of a linear layer are no class means."""
        return self

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """log p(phi, y = k) and zeros for `(..., d)`: two `(..., K)`."""
        self.check_features(features)
        with torch.autocast(features.device.type, enabled=False):
            own = self.discriminant()
            joint = own.log_joint(features.flatten(0, -2).to(own.mean.dtype))
            joint = joint.reshape(*features.shape[:-1], -1)
            return joint, torch.zeros_like(joint)

    def latent(self, mean: Tensor, variance: Tensor) -> GaussianLatent:
        return GaussianLatent(mean, variance)

    def likelihood(self) -> Likelihood:
        return Categorical(ignore_index=IGNORED)

    def targets(self, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        return class_labels(y, mean, IGNORED)

    def posterior(self, layer: str | None = None) -> LastLayerPosterior:
        own = self.discriminant()
        held = {name: value.detach().clone().float() for name, value in own.tensors().items()}
        return LastLayerPosterior(layer, Discriminant.restore(held, own.config()))

    def score(self, kind: str, features: Tensor) -> Tensor | None:
        own = self.discriminant()
        phi = features.to(own.mean.dtype)
        if kind == "density":
            return -torch.logsumexp(own.log_joint(phi), -1)
        if kind == "mahalanobis":
            return own.distances(phi, predictive=False).amin(-1)
        return None

    def pseudo_counts(self, features: Tensor, *, prior: float = 1.0) -> PseudoCounts:
        """Dirichlet with alpha_k = prior + n_k p(phi | k) / max p(. | k) for `(..., d)`.

        An input at the mean of a class counts all of its examples, one far from all classes none: there the belief
        returns to the prior. The budget has no units, and does not change under linear maps of the features.

        Args:
            features: `(..., d)`.
            prior: concentration of each class before any example.
        """
        self.check_features(features)
        own = self.discriminant()
        apart = own.distances(features.flatten(0, -2).to(own.mean.dtype), predictive=True)
        alpha = prior + self.class_counts().to(apart) * (-0.5 * apart).exp()
        return PseudoCounts(alpha.reshape(*features.shape[:-1], -1))
