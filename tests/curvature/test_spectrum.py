"""Log-determinants by Lanczos quadrature against dense ones: exact where they must be, honest elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesdl.curvature.spectrum import exact_spectrum, lanczos_spectrum, whitened_logdet
from bayesdl.errors import ArgumentError, NumericalError
from tests.curvature.test_krylov import matrix
from tests.curvature.test_traces import probes

SIZE = 60
SCALE, SHIFT = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)


def semidefinite() -> Tensor:
    """Half of the spectrum is zero, as that of a GGN with few data."""
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[: SIZE // 2] = torch.logspace(-2, 2, SIZE // 2, dtype=torch.float64)
    return matrix(values)


def truth(a: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.linalg.slogdet(scale * a + torch.diag(shift.expand(SIZE)))[1]


def many() -> Tensor:
    return 0.2 + torch.rand(SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_all_eigenvalues_have_the_log_determinant() -> None:
    found = exact_spectrum(semidefinite(), True)
    for shift in (SHIFT, 10.0 * SHIFT):
        torch.testing.assert_close(found.logdet(SCALE, shift).value, truth(semidefinite(), SCALE, shift))
    assert float(found.logdet(SCALE, SHIFT).standard_error) == 0.0
    torch.testing.assert_close(found.trace().value, semidefinite().trace())


def test_as_many_probes_as_dimensions_are_exact_for_a_shift_per_parameter() -> None:
    found = whitened_logdet(probes(semidefinite()), SCALE, many(), SIZE, 5, True)
    torch.testing.assert_close(found.value, truth(semidefinite(), SCALE, many()))
    assert float(found.standard_error) == 0.0


def test_one_spectrum_serves_every_scale_and_shift() -> None:
    # 400 probes on one matrix: 5 standard errors (failure below 1e-6 for another seed)
    a = semidefinite()
    found = lanczos_spectrum(probes(a), 50, SIZE, True)
    torch.testing.assert_close(found.weights.sum(1), torch.full((50,), float(SIZE), dtype=torch.float64))
    for scale in (0.1, 1.0):
        for shift in (1e-2, 1.0, 1e2):
            estimate = found.logdet(scale, shift)
            exact = truth(a, torch.tensor(scale, dtype=torch.float64), torch.tensor(shift, dtype=torch.float64))
            assert abs(float(estimate.value - exact)) < 5.0 * float(estimate.standard_error) + 1e-9


@pytest.mark.parametrize("whitened", [False, True])
def test_error_is_honest(whitened: bool) -> None:
    # 100 independent estimates of 12 probes: their mean within 5 standard errors (failure below 1e-6), the stated
    # error within a third of the spread (known to 7 percent)
    a = semidefinite()
    shift = many() if whitened else SHIFT
    found = []
    for seed in range(100):
        own = probes(a, seed)
        if whitened:
            found.append(whitened_logdet(own, SCALE, shift, 12, SIZE - 1, True))
        else:
            found.append(lanczos_spectrum(own, 12, SIZE - 1, True).logdet(SCALE, shift))
    values = torch.stack([f.value for f in found])
    stated = torch.stack([f.standard_error for f in found]).square().mean().sqrt()
    assert abs(float(values.mean() - truth(a, SCALE, shift))) < 5.0 * float(values.std()) / math.sqrt(100)
    assert 0.67 < float(stated / values.std()) < 1.5


def test_steps_converge_far_below_the_dimension() -> None:
    a = semidefinite()
    found = [lanczos_spectrum(probes(a), 8, steps, True).logdet(SCALE, SHIFT).value for steps in (5, 25, SIZE)]
    assert abs(float(found[1] - found[2])) < 1e-2 * abs(float(found[0] - found[2])) + 1e-9
    assert abs(float(found[1] - found[2])) < 1e-3


def test_gradients_are_those_of_the_estimate_for_a_scalar_shift() -> None:
    found = lanczos_spectrum(probes(semidefinite()), 6, 20, True)

    def logdet(scale: Tensor, shift: Tensor) -> Tensor:
        return found.logdet(scale, shift).value

    assert torch.autograd.gradcheck(logdet, (SCALE.clone().requires_grad_(), SHIFT.clone().requires_grad_()))


def test_gradients_of_a_shift_per_parameter_are_near_the_true_ones() -> None:
    # a diagonal matrix: z_i (P^-1 z)_i is (P^-1)_ii whatever the signs, so the estimate is exact
    a = torch.diag(torch.logspace(-1, 2, SIZE, dtype=torch.float64))
    scale, shift = SCALE.clone().requires_grad_(), many().requires_grad_()
    found = whitened_logdet(probes(a), scale, shift, 3, SIZE - 1, True)
    mine = torch.autograd.grad(found.value, (scale, shift))
    exact = torch.autograd.grad(truth(a, scale, shift), (scale, shift))
    torch.testing.assert_close(found.value, truth(a, scale, shift), rtol=1e-9, atol=0.0)
    for ours, theirs in zip(mine, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0.0)


def test_gradients_of_a_shift_per_parameter_are_unbiased() -> None:
    # 600 probes: the largest of 61 errors within 5.5 standard errors (failure below 3e-6)
    a = semidefinite()
    scale, shift = SCALE.clone().requires_grad_(), many().requires_grad_()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(truth(a, scale, shift), (scale, shift))])
    rounds = []
    for seed in range(100):
        value = whitened_logdet(probes(a, seed), scale, shift, 6, SIZE - 1, True).value
        rounds.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, (scale, shift))]))
    mine = torch.stack(rounds)
    assert bool(((mine.mean(0) - exact).abs() < 5.5 * mine.std(0) / 10.0).all())


def test_gradients_where_probes_span_the_space() -> None:
    a = semidefinite()

    def logdet(scale: Tensor, shift: Tensor) -> Tensor:
        return whitened_logdet(probes(a), scale, shift, SIZE, 1, True).value

    assert torch.autograd.gradcheck(logdet, (SCALE.clone().requires_grad_(), many().requires_grad_()))


def test_a_negative_eigenvalue_below_the_shift_is_named() -> None:
    values = torch.linspace(0.5, 4.0, SIZE, dtype=torch.float64)
    values[0] = -2.0
    a = matrix(values)
    for found in (exact_spectrum(a, False), lanczos_spectrum(probes(a), 4, SIZE, False)):
        with pytest.raises(NumericalError, match=r"not positive definite: its smallest eigenvalue is about -1\.1"):
            found.logdet(SCALE, SHIFT)
        assert bool(torch.isfinite(found.logdet(SCALE, 1.5).value))
    for count in (4, SIZE):
        with pytest.raises(NumericalError, match="larger shift"):
            whitened_logdet(probes(a), SCALE, many(), count, SIZE, False)


def test_too_few_probes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="num_probes=1"):
        lanczos_spectrum(probes(semidefinite()), 1, 5, True)
    with pytest.raises(ArgumentError, match="steps=0"):
        whitened_logdet(probes(semidefinite()), SCALE, many(), 4, 0, True)
