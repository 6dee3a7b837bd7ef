"""Low-rank curvature: H on the span of its leading eigenvectors, found by randomised subspace iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from bayesdl.curvature.factor import Factor, dense_factor
from bayesdl.curvature.layout import Layout, cast, positive
from bayesdl.curvature.products import times, transposed_times
from bayesdl.curvature.structure import Shift, Structure, Uniform, check_noise, check_positive
from bayesdl.linalg import cholesky, eigh

DEFAULT_RANK = 32
# columns beyond the rank while the span is looked for (Halko, Martinsson and Tropp 2011, section 4.2)
OVERSAMPLING = 10


@final
@dataclass(frozen=True, eq=False)
class LowRank(Uniform):
    """H = U M U^T with orthonormal U; P = diag(shift) + scale U M U^T by Woodbury, exact for any shift.

    Three passes over the data: H times random directions; H times the span found; M = U^T H U on the leading
    eigenvectors of the Nystrom approximation that the second pass gave. Nothing of H beyond the span is kept: there
    the posterior is as wide as the prior. No Jacobian is formed: products with J and J^T are contractions of the layer
    factors.

    Attributes:
        basis: U `(P, r)` in flat order.
        core: M `(r, r)`.
        image: while the span is looked for, H U `(P, r)`; None in a finished fit.
        pending: passes that are still to come.
        rank: r asked for; fewer where H has fewer non-zero eigenvalues.
        signed: whether M may have negative eigenvalues, as those of an exact Hessian.
    """

    basis: Tensor
    core: Tensor
    image: Tensor | None = None
    pending: int = 0
    rank: int = DEFAULT_RANK
    signed: bool = False

    name: ClassVar[str] = "lowrank"
    num_passes: ClassVar[int] = 3

    @classmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Self:
        """Zero curvature of rank zero."""
        basis = torch.zeros(layout.numel, 0, dtype=dtype, device=device)
        return cls(layout, basis, basis.new_zeros(0, 0))

    @classmethod
    def first(cls, layout: Layout, dtype: torch.dtype, device: torch.device, rank: int | None = None) -> Structure:
        kept = min(rank or DEFAULT_RANK, layout.numel)
        width = min(kept + OVERSAMPLING, layout.numel)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(layout.numel, width, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(start)[0].to(device, dtype)
        return cls._zero(layout, basis, 2, kept)

    @classmethod
    def following(cls, fitted: Structure) -> Structure | None:
        if not isinstance(fitted, LowRank) or fitted.image is None:
            return None
        image = fitted.image.double()
        if fitted.pending > 1:
            basis = torch.linalg.qr(image)[0].to(fitted.basis)
        else:
            values, vectors = eigh(fitted.core.double(), "low-rank curvature")
            sound = values > len(values) * torch.finfo(fitted.core.dtype).eps * values.max()
            nystrom = image @ (vectors[:, sound] / values[sound].sqrt())
            basis = torch.linalg.svd(nystrom, full_matrices=False)[0][:, : fitted.rank].to(fitted.basis)
        return cls._zero(fitted.layout, basis, fitted.pending - 1, fitted.rank)

    @classmethod
    def _zero(cls, layout: Layout, basis: Tensor, pending: int, rank: int) -> Self:
        core = basis.new_zeros(basis.shape[1], basis.shape[1])
        return cls(layout, basis, core, torch.zeros_like(basis) if pending else None, pending, rank)

    @property
    def options(self) -> dict[str, Any]:
        return {"signed": True} if self.signed else {}

    def fresh(self) -> Self:
        return self._zero(self.layout, self.basis, self.pending, self.rank)

    def update(self, factors: Sequence[Factor]) -> None:
        products = self._products(factors, self.basis)
        rows = products.flatten(1)  # (r, B K)
        self.core.addmm_(rows, rows.T)
        if self.image is None:
            return
        pairs = zip(factors, self.layout.blocks, strict=True)
        pulled = [transposed_times(factor, products, block) for factor, block in pairs]
        self.image.add_(self.layout.join(pulled).T)

    def per_block(self) -> Sequence[Tensor]:
        if self.image is None:
            return [self.core] * len(self.layout.blocks)
        return self.layout.split(self.image.T)

    def _plus(self, other: Self) -> Self:
        if self.basis is other.basis or (
            self.basis.shape == other.basis.shape and torch.equal(self.basis, other.basis)
        ):
            image = None if self.image is None or other.image is None else self.image + other.image
            return replace(self, core=self.core + other.core, image=image)
        basis, turn = torch.linalg.qr(torch.cat([self.basis, other.basis], 1))
        core = turn @ torch.block_diag(self.core, other.core) @ turn.mT
        return type(self)(self.layout, basis, core, rank=basis.shape[1], signed=self.signed or other.signed)

    def scaled(self, weight: Tensor) -> Self:
        return replace(self, core=weight.to(self.core) * self.core)

    def logdet(self, scale: Shift, shift: Shift) -> Tensor:
        diagonal = self._diagonal(shift, torch.float64)
        core, gram = self._core(scale), self._gram(shift, diagonal)
        self._check(core, gram)
        return diagonal.log().sum() + torch.linalg.slogdet(_one(core) + gram @ core)[1]

    def product(self, vectors: Tensor) -> Tensor:
        return ((self._checked(vectors) @ self.basis) @ self.core) @ self.basis.T

    def solve(self, vectors: Tensor, scale: Shift, shift: Shift) -> Tensor:
        diagonal = self._diagonal(shift)
        plain = self._checked(vectors) / diagonal
        return plain - (((plain @ self.basis) @ self._middle(scale, shift)) @ self.basis.T) / diagonal

    def quad(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self.quad_prepared(self.prepared(factors), scale, shift)

    def marginal(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        return self.marginal_prepared(self.prepared(factors), scale, shift)

    @property
    def num_prepared(self) -> int:
        return len(self.layout.blocks) + 1

    def prepared(self, factors: Sequence[Factor]) -> Sequence[Factor]:
        """The factors as they are, and J U, which is all that a scalar shift needs beside them."""
        return [*factors, dense_factor(self._products(factors, self.basis).permute(2, 1, 0))]

    def quad_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._weights(shift)
        wide = torch.stack([f.quad(w) for f, w in zip(factors[:-1], weights, strict=True)]).sum(0)
        inner = self._inner(factors, shift)
        return wide - inner @ self._middle(scale, shift) @ inner.mT

    def marginal_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        weights = self._weights(shift)
        wide = torch.stack([f.marginal(w) for f, w in zip(factors[:-1], weights, strict=True)]).sum(0)
        inner = self._inner(factors, shift)
        return wide - ((inner @ self._middle(scale, shift)) * inner).sum(-1)

    def sample(self, noise: Tensor, scale: Shift, shift: Shift) -> Tensor:
        """D^-1/2 (I + scale D^-1/2 U M U^T D^-1/2)^-1/2 noise: symmetric where D is a scalar."""
        check_noise(noise, self.layout.numel)
        root = self._diagonal(shift).rsqrt()
        core, gram = self._core(scale), self._gram(shift, self._diagonal(shift, torch.float64))
        self._check(core, gram)
        # D^-1/2 U = Q L^T with orthonormal Q, and L^T scale M L = V diag(spread) V^T
        lower = cholesky(gram, "low-rank curvature")
        spread, turn = eigh(lower.T @ core @ lower, "low-rank curvature", not self.signed)
        turn = torch.linalg.solve_triangular(lower.T, turn, upper=True)
        directions = root.unsqueeze(1) * (self.basis @ turn.to(self.basis))
        draws, shrunk = noise.to(self.basis), ((1.0 + spread).rsqrt() - 1.0).to(self.basis)
        return root * (draws + ((draws @ directions) * shrunk) @ directions.T)

    def eigenvalues(self) -> Tensor:
        values = eigh(self.core, "low-rank curvature", not self.signed)[0]
        return torch.cat([values, values.new_zeros(self.layout.numel - len(values))])

    def to_dense(self) -> Tensor:
        return self.basis @ self.core @ self.basis.T

    def sums(self) -> dict[str, Tensor]:
        return {"core": self.core} if self.image is None else {"core": self.core, "image": self.image}

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self.basis} | self.sums()

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        return replace(self, basis=tensors["basis"], core=tensors["core"], image=tensors.get("image"))

    def _products(self, factors: Sequence[Factor], directions: Tensor) -> Tensor:
        """J times directions `(P, r)`: `(r, B, K)`."""
        pieces = zip(factors, self.layout.split(directions.T), strict=True)
        return torch.stack([times(f, d) for f, d in pieces]).sum(0)

    def _inner(self, factors: Sequence[Factor], shift: Shift) -> Tensor:
        """J D^-1 U `(B, K, r)`."""
        if torch.as_tensor(shift).numel() == 1:
            return factors[-1].g[0, :, :, 0].transpose(0, 1) / cast(shift, self.basis).reshape(())
        directions = self.basis / self._diagonal(shift).unsqueeze(1)
        return self._products(factors[:-1], directions).permute(1, 2, 0)

    def _core(self, scale: Shift) -> Tensor:
        core = self.core.double()
        return positive(scale, core) * core

    def _gram(self, shift: Shift, diagonal: Tensor) -> Tensor:
        """U^T D^-1 U."""
        if torch.as_tensor(shift).numel() == 1:
            return _one(self.core.double()) / cast(shift, diagonal).reshape(())
        basis = self.basis.double()
        return (basis / diagonal.unsqueeze(1)).T @ basis

    def _check(self, core: Tensor, gram: Tensor) -> None:
        """Refuse what is not positive definite; `gram` is U^T D^-1 U."""
        if self.signed:
            lower = cholesky(gram.detach(), "low-rank curvature")
            values = 1.0 + torch.linalg.eigvalsh(lower.T @ core.detach() @ lower)
            check_positive(values, "its smallest eigenvalue, as a multiple of the shift,")

    def _middle(self, scale: Shift, shift: Shift) -> Tensor:
        """scale M (I + scale U^T D^-1 U M)^-1, symmetric."""
        core, gram = self._core(scale), self._gram(shift, self._diagonal(shift, torch.float64))
        self._check(core, gram)
        solved = torch.linalg.solve(_one(core) + core @ gram, core)
        return (0.5 * (solved + solved.T)).to(self.basis)

    def _weights(self, shift: Shift) -> list[Tensor]:
        sizes = [(b.groups, b.rows, b.columns) for b in self.layout.blocks]
        shifts = self.layout.shifts(shift, self.basis)
        return [(1.0 / s).expand(size) for s, size in zip(shifts, sizes, strict=True)]

    def _diagonal(self, shift: Shift, dtype: torch.dtype | None = None) -> Tensor:
        """The shift as one number per parameter, flat."""
        sizes = [(b.groups, b.rows, b.columns) for b in self.layout.blocks]
        shifts = self.layout.shifts(shift, self.basis.new_empty((), dtype=dtype or self.basis.dtype))
        return self.layout.join([s.expand(size) for s, size in zip(shifts, sizes, strict=True)])

    def _checked(self, vectors: Tensor) -> Tensor:
        self.layout.to_dict(vectors)  # refuses another length
        return vectors.to(self.basis)


def _one(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)
