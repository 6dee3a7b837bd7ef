"""Diagonal curvature: h_w = sum_n sum_k (J_n^T V_n)^2, exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.curvature.cross import cross
from bayesdl.curvature.factor import Factor, add_marginals, add_quads
from bayesdl.curvature.layout import Layout, positive
from bayesdl.curvature.logsum import log_sum
from bayesdl.curvature.structure import Shift, Uniform, check_noise, check_positive


@final
@dataclass(frozen=True, eq=False)
class Diag(Uniform):
    """One number per parameter.

    Attributes:
        diagonal: `(G, rows, columns)` per block.
        signed: whether entries may be negative, as those of an exact Hessian.
    """

    diagonal: tuple[Tensor, ...]
    signed: bool = False

    name: ClassVar[str] = "diag"
    separates_outputs: ClassVar[bool] = True

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Self:
        return cls(
            layout,
            tuple(torch.zeros(b.groups, b.rows, b.columns, dtype=dtype, device=device) for b in layout.blocks),
        )

    @property
    def options(self) -> dict[str, Any]:
        return {"signed": True} if self.signed else {}

    def update(self, factors: Sequence[Factor]) -> None:
        for total, factor in zip(self.diagonal, factors, strict=True):
            total += factor.square()

    def per_block(self) -> Sequence[Tensor]:
        return self.diagonal

    def _plus(self, other: Self) -> Self:
        return replace(self, diagonal=tuple(a + b for a, b in zip(self.diagonal, other.diagonal, strict=True)))

    def scaled(self, weight: Tensor) -> Self:
        return replace(self, diagonal=tuple(weight.to(d) * d for d in self.diagonal))

    def logdet(self, scale: Shift, shift: Shift) -> Tensor:
        like = self.diagonal[0].new_empty((), dtype=torch.float64)
        shifts = self.layout.shifts(shift, like)
        if self.signed or any(s.numel() > 1 for s in shifts):
            return torch.stack([p.log().sum() for p in self._precision(scale, shift, torch.float64)]).sum()
        scaling = positive(scale, like)
        return torch.stack([log_sum(d, scaling, s) for d, s in zip(self.diagonal, shifts, strict=True)]).sum()

    def product(self, vectors: Tensor) -> Tensor:
        pairs = zip(self.layout.split(vectors.to(self.diagonal[0])), self.diagonal, strict=True)
        return self.layout.join([v * d for v, d in pairs])

    def solve(self, vectors: Tensor, scale: Shift, shift: Shift) -> Tensor:
        parts = zip(self.layout.split(vectors), self._precision(scale, shift), strict=True)
        return self.layout.join([v / p for v, p in parts])

    def quad(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._precision(scale, shift)
        return torch.stack([f.quad(1.0 / p) for f, p in zip(factors, weights, strict=True)]).sum(0)

    def quads_prepared(self, factors: Sequence[Factor], scale: Shift, shifts: Tensor) -> Tensor:
        if self.signed:
            self._precision(scale, shifts.min())  # refuses what is not positive definite
        return add_quads(factors, [positive(scale, d) * d for d in self.diagonal], shifts)

    def marginal(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._precision(scale, shift)
        return torch.stack([f.marginal(1.0 / p) for f, p in zip(factors, weights, strict=True)]).sum(0)

    def marginals_prepared(self, factors: Sequence[Factor], scale: Shift, shifts: Tensor) -> Tensor:
        if self.signed:
            self._precision(scale, shifts.min())
        return add_marginals(factors, [positive(scale, d) * d for d in self.diagonal], shifts)

    def cross(self, first: Sequence[Factor], second: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._precision(scale, shift)
        return torch.stack([cross(a, b, 1.0 / p) for a, b, p in zip(first, second, weights, strict=True)]).sum(0)

    def sample(self, noise: Tensor, scale: Shift, shift: Shift) -> Tensor:
        check_noise(noise, self.layout.numel)
        parts = zip(self.layout.split(noise), self._precision(scale, shift), strict=True)
        return self.layout.join([e / p.sqrt() for e, p in parts])

    def eigenvalues(self) -> Tensor:
        return torch.cat([d.flatten() for d in self.diagonal])

    def to_dense(self) -> Tensor:
        return torch.diag(self.layout.join(self.diagonal))

    def tensors(self) -> dict[str, Tensor]:
        return {f"diag.{i}": d for i, d in enumerate(self.diagonal)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        return replace(self, diagonal=tuple(tensors[f"diag.{i}"] for i in range(len(self.layout.blocks))))

    def _precision(self, scale: Shift, shift: Shift, dtype: torch.dtype | None = None) -> list[Tensor]:
        like = self.diagonal[0].new_empty((), dtype=dtype or self.diagonal[0].dtype)
        scaling = positive(scale, like)
        shifts = self.layout.shifts(shift, like)
        found = [scaling * d.to(like) + s for d, s in zip(self.diagonal, shifts, strict=True)]
        if self.signed:
            check_positive(torch.stack([part.detach().min() for part in found]), "its smallest entry")
        return found
