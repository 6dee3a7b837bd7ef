"""Latents: a belief over the network's outputs f(x), before the likelihood's own randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bayesdl.errors import ShapeError
from bayesdl.linalg import symmetric_root


@dataclass(frozen=True)
class GaussianLatent:
    """f ~ N(mean, covariance), one Gaussian per input; per position where the outputs have positions.

    Attributes:
        mean: `(B, C)`; `(B, T, C)` for sequences, `(B, H, W, C)` for images.
        variance: of the same shape, marginal variances.
        covariance: `(B, C, C)` (`(B, T, C, C)`, ...: between the outputs of one position), or None where only marginals
            were computed (outputs are then independent).
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | None = None

    def __post_init__(self) -> None:
        if self.variance.shape != self.mean.shape:
            raise ShapeError(f"mean {tuple(self.mean.shape)} and variance {tuple(self.variance.shape)} must agree")

    def draws(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `(S,)` and outputs `(S, B, C)` from base noise `(S, C)` common to all inputs and positions.

        The symmetric square root of the covariance is used: it is unique, so the draws are a continuous
        function of the covariance and do not depend on how inputs were batched.
        """
        noise = noise.to(self.mean)
        if self.covariance is None:
            common = noise.view(len(noise), *(1,) * (self.mean.dim() - 1), -1)
            offset = common * self.variance.clamp(min=0).sqrt()
        else:
            offset = torch.einsum("...ij,sj->s...i", symmetric_root(self.covariance), noise)
        return _uniform(len(noise), self.mean), self.mean + offset

    def map(self, function: Callable[[Tensor], Tensor]) -> GaussianLatent:
        """Apply `function` to every tensor."""
        covariance = None if self.covariance is None else function(self.covariance)
        return GaussianLatent(function(self.mean), function(self.variance), covariance)

    def flat(self) -> GaussianLatent:
        """Positions as inputs of their own: `(B T, C)`."""
        covariance = None if self.covariance is None else self.covariance.flatten(0, -3)
        return GaussianLatent(self.mean.flatten(0, -2), self.variance.flatten(0, -2), covariance)

    def select(self, index: Tensor) -> GaussianLatent:
        """The inputs at `index`, a mask or positions on the first axis."""
        return self.map(lambda tensor: tensor[index])

    @staticmethod
    def cat(parts: Sequence[GaussianLatent]) -> GaussianLatent:
        """Concatenate along the batch."""
        covariances = [p.covariance for p in parts if p.covariance is not None]
        return GaussianLatent(
            torch.cat([p.mean for p in parts]),
            torch.cat([p.variance for p in parts]),
            torch.cat(covariances) if len(covariances) == len(parts) else None,
        )


@dataclass(frozen=True)
class SampleLatent:
    """f is one of S outputs with given weights.

    Attributes:
        samples: `(S, B, C)`; `(S, B, T, C)` for sequences, `(S, B, H, W, C)` for images.
        weights: `(S,)`, summing to one.
        spreads: variances within each sample, in the shape of `samples`, where every sample is a Gaussian belief of its
            own (a Bayesian last layer on sampled features); None where samples are certain.
    """

    samples: Tensor
    weights: Tensor
    spreads: Tensor | None = None

    def __post_init__(self) -> None:
        if self.samples.dim() < 3 or self.weights.shape != self.samples.shape[:1]:
            raise ShapeError(
                f"samples {tuple(self.samples.shape)} must be (S, B, C) and weights {tuple(self.weights.shape)} (S,)"
            )

    @cached_property
    def mean(self) -> Tensor:
        """`(B, C)`."""
        return torch.einsum("s,s...->...", self.weights, self.samples)

    @cached_property
    def variance(self) -> Tensor:
        """`(B, C)`."""
        square = (self.samples - self.mean).square()
        return torch.einsum("s,s...->...", self.weights, square if self.spreads is None else square + self.spreads)

    def draws(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `(S,)` and outputs `(S, B, C)`; the base noise is needed only where samples have spreads, and is then
        dealt out among them."""
        if self.spreads is None:
            return self.weights, self.samples
        weights, outputs, count = [], [], len(self.weights)
        for number, part in enumerate(self.parts()):
            rows = noise[number % len(noise) :: count]
            shares, drawn = part.draws(rows)
            weights.append(self.weights[number] * shares)
            outputs.append(drawn)
        return torch.cat(weights), torch.cat(outputs)

    def parts(self) -> list[GaussianLatent]:
        """The samples as beliefs of their own."""
        spreads = torch.zeros_like(self.samples) if self.spreads is None else self.spreads
        return [GaussianLatent(mean, variance) for mean, variance in zip(self.samples, spreads, strict=True)]

    def on_samples(self, function: Callable[[Tensor], Tensor]) -> SampleLatent:
        """Apply `function` to what has the shape of the samples."""
        spreads = None if self.spreads is None else function(self.spreads)
        return SampleLatent(function(self.samples), self.weights, spreads)

    def map(self, function: Callable[[Tensor], Tensor]) -> SampleLatent:
        """Apply `function` to every tensor."""
        spreads = None if self.spreads is None else function(self.spreads)
        return SampleLatent(function(self.samples), function(self.weights), spreads)

    def flat(self) -> SampleLatent:
        """Positions as inputs of their own: `(S, B T, C)`."""
        return self.on_samples(lambda tensor: tensor.flatten(1, -2))

    def select(self, index: Tensor) -> SampleLatent:
        """The inputs at `index`, a mask or positions on the batch axis."""
        return self.on_samples(lambda tensor: tensor[:, index])

    @staticmethod
    def cat(parts: Sequence[SampleLatent]) -> SampleLatent:
        """Concatenate along the batch."""
        spreads = [p.spreads for p in parts if p.spreads is not None]
        together = torch.cat(spreads, dim=1) if len(spreads) == len(parts) else None
        return SampleLatent(torch.cat([p.samples for p in parts], dim=1), parts[0].weights, together)


Latent = GaussianLatent | SampleLatent


def point_latent(output: Tensor) -> SampleLatent:
    """Certainty: one sample of weight one. `output` is `(B, C)`."""
    return SampleLatent(output.unsqueeze(0), output.new_ones(1))


def cat_latents(parts: Sequence[Latent]) -> Latent:
    """Concatenate latents of one kind along the batch; positions become inputs where their numbers differ."""
    if len({p.mean.shape[1:] for p in parts}) > 1:
        parts = [p.flat() for p in parts]
    counts = sorted({int(p.mean.shape[-1]) for p in parts})
    if len(counts) > 1:
        raise ShapeError(
            f"the batches have {counts} outputs an input; expected one number for all of them. Questions with fewer "
            "options are filled up: tokens (B, C, T) with the same C everywhere, and the attention mask of a missing "
            "option all zero"
        )
    if all(isinstance(p, GaussianLatent) for p in parts):
        return GaussianLatent.cat([p for p in parts if isinstance(p, GaussianLatent)])
    return SampleLatent.cat([p for p in parts if isinstance(p, SampleLatent)])


def _uniform(count: int, like: Tensor) -> Tensor:
    return like.new_full((count,), 1.0 / count)
