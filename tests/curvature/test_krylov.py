"""Conjugate gradients and Lanczos on dense float64 matrices, whose solutions and spectra are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayesdl.curvature.krylov import conjugate_gradients, lanczos
from bayesdl.errors import NumericalError

SIZE = 40


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    """Symmetric, with the given eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return (basis * values) @ basis.T


def columns(count: int, size: int = SIZE) -> Tensor:
    return torch.randn(size, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_solutions_are_those_of_the_dense_solver() -> None:
    a, b = matrix(torch.logspace(-2, 3, SIZE, dtype=torch.float64)), columns(3)
    b[:, 1] = 0.0
    b[:, 2] *= 1e6
    found = conjugate_gradients(lambda v: a @ v, b, lambda v: v, 1e-11, 1000)
    torch.testing.assert_close(found.value, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-8)
    assert not bool(found.value[:, 1].any())
    assert found.residual <= 1e-11
    true = (b - a @ found.value).norm(dim=0)[[0, 2]] / b.norm(dim=0)[[0, 2]]
    assert found.residual == pytest.approx(float(true.max()), rel=1e-6)


def test_iterations_are_at_most_the_number_of_different_eigenvalues() -> None:
    a, seen = matrix(torch.tensor([1.0, 3.0, 10.0, 50.0], dtype=torch.float64).repeat(SIZE // 4)), []

    def product(v: Tensor) -> Tensor:
        seen.append(v.shape[1])
        return a @ v

    found = conjugate_gradients(product, columns(2), lambda v: v, 1e-10, 100)
    assert found.iterations == 4
    assert seen == [2] * 5  # and one to compute the residual afresh


def test_columns_that_converged_leave_the_products() -> None:
    a, seen = matrix(torch.logspace(0, 3, SIZE, dtype=torch.float64)), []
    b = columns(2)
    b[:, 0] = torch.linalg.eigh(a)[1][:, 7]  # solved by one step

    def product(v: Tensor) -> Tensor:
        seen.append(v.shape[1])
        return a @ v

    conjugate_gradients(product, b, lambda v: v, 1e-10, 200)
    assert seen[0] == 2
    assert set(seen[1:-1]) == {1}


def test_the_inverse_as_preconditioner_needs_one_step() -> None:
    a, b = matrix(torch.logspace(-3, 3, SIZE, dtype=torch.float64)), columns(2)
    inverse = torch.linalg.inv(a)
    plain = conjugate_gradients(lambda v: a @ v, b, lambda v: v, 1e-6, 1000)
    found = conjugate_gradients(lambda v: a @ v, b, lambda v: inverse @ v, 1e-6, 1000)
    assert found.iterations == 1 < 20 < plain.iterations


def test_negative_curvature_is_named() -> None:
    values = torch.linspace(1.0, 5.0, SIZE, dtype=torch.float64)
    values[3] = -2.0
    with pytest.raises(NumericalError, match=r"not positive definite.*larger shift.*kind=\"ggn\""):
        conjugate_gradients(lambda v: matrix(values) @ v, columns(1), lambda v: v, 1e-8, 1000)


def test_a_preconditioner_that_is_not_positive_is_named() -> None:
    a = matrix(torch.ones(SIZE, dtype=torch.float64))
    with pytest.raises(NumericalError, match="preconditioner is not positive definite"):
        conjugate_gradients(lambda v: a @ v, columns(1), lambda v: -v, 1e-8, 1000)


def test_too_few_iterations_are_an_error_with_the_residual() -> None:
    a = matrix(torch.logspace(-3, 3, SIZE, dtype=torch.float64))
    with pytest.raises(NumericalError, match="after 5 iterations.*kron"):
        conjugate_gradients(lambda v: a @ v, columns(1), lambda v: v, 1e-8, 5)


def test_a_tolerance_below_rounding_is_an_error_that_says_so() -> None:
    a = matrix(torch.logspace(-2, 2, SIZE, dtype=torch.float64)).float()
    with pytest.raises(NumericalError, match="rounding keeps.*float64"):
        conjugate_gradients(lambda v: a @ v, columns(1).float(), lambda v: v, 1e-9, 10_000)


def test_products_that_are_not_finite_are_named() -> None:
    with pytest.raises(NumericalError, match="NaN or infinite"):
        conjugate_gradients(lambda v: v * torch.nan, columns(1), lambda v: v, 1e-8, 10)


# --- Lanczos ---


@pytest.mark.parametrize("steps", [1, 5, SIZE, SIZE + 7])
def test_basis_is_orthonormal_and_projects_to_the_tridiagonal(steps: int) -> None:
    a, start = matrix(torch.logspace(-3, 3, SIZE, dtype=torch.float64)), columns(3)
    found = lanczos(lambda v: a @ v, start, steps)
    kept = min(steps, SIZE)
    for r in range(3):
        q = found.basis[:, :, r].T
        torch.testing.assert_close(q.T @ q, torch.eye(kept, dtype=torch.float64), rtol=0.0, atol=1e-12)
        t = torch.diag(found.diagonal[r]) + torch.diag(found.beside[r], 1) + torch.diag(found.beside[r], -1)
        torch.testing.assert_close(q.T @ a @ q, t, rtol=1e-10, atol=1e-9)
        torch.testing.assert_close(q[:, 0], start[:, r] / start[:, r].norm())


def test_all_steps_have_the_quadratic_form_of_any_function() -> None:
    a, start = matrix(torch.logspace(-1, 2, SIZE, dtype=torch.float64)), columns(2)
    nodes, vectors = lanczos(lambda v: a @ v, start, SIZE).eigen()
    found = start.square().sum(0) * (vectors[:, 0].square() * nodes.log()).sum(1)
    values, basis = torch.linalg.eigh(a)
    truth = ((basis.T @ start).square() * values.log().unsqueeze(1)).sum(0)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=0.0)


def test_an_exhausted_space_ends_one_column_and_not_the_others() -> None:
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[:3] = torch.tensor([1.0, 2.0, 5.0])
    a, start = matrix(values), columns(2)
    start[:, 0] = torch.linalg.eigh(a)[1][:, -1]
    found = lanczos(lambda v: a @ v, start, 10)
    nodes, vectors = found.eigen()
    weights = vectors[:, 0].square()
    torch.testing.assert_close(nodes[0][weights[0] > 1e-9], torch.tensor([5.0], dtype=torch.float64))
    # the start's part in the null space is one more direction
    expected = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(nodes[1][weights[1] > 1e-9], expected, rtol=1e-9, atol=1e-9)
    assert bool(torch.isfinite(found.basis).all())
