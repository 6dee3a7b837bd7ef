"""Eigenvalue-corrected Kronecker curvature (EKFAC, George et al. 2018): the bases of kron, exact variances in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor
from bayesdl.curvature.kron import Kron
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.rotated import Eigen, Rotated
from bayesdl.curvature.structure import Structure
from bayesdl.errors import UnsupportedError

Bases = tuple[Tensor | None, ...]


@final
@dataclass(frozen=True, eq=False)
class EKFAC(Rotated):
    """Per block U diag(h) U^T with U = U_G (x) U_A of `Kron` and h = sum_n sum_k (U^T J_n^T V_n)^2.

    Of all matrices that are diagonal in U this is the nearest to the block of H (Frobenius norm), so it is never
    farther than `Kron`, which is one of them; the trace is exact too. The price is a second pass over the same data.
    Blocks of which `Kron` keeps the exact matrix or the diagonal keep just that.

    The bases do not change afterwards: a sum of two fits needs common bases. Where the noise of several outputs is
    open, the outputs share the bases found at unit noise.

    Attributes:
        values: `(G, rows, columns)` second moments.
        inner: `(G, in, in)` eigenvectors of A; None for the identity.
        outer: `(G, out, out)` eigenvectors of G; None for the identity.
    """

    values: tuple[Tensor, ...]
    inner: Bases
    outer: Bases

    name: ClassVar[str] = "ekfac"
    num_passes: ClassVar[int] = 2

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Self:
        """Zero curvature in the coordinates of the parameters themselves."""
        values = tuple(torch.zeros(b.groups, b.rows, b.columns, dtype=dtype, device=device) for b in layout.blocks)
        nothing = (None,) * len(layout.blocks)
        return cls(layout, values, nothing, nothing)

    @classmethod
    def first(cls, layout: Layout, dtype: torch.dtype, device: torch.device, rank: int | None = None) -> Structure:
        return Kron.empty(layout, dtype, device)

    @classmethod
    def following(cls, fitted: Structure) -> Structure | None:
        if not isinstance(fitted, Kron):
            return None
        values = tuple(torch.zeros_like(e.values) for e in fitted.eigen)
        return cls(fitted.layout, values, tuple(e.inner for e in fitted.eigen), tuple(e.outer for e in fitted.eigen))

    def fresh(self) -> Self:
        return type(self)(self.layout, tuple(torch.zeros_like(v) for v in self.values), self.inner, self.outer)

    def update(self, factors: Sequence[Factor]) -> None:
        for part, factor in zip(self.eigen, factors, strict=True):
            part.values.add_(part.rotate(factor).square())

    def per_block(self) -> Sequence[Tensor]:
        return self.values

    def _plus(self, other: Self) -> Self:
        bases = zip(self.inner + self.outer, other.inner + other.outer, strict=True)
        if not all(_same(mine, theirs) for mine, theirs in bases):
            raise UnsupportedError(
                "two EKFAC curvatures in different bases were added: their sum is no EKFAC of all the data. "
                'Fit once on both data sets, or use structure="kron"'
            )
        values = tuple(a + b for a, b in zip(self.values, other.values, strict=True))
        return type(self)(self.layout, values, self.inner, self.outer)

    def scaled(self, weight: Tensor) -> Self:
        return type(self)(self.layout, tuple(weight.to(v) * v for v in self.values), self.inner, self.outer)

    @cached_property
    def eigen(self) -> tuple[Eigen, ...]:
        return tuple(Eigen(v, a, g) for v, a, g in zip(self.values, self.inner, self.outer, strict=True))

    def sums(self) -> dict[str, Tensor]:
        return {f"values.{i}": t for i, t in enumerate(self.values)}

    def tensors(self) -> dict[str, Tensor]:
        named = self.sums()
        named |= {f"inner.{i}": t for i, t in enumerate(self.inner) if t is not None}
        return named | {f"outer.{i}": t for i, t in enumerate(self.outer) if t is not None}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        count = range(len(self.layout.blocks))
        return type(self)(
            self.layout,
            tuple(tensors[f"values.{i}"] for i in count),
            tuple(tensors.get(f"inner.{i}") for i in count),
            tuple(tensors.get(f"outer.{i}") for i in count),
        )


def _same(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return mine is theirs or torch.equal(mine, theirs)
