"""Predictive: the distribution of y at given inputs, with its split into aleatoric and epistemic parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from bayesdl import closed, mixtures
from bayesdl.closed import Split
from bayesdl.errors import ArgumentError, LabelError, UnsupportedError
from bayesdl.latent import Latent, SampleLatent, cat_latents

if TYPE_CHECKING:
    from bayesdl.likelihoods import Likelihood


@dataclass(frozen=True, eq=False)
class Predictive:
    """p(y | x, data) for a batch of B inputs.

    Outputs at every position put the positions behind the batch axis: sequences have `mean` `(B, T, C)` and `entropy`
    `(B, T)`, images `(B, H, W, C)` and `(B, H, W)`. `flat` makes every position an input of its own.

    Attributes:
        likelihood: p(y | f).
        latent: belief over the outputs f alone, without observation noise.
        noise: base noise `(S, C)`, common to all inputs, for whatever has no closed form.
    """

    likelihood: Likelihood
    latent: Latent
    noise: Tensor

    def __repr__(self) -> str:
        mean = self.latent.mean
        draws = f", samples={len(self.latent.samples)}" if isinstance(self.latent, SampleLatent) else ""
        return f"Predictive({self.likelihood.name}, outputs {tuple(mean.shape)}{draws}, {mean.dtype}, {mean.device})"

    @property
    def task(self) -> str:
        """ "classification", "multilabel", "regression" or "count"."""
        return self.likelihood.task

    @cached_property
    def distribution(self) -> Distribution:
        """The predictive as a torch Distribution, observation noise included."""
        if isinstance(self.latent, SampleLatent) and self.latent.spreads is not None:
            return closed.marginal(self.likelihood, self.latent, self.noise)
        return self.likelihood.marginal(self.latent, self.noise)

    @cached_property
    def split(self) -> Split:
        """Aleatoric and epistemic parts, both from the same draws or moments."""
        if isinstance(self.latent, SampleLatent) and self.latent.spreads is not None:
            return closed.split(self.likelihood, self.latent, self.noise)
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
        if isinstance(self.latent, SampleLatent) and self.latent.spreads is not None:
            return closed.components(self.likelihood, self.latent, self.noise)
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
        """log p(y | x), summed over outputs: `(B,)` for targets of the likelihood's shape, zero where one is ignored.

        Raises:
            ShapeError, LabelError: targets do not fit the outputs.
        """
        checked = self.likelihood.check_targets(self.latent.mean, y)
        counted = self.likelihood.counted(checked)
        if counted is None:
            return mixtures.per_example(self.distribution, self.distribution.log_prob(checked))
        found = self.distribution.log_prob(checked.masked_fill(~counted, 0))
        return mixtures.per_example(self.distribution, found).masked_fill(~counted, 0.0)

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

    def flat(self) -> Predictive:
        """Positions as inputs of their own: `(B T, C)`."""
        return self if self.latent.mean.dim() == 2 else replace(self, latent=self.latent.flat())

    def observed(self, targets: Tensor, group: Tensor | None = None) -> tuple[Predictive, Tensor, Tensor | None]:
        """Predictive `(N, C)`, checked targets `(N,)` and group of the observations that count, positions as inputs.

        Args:
            targets: in the likelihood's shape.
            group: one per example, or one per position, to be cut alike.

        Raises:
            ShapeError, LabelError: targets do not fit the outputs, or all of them are ignored.
        """
        shape = self.latent.mean.shape[:-1]
        if group is not None and len(shape) > 1 and group.shape == shape[:1]:
            group = group.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
        flat = self.flat()
        checked = self.likelihood.check_targets(self.latent.mean, targets)
        mask = self.likelihood.counted(checked)
        goal = checked if len(shape) == 1 else checked.flatten()
        if mask is None or bool(mask.all()):
            return flat, goal, None if group is None else group.flatten()
        keep = mask.flatten()
        if group is not None:
            group = group.flatten()[keep.to(group.device)]
        return flat._select(keep), goal[keep], group

    def without_ignored(self, targets: Tensor) -> Predictive:
        """The predictive without the positions whose target is ignored; targets may be labels of other classes."""
        shape = self.latent.mean.shape[:-1]
        mask = self.likelihood.counted(targets.to(self.latent.mean.device)) if targets.shape == shape else None
        return self if mask is None or bool(mask.all()) else self.flat()._select(mask.flatten())

    def _select(self, mask: Tensor) -> Predictive:
        if not bool(mask.any()):
            raise LabelError("every target is ignored; at least one has to count")
        return replace(self, latent=self.latent.select(mask))

    @staticmethod
    def cat(parts: Sequence[Predictive]) -> Predictive:
        """Concatenate along the batch; all parts come from one call."""
        if not parts:
            raise ArgumentError("no predictions to concatenate: the loader yielded no batch")
        return Predictive(parts[0].likelihood, cat_latents([p.latent for p in parts]), parts[0].noise)


def cat_targets(parts: Sequence[Predictive], targets: Sequence[Tensor]) -> Tensor:
    """Targets of several batches as one tensor, in the shape that `Predictive.cat` of their predictions has."""
    if len({part.latent.mean.shape[1:] for part in parts}) > 1:
        targets = [target.flatten() for target in targets]
    return torch.cat(list(targets))
