"""Kronecker-factored curvature (KFAC): per layer A (x) G from second moments of inputs and cotangents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor, LinearFactor
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.rotated import Eigen, Rotated
from bayesdl.errors import UnsupportedError
from bayesdl.linalg import eigh

# blocks without a Kronecker form (norms, bare parameters) keep their exact matrix up to this size, the diagonal above
EXACT = 1024
# of both factors of one layer; their decomposition takes three times as much, in float64
MAX_BYTES = 4 << 30
# how positions of one example are treated; the first is the default
SHARED = ("expand", "reduce")


@final
@dataclass(frozen=True, eq=False)
class Kron(Rotated):
    """One pair of factors per block: H_block = (sum a a^T / R) (x) (sum g g^T), R rows of a.

    With one datum and one position the product is exact. A weight that meets T positions of an example (convolutions,
    tokens, several uses) is treated in one of two ways (Eschenhagen et al. 2023):

    - "expand": every position counts as a datum, R = N T; exact for a deep linear network whose loss is a sum over
      positions.
    - "reduce": a is averaged and g is summed over the positions of an example first, R = N; exact for a deep linear
      network whose outputs are means over positions, and cheaper: second moments of N rows instead of N T.

    An embedding's A is diagonal, because every look-up counts ("expand" in both), and stored as counts. Blocks of kinds
    other than "linear" and "rows" have A = 1, so that G is their exact matrix, unless they exceed `EXACT` parameters:
    then only the diagonal is kept.

    Attributes:
        inner: `(G, in, in)`, or `(G, in)` for embeddings; a scalar one for diagonal blocks.
        outer: `(G, out, out)`, or `(G, out, in)` for diagonal blocks.
        rows: `()` float64 counts R.
        shared: "expand" or "reduce".
    """

    inner: tuple[Tensor, ...]
    outer: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    shared: str = SHARED[0]

    name: ClassVar[str] = "kron"
    takes_turns: ClassVar[bool] = True

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Self:
        inner, outer = [], []
        _check_sizes(layout, dtype)
        for b in layout.blocks:
            diagonal = _is_diagonal(b.kind, b.rows)
            a = (b.groups, b.columns) if b.kind == "rows" else (b.groups, b.columns, b.columns)
            g = (b.groups, b.rows, b.columns) if diagonal else (b.groups, b.rows, b.rows)
            inner.append(torch.zeros(() if diagonal else a, dtype=dtype, device=device))
            outer.append(torch.zeros(g, dtype=dtype, device=device))
        rows = tuple(torch.zeros((), dtype=torch.float64, device=device) for _ in layout.blocks)
        return cls(layout, tuple(inner), tuple(outer), rows)

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.shared == SHARED[0] else {"shared": self.shared}

    def update(self, factors: Sequence[Factor]) -> None:
        for b, inner, outer, rows, factor in zip(
            self.layout.blocks, self.inner, self.outer, self.rows, factors, strict=True
        ):
            if not factor.g.numel():
                continue
            if _is_diagonal(b.kind, b.rows):
                outer += factor.square()
                continue
            if self.shared == "reduce" and isinstance(factor, LinearFactor) and factor.positions > 1:
                factor = reduced(factor)
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

    def _plus(self, other: Self) -> Self:
        def total(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(a + b for a, b in zip(mine, theirs, strict=True))

        if self.shared != other.shared:
            raise UnsupportedError(
                f"two Kronecker curvatures were added, one fitted with shared={self.shared!r} and one with "
                f"shared={other.shared!r}; fit both alike"
            )
        return replace(
            self,
            inner=total(self.inner, other.inner),
            outer=total(self.outer, other.outer),
            rows=total(self.rows, other.rows),
        )

    def scaled(self, weight: Tensor) -> Self:
        return replace(self, outer=tuple(weight.to(g) * g for g in self.outer))

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
        return replace(
            self,
            inner=tuple(tensors[f"inner.{i}"] for i in count),
            outer=tuple(tensors[f"outer.{i}"] for i in count),
            rows=tuple(tensors[f"rows.{i}"] for i in count),
        )


def reduced(factor: LinearFactor) -> LinearFactor:
    """Mean of a and sum of g over the positions of each example; groups of fewer positions over their own."""
    a = factor.a[:, :, :1]
    if not factor.again:  # then inputs do not count
        lengths = factor.lengths or (factor.positions,) * len(a)
        a = factor.a.sum(2, keepdim=True) / a.new_tensor([max(1, n) for n in lengths])[:, None, None, None]
    return replace(factor, a=a, g=factor.g.sum(3, keepdim=True), lengths=())


def _check_sizes(layout: Layout, dtype: torch.dtype) -> None:
    """Raise `UnsupportedError` where the factors of a layer are too large to hold and decompose."""
    for b in layout.blocks:
        sides = [] if _is_diagonal(b.kind, b.rows) else [b.rows] if b.kind == "rows" else [b.rows, b.columns]
        size = b.groups * sum(side**2 for side in sides) * torch.finfo(dtype).bits // 8
        if size > MAX_BYTES:
            raise UnsupportedError(
                f"the Kronecker factors of layer {b.name!r} ({b.rows} outputs, {b.columns} inputs) take "
                f"{size / 1e9:.1f} GB (limit {MAX_BYTES / 1e9:.1f}); keep their leading eigenpairs "
                '(structure="kron-lowrank", or bdl.Laplace(kron_rank=32)), use structure="diag" for this layer, for '
                f'example structure={{{b.name!r}: "diag", "*": "kron"}}, or select other parameters'
            )


def _is_diagonal(kind: str, size: int) -> bool:
    return kind not in ("linear", "rows") and size > EXACT
