"""Predictive: the distribution of y at given inputs, with its split into aleatoric and epistemic parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from bayesdl import mixtures
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.latent import Latent, cat_latents

if TYPE_CHECKING:
    from bayesdl.likelihoods import Likelihood


@dataclass(frozen=True)
class Split:
    """total = aleatoric + epistemic; nats for classes `(B,)`, target units squared for regression `(B, C)`."""

    aleatoric: Tensor
    epistemic: Tensor


@dataclass(frozen=True, eq=False)
class Predictive:
    """p(y | x, data) for a batch of B inputs.

    Attributes:
        likelihood: p(y | f).
        latent: belief over the outputs f alone, without observation noise.
        noise: base noise `(S, C)`, common to all inputs, for whatever has no closed form.
    """

    likelihood: Likelihood
    latent: Latent
    noise: Tensor

    @property
    def task(self) -> str:
        """ "classification", "multilabel", "regression" or "count"."""
        return self.likelihood.task

    @cached_property
    def distribution(self) -> Distribution:
        """The predictive as a torch Distribution, observation noise included."""
        return self.likelihood.marginal(self.latent, self.noise)

    @cached_property
    def split(self) -> Split:
        """Aleatoric and epistemic parts, both from the same draws or moments."""
        return self.likelihood.split(self.latent, self.noise)

    @property
    def probs(self) -> Tensor:
        """`(B, C)`; class or label probabilities. Raises `UnsupportedError` for regression."""
        if isinstance(self.distribution, (Categorical, Bernoulli)):
            return self.distribution.probs
        raise UnsupportedError(f"a {self.likelihood.name} predictive has no class probabilities; use .mean")

    @property
    def mean(self) -> Tensor:
        """`(B, C)`: probabilities for classification and multi-label, the predictive mean otherwise."""
        return self.probs if self.task in ("classification", "multilabel") else self.distribution.mean

    @property
    def variance(self) -> Tensor:
        """`(B, C)`: p (1 - p) for probabilities, the predictive variance (noise included) otherwise."""
        if self.task in ("classification", "multilabel"):
            return self.probs * (1 - self.probs)
        return self.distribution.variance

    @property
    def aleatoric(self) -> Tensor:
        """Expected uncertainty of y once f is known: `(B,)` nats, or `(B, C)` variance."""
        return self.split.aleatoric

    @property
    def epistemic(self) -> Tensor:
        """Uncertainty about f: mutual information `(B,)` in nats, or variance of the mean `(B, C)`."""
        return self.split.epistemic

    @property
    def total(self) -> Tensor:
        """aleatoric + epistemic."""
        return self.split.aleatoric + self.split.epistemic

    @property
    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights `(S,)`, means and variances `(S, B, C)` of y as a mixture; noise included."""
        return self.likelihood.components(self.latent, self.noise)

    @cached_property
    def entropy(self) -> Tensor:
        """`(B,)` in nats; mixtures and counts by quadrature, see `bayesdl.mixtures.entropy`."""
        return mixtures.entropy(self.distribution)

    @property
    def batch_size(self) -> int:
        """B."""
        return int(self.latent.mean.shape[0])

    def log_prob(self, y: Tensor) -> Tensor:
        """log p(y | x), summed over outputs: `(B,)` for targets of the likelihood's shape.

        Raises:
            ShapeError, LabelError: targets do not fit the outputs.
        """
        checked = self.likelihood.check_targets(self.latent.mean, y)
        return mixtures.per_example(self.distribution, self.distribution.log_prob(checked))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws of y: `(n, B)` class indices, or `(n, B, C)`."""
        if n < 1:
            raise ArgumentError(f"n={n} draws were asked for; expected at least 1")
        return mixtures.sample(self.distribution, n, generator)

    def quantile(self, q: float) -> Tensor:
        """`(B, C)` marginal quantiles at level `q` in (0, 1). Raises `UnsupportedError` for classes."""
        if not 0.0 < q < 1.0:
            raise ArgumentError(f"q={q} was given; a quantile level lies strictly between 0 and 1")
        if self.task in ("classification", "multilabel"):
            raise UnsupportedError(f"a {self.likelihood.name} predictive has no quantiles; use .probs")
        return mixtures.quantile(self.distribution, q)

    def interval(self, level: float = 0.9) -> Tensor:
        """`(B, C, 2)`: the central interval that holds `level` of the probability of each output."""
        if not 0.0 < level < 1.0:
            raise ArgumentError(f"level={level} was given; the probability of an interval lies between 0 and 1")
        tail = (1.0 - level) / 2.0
        return torch.stack([self.quantile(tail), self.quantile(1.0 - tail)], dim=-1)

    def map(self, function: Callable[[Tensor], Tensor]) -> Predictive:
        """Apply `function` to every tensor."""
        return Predictive(self.likelihood.map(function), self.latent.map(function), function(self.noise))

    @staticmethod
    def cat(parts: Sequence[Predictive]) -> Predictive:
        """Concatenate along the batch; all parts come from one call."""
        if not parts:
            raise ArgumentError("no predictions to concatenate: the loader yielded no batch")
        return Predictive(parts[0].likelihood, cat_latents([p.latent for p in parts]), parts[0].noise)
