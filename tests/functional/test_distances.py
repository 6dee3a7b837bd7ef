"""Distances against closed forms of Gaussians."""

import math

import pytest
import torch

from bayesdl.errors import ArgumentError
from bayesdl.functional import DISTANCES, DistributionalSliced, Wasserstein
from bayesdl.functional.distances import gaussian_kernel_mean, projected


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(n, points, scale, seed, mean=0.0):
    return mean + scale * torch.randn(n, points, 1, generator=generator(seed), dtype=torch.float64)


def test_energy_of_isotropic_gaussians():
    s, t, points = 1.0, 1.7, 5
    kappa = math.sqrt(2) * math.gamma((points + 1) / 2) / math.gamma(points / 2)
    expected = kappa * (2 * math.sqrt(s**2 + t**2) - math.sqrt(2) * s - math.sqrt(2) * t)
    values = torch.stack(
        [
            DISTANCES["energy"].value(gaussian(500, points, s, i), gaussian(500, points, t, 100 + i), None, generator())
            for i in range(20)
        ]
    )
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / math.sqrt(20)
    same = DISTANCES["energy"].value(gaussian(500, 5, 1.0, 0), gaussian(500, 5, 1.0, 1), None, generator())
    assert abs(float(same)) < 0.1 * expected + 0.05


def test_mean_of_the_gaussian_kernel_by_monte_carlo():
    points = 4
    root = torch.randn(points, points, generator=generator(), dtype=torch.float64)
    covariance = root @ root.mT
    draws = (root @ torch.randn(points, 200_000, generator=generator(1), dtype=torch.float64)).mT
    x = torch.randn(3, points, generator=generator(2), dtype=torch.float64)
    found = gaussian_kernel_mean(x, covariance, torch.tensor(2.0, dtype=torch.float64))
    for i in range(3):
        kernel = torch.exp(-(draws - x[i]).square().sum(1) / 4.0)
        assert abs(float(kernel.mean() - found[i])) < 5 * float(kernel.std()) / math.sqrt(200_000)


def test_mmd_with_exact_expectations_agrees_with_samples():
    k = torch.eye(4, dtype=torch.float64)
    h = gaussian(600, 4, 1.5, 0)
    exact = DISTANCES["mmd"].value(h, gaussian(600, 4, 1.0, 1), k, generator())
    drawn = DISTANCES["mmd"].value(h, gaussian(600, 4, 1.0, 1), None, generator())
    assert abs(float(exact - drawn)) < 0.02
    assert float(exact) > 0.02


def test_gaussian_w2_of_gaussians():
    points = 4
    roots = [torch.randn(points, points, generator=generator(i), dtype=torch.float64) for i in range(2)]
    a, b = (r @ r.mT for r in roots)
    noise = torch.randn(200_000, points, generator=generator(2), dtype=torch.float64)
    found = DISTANCES["gaussian-w2"].value((noise @ roots[0].mT).unsqueeze(2), noise, b, generator())

    def half(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT

    expected = torch.trace(a + b - 2 * half(half(a) @ b @ half(a)))
    assert abs(float(found - expected)) < 0.02 * float(expected) + 0.02


def test_moments_are_unbiased():
    k = torch.eye(3, dtype=torch.float64)
    values = torch.stack([DISTANCES["moments"].value(gaussian(40, 3, 1.0, i), k, k, generator()) for i in range(400)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20
    far = torch.stack([DISTANCES["moments"].value(gaussian(40, 3, 2.0, i), k, k, generator()) for i in range(400)])
    assert abs(float(far.mean()) - 9.0) < 4 * float(far.std()) / 20  # (4 - 1)^2 of each entry of the diagonal


def test_sliced_distances_of_gaussians():
    points, n = 6, 8000
    mean = torch.zeros(points, 1, dtype=torch.float64)
    mean[0] = 3.0
    shifted = DISTANCES["sw"].value(gaussian(n, points, 1.0, 0), gaussian(n, points, 1.0, 1) + mean, None, generator())
    assert float(shifted) == pytest.approx(9.0 / points, rel=0.25)  # 256 directions: a relative error of 9 % each way
    scaled = DISTANCES["sw"].value(gaussian(n, points, 1.0, 0), gaussian(n, points, 1.5, 1), None, generator())
    assert float(scaled) == pytest.approx(0.25, rel=0.05)


def test_numbers_of_draws_may_differ():
    directions = torch.eye(3, dtype=torch.float64)
    a, b = gaussian(30_000, 3, 1.0, 0), gaussian(7000, 3, 1.5, 1)
    assert torch.allclose(projected(a, b, directions), torch.full((3,), 0.25, dtype=torch.float64), atol=0.04)


def test_distributional_slicing_finds_a_shift_and_sees_no_direction_in_a_scale():
    points, n = 6, 800
    mean = torch.zeros(points, 1)
    mean[0] = 3.0
    h, moved = gaussian(n, points, 1.0, 0).float(), gaussian(n, points, 1.0, 1).float() + mean
    wide = gaussian(n, points, 2.0, 1).float()
    distance = DistributionalSliced(inner_steps=100, lr=0.05, weight=0.1)
    plain = [DISTANCES["sw"].value(h, g, None, generator()).sqrt() for g in (moved, wide)]
    found = [distance.value(h, g, lambda g=g: (h, g), generator()) for g in (moved, wide)]
    assert float(found[0] / plain[0]) > 1.3
    assert 0.9 < float(found[1] / plain[1]) < 1.25  # the supremum over 800 draws finds some of their noise
    tight = DistributionalSliced(inner_steps=100, lr=0.05, weight=100.0).value(
        h, moved, lambda: (h, moved), generator()
    )
    assert float(tight / plain[0]) < float(found[0] / plain[0])


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_wasserstein_of_a_shift(shift):
    h, g = gaussian(400, 1, 1.0, 0).float(), gaussian(400, 1, 1.0, 1, -shift).float()
    found = Wasserstein(inner_steps=300, redraw=False, threshold=0.0).value(h, g, lambda: (h, g), generator())
    assert float(found) == pytest.approx(shift, rel=0.15)


def test_the_critic_and_its_optimiser_carry_nothing_over():
    h, g = gaussian(50, 3, 1.0, 0).float(), gaussian(50, 3, 2.0, 1).float()
    distance = Wasserstein(inner_steps=10)
    values = [float(distance.value(h, g, lambda: (h, g), generator(7))) for _ in range(2)]
    assert values[0] == values[1]


@pytest.mark.parametrize("name", [n for n, d in DISTANCES.items() if d.value is not None])
def test_gradients_reach_the_functions_and_permuted_points_are_further(name):
    k = 0.9 * torch.ones(4, 4, dtype=torch.float64) + 0.1 * torch.eye(4, dtype=torch.float64)
    k = k * torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 5.0)).double()
    root = torch.linalg.cholesky(k)
    h = (root @ gaussian(300, 4, 1.0, 0)).requires_grad_()
    g = root @ gaussian(300, 4, 1.0, 1)
    near = DISTANCES[name].value(h, g, k, generator())
    assert bool(torch.isfinite(torch.autograd.grad(near, h)[0]).all())
    far = DISTANCES[name].value(h.detach().flip(1), g, k, generator())
    assert float(far) > float(near.detach()) + 0.01


def test_distances_without_moments_are_refused_by_name():
    h = gaussian(10, 3, 1.0, 0)
    for name in ("moments", "gaussian-w2"):
        with pytest.raises(ArgumentError, match="needs the target's covariance"):
            DISTANCES[name].value(h, h, None, generator())
