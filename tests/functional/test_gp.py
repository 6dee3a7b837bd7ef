"""Targets against their kernels."""

import math

import pytest
import torch

from bayesdl.errors import ArgumentError, ShapeError, UnknownNameError
from bayesdl.functional import GP, KERNELS, Functions, LogNormal, constant, periodic
from bayesdl.functional.gp import kernel_root


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kernel", [*KERNELS, "rbf + linear", "rbf * periodic"])
def test_samples_have_the_kernels_covariance(kernel):
    chosen = {
        "rbf + linear": KERNELS["rbf"] + KERNELS["linear"],
        "rbf * periodic": KERNELS["rbf"] * periodic(1.5),
    }.get(kernel, kernel)
    gp = GP(chosen, lengthscale=0.8, variance=1.7, outputs=2)
    x = torch.randn(6, 2, generator=generator())
    mean, covariance = gp.moments(x)
    count = 20_000
    draws = gp.sample(x, count, generator(1))
    assert draws.shape == (count, 6, 2) and not mean.any()
    spread = covariance.diagonal()
    error = ((spread.unsqueeze(1) * spread + covariance.square()) / count).sqrt()
    for c in range(2):
        found = draws[..., c].mT @ draws[..., c] / count
        # 36 entries, two outputs, at 5 standard errors: fails by chance less than once in 20,000 seeds
        assert bool(((found - covariance).abs() < 5 * error + 1e-7).all())
    assert bool(((draws[..., 0] * draws[..., 1]).mean(0).abs() < 5 * spread / math.sqrt(count)).all())


def test_kernels_by_hand():
    x, y = torch.zeros(1, 1).double(), torch.full((1, 1), 2.0).double()
    s3, s5 = 2 * math.sqrt(3), 2 * math.sqrt(5)
    expected = {
        "rbf": math.exp(-2.0),
        "matern12": math.exp(-2.0),
        "matern32": (1 + s3) * math.exp(-s3),
        "matern52": (1 + s5 + s5**2 / 3) * math.exp(-s5),
        "linear": 0.0,
    }
    for name, value in expected.items():
        assert float(KERNELS[name](x, y)) == pytest.approx(value, abs=1e-12)
    assert float(periodic(4.0)(x, y)) == pytest.approx(math.exp(-2.0))
    assert float(periodic(2.0)(x, y)) == pytest.approx(1.0)
    assert float(constant(3.0)(x, y)) == 3.0
    one = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
    # orthogonal inputs: |x||y| (sin 90 + 90 degrees * 0) / pi
    assert float(KERNELS["arccosine"](one, one)[0, 1]) == pytest.approx(2.0 / math.pi)
    assert float(KERNELS["arccosine"](one, one)[1, 1]) == pytest.approx(4.0)


def test_every_function_draws_its_own_hyper_parameters_in_one_factorisation(monkeypatch):
    calls = []

    def counted(matrix):
        calls.append(matrix.shape)
        return kernel_root(matrix)

    monkeypatch.setattr("bayesdl.functional.gp.kernel_root", counted)
    gp = GP("rbf", LogNormal(0.0, 0.5), LogNormal(math.log(2.0), 0.3))
    x = torch.randn(5, 3, generator=generator())
    draws = gp.sample(x, 4000, generator(1))
    assert len(calls) == 1 and calls[0] == (4000, 5, 5)
    # E f^2 = E variance = 2 exp(0.15); its draws have kurtosis, so the error is estimated
    squares = draws.square().mean((1, 2))
    assert abs(float(squares.mean()) - 2 * math.exp(0.15)) < 5 * float(squares.std()) / math.sqrt(4000)
    assert float(((draws / draws.std()) ** 4).mean()) > 3.2  # a scale mixture has heavier tails
    with pytest.raises(ArgumentError, match="no closed moments"):
        gp.moments(x)


def test_lognormal_moments():
    drawn = LogNormal(0.3, 0.25).draw((100_000,), generator()).log()
    assert abs(float(drawn.mean()) - 0.3) < 5 * 0.5 / math.sqrt(1e5)
    assert abs(float(drawn.var()) - 0.25) < 5 * 0.25 * math.sqrt(2 / 1e5)


def test_default_has_one_lengthscale_per_dimension():
    gp = GP.default(4, outputs=2)
    assert gp.ard and not gp.fixed and gp.lengthscale.mean == pytest.approx(0.5 * math.log(8.0))
    assert gp.sample(torch.randn(7, 4, generator=generator()), 3, generator(1)).shape == (3, 7, 2)


def test_points_that_coincide_do_not_break_the_factorisation():
    x = torch.zeros(5, 2)
    draws = GP().sample(x, 10, generator())
    assert bool(torch.isfinite(draws).all())
    assert torch.allclose(draws[:, 0], draws[:, 4], atol=1e-3)


def test_an_empirical_set_is_drawn_from():
    values = torch.arange(24.0).reshape(4, 3, 2)
    target = Functions(values)
    drawn = target.sample(torch.zeros(3, 1), 50, generator())
    assert {int(v) for v in drawn[:, 0, 0]} == {0, 6, 12, 18}
    with pytest.raises(ShapeError, match="known at 3 points"):
        target.sample(torch.zeros(4, 1), 5, generator())


def test_refusals():
    with pytest.raises(UnknownNameError, match="kernel 'rbff'"):
        GP("rbff")
    with pytest.raises(ArgumentError, match="lengthscale=-1"):
        GP(lengthscale=-1.0)
    with pytest.raises(ArgumentError, match="variance=0"):
        LogNormal(0.0, 0)
