"""Safe decompositions of symmetric matrices: escalating jitter, a warning, then a named error."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayesdl.errors import NumericalError, check_finite

JITTER = (1e-10, 1e-8, 1e-6, 1e-4)


class JitterWarning(UserWarning):
    """A matrix was not positive definite to working precision, and jitter was added to its diagonal."""


def cholesky(matrix: Tensor, what: str = "matrix") -> Tensor:
    """Lower Cholesky factor of `(..., n, n)`.

    Jitter, relative to the mean diagonal, is added in growing steps where the plain factorisation fails.

    Raises:
        NonFiniteError: NaN or infinity in the input.
        NumericalError: not positive definite even with the largest jitter.
    """
    check_finite(matrix, what)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        return factor
    scale = matrix.diagonal(dim1=-2, dim2=-1).abs().mean(-1, keepdim=True)
    for jitter in JITTER:
        factor, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed((jitter * scale).expand(matrix.shape[:-1])))
        if not bool(info.any()):
            warnings.warn(
                f"{what}: jitter of {jitter:g} times the mean diagonal was added", JitterWarning, stacklevel=2
            )
            return factor
    raise NumericalError(
        f"{what} of shape {tuple(matrix.shape)} is not positive definite even with jitter {JITTER[-1]:g} times its "
        "mean diagonal; use float64 curvature or a larger prior precision"
    )


def eigh(matrix: Tensor, what: str = "matrix", semidefinite: bool = True) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric `(..., n, n)`, computed in float64.

    Args:
        matrix: the matrix.
        what: its name in errors.
        semidefinite: it is positive semi-definite by construction: eigenvalues below zero are rounding, and clamped.

    Raises:
        NonFiniteError: NaN or infinity in the input.
        NumericalError: the solver does not converge.
    """
    check_finite(matrix, what)
    symmetric = 0.5 * (matrix + matrix.mT).double()
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"{what} of shape {tuple(matrix.shape)}: the eigensolver failed ({error})") from error
    return (values.clamp(min=0) if semidefinite else values).to(matrix.dtype), vectors.to(matrix.dtype)


def symmetric_root(matrix: Tensor) -> Tensor:
    """The unique symmetric square root of positive semi-definite `(..., n, n)`, once differentiable."""
    return _SymmetricRoot.apply(matrix)


class _SymmetricRoot(torch.autograd.Function):
    """R with R R = A. Its differential solves dR R + R dR = dA, which needs no gaps between the eigenvalues."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = eigh(matrix, "covariance of the outputs")
        ctx.save_for_backward(values.sqrt(), vectors)
        return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
        # where both eigenvalues are zero the root has no derivative: nothing flows back through that direction
        share = torch.where(sums > torch.finfo(sums.dtype).eps * sums.amax((-2, -1), keepdim=True), 1.0 / sums, 0.0)
        found = vectors @ (share * (vectors.mT @ gradients[0] @ vectors)) @ vectors.mT
        return 0.5 * (found + found.mT)
