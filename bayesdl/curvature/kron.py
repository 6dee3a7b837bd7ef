"""Kronecker-factored curvature: per layer A (x) G from second moments of inputs and cotangents (KFAC, expand form)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor
from bayesdl.curvature.layout import Layout, cast
from bayesdl.curvature.structure import Shift, Structure, check_noise
from bayesdl.errors import UnsupportedError
from bayesdl.linalg import eigh

# blocks without a Kronecker form (norms, bare parameters) keep their exact matrix up to this size, the diagonal above
EXACT = 1024


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


@final
@dataclass(frozen=True, eq=False)
class Kron(Structure):
    """One pair of factors per block: H_block = (sum a a^T / R) (x) (sum g g^T), R rows of a.

    Every position of a shared weight counts as a datum. With one datum and one position the product is exact.
    An embedding's A is diagonal and stored as counts. Blocks of kinds other than "linear" and "rows" have A = 1, so
    that G is their exact matrix, unless they exceed `EXACT` parameters: then only the diagonal is kept.

    Attributes:
        inner: `(G, in, in)`, or `(G, in)` for embeddings; a scalar one for diagonal blocks.
        outer: `(G, out, out)`, or `(G, out, in)` for diagonal blocks.
        rows: `()` float64 counts R.
    """

    inner: tuple[Tensor, ...]
    outer: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]

    name: ClassVar[str] = "kron"

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Self:
        inner, outer = [], []
        for b in layout.blocks:
            diagonal = _is_diagonal(b.kind, b.rows)
            a = (b.groups, b.columns) if b.kind == "rows" else (b.groups, b.columns, b.columns)
            g = (b.groups, b.rows, b.columns) if diagonal else (b.groups, b.rows, b.rows)
            inner.append(torch.zeros(() if diagonal else a, dtype=dtype, device=device))
            outer.append(torch.zeros(g, dtype=dtype, device=device))
        rows = tuple(torch.zeros((), dtype=torch.float64, device=device) for _ in layout.blocks)
        return cls(layout, tuple(inner), tuple(outer), rows)

    def update(self, factors: Sequence[Factor]) -> None:
        for b, inner, outer, rows, factor in zip(
            self.layout.blocks, self.inner, self.outer, self.rows, factors, strict=True
        ):
            if _is_diagonal(b.kind, b.rows):
                outer += factor.square()
                continue
            a, g, count = factor.moments()
            inner += a
            outer += g
            rows += count

    def per_block(self) -> Sequence[Tensor]:
        return [a.sum() + g.sum() for a, g in zip(self.inner, self.outer, strict=True)]

    def is_zero(self) -> bool:
        # a product is zero where either factor is; a diagonal block has no input factor
        pairs = zip(self.inner, self.outer, strict=True)
        return not any(bool(g.any()) and (a.dim() == 0 or bool(a.any())) for a, g in pairs)

    def __add__(self, other: Self) -> Self:
        def total(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(a + b for a, b in zip(mine, theirs, strict=True))

        return type(self)(
            self.layout,
            total(self.inner, other.inner),
            total(self.outer, other.outer),
            total(self.rows, other.rows),
        )

    def scaled(self, weight: Tensor) -> Self:
        return type(self)(self.layout, self.inner, tuple(weight.to(g) * g for g in self.outer), self.rows)

    @cached_property
    def eigen(self) -> tuple[Eigen, ...]:
        """Decomposed once; every prior precision reuses it."""
        parts = []
        for b, inner, outer, rows in zip(self.layout.blocks, self.inner, self.outer, self.rows, strict=True):
            if _is_diagonal(b.kind, b.rows):
                parts.append(Eigen(outer, None, None))
                continue
            mean = inner / rows.clamp(min=1.0).to(inner)
            values, basis = eigh(outer, f"output factor of layer {b.name!r}")
            if b.kind == "rows":
                parts.append(Eigen(values.unsqueeze(-1) * mean.unsqueeze(-2), None, basis))
            elif b.columns == 1:
                parts.append(Eigen(values.unsqueeze(-1) * mean, None, basis))
            else:
                spread, turned = eigh(mean, f"input factor of layer {b.name!r}")
                parts.append(Eigen(values.unsqueeze(-1) * spread.unsqueeze(-2), turned, basis))
        return tuple(parts)

    def logdet(self, scale: Shift, shift: Shift) -> Tensor:
        return torch.stack([p.log().sum() for p in self._precision(scale, shift, torch.float64)]).sum()

    def solve(self, vectors: Tensor, scale: Shift, shift: Shift) -> Tensor:
        return self._filtered(vectors, [1.0 / p for p in self._precision(scale, shift)])

    def quad(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self.quad_prepared(self.prepared(factors), scale, shift)

    def prepared(self, factors: Sequence[Factor]) -> Sequence[Factor]:
        return [e.rotate(f) for e, f in zip(self.eigen, factors, strict=True)]

    def quad_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._precision(scale, shift)
        return torch.stack([f.quad(1.0 / p) for f, p in zip(factors, weights, strict=True)]).sum(0)

    def marginal(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self.marginal_prepared(self.prepared(factors), scale, shift)

    def marginal_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._precision(scale, shift)
        return torch.stack([f.marginal(1.0 / p) for f, p in zip(factors, weights, strict=True)]).sum(0)

    def sample(self, noise: Tensor, scale: Shift, shift: Shift) -> Tensor:
        check_noise(noise, self.layout.numel)
        return self._filtered(noise, [p.rsqrt() for p in self._precision(scale, shift)])

    def eigenvalues(self) -> Tensor:
        return torch.cat([e.values.flatten() for e in self.eigen])

    def to_dense(self) -> Tensor:
        identity = torch.eye(self.layout.numel, dtype=self.outer[0].dtype, device=self.outer[0].device)
        return self._filtered(identity, [e.values for e in self.eigen])

    def tensors(self) -> dict[str, Tensor]:
        named = {f"inner.{i}": t for i, t in enumerate(self.inner)}
        named |= {f"outer.{i}": t for i, t in enumerate(self.outer)}
        return named | {f"rows.{i}": t for i, t in enumerate(self.rows)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        count = range(len(self.layout.blocks))
        return type(self)(
            self.layout,
            tuple(tensors[f"inner.{i}"] for i in count),
            tuple(tensors[f"outer.{i}"] for i in count),
            tuple(tensors[f"rows.{i}"] for i in count),
        )

    def _filtered(self, vectors: Tensor, weights: Sequence[Tensor]) -> Tensor:
        parts = self.layout.split(vectors.to(self.outer[0]))
        return self.layout.join([e.back(e.into(v) * w) for e, v, w in zip(self.eigen, parts, weights, strict=True)])

    def _precision(self, scale: Shift, shift: Shift, dtype: torch.dtype | None = None) -> list[Tensor]:
        value = torch.as_tensor(shift)
        if value.numel() > 1 and value.shape != (len(self.layout.blocks),):
            raise UnsupportedError(
                f"a prior precision of shape {tuple(value.shape)} was given; Kronecker curvature is exact "
                "for a scalar or "
                f'one per block ({len(self.layout.blocks)},) only. Use structure="diag" or "full" for one per parameter'
            )
        like = self.outer[0].to(dtype or self.outer[0].dtype)
        scaling = cast(scale, like)
        return [scaling * e.values + s for e, s in zip(self.eigen, self.layout.shifts(shift, like), strict=True)]


def _is_diagonal(kind: str, size: int) -> bool:
    return kind not in ("linear", "rows") and size > EXACT
