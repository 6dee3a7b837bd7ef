"""Statistics of features by class: one pass, any order, any shards, classes that appear later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from bayesdl.errors import LabelError, ShapeError, check_finite


@final
@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """Counts, means and the pooled within-class scatter of features `(N, d)`, in float64.

    Merged class by class with the update of Chan, Golub and LeVeque (1983): equal for any order, up to rounding.

    Attributes:
        counts: n_c, `(K,)`, int64.
        mean: `(K, d)`; zero for a class without examples.
        scatter: sum over classes of sum (z - mean_c)(z - mean_c)^T, `(d, d)`, or its diagonal `(d,)`.
    """

    counts: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, features: int, classes: int, *, diagonal: bool) -> Self:
        """Before any example."""
        shape = (features,) if diagonal else (features, features)
        double = torch.float64
        return cls(
            torch.zeros(classes, dtype=torch.int64),
            torch.zeros(classes, features, dtype=double),
            torch.zeros(shape, dtype=double),
        )

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int = 0, *, diagonal: bool) -> Self:
        """Statistics of one batch.

        Args:
            features: `(B, d)`.
            labels: `(B,)`, integers from 0.
            classes: K at least; more where the labels hold more.
            diagonal: keep the diagonal of the scatter alone.

        Raises:
            ShapeError, LabelError, NonFiniteError: bad data.
        """
        if features.dim() != 2 or labels.shape != features.shape[:1]:
            raise ShapeError(
                f"features {tuple(features.shape)} and labels {tuple(labels.shape)}; expected (B, d) and (B,)"
            )
        if labels.dtype.is_floating_point or labels.dtype is torch.bool or bool((labels < 0).any()):
            raise LabelError(f"labels have dtype {labels.dtype} and least {labels.min()}; expected integers from 0")
        check_finite(features, "features")
        z, y = features.detach().double(), labels.long().to(features.device)
        classes = max(classes, int(y.max()) + 1 if len(y) else 0)
        counts = torch.bincount(y, minlength=classes)
        total = z.new_zeros(classes, z.shape[1]).index_add_(0, y, z)
        mean = total / counts.clamp(min=1).unsqueeze(1)
        rest = z - mean[y]
        return cls(counts, mean, rest.square().sum(0) if diagonal else rest.mT @ rest)

    def __add__(self, other: Self) -> Self:
        """Statistics of both sets together."""
        if self.scatter.shape != other.scatter.shape:
            raise ShapeError(
                f"scatters of shape {tuple(self.scatter.shape)} and {tuple(other.scatter.shape)} cannot be merged"
            )
        classes = max(len(self.counts), len(other.counts))
        mine, theirs = self.grown(classes), other.grown(classes)
        counts = mine.counts + theirs.counts
        share = theirs.counts.double() / counts.clamp(min=1)
        delta = theirs.mean - mine.mean
        # a class that one side has not seen moves there as it is
        weighted = delta * (mine.counts * share).sqrt().unsqueeze(1)
        between = weighted.square().sum(0) if self.scatter.dim() == 1 else weighted.mT @ weighted
        mean = mine.mean + share.unsqueeze(1) * delta
        return type(self)(counts, mean, mine.scatter + theirs.scatter + between)

    def grown(self, classes: int) -> Self:
        """The same with at least that many classes."""
        more = classes - len(self.counts)
        if more <= 0:
            return self
        counts = torch.cat([self.counts, self.counts.new_zeros(more)])
        return type(self)(counts, torch.cat([self.mean, self.mean.new_zeros(more, self.mean.shape[1])]), self.scatter)

    @property
    def total(self) -> int:
        """N."""
        return int(self.counts.sum())

    @property
    def degrees(self) -> int:
        """N less the number of classes with examples."""
        return self.total - int((self.counts > 0).sum())

    def background(self) -> tuple[Tensor, Tensor]:
        """Mean `(d,)` and scatter of all examples, whatever their class."""
        centre = (self.counts.unsqueeze(1) * self.mean).sum(0) / max(1, self.total)
        spread = (self.mean - centre) * self.counts.double().sqrt().unsqueeze(1)
        between = spread.square().sum(0) if self.scatter.dim() == 1 else spread.mT @ spread
        return centre, self.scatter + between
