"""Safe decompositions: the right numbers, jitter with a warning, named errors, never a silent NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayesdl.errors import NonFiniteError, NumericalError
from bayesdl.linalg import JitterWarning, cholesky, eigh, symmetric_root


def positive(size: int = 4, batch: int = 3) -> Tensor:
    root = torch.randn(batch, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return root @ root.mT + torch.eye(size, dtype=torch.float64)


def test_cholesky_of_a_positive_matrix() -> None:
    matrix = positive()
    factor = cholesky(matrix)
    torch.testing.assert_close(factor @ factor.mT, matrix)
    torch.testing.assert_close(factor, factor.tril())


def test_jitter_is_small_and_said() -> None:
    ones = torch.ones(3, 3, dtype=torch.float64)
    ones[0, 0] -= 1e-12  # indefinite by rounding only
    with pytest.warns(JitterWarning, match="the precision: jitter of"):
        factor = cholesky(ones, "the precision")
    torch.testing.assert_close(factor @ factor.mT, ones, rtol=0.0, atol=1e-6)


def test_an_indefinite_matrix_is_an_error() -> None:
    with pytest.raises(NumericalError, match=r"the precision.*\(2, 2\).*not positive definite"):
        cholesky(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "the precision")


@pytest.mark.parametrize("function", [cholesky, eigh])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_named(function, bad: float) -> None:  # type: ignore[no-untyped-def]
    matrix = torch.eye(3)
    matrix[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"the factor.*\(1, 2\)"):
        function(matrix, "the factor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigh_clamps_at_zero_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    vector = torch.arange(1.0, 5.0, dtype=dtype)
    values, basis = eigh(torch.outer(vector, vector))
    assert values.dtype == basis.dtype == dtype
    assert float(values.min()) >= 0.0
    torch.testing.assert_close(values[-1], vector.square().sum())
    torch.testing.assert_close((basis * values) @ basis.T, torch.outer(vector, vector), rtol=1e-4, atol=1e-4)


def test_eigenvalues_of_a_single_precision_matrix_come_from_double() -> None:
    # 1e-9 beside 1 is lost to a single-precision solver's rounding
    values, _ = eigh(torch.diag(torch.tensor([1.0, 1e-9])))
    torch.testing.assert_close(values, torch.tensor([1e-9, 1.0]), rtol=1e-6, atol=0.0)


def test_symmetric_root() -> None:
    matrix = positive()
    root = symmetric_root(matrix)
    torch.testing.assert_close(root, root.mT)
    torch.testing.assert_close(root @ root, matrix)
    assert bool((torch.linalg.eigvalsh(root) > 0).all())
