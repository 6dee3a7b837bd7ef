"""Curvature that is diagonal per block in orthonormal coordinates U_A (x) U_G: all queries, for any eigenvalues."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.curvature.cross import cross
from bayesdl.curvature.factor import Factor, add_marginals, add_quads
from bayesdl.curvature.layout import positive
from bayesdl.curvature.structure import Shift, Uniform, check_noise
from bayesdl.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Eigen:
    """Eigenvalues `(G, rows, columns)` of one block and its bases; None stands for the identity."""

    values: Tensor
    inner: Tensor | None
    outer: Tensor | None

    def rotate(self, factor: Factor) -> Factor:
        """A factor in eigen-coordinates."""
        return factor if self.outer is None else factor.rotate(self.inner, self.outer)

    def into(self, matrix: Tensor) -> Tensor:
        """U_G^T M U_A."""
        if self.outer is not None:
            matrix = self.outer.mT @ matrix
        return matrix if self.inner is None else matrix @ self.inner

    def back(self, matrix: Tensor) -> Tensor:
        """U_G M U_A^T."""
        if self.outer is not None:
            matrix = self.outer @ matrix
        return matrix if self.inner is None else matrix @ self.inner.mT


@dataclass(frozen=True, eq=False)
class Rotated(Uniform):
    """Base of Kronecker-type structures: every query rotates, weights, and rotates back."""

    @property
    @abstractmethod
    def eigen(self) -> tuple[Eigen, ...]:
        """Eigenvalues and bases per block."""

    def logdet(self, scale: Shift, shift: Shift) -> Tensor:
        return torch.stack([p.log().sum() for p in self._precision(scale, shift, torch.float64)]).sum()

    def product(self, vectors: Tensor) -> Tensor:
        return self._filtered(vectors, [e.values for e in self.eigen])

    def solve(self, vectors: Tensor, scale: Shift, shift: Shift) -> Tensor:
        return self._filtered(vectors, [1.0 / p for p in self._precision(scale, shift)])

    def quad(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self.quad_prepared(self.prepared(factors), scale, shift)

    def prepared(self, factors: Sequence[Factor]) -> Sequence[Factor]:
        return [e.rotate(f) for e, f in zip(self.eigen, factors, strict=True)]

    def quad_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._precision(scale, shift)
        return torch.stack([f.quad(1.0 / p) for f, p in zip(factors, weights, strict=True)]).sum(0)

    def quads_prepared(self, factors: Sequence[Factor], scale: Shift, shifts: Tensor) -> Tensor:
        values = [positive(scale, e.values) * e.values for e in self.eigen]
        return add_quads(factors, values, shifts)

    def marginal(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self.marginal_prepared(self.prepared(factors), scale, shift)

    def marginal_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._precision(scale, shift)
        return torch.stack([f.marginal(1.0 / p) for f, p in zip(factors, weights, strict=True)]).sum(0)

    def marginals_prepared(self, factors: Sequence[Factor], scale: Shift, shifts: Tensor) -> Tensor:
        values = [positive(scale, e.values) * e.values for e in self.eigen]
        return add_marginals(factors, values, shifts)

    def cross(self, first: Sequence[Factor], second: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        mine = self.prepared(first)
        other = mine if second is first else self.prepared(second)
        weights = self._precision(scale, shift)
        return torch.stack([cross(a, b, 1.0 / p) for a, b, p in zip(mine, other, weights, strict=True)]).sum(0)

    def sample(self, noise: Tensor, scale: Shift, shift: Shift) -> Tensor:
        check_noise(noise, self.layout.numel)
        return self._filtered(noise, [p.rsqrt() for p in self._precision(scale, shift)])

    def eigenvalues(self) -> Tensor:
        return torch.cat([e.values.flatten() for e in self.eigen])

    def to_dense(self) -> Tensor:
        like = self.eigen[0].values
        identity = torch.eye(self.layout.numel, dtype=like.dtype, device=like.device)
        return self._filtered(identity, [e.values for e in self.eigen])

    def _filtered(self, vectors: Tensor, weights: Sequence[Tensor]) -> Tensor:
        parts = self.layout.split(vectors.to(self.eigen[0].values))
        return self.layout.join([e.back(e.into(v) * w) for e, v, w in zip(self.eigen, parts, weights, strict=True)])

    def _precision(self, scale: Shift, shift: Shift, dtype: torch.dtype | None = None) -> list[Tensor]:
        value = torch.as_tensor(shift)
        if value.numel() > 1 and value.shape != (len(self.layout.blocks),):
            raise UnsupportedError(
                f"a prior precision of shape {tuple(value.shape)} was given; Kronecker curvature is exact "
                "for a scalar or one per block "
                f'({len(self.layout.blocks)},) only. Use structure="diag" or "full" for one per parameter'
            )
        like = self.eigen[0].values
        like = like.new_empty((), dtype=dtype or like.dtype)
        scaling = positive(scale, like)
        return [
            scaling * e.values.to(like) + s for e, s in zip(self.eigen, self.layout.shifts(shift, like), strict=True)
        ]
