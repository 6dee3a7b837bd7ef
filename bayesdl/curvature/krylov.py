"""Krylov methods on symmetric matrices known by their products alone: conjugate gradients, Lanczos.

All directions of one product go through the data together: columns of `(P, r)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.errors import NumericalError

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """Solutions of a linear system by conjugate gradients.

    Attributes:
        value: x, in the shape of the right-hand side.
        iterations: products with the matrix that the slowest column took.
        residual: the largest ||b - A x|| / ||b|| of all columns, computed afresh at the end.
    """

    value: Tensor
    iterations: int
    residual: float


def conjugate_gradients(product: Product, b: Tensor, precondition: Product, tol: float, max_iter: int) -> Solution:
    """Solve A x = b for positive definite A and every column of b `(P, r)` (Hestenes and Stiefel 1952).

    Columns that have converged leave the products. The recursion's residual drifts from the true one by rounding, so
    convergence is claimed only of a residual computed afresh; columns that fail there start again from where they are.

    Args:
        product: `(P, s) -> (P, s)`.
        b: right-hand sides.
        precondition: an approximation of A^-1, symmetric and positive definite, `(P, s) -> (P, s)`.
        tol: relative residual.
        max_iter: products.

    Raises:
        NumericalError: A has a direction of negative curvature, or the residual does not fall below `tol`.
    """
    norms = b.norm(dim=0)
    x, residual = torch.zeros_like(b), b.clone()
    left = (norms > 0).nonzero().squeeze(1)
    iterations, reached = 0, torch.zeros_like(norms)
    before = torch.full_like(norms, torch.inf)
    while len(left):
        turned = precondition(residual[:, left])
        direction, step = turned, (residual[:, left] * turned).sum(0)
        active = left
        while len(active):
            if iterations >= max_iter:
                worst = float((residual[:, active].norm(dim=0) / norms[active]).max())
                raise NumericalError(
                    f"conjugate gradients stand at a relative residual of {worst:.3g} after {iterations} iterations "
                    f'(tol={tol:g}); pass preconditioner="kron", a larger max_iter or tol, or a larger shift'
                )
            _positive(step, "the preconditioner")
            image = product(direction)
            iterations += 1
            curvature = (direction * image).sum(0)
            _positive(curvature, "scale * H + diag(shift)", direction)
            length = step / curvature
            x[:, active] += length * direction
            residual[:, active] -= length * image
            open_ = residual[:, active].norm(dim=0) > tol * norms[active]
            active, direction, step = active[open_], direction[:, open_], step[open_]
            if len(active):
                turned = precondition(residual[:, active])
                fresh = (residual[:, active] * turned).sum(0)
                direction, step = turned + (fresh / step) * direction, fresh
        residual[:, left] = b[:, left] - product(x[:, left])
        reached[left] = residual[:, left].norm(dim=0) / norms[left]
        failed = reached[left] > tol
        if bool((reached[left] > 0.5 * before[left])[failed].any()):
            raise NumericalError(
                f"rounding keeps the relative residual of conjugate gradients at {float(reached.max()):.3g} "
                f"(tol={tol:g}, {b.dtype}); pass dtype=torch.float64 to the operator, or a larger tol"
            )
        before = reached.clone()
        left = left[failed]
    return Solution(x, iterations, float(reached.max()) if reached.numel() else 0.0)


def _positive(values: Tensor, what: str, directions: Tensor | None = None) -> None:
    if bool((values > 0).all()):
        return
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(f"a product with {what} became NaN or infinite")
    if directions is None:
        raise NumericalError(f"{what} is not positive definite; conjugate gradients need one that is")
    quotient = float((values / directions.square().sum(0)).min())
    raise NumericalError(
        f"{what} is not positive definite: its curvature along a direction is {quotient:.4g}. Add a larger shift "
        '(prior precision), or use kind="ggn", which is positive semi-definite'
    )


@dataclass(frozen=True)
class Tridiagonal:
    """What k Lanczos steps leave of A for each of r starts: Q^T A Q = T.

    Attributes:
        diagonal: `(r, k)` of T.
        beside: `(r, k - 1)` next to it.
        basis: Q `(k, P, r)`; columns are zero once the Krylov space is exhausted.
    """

    diagonal: Tensor
    beside: Tensor
    basis: Tensor

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `(r, k)` and eigenvectors `(r, k, k)` of T, in float64."""
        beside = self.beside.double()
        matrix = torch.diag_embed(self.diagonal.double())
        return torch.linalg.eigh(matrix + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1))


def lanczos(product: Product, start: Tensor, steps: int) -> Tridiagonal:
    """Lanczos with full reorthogonalisation from every column of `start` `(P, r)`; exact with P steps.

    Costs `steps` products with r directions each, and holds steps x P x r numbers.
    """
    steps = min(steps, len(start))
    basis = start.new_zeros(steps, *start.shape)
    diagonal, beside = start.new_zeros(steps, start.shape[1]), start.new_zeros(steps - 1, start.shape[1])
    current, level = start / start.norm(dim=0), start.new_zeros(start.shape[1])
    for k in range(steps):
        basis[k] = current
        image = product(current)
        diagonal[k] = (current * image).sum(0)
        if k + 1 == steps:
            break
        level = torch.maximum(level, image.norm(dim=0))
        for _ in range(2):  # once leaves what cancellation left over
            known = basis[: k + 1]
            image = image - (known * (known * image).sum(1, keepdim=True)).sum(0)
        norm = image.norm(dim=0)
        exhausted = norm <= 10.0 * len(start) ** 0.5 * torch.finfo(start.dtype).eps * level
        beside[k] = torch.where(exhausted, 0.0, norm)
        current = torch.where(exhausted, 0.0, image / norm.clamp(min=torch.finfo(start.dtype).tiny))
    return Tridiagonal(diagonal.T, beside.T, basis)
