"""Covariances between the nodes: never further off than the bound says, whatever the eigenvalues."""

from __future__ import annotations

import pytest
import torch

from bayesdl.tuning.interpolation import TOLERANCE, nodes, shifts_of

EIGENVALUES = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-25, 25, 20_001, dtype=torch.float64)])


@pytest.mark.parametrize(("low", "high", "count", "most"), [(-3, 4, 100, 31), (-4, 6, 200, 41), (0, 1, 30, 9)])
def test_the_bound_holds_and_is_met_for_every_eigenvalue(low: int, high: int, count: int, most: int) -> None:
    wanted = torch.logspace(low, high, count, dtype=torch.float64)
    shifts = shifts_of(wanted)
    assert shifts.weights is not None and len(shifts.nodes) < most and shifts.count == count
    values = 1.0 / (EIGENVALUES + shifts.nodes.unsqueeze(-1))
    error = float((shifts.combined(values) * (EIGENVALUES + wanted.unsqueeze(-1)) - 1.0).abs().max())
    assert error <= shifts.error * (1.0 + 1e-6) <= TOLERANCE
    assert error >= 0.99 * shifts.error  # the bound is no looser than what happens
    torch.testing.assert_close(shifts.combined(values, slice(3, 5)), shifts.combined(values)[3:5])
    # rounding at the nodes is hardly amplified
    amplified = shifts.weights.abs().mT @ values * (EIGENVALUES + wanted.unsqueeze(-1))
    assert float(amplified.max()) < 10.0


def test_covariances_of_any_matrix_obey_the_bound() -> None:
    g = torch.Generator().manual_seed(0)
    wanted = torch.logspace(-3, 3, 60, dtype=torch.float64)
    shifts = shifts_of(wanted)
    half = torch.randn(6, 9, dtype=torch.float64, generator=g) * torch.logspace(-3, 2, 9, dtype=torch.float64)
    curvature, rows = half.mT @ half, torch.randn(4, 9, dtype=torch.float64, generator=g)
    identity = torch.eye(9, dtype=torch.float64)

    def covariance(shift: torch.Tensor) -> torch.Tensor:
        return rows @ torch.linalg.solve(curvature + shift * identity, rows.mT)

    truth = torch.stack([covariance(shift) for shift in wanted])
    found = shifts.combined(torch.stack([covariance(shift) for shift in shifts.nodes]))
    spread = truth.diagonal(dim1=1, dim2=2).sqrt()
    scale = spread.unsqueeze(-1) * spread.unsqueeze(-2)
    assert float(((found - truth).abs() / scale).max()) < 1.1 * shifts.error


def test_few_or_equal_or_far_apart_precisions_are_taken_as_they_are() -> None:
    for wanted in ([0.3], [2.0] * 50, [1e-3, 1.0, 1e3], torch.logspace(-4, 6, 20).tolist(), [1e-300, 1e300]):
        shifts = shifts_of(torch.tensor(wanted, dtype=torch.float64))
        assert shifts.weights is None and shifts.error == 0.0 and shifts.count == len(wanted)
        assert shifts.nodes.tolist() == wanted


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.0), (1e-2, 3.0), (1e-5, 1e3)])
def test_nodes_are_values_of_dn(low: float, high: float) -> None:
    special = pytest.importorskip("scipy.special")
    quarter = special.ellipkm1((low / high) ** 2)
    u = (2.0 * torch.arange(7, dtype=torch.float64) + 1.0) * quarter / 14.0
    truth = high * torch.as_tensor(special.ellipj(u.numpy(), 1.0 - (low / high) ** 2)[2]).flip(0)
    found = nodes(low, high, 7)
    if low / high > 1e-4:  # nearer to a modulus of one the reference itself is right to a percent only
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=0.0)
    torch.testing.assert_close(found * found.flip(0), torch.full_like(found, low * high), rtol=1e-10, atol=0.0)
