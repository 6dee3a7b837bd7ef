"""Couplings and the joint law they make: one map in both directions."""

import itertools
import math

import pytest
import torch

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.priors import CouplingPrior
from bayesdl.priors.coupling import BOUND, AffineCoupling, LayerFlow


def coupling(size, moves, seed=0, inner=3):
    source = torch.Generator().manual_seed(seed)
    move = size // 2 if moves else (size + 1) // 2

    def randn(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    return AffineCoupling(moves, randn(inner, size - move), randn(move, inner), randn(move, inner), randn(move))


def flow(size, seed=0):
    return tuple(coupling(size, 1 - step % 2, 10 * seed + step) for step in range(4))


def through(maps, z):
    total = torch.zeros(z.shape[:-1], dtype=z.dtype)
    for one in maps:
        z, stretch = one.forward(z)
        total = total + stretch
    return z, total


def law(seed=0):
    """Two parameters, one weight and one bias: their joint density can be integrated."""
    return CouplingPrior((LayerFlow(("bias", "weight"), (0.8, 1.3), flow(2, seed)),))


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_the_inverse_undoes_the_map(size):
    z = torch.randn(50, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    there, stretch = through(flow(size), z)
    back, again = there, torch.zeros_like(stretch)
    for one in reversed(flow(size)):
        back, part = one.inverse(back)
        again = again + part
    assert torch.allclose(back, z, atol=1e-10, rtol=0)
    assert torch.allclose(again, stretch, atol=1e-10, rtol=0)
    assert bool((stretch.abs() <= 4 * BOUND * size).all())
    assert torch.allclose(through(flow(size), -z)[0], -there)  # odd: the law has mean zero


@pytest.mark.parametrize("size", [5, 6])
def test_log_determinants_are_those_of_autograd(size):
    z = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda value: through(flow(size), value)[0])(z)
    assert torch.allclose(through(flow(size), z)[1], torch.linalg.slogdet(jacobian)[1], atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_the_density_integrates_to_one_and_is_that_of_the_samples(seed):
    prior = law(seed)
    step, reach = 0.05, 14.0
    grid = torch.arange(-reach, reach, step, dtype=torch.float64) + step / 2

    def density(bias, weight):
        return prior.log_prob({"weight": weight.view(1, 1), "bias": bias.view(1)}).exp()

    every = torch.func.vmap(torch.func.vmap(density, (None, 0)), (0, None), chunk_size=100)
    mass = every(grid, grid) * step**2  # (bias, weight)
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-3)
    source, count = torch.Generator().manual_seed(1), 20_000
    shapes = {"weight": torch.zeros(1, 1).double(), "bias": torch.zeros(1).double()}
    drawn = [prior.sample(shapes, source) for _ in range(count)]
    pairs = torch.stack([torch.cat([one["bias"], one["weight"].flatten()]) for one in drawn])
    cells = list(itertools.pairwise([-reach, -2.0, -1.0, -0.4, 0.0, 0.4, 1.0, 2.0, reach]))  # on the grid's lines
    for (low, high), (left, right) in itertools.product(cells, cells):
        share = float(mass[(grid > low) & (grid < high)][:, (grid > left) & (grid < right)].sum())
        inside = (pairs[:, 0] > low) & (pairs[:, 0] < high) & (pairs[:, 1] > left) & (pairs[:, 1] < right)
        # 64 cells at five binomial standard errors: fails by chance less than once in 20,000 seeds
        allowed = 5 * math.sqrt(max(share, 1 / count) / count) + 5e-4
        assert abs(float(inside.double().mean()) - share) < allowed
    kurtosis = ((pairs - pairs.mean(0)) / pairs.std(0)).pow(4).mean(0) - 3.0
    assert float(kurtosis.abs().max()) > 0.3  # a law of its own, far from normal (standard error 0.035)


def test_gradients_agree_with_finite_differences():
    prior = CouplingPrior((LayerFlow(("bias", "weight"), (0.8, 1.3), flow(6)),))
    source = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 2, generator=source, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, generator=source, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, b: prior.log_prob({"weight": w, "bias": b}), (weight, bias))
    found = prior.grad({"weight": weight, "bias": bias})
    wanted = torch.autograd.grad(prior.log_prob({"weight": weight, "bias": bias}), (weight, bias))
    assert torch.allclose(found["weight"], wanted[0]) and torch.allclose(found["bias"], wanted[1])
    z = torch.randn(4, 5, generator=source, dtype=torch.float64)
    one = coupling(5, 1)
    numbers = [t.requires_grad_() for t in (one.inward, one.shift, one.stretch, one.offset)]
    for direction in ("forward", "inverse"):
        assert torch.autograd.gradcheck(lambda *t, d=direction: getattr(AffineCoupling(1, *t), d)(z), numbers)


def test_scales_divide_by_the_fan_in():
    still = AffineCoupling(1, *(torch.zeros(s).double() for s in ((2, 4), (4, 2), (4, 2), (4,))))
    prior = CouplingPrior((LayerFlow(("weight",), (1.5,), (still,)),))
    value = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normal = torch.distributions.Normal(torch.zeros(()).double(), torch.tensor(1.5 / 2.0).double())  # fan-in 4
    expected = normal.log_prob(value).sum()
    assert float(prior.log_prob({"weight": value})) == pytest.approx(float(expected), rel=1e-12)


def test_refusals():
    with pytest.raises(ArgumentError, match="'bias' differs"):
        law().log_prob({"weight": torch.zeros(1, 1)})
    with pytest.raises(ShapeError, match="3 coordinates that stay and 2 that move"):
        AffineCoupling(1, torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(2))
