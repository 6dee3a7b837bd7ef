"""Kronecker-factored curvature: per layer A (x) G from second moments of inputs and cotangents (KFAC, expand form)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.rotated import Eigen, Rotated
from bayesdl.linalg import eigh

# blocks without a Kronecker form (norms, bare parameters) keep their exact matrix up to this size, the diagonal above
EXACT = 1024


@final
@dataclass(frozen=True, eq=False)
class Kron(Rotated):
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


def _is_diagonal(kind: str, size: int) -> bool:
    return kind not in ("linear", "rows") and size > EXACT
