"""Full curvature: the P x P matrix itself, where it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor, dense_factor
from bayesdl.curvature.layout import Layout, positive
from bayesdl.curvature.structure import Shift, Uniform, check_noise, check_positive
from bayesdl.errors import UnsupportedError
from bayesdl.linalg import cholesky, eigh

MAX_BYTES = 8 << 30


@final
@dataclass(frozen=True, eq=False)
class Full(Uniform):
    """The whole matrix.

    Attributes:
        matrix: `(P, P)` in block order (blocks one after another, each flattened).
        signed: whether eigenvalues may be negative, as those of an exact Hessian.
    """

    matrix: Tensor
    signed: bool = False

    name: ClassVar[str] = "full"

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Self:
        size = layout.numel**2 * torch.finfo(dtype).bits // 8
        if size > MAX_BYTES:
            raise UnsupportedError(
                f"a full matrix over {layout.numel} parameters takes {size / 2**30:.1f} GB (limit "
                f"{MAX_BYTES / 2**30:.0f}); "
                'use structure="kron" or "diag", or select fewer parameters, e.g. select="last_layer"'
            )
        return cls(layout, torch.zeros(layout.numel, layout.numel, dtype=dtype, device=device))

    @classmethod
    def of_dense(cls, layout: Layout, matrix: Tensor, signed: bool) -> Self:
        """From H `(P, P)` in flat order, as `to_dense` returns it."""
        found = cls(layout, matrix, signed)
        where = found._order.argsort()
        return replace(found, matrix=matrix[where][:, where])

    @property
    def options(self) -> dict[str, Any]:
        return {"signed": True} if self.signed else {}

    def update(self, factors: Sequence[Factor]) -> None:
        rows = _rows(factors).flatten(0, 1)
        self.matrix.addmm_(rows.T, rows)

    def per_block(self) -> Sequence[Tensor]:
        # a NaN or infinite row reaches the diagonal
        return self.matrix.diagonal().split([block.numel for block in self.layout.blocks])

    def whole_blocks(self) -> frozenset[str]:
        return frozenset(block.name for block in self.layout.blocks)

    @property
    def num_prepared(self) -> int:
        return 1

    def _plus(self, other: Self) -> Self:
        return replace(self, matrix=self.matrix + other.matrix)

    def scaled(self, weight: Tensor) -> Self:
        return replace(self, matrix=weight.to(self.matrix) * self.matrix)

    def logdet(self, scale: Shift, shift: Shift) -> Tensor:
        if torch.as_tensor(shift).numel() == 1:
            return self._precision(scale, shift, torch.float64).log().sum()
        return 2.0 * self._root(scale, shift).diagonal().log().sum()

    def product(self, vectors: Tensor) -> Tensor:
        return self._flat(self._blocks(vectors) @ self.matrix)

    def solve(self, vectors: Tensor, scale: Shift, shift: Shift) -> Tensor:
        flat = self._blocks(vectors)
        if torch.as_tensor(shift).numel() == 1:
            basis = self._eigen[1]
            return self._flat(((flat @ basis) / self._precision(scale, shift)) @ basis.T)
        rows = flat.reshape(-1, flat.shape[-1])
        return self._flat(torch.cholesky_solve(rows.T, self._root(scale, shift)).T.reshape(flat.shape))

    def quad(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self.quad_prepared(self.prepared(factors), scale, shift)

    def marginal(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self.marginal_prepared(self.prepared(factors), scale, shift)

    def prepared(self, factors: Sequence[Factor]) -> Sequence[Factor]:
        return [dense_factor((_rows(factors) @ self._eigen[1]).transpose(0, 1))]

    def quad_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        whitened = self._whitened(factors, scale, shift)
        return whitened @ whitened.mT

    def marginal_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self._whitened(factors, scale, shift).square().sum(-1)

    def sample(self, noise: Tensor, scale: Shift, shift: Shift) -> Tensor:
        check_noise(noise, self.layout.numel)
        if torch.as_tensor(shift).numel() == 1:
            values, basis = self._precision(scale, shift), self._eigen[1]
        else:
            self._root(scale, shift)  # refuses what is not positive definite
            values, basis = eigh(self._dense_precision(scale, shift), "posterior precision")
        return self._flat(((self._blocks(noise) @ basis) / values.sqrt()) @ basis.T)

    def eigenvalues(self) -> Tensor:
        return self._eigen[0]

    def to_dense(self) -> Tensor:
        return self.matrix[self._order][:, self._order]

    @property
    def _order(self) -> Tensor:
        """Place in block order of every parameter in flat order."""
        return self._flat(torch.arange(self.layout.numel, device=self.matrix.device, dtype=torch.float64)).long()

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        return replace(self, matrix=tensors["matrix"])

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        return eigh(self.matrix, "full curvature", not self.signed)

    def _shift(self, shift: Shift) -> Tensor:
        parts = self.layout.shifts(shift, self.matrix)
        sizes = [(b.groups, b.rows, b.columns) for b in self.layout.blocks]
        return torch.cat([p.expand(size).flatten() for p, size in zip(parts, sizes, strict=True)])

    def _root(self, scale: Shift, shift: Shift) -> Tensor:
        precision = self._dense_precision(scale, shift)
        if self.signed and bool(torch.linalg.cholesky_ex(precision)[1]):
            check_positive(torch.linalg.eigvalsh(precision.detach()))
        return cholesky(precision, "posterior precision")

    def _dense_precision(self, scale: Shift, shift: Shift) -> Tensor:
        return positive(scale, self.matrix) * self.matrix + torch.diag(self._shift(shift))

    def _precision(self, scale: Shift, shift: Shift, dtype: torch.dtype | None = None) -> Tensor:
        """Eigenvalues of P for a scalar shift, `(P,)`."""
        values = self._eigen[0].to(dtype or self.matrix.dtype)
        found = positive(scale, values) * values + self.layout.shifts(shift, values)[0]
        if self.signed:
            check_positive(found.detach())
        return found

    def _whitened(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        rows = factors[0].g[0, :, :, 0].transpose(0, 1)  # (B, K, P) in the eigenbasis of H
        if torch.as_tensor(shift).numel() == 1:
            return rows / self._precision(scale, shift).sqrt()
        root, rows = self._root(scale, shift), rows @ self._eigen[1].T
        flat = torch.linalg.solve_triangular(root, rows.flatten(0, 1).T, upper=False).T
        return flat.reshape(rows.shape)

    def _blocks(self, flat: Tensor) -> Tensor:
        return torch.cat([part.flatten(-3) for part in self.layout.split(flat.to(self.matrix))], -1)

    def _flat(self, blocks: Tensor) -> Tensor:
        sizes = [block.numel for block in self.layout.blocks]
        parts = blocks.split(sizes, -1)
        lead = blocks.shape[:-1]
        shaped = [
            part.reshape(*lead, b.groups, b.rows, b.columns) for part, b in zip(parts, self.layout.blocks, strict=True)
        ]
        return self.layout.join(shaped)


def _rows(factors: Sequence[Factor]) -> Tensor:
    """The rows of V^T J `(B, K, P)`; a batch small enough for this is the estimator's and `push`'s business."""
    return torch.cat([factor.jacobian() for factor in factors], -1)
