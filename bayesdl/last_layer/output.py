"""HeadOutput: what a Bayesian head returns; closed forms in, no samples drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, UnsupportedError
from bayesdl.latent import GaussianLatent
from bayesdl.predictive import Predictive

if TYPE_CHECKING:
    from bayesdl.last_layer.head import Head


@final
@dataclass(frozen=True, eq=False)
class HeadOutput:
    """Belief of a head over its outputs at given features.

    Attributes:
        head: the head that made it.
        mean: `(..., K)` mean of the noise-free outputs.
        variance: `(..., K)` their variance; for heads whose weights scale with the noise, in units of the noise.
        features: `(..., d)`, what the head was given.
    """

    head: Head
    mean: Tensor
    variance: Tensor
    features: Tensor

    @property
    def logits(self) -> Tensor:
        """The mean: what a plain linear head would return."""
        return self.mean

    def loss(self, y: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Negative evidence lower bound per example: the mean over kept elements, plus `kl_weight` times the KL.

        Args:
            y: targets for the leading shape of `mean`: class indices or soft labels `(..., K)` for classification,
                real `(..., K)` for regression (`(...,)` where K = 1).
            mask: bool `(...,)`; False elements do not count.
            weight: `(...,)` non-negative weights of the elements.

        Raises:
            ShapeError, LabelError, NonFiniteError: targets or weights do not fit.
        """
        return self.head.loss(self, y, mask=mask, weight=weight)

    def at(self, positions: Tensor) -> HeadOutput:
        """The output at one position of every sequence `(B, T, ...)`: `(B, ...)`.

        Decoders of Hugging Face score every token and keep the last one of each sequence; so does
        `head.output.at(attention_mask.sum(-1) - 1)` for sequences padded on the right.

        Args:
            positions: `(B,)`, integers.

        Raises:
            ShapeError: there are no positions, or as many of them as sequences are not given.
        """
        if self.mean.dim() < 3 or positions.shape != self.mean.shape[:1]:
            raise ShapeError(f"positions {tuple(positions.shape)} for outputs {tuple(self.mean.shape)}; expected (B,)")
        rows = torch.arange(len(positions), device=self.mean.device)
        index = rows, positions.to(self.mean.device)
        return HeadOutput(self.head, self.mean[index], self.variance[index], self.features[index])

    @cached_property
    def latent(self) -> GaussianLatent:
        """Belief over the noise-free outputs: `(..., K)` for class labels, `(B, K)` with leading axes flattened for
        families that know no positions."""
        if self.head.likelihood().output_axis is not None:
            return self.head.latent(self.mean, self.variance)
        return self.head.latent(self.mean.flatten(0, -2), self.variance.flatten(0, -2))

    @cached_property
    def predictive(self) -> Predictive:
        """The predictive distribution, in closed form: two calls give the same numbers in any mode."""
        mean = self.latent.mean
        return self.head.likelihood().predictive(self.latent, mean.new_zeros(1, mean.shape[-1]))

    def ood_score(self, kind: str = "variance") -> Tensor:
        """`(...,)`; higher means further from the training data.

        Args:
            kind: "variance" (mean latent variance), "entropy", "epistemic", "max_prob" (less the largest probability;
                classification), and of heads that model the features "density" (less their log density),
                "mahalanobis" (squared distance to the nearest class) and "relative_mahalanobis" (less that to all).

        Raises:
            UnsupportedError: this head has no such score.
        """
        shape = self.mean.shape[:-1]
        modelled = self.head.score(kind, self.features.flatten(0, -2))
        if modelled is not None:
            return modelled.reshape(shape)
        predictive = self.predictive
        regression = predictive.task == "regression"
        if kind == "variance":
            score = self.latent.variance.mean(-1)
        elif kind == "entropy":
            score = predictive.entropy
        elif kind == "epistemic":
            score = predictive.epistemic.mean(-1) if regression else predictive.epistemic
        elif kind == "max_prob" and not regression:
            score = -predictive.probs.amax(-1)
        else:
            known = "variance, entropy, epistemic" + ("" if regression else ", max_prob")
            raise UnsupportedError(f"this head has no score {kind!r}; choose one of {known}")
        return score.reshape(shape)
