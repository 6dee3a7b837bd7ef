"""Sufficient statistics of a linear map from features to targets: one pass, any order, any shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError, check_finite


@final
@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of n pairs of features `(d,)` and targets `(K,)`, in float64.

    Merged by the update of Chan, Golub and LeVeque (1983), which stays accurate where the mean is large beside the
    spread. Sums of shards are the same in any order, up to rounding.

    Attributes:
        count: n.
        feature_mean: f, `(d,)`.
        target_mean: t, `(K,)`.
        scatter: C = sum (phi - f)(phi - f)^T, `(d, d)`.
        cross: D = sum (phi - f)(y - t)^T, `(d, K)`.
        residual: E_k = sum (y_k - t_k)^2, `(K,)`.
    """

    count: int
    feature_mean: Tensor
    target_mean: Tensor
    scatter: Tensor
    cross: Tensor
    residual: Tensor

    @classmethod
    def of(cls, features: Tensor, targets: Tensor) -> Self:
        """Statistics of one batch.

        Args:
            features: `(B, d)`.
            targets: `(B, K)`, or `(B,)` for K = 1.

        Raises:
            ShapeError: the shapes do not agree.
            NonFiniteError: NaN or infinity in either.
            ArgumentError: no example.
        """
        if targets.dim() == 1:
            targets = targets.unsqueeze(1)
        if features.dim() != 2 or targets.dim() != 2 or len(features) != len(targets):
            raise ShapeError(
                f"features {tuple(features.shape)} and targets {tuple(targets.shape)}; expected (B, d) and (B, K)"
            )
        if not len(features):
            raise ArgumentError("a batch without examples has no statistics")
        check_finite(features, "features")
        check_finite(targets, "targets")
        phi, y = _double(features), _double(targets)
        f, t = phi.mean(0), y.mean(0)
        centred, left = phi - f, y - t
        return cls(len(phi), f, t, centred.mT @ centred, centred.mT @ left, left.square().sum(0))

    def __add__(self, other: Self) -> Self:
        """Statistics of both sets together."""
        if self.cross.shape != other.cross.shape:
            raise ShapeError(
                f"statistics of {tuple(self.cross.shape)} and {tuple(other.cross.shape)} (features, outputs) "
                "cannot be merged"
            )
        n = self.count + other.count
        weight = self.count * other.count / n
        f, t = other.feature_mean - self.feature_mean, other.target_mean - self.target_mean
        share = other.count / n
        return type(self)(
            n,
            self.feature_mean + share * f,
            self.target_mean + share * t,
            self.scatter + other.scatter + weight * torch.outer(f, f),
            self.cross + other.cross + weight * torch.outer(f, t),
            self.residual + other.residual + weight * t.square(),
        )

    def uncentred(self) -> Statistics:
        """The same sums about zero: means of zero, raw moments. For models without an intercept."""
        f, t, n = self.feature_mean, self.target_mean, self.count
        return Statistics(
            n,
            torch.zeros_like(f),
            torch.zeros_like(t),
            self.scatter + n * torch.outer(f, f),
            self.cross + n * torch.outer(f, t),
            self.residual + n * t.square(),
        )

    def with_constant(self) -> Statistics:
        """Raw moments of `[phi, 1]`: the intercept becomes one more weight, with a proper prior."""
        raw, n = self.uncentred(), self.count
        column = (n * self.feature_mean).unsqueeze(1)
        corner = column.new_full((1, 1), float(n))
        return Statistics(
            n,
            torch.cat([raw.feature_mean, raw.feature_mean.new_zeros(1)]),
            raw.target_mean,
            torch.cat([torch.cat([raw.scatter, column], 1), torch.cat([column.mT, corner], 1)]),
            torch.cat([raw.cross, (n * self.target_mean).unsqueeze(0)]),
            raw.residual,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by name."""
        return {
            "feature_mean": self.feature_mean,
            "target_mean": self.target_mean,
            "scatter": self.scatter,
            "cross": self.cross,
            "residual": self.residual,
        }


def _double(value: Tensor) -> Tensor:
    # some accelerators have no float64: sums then happen on the CPU
    try:
        return value.detach().double()
    except TypeError:
        return value.detach().cpu().double()
