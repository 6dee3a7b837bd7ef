"""Bernoulli likelihood on logits: one binary label, or several independent ones (multi-label)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Distribution

from bayesdl.errors import ArgumentError, LabelError
from bayesdl.latent import GaussianLatent, Latent
from bayesdl.likelihoods.base import Likelihood, entropy_split, first_bad, scaled_mean
from bayesdl.predictive import Split


@final
@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """C independent labels in {0, 1}; f are logits `(B, C)`, targets `(B, C)`, or `(B,)` where C = 1.

    Args:
        link: "probit" (mean-field) or "mc" (draws with common base noise).
    """

    link: str = "probit"

    name: ClassVar[str] = "bernoulli"
    task: ClassVar[str] = "multilabel"

    def __post_init__(self) -> None:
        if self.link not in ("probit", "mc"):
            raise ArgumentError(f"link={self.link!r} is not known; choose 'probit' or 'mc'")

    def distribution(self, f: Tensor) -> Distribution:
        return TorchBernoulli(logits=f)

    def check_targets(self, f: Tensor, y: Tensor) -> Tensor:
        target = super().check_targets(f, y)
        bad = (target != 0) & (target != 1)
        if bool(bad.any()):
            place = first_bad(bad)
            raise LabelError(f"target {float(target[place])} at index {place}; bernoulli labels are 0 or 1")
        return target

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(f) - y

    def hessian_root(self, f: Tensor) -> Tensor:
        p = torch.sigmoid(f.detach())
        return torch.diag_embed((p * (1 - p)).sqrt()).permute(2, 0, 1)

    def marginal(self, latent: Latent, noise: Tensor) -> Distribution:
        if isinstance(latent, GaussianLatent) and self.link == "probit":
            return TorchBernoulli(logits=scaled_mean(latent))
        return self.mixture(*latent.draws(noise))

    def mixture(self, weights: Tensor, draws: Tensor) -> Distribution:
        share = weights.log().view(-1, 1, 1)
        positive = torch.logsumexp(share + torch.nn.functional.logsigmoid(draws), 0)
        negative = torch.logsumexp(share + torch.nn.functional.logsigmoid(-draws), 0)
        return TorchBernoulli(logits=positive - negative)

    def split(self, latent: Latent, noise: Tensor) -> Split:
        """Entropies summed over the labels, `(B,)` nats; both parts from draws."""
        weights, draws = latent.draws(noise)
        probs = torch.sigmoid(draws)
        return entropy_split(weights, _entropy(probs), _entropy(torch.einsum("s,sbc->bc", weights, probs)))

    def config(self) -> dict[str, object]:
        return {"link": self.link}


def _entropy(probs: Tensor) -> Tensor:
    return -(torch.special.xlogy(probs, probs) + torch.special.xlogy(1 - probs, 1 - probs)).sum(-1)
