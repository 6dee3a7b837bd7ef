"""Safe decompositions of symmetric matrices: escalating jitter, a warning, then a named error."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

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


def eigh(matrix: Tensor, what: str = "matrix") -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at zero) and eigenvectors of positive semi-definite `(..., n, n)`, computed in float64.

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
    return values.clamp(min=0).to(matrix.dtype), vectors.to(matrix.dtype)


def symmetric_root(matrix: Tensor) -> Tensor:
    """The unique symmetric square root of positive semi-definite `(..., n, n)`."""
    values, vectors = eigh(matrix, "covariance of the outputs")
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
