"""Curvature in function space: H = Z^T T C T^T Z by its rows Z, which stay layer factors; kernels are decomposed.

With r rows, P = diag(shift) + scale H is inverted through the r x r kernel K = Z diag(1/shift) Z^T (Woodbury), which
makes the linearised Gaussian posterior a Gaussian process with the neural tangent kernel: exact, and cheap where there
are fewer rows than parameters. Rows that are all rows V_n^T J_n of a data set give its whole curvature; rows of some
points give that of a subset, or (`basis`, `core`) the projection of the whole onto the span of these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.curvature.cross import cross
from bayesdl.curvature.factor import Factor, dense_factor
from bayesdl.curvature.layout import Layout, positive
from bayesdl.curvature.pieces import (
    content,
    factors_named,
    in_double,
    named_factors,
    num_rows,
    rows_pulled,
    rows_squared,
    rows_times,
    same_rows,
)
from bayesdl.curvature.products import selected
from bayesdl.curvature.structure import Shift, Uniform, check_noise
from bayesdl.errors import UnsupportedError
from bayesdl.linalg import cholesky, eigh, symmetric_root

MAX_ROWS = 20_000
# entries of the kernels of all blocks that are kept apart, for one prior precision per block
HELD = 1 << 26
# eigenvalues of a kernel below this times the largest are rounding
SOUND = 1e-12


@final
@dataclass(frozen=True, eq=False)
class Dual(Uniform):
    """H = Z^T T C T^T Z. All queries are exact for any prior precision, and computed in float64.

    Attributes:
        pieces: factors of all blocks for some examples each; their rows, examples slower than cotangents, are Z, r x P.
        basis: T `(r, q)`; None stands for the identity.
        core: C `(q, q)`; None stands for the identity.
        metric: while a projection is fitted, the prior precision D in whose geometry is projected; None otherwise.
        gap: per block, the diagonal of the whole curvature less that of its projection, where the projection remembers
            it: `logdet` then adds scale tr(D^-1 (whole - projection)), which makes it an upper bound of the whole's,
            and the evidence a lower bound (Titsias 2009). Holds for the metric times any number.
    """

    pieces: list[list[Factor]] = field(default_factory=list)
    basis: Tensor | None = None
    core: Tensor | None = None
    metric: Tensor | None = None
    gap: tuple[Tensor, ...] = ()

    name: ClassVar[str] = "dual"

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Self:
        del dtype, device
        return cls(layout)

    @property
    def num_rows(self) -> int:
        """r."""
        return sum(num_rows(piece) for piece in self.pieces)

    def update(self, factors: Sequence[Factor]) -> None:
        if self.metric is None:
            if self.num_rows + num_rows(factors) > MAX_ROWS:
                raise UnsupportedError(
                    f"curvature in function space holds one row for every example and output, and these are more than "
                    f'{MAX_ROWS}; use bdl.SubsetGP(num_points=...), bdl.ELLA(...) or structure="kron"'
                )
            self.pieces.append(list(factors))
            return
        features = (self._products(factors, self.metric) @ self._basis).flatten(0, 1)  # (B K, q)
        self._core.addmm_(features.mT, features)
        for total, factor in zip(self.gap, factors, strict=False):
            total += factor.square()

    def per_block(self) -> Sequence[Tensor]:
        if self.metric is not None:
            return [self._core] * len(self.layout.blocks)
        # pieces before the last one were looked at before
        return [content(factor) for factor in (self.pieces[-1] if self.pieces else ())]

    def is_zero(self) -> bool:
        if self.core is not None:
            return not bool(self.core.any())
        return not any(bool(factor.g.any()) for piece in self.pieces for factor in piece)

    def fresh(self) -> Self:
        if self.metric is None:
            return replace(self, pieces=[], basis=None, core=None, gap=())
        return replace(self, core=torch.zeros_like(self._core), gap=tuple(torch.zeros_like(g) for g in self.gap))

    def selected(self, examples: Sequence[int]) -> Self:
        """The rows of some examples, counted over all pieces; for rows that are no projection."""
        kept, start = [], 0
        for piece in self.pieces:
            size = piece[0].g.shape[2]
            index = [i - start for i in examples if start <= i < start + size]
            if index:
                kept.append([selected(factor, torch.tensor(index, device=factor.g.device)) for factor in piece])
            start += size
        return replace(self, pieces=kept)

    def projecting(self, metric: Tensor, rank: int | None = None, bound: bool = False) -> Self:
        """The same rows, ready for a pass over the data whose curvature is projected onto their span.

        Args:
            metric: prior precision D: T^T Z D^-1/2 is orthonormal, and projects D^-1/2 H D^-1/2.
            rank: leading eigenvectors of the kernel that are kept; None: all.
            bound: whether to remember what the projection leaves out, for the evidence to be a bound.
        """
        values, vectors = eigh(self.kernel(metric), "kernel")
        sound = values > max(SOUND, len(values) * torch.finfo(values.dtype).eps) * values.max()
        if rank is not None:
            sound[: max(0, len(values) - rank)] = False
        basis = vectors[:, sound] / values[sound].sqrt()
        gap = tuple(basis.new_zeros(b.groups, b.rows, b.columns) for b in (self.layout.blocks if bound else ()))
        core = basis.new_zeros(basis.shape[1], basis.shape[1])
        return replace(self, basis=basis, core=core, metric=metric, gap=gap)

    def projected(self) -> Self:
        """The projection, once the pass is over."""
        done = replace(self, metric=None, gap=())
        if not self.gap:
            return done
        return replace(done, gap=tuple(g - own for g, own in zip(self.gap, done._squares(), strict=True)))

    def _plus(self, other: Self) -> Self:
        gap = tuple(a + b for a, b in zip(self.gap, other.gap, strict=True))
        if same_rows(self.pieces, other.pieces, self.basis, other.basis):
            return replace(self, core=self._core + other._core, gap=gap)
        if self.core is None and other.core is None:
            return replace(self, pieces=self.pieces + other.pieces, gap=gap)
        basis = None
        if self.basis is not None or other.basis is not None:
            basis = torch.block_diag(self._basis, other._basis)
        core = torch.block_diag(self._core, other._core)
        return replace(self, pieces=self.pieces + other.pieces, basis=basis, core=core, gap=gap)

    def scaled(self, weight: Tensor) -> Self:
        core = self._core
        return replace(self, core=weight.to(core) * core, gap=tuple(weight.to(g) * g for g in self.gap))

    def logdet(self, scale: Shift, shift: Shift) -> Tensor:
        shifts = self._shifts(shift)
        total = torch.stack([s.log().expand(size).sum() for s, size in zip(shifts, self._sizes, strict=True)]).sum()
        level = positive(scale, total)
        if torch.as_tensor(shift).numel() == 1:
            total = total + torch.log1p(level * self._unit[0] / shifts[0]).sum()
        else:
            total = total + 2.0 * self._inner_root(scale, shift).diagonal().log().sum()
        for gap, s in zip(self.gap, shifts, strict=False):
            total = total + level * (gap.double() / s).sum()
        return total

    def product(self, vectors: Tensor) -> Tensor:
        lead, flat = vectors.shape[:-1], vectors.double().reshape(-1, vectors.shape[-1])
        found = self._transposed(self._back(self._turned(self._times(flat))))
        return found.view(*lead, -1).to(self._dtype)

    def solve(self, vectors: Tensor, scale: Shift, shift: Shift) -> Tensor:
        self.layout.to_dict(vectors)  # refuses another length
        lead, diagonal = vectors.shape[:-1], self._diagonal(shift)
        plain = vectors.double().reshape(-1, vectors.shape[-1]) / diagonal
        seen = self._turned(self._times(plain))
        pulled = torch.cholesky_solve(seen.mT, self._inner_root(scale, shift)).mT * positive(scale, seen)
        found = plain - self._transposed(self._back(pulled)) / diagonal
        return found.view(*lead, -1).to(self._dtype)

    def quad(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self.quad_prepared(self.prepared(factors), scale, shift)

    def marginal(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self.marginal_prepared(self.prepared(factors), scale, shift)

    def cross(self, first: Sequence[Factor], second: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        mine, other = ([in_double(f) for f in factors] for factors in (first, second))
        wide = self._between(mine, other, shift)
        left = self._seen(mine, scale, shift)
        right = left if second is first else self._seen(other, scale, shift)
        return (wide - torch.einsum("bkr,clr->bkcl", left, right)).to(self._dtype)

    @property
    def num_prepared(self) -> int:
        return len(self.layout.blocks) + 1

    def prepared(self, factors: Sequence[Factor]) -> Sequence[Factor]:
        """The factors in float64, and their kernel with Z in its eigenbasis, all that a scalar shift needs besides."""
        wide = [in_double(factor) for factor in factors]
        turned = self._turned(self._products(wide, 1.0)) @ self._unit[1]
        return [*wide, dense_factor(turned.transpose(0, 1))]

    def quad_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._weights(shift)
        wide = torch.stack([f.quad(w) for f, w in zip(factors[:-1], weights, strict=True)]).sum(0)
        seen = self._seen_prepared(factors, scale, shift)
        return (wide - seen @ seen.mT).to(self._dtype)

    def marginal_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._weights(shift)
        wide = torch.stack([f.marginal(w) for f, w in zip(factors[:-1], weights, strict=True)]).sum(0)
        return (wide - self._seen_prepared(factors, scale, shift).square().sum(-1)).to(self._dtype)

    def sample(self, noise: Tensor, scale: Shift, shift: Shift) -> Tensor:
        """D^-1/2 (I + scale D^-1/2 H D^-1/2)^-1/2 noise: the symmetric root where D is a scalar."""
        check_noise(noise, self.layout.numel)
        root, level = self._diagonal(shift).rsqrt(), positive(scale, self._diagonal(shift))
        inner = self._kernel_inside(shift)
        values, vectors = eigh(inner, "kernel")
        grown = (1.0 + level * values).sqrt()
        draws = noise.double()
        seen = self._turned(self._times(draws * root)) @ vectors
        pulled = (seen * (level / (grown * (1.0 + grown)))) @ vectors.mT
        return (root * (draws - root * self._transposed(self._back(pulled)))).to(self._dtype)

    def eigenvalues(self) -> Tensor:
        values, size = self._unit[0], self.layout.numel
        found = torch.cat([values.new_zeros(max(0, size - len(values))), values[-min(size, len(values)) :]])
        return found.to(self._dtype)

    def to_dense(self) -> Tensor:
        rows = self._transposed(self._one(self.num_rows))
        turned = self._turned(rows.mT)
        return (turned @ turned.mT).to(self._dtype)

    def tensors(self) -> dict[str, Tensor]:
        held = {"basis": self.basis, "core": self.core}
        named = named_factors(self.pieces) | {name: value for name, value in held.items() if value is not None}
        return named | {f"gap.{j}": value for j, value in enumerate(self.gap)}

    def sums(self) -> dict[str, Tensor]:
        raise UnsupportedError(
            "curvature in function space holds the examples themselves, and does not add up between processes; use "
            'structure="kron", "diag" or "full"'
        )

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        gap = tuple(tensors[f"gap.{j}"] for j in range(len(self.layout.blocks)) if f"gap.{j}" in tensors)
        pieces = factors_named(tensors, self.layout)
        return type(self)(self.layout, pieces, tensors.get("basis"), tensors.get("core"), gap=gap)

    def kernel(self, shift: Shift) -> Tensor:
        """Z diag(1/shift) Z^T `(r, r)` float64."""
        value = torch.as_tensor(shift)
        if value.numel() == 1:
            return self._kernel / self._shifts(shift)[0]
        shifts = self._shifts(shift)
        if value.shape == (len(self.layout.blocks),) and self.num_rows**2 * len(self.layout.blocks) <= HELD:
            return torch.stack([k / s for k, s in zip(self._kernels, shifts, strict=True)]).sum(0)
        total = torch.zeros_like(self._kernel)
        for j, s in enumerate(shifts):
            total = total + (self._gram(j, None) / s if s.dim() == 0 else self._gram(j, 1.0 / s))
        return total

    @cached_property
    def _kernel(self) -> Tensor:
        total = self._gram(0, None)
        for j in range(1, len(self.layout.blocks)):
            total = total + self._gram(j, None)
        return total

    @cached_property
    def _kernels(self) -> list[Tensor]:
        return [self._gram(j, None) for j in range(len(self.layout.blocks))]

    def _gram(self, j: int, weight: Tensor | None) -> Tensor:
        """The kernel of one block between all rows."""
        own = [in_double(piece[j]) for piece in self.pieces]
        strips = []
        for mine in own:
            parts = [cross(mine, other, weight).flatten(2).flatten(0, 1) for other in own]
            strips.append(torch.cat(parts, 1))
        found = torch.cat(strips)
        return 0.5 * (found + found.mT)

    @cached_property
    def _basis(self) -> Tensor:
        """T, also where it is the identity."""
        return self._one(self.num_rows) if self.basis is None else self.basis.double()

    @cached_property
    def _core(self) -> Tensor:
        """C, also where it is the identity."""
        if self.core is not None:
            return self.core.double()
        return self._one(self.num_rows if self.basis is None else self.basis.shape[1])

    @cached_property
    def _root(self) -> Tensor | None:
        """R with R R^T = T C T^T, differentiable in C whatever its eigenvalues; None for the identity."""
        if self.core is None:
            return self.basis
        root = symmetric_root(self.core.double())
        return root if self.basis is None else self._basis @ root

    def _one(self, size: int) -> Tensor:
        return torch.eye(size, dtype=torch.float64, device=self.pieces[0][0].g.device)

    @cached_property
    def _unit(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of R^T K R at a prior precision of one: those of H that are not zero."""
        return eigh(self._inside(self._kernel), "kernel")

    def _inside(self, kernel: Tensor) -> Tensor:
        return kernel if self._root is None else self._root.mT @ kernel @ self._root

    def _kernel_inside(self, shift: Shift) -> Tensor:
        return self._inside(self.kernel(shift))

    def _inner_root(self, scale: Shift, shift: Shift) -> Tensor:
        """Cholesky factor of I + scale R^T K R."""
        inner = self._kernel_inside(shift)
        one = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        return cholesky(one + positive(scale, inner) * inner, "kernel")

    def _turned(self, values: Tensor) -> Tensor:
        """`(..., r)` times R."""
        return values if self._root is None else values @ self._root

    def _back(self, values: Tensor) -> Tensor:
        """`(..., r)` times R^T."""
        return values if self._root is None else values @ self._root.mT

    def _between(self, first: Sequence[Factor], second: Sequence[Factor], shift: Shift) -> Tensor:
        """J D^-1 J'^T for factors in float64, `(B, K, B', K')`."""
        parts = []
        for a, b, s in zip(first, second, self._shifts(shift), strict=True):
            parts.append(cross(a, b) / s if s.dim() == 0 else cross(a, b, 1.0 / s))
        return torch.stack(parts).sum(0)

    def _products(self, factors: Sequence[Factor], shift: Shift) -> Tensor:
        """J D^-1 Z^T `(B, K, r)`."""
        wide = [in_double(factor) for factor in factors]
        found = [self._between(wide, [in_double(f) for f in piece], shift).flatten(2) for piece in self.pieces]
        return torch.cat(found, 2)

    def _seen(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        """What the data take from the prior's covariance, as rows `(B, K, r)` of a root."""
        products = self._turned(self._products(factors, shift))
        flat = torch.linalg.solve_triangular(self._inner_root(scale, shift), products.flatten(0, 1).mT, upper=False)
        return flat.mT.view(products.shape) * positive(scale, flat).sqrt()

    def _seen_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        if torch.as_tensor(shift).numel() != 1:
            return self._seen(factors[:-1], scale, shift)
        turned = factors[-1].g[0, :, :, 0].transpose(0, 1)  # (B, K, r)
        level, prior = positive(scale, turned), self._shifts(shift)[0]
        return turned * (level / (1.0 + level * self._unit[0] / prior)).sqrt() / prior

    def _times(self, vectors: Tensor) -> Tensor:
        """Z v for vectors `(q, P)`: `(q, r)`."""
        return rows_times(self.pieces, self.layout, vectors)

    def _transposed(self, vectors: Tensor) -> Tensor:
        """Z^T u for vectors `(q, r)`: `(q, P)`."""
        found = [rows_pulled(self.pieces, self.layout, vectors, j) for j in range(len(self.layout.blocks))]
        return self.layout.join(found)

    def _squares(self) -> list[Tensor]:
        """diag(Z^T C Z) per block."""
        root = self._one(self.num_rows) if self._root is None else self._root
        return rows_squared(self.pieces, self.layout, root.mT, HELD // 8)

    @property
    def _dtype(self) -> torch.dtype:
        return self.pieces[0][0].g.dtype

    @property
    def _sizes(self) -> list[tuple[int, int, int]]:
        return [(b.groups, b.rows, b.columns) for b in self.layout.blocks]

    def _shifts(self, shift: Shift) -> list[Tensor]:
        return self.layout.shifts(shift, torch.empty((), dtype=torch.float64, device=self.pieces[0][0].g.device))

    def _weights(self, shift: Shift) -> list[Tensor]:
        return [(1.0 / s).expand(size) for s, size in zip(self._shifts(shift), self._sizes, strict=True)]

    def _diagonal(self, shift: Shift) -> Tensor:
        return self.layout.join([s.expand(size) for s, size in zip(self._shifts(shift), self._sizes, strict=True)])
