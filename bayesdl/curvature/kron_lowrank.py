"""Kronecker-factored curvature whose large factors are kept as their leading eigenpairs: wide layers, vocabularies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor, LinearFactor, second_moment
from bayesdl.curvature.kron import SHARED, Kron, reduced
from bayesdl.curvature.layout import Block, Layout
from bayesdl.curvature.lowrank import DEFAULT_RANK, OVERSAMPLING
from bayesdl.curvature.rotated import Eigen, Rotated
from bayesdl.curvature.structure import Shift, Structure, check_noise
from bayesdl.errors import UnsupportedError
from bayesdl.linalg import cholesky, eigh


@final
@dataclass(frozen=True, eq=False)
class KronLowRank(Rotated):
    """`Kron` with at most `rank` eigenpairs of each factor of a linear layer; what lies outside carries no curvature.

    A factor M of more than 2 `rank` + 10 rows is never formed: what is summed is M Omega for random orthonormal
    columns Omega, once over the data, in any order and over any number of processes. Its leading eigenpairs are those
    of the Nystrom approximation M Omega (Omega' M Omega)^-1 Omega' M (Tropp et al. 2017, algorithm 3), which never
    exceeds M and is M itself where M has no more eigenvalues than there are columns. In the directions left out the
    posterior is the prior: the variance of an output takes its share |a - Q Q' a|^2 / shift, not as a difference of
    large numbers.

    Attributes:
        inner, outer: as in `Kron`; a sketch M Omega `(G, D, w)` in the place of a large factor.
        rows: counts R.
        directions: Omega `(D, w)` of each sketch, by "inner.i" and "outer.i".
        rank: eigenpairs kept of a sketch.
        shared: "expand" or "reduce".
    """

    inner: tuple[Tensor, ...]
    outer: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    rank: int = DEFAULT_RANK
    shared: str = SHARED[0]

    name: ClassVar[str] = "kron-lowrank"

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Self:
        return cls._zero(layout, dtype, device, DEFAULT_RANK)

    @classmethod
    def first(cls, layout: Layout, dtype: torch.dtype, device: torch.device, rank: int | None = None) -> Structure:
        return cls._zero(layout, dtype, device, rank or DEFAULT_RANK)

    @classmethod
    def _zero(cls, layout: Layout, dtype: torch.dtype, device: torch.device, rank: int) -> Self:
        directions: dict[str, Tensor] = {}
        inner, outer, rows = [], [], []
        for i, b in enumerate(layout.blocks):
            plain = replace(layout, blocks=(b,))
            if b.kind != "linear":
                whole = Kron.empty(plain, dtype, device)
                inner.append(whole.inner[0])
                outer.append(whole.outer[0])
            else:
                for side, size, kept in (("inner", b.columns, inner), ("outer", b.rows, outer)):
                    width = 2 * rank + OVERSAMPLING
                    if size > width:
                        directions[f"{side}.{i}"] = _directions(size, width).to(device, dtype)
                    kept.append(torch.zeros(b.groups, size, min(size, width), dtype=dtype, device=device))
            rows.append(torch.zeros((), dtype=torch.float64, device=device))
        return cls(layout, tuple(inner), tuple(outer), tuple(rows), directions, rank)

    @property
    def options(self) -> dict[str, Any]:
        return {"rank": self.rank} | ({} if self.shared == SHARED[0] else {"shared": self.shared})

    def update(self, factors: Sequence[Factor]) -> None:
        for i, (b, factor) in enumerate(zip(self.layout.blocks, factors, strict=True)):
            inner, outer = self.inner[i], self.outer[i]
            if inner.dim() == 0:  # too large for anything but its diagonal
                outer += factor.square()
                continue
            if self.shared == "reduce" and isinstance(factor, LinearFactor) and factor.positions > 1:
                factor = reduced(factor)
            if b.kind != "linear" or not isinstance(factor, LinearFactor):
                a, g, count = factor.moments()
                inner += a
                outer += g
                self.rows[i].add_(count)
                continue
            cotangents = factor.g.transpose(1, 2).flatten(1, 2)  # (G, B K, T, out)
            outer += _summed(cotangents, self.directions.get(f"outer.{i}"))
            if factor.again:
                continue
            found = _summed(factor.a, self.directions.get(f"inner.{i}"))
            if factor.lengths:  # groups of fewer positions count as if repeated
                found = found * found.new_tensor([factor.positions / max(1, n) for n in factor.lengths])[:, None, None]
            inner += found
            self.rows[i].add_(factor.a.shape[1] * factor.a.shape[2])

    def per_block(self) -> Sequence[Tensor]:
        return [a.sum() + g.sum() for a, g in zip(self.inner, self.outer, strict=True)]

    def is_zero(self) -> bool:
        pairs = zip(self.inner, self.outer, strict=True)
        return not any(bool(g.any()) and (a.dim() == 0 or bool(a.any())) for a, g in pairs)

    def _plus(self, other: Self) -> Self:
        mine, theirs = self.directions, other.directions
        if (
            self.shared != other.shared
            or set(mine) != set(theirs)
            or not all(torch.equal(mine[key], theirs[key]) for key in mine)
        ):
            raise UnsupportedError(
                f"two low-rank Kronecker curvatures were added, of rank {self.rank} and {other.rank} and with "
                f"shared={self.shared!r} and {other.shared!r}; fit both alike"
            )
        sums = other.sums()
        return self.with_tensors(self.tensors() | {name: value + sums[name] for name, value in self.sums().items()})

    def scaled(self, weight: Tensor) -> Self:
        return replace(self, outer=tuple(weight.to(g) * g for g in self.outer))

    @cached_property
    def eigen(self) -> tuple[Eigen, ...]:
        """Kept eigenvalues `(G, r_out, r_in)` and their vectors `(G, in, r_in)`, `(G, out, r_out)`."""
        return tuple(self._decomposed(i, b) for i, b in enumerate(self.layout.blocks))

    def _decomposed(self, i: int, b: Block) -> Eigen:
        inner, outer, rows = self.inner[i], self.outer[i], self.rows[i]
        cut = {side: self.directions.get(f"{side}.{i}") for side in ("inner", "outer")}
        plain = replace(self.layout, blocks=(b,))
        if cut["inner"] is None and cut["outer"] is None:
            return Kron(plain, (inner,), (outer,), (rows,)).eigen[0]
        sides = []
        for side, factor in (("inner", inner / rows.clamp(min=1.0).to(inner)), ("outer", outer)):
            directions = cut[side]
            what = f"{'input' if side == 'inner' else 'output'} factor of layer {b.name!r}"
            if directions is not None:
                sides.append(_nystrom(factor, directions, self.rank, what))
            elif side == "inner" and b.columns == 1:
                sides.append((factor.squeeze(-1), torch.ones_like(factor)))
            else:
                sides.append(eigh(factor, what))
        (spread, turned), (values, basis) = sides
        return Eigen(values.unsqueeze(-1) * spread.unsqueeze(-2), turned, basis)

    @property
    def num_prepared(self) -> int:
        return len(self.layout.blocks) + len(self.directions)

    def prepared(self, factors: Sequence[Factor]) -> Sequence[Factor]:
        """For each block its kept part, then what lies outside the kept inputs, then outside the kept outputs."""
        found: list[Factor] = []
        for i, (e, f) in enumerate(zip(self.eigen, factors, strict=True)):
            missing = [f"{side}.{i}" in self.directions for side in ("inner", "outer")]
            if not any(missing) or not isinstance(f, LinearFactor):
                found.append(e.rotate(f))
                continue
            assert e.inner is not None and e.outer is not None
            turned, out = e.inner.unsqueeze(1), e.outer[:, None, None]
            a, g = f.a @ turned, (f.g[:, :, :1] if f.shared else f.g) @ out
            width = f.g.shape[:4]
            found.append(LinearFactor(a, g.expand(*width, -1), lengths=f.lengths))
            if missing[0]:
                found.append(LinearFactor(f.a - a @ turned.mT, f.g, lengths=f.lengths))
            if missing[1]:
                rest = (f.g[:, :, :1] if f.shared else f.g) - g @ out.mT
                found.append(LinearFactor(a, rest.expand(*width, -1), lengths=f.lengths))
        return found

    def quad_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._spread(self._precision(scale, shift), shift)
        return torch.stack([f.quad(1.0 / p) for f, p in zip(factors, weights, strict=True)]).sum(0)

    def quads_prepared(self, factors: Sequence[Factor], scale: Shift, shifts: Tensor) -> Tensor:
        return Structure.quads_prepared(self, factors, scale, shifts)

    def marginal_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._spread(self._precision(scale, shift), shift)
        return torch.stack([f.marginal(1.0 / p) for f, p in zip(factors, weights, strict=True)]).sum(0)

    def marginals_prepared(self, factors: Sequence[Factor], scale: Shift, shifts: Tensor) -> Tensor:
        return Structure.marginals_prepared(self, factors, scale, shifts)

    def cross(self, first: Sequence[Factor], second: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return Structure.cross(self, first, second, scale, shift)

    def logdet(self, scale: Shift, shift: Shift) -> Tensor:
        kept = self._precision(scale, shift, torch.float64)
        shifts = self.layout.shifts(shift, kept[0])
        rest = [(b.numel - p.numel()) * s.log() for b, p, s in zip(self.layout.blocks, kept, shifts, strict=True)]
        return torch.stack([p.log().sum() for p in kept]).sum() + torch.stack(rest).sum()

    def solve(self, vectors: Tensor, scale: Shift, shift: Shift) -> Tensor:
        return self._everywhere(vectors, self._precision(scale, shift), shift, -1.0)

    def sample(self, noise: Tensor, scale: Shift, shift: Shift) -> Tensor:
        check_noise(noise, self.layout.numel)
        return self._everywhere(noise, self._precision(scale, shift), shift, -0.5)

    def eigenvalues(self) -> Tensor:
        parts = []
        for b, e in zip(self.layout.blocks, self.eigen, strict=True):
            values = e.values.flatten()
            parts += [values, values.new_zeros(b.numel - len(values))]
        return torch.cat(parts)

    def sums(self) -> dict[str, Tensor]:
        named = {f"inner.{i}": t for i, t in enumerate(self.inner)}
        named |= {f"outer.{i}": t for i, t in enumerate(self.outer)}
        return named | {f"rows.{i}": t for i, t in enumerate(self.rows)}

    def tensors(self) -> dict[str, Tensor]:
        return self.sums() | {f"directions.{key}": value for key, value in self.directions.items()}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        count, prefix = range(len(self.layout.blocks)), "directions."
        return replace(
            self,
            inner=tuple(tensors[f"inner.{i}"] for i in count),
            outer=tuple(tensors[f"outer.{i}"] for i in count),
            rows=tuple(tensors[f"rows.{i}"] for i in count),
            directions={name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)},
        )

    def fresh(self) -> Self:
        return self.with_tensors(self.tensors() | {name: torch.zeros_like(t) for name, t in self.sums().items()})

    def _spread(self, kept: Sequence[Tensor], shift: Shift) -> list[Tensor]:
        """Precisions of what `prepared` returns."""
        found = []
        for i, (b, p, s) in enumerate(zip(self.layout.blocks, kept, self.layout.shifts(shift, kept[0]), strict=True)):
            found.append(p)
            if f"inner.{i}" in self.directions:
                found.append(s.expand(b.groups, b.rows, b.columns))
            if f"outer.{i}" in self.directions:
                found.append(s.expand(b.groups, b.rows, p.shape[-1]))
        return found

    def _everywhere(self, vectors: Tensor, kept: Sequence[Tensor], shift: Shift, power: float) -> Tensor:
        """P^power v."""
        shifts = self.layout.shifts(shift, kept[0])
        found = []
        for e, v, p, s in zip(self.eigen, self.layout.split(vectors.to(kept[0])), kept, shifts, strict=True):
            inside = e.into(v)
            outside = v - e.back(inside) if inside.shape[-2:] != v.shape[-2:] else torch.zeros_like(v)
            found.append(e.back(inside * p**power) + outside * s**power)
        return self.layout.join(found)


def _directions(size: int, width: int) -> Tensor:
    """Orthonormal columns `(size, width)`, float64, the same ones for every fit of this size."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, width, generator=generator, dtype=torch.float64))[0]


def _summed(rows: Tensor, directions: Tensor | None) -> Tensor:
    """sum r r' over rows `(G, B, T, D)`, or that times the directions `(D, w)`."""
    if directions is None:
        return second_moment(rows)
    flat = rows.flatten(1, 2)
    return flat.mT @ (flat @ directions)


def _nystrom(sketch: Tensor, directions: Tensor, rank: int, what: str) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues `(G, r)` and vectors `(G, D, r)` of M from M Omega `(G, D, w)`, in float64.

    The small multiple of the identity that makes Omega' M Omega invertible is taken off the eigenvalues again.
    """
    wide, omega = sketch.double(), directions.double()
    size = wide.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)[:, None, None]
    small = torch.finfo(sketch.dtype).eps * len(omega) ** 0.5 * size
    moved = wide + small * omega
    core = omega.mT @ moved
    lower = cholesky(0.5 * (core + core.mT), what)
    root = torch.linalg.solve_triangular(lower, moved.mT, upper=False).mT
    vectors, roots, _ = torch.linalg.svd(root, full_matrices=False)
    values = (roots[:, :rank].square() - small.squeeze(-1)).clamp(min=0)
    return values.to(sketch.dtype), vectors[:, :, :rank].to(sketch.dtype)
