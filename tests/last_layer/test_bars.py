"""The binned density: every sum over bins against quadrature, and the head's loss, predictive and curvature."""

import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import ArgumentError, LabelError, ShapeError, UnknownNameError, UnsupportedError
from bayesdl.last_layer.bars import Bars, Binned

BORDERS = torch.tensor([-1.0, -0.4, 0.1, 0.5, 2.0], dtype=torch.float64)
TAILS = ["none", "half-normal"]


def binned(tails, count=3):
    logits = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Binned(logits, BORDERS, tails=tails)


def grid():
    """Midpoints and spacing; borders fall between cells, so that steps of the density cost nothing."""
    spacing = 1e-4
    return torch.arange(-25.0, 35.0, spacing, dtype=torch.float64)[:, None] + spacing / 2, spacing


@pytest.mark.parametrize("tails", TAILS)
def test_density_integrates_to_one_and_gives_the_moments(tails):
    made, (y, step) = binned(tails), grid()
    density = made.log_prob(y).exp()
    torch.testing.assert_close(density.sum(0) * step, torch.ones(3).double(), atol=1e-6, rtol=0)
    mean = (density * y).sum(0) * step
    torch.testing.assert_close(made.mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(made.variance, (density * (y - mean).square()).sum(0) * step, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tails", TAILS)
def test_cdf_is_the_integral_of_the_density_and_the_quantile_its_inverse(tails):
    made, (y, step) = binned(tails), grid()
    cdf = made.log_prob(y).exp().cumsum(0) * step
    torch.testing.assert_close(made.cdf(y + step / 2), cdf, atol=1e-6, rtol=0)
    for level in (0.001, 0.2, 0.5, 0.77, 0.999):
        found = made.icdf(torch.tensor(level))
        torch.testing.assert_close(made.cdf(found), torch.full((3,), level).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("value", [-3.0, -0.7, 0.3, 1.7, 4.0])
def test_crps_is_its_integral(tails, value):
    made, (y, step) = binned(tails), grid()
    expected = (made.cdf(y) - (y >= value).double()).square().sum(0) * step
    torch.testing.assert_close(made.crps(torch.tensor(value).double()), expected, atol=1e-6, rtol=0)


def test_uniform_logits_give_the_piecewise_linear_cdf():
    made = Binned(torch.zeros(4).double(), BORDERS)
    torch.testing.assert_close(made.cdf(BORDERS), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double())
    halves = (BORDERS[1:] + BORDERS[:-1]) / 2
    torch.testing.assert_close(made.cdf(halves), torch.tensor([0.125, 0.375, 0.625, 0.875]).double())


def test_half_of_the_mass_of_a_tail_is_inside_its_bin():
    made = binned("half-normal")
    torch.testing.assert_close(made.cdf(BORDERS[0]), made.mass[:, 0] / 2)
    torch.testing.assert_close(1.0 - made.cdf(BORDERS[-1]), made.mass[:, -1] / 2)


@pytest.mark.parametrize("tails", TAILS)
def test_the_head_follows_the_conventions_of_heads(tails):
    head = Bars(3, BORDERS, tails=tails).double()
    with torch.no_grad():
        head.linear.weight.copy_(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
    phi = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.tensor([-0.9, -0.2, 0.2, 0.3, 1.0], dtype=torch.float64)
    output, direct = head(phi), Binned(head.linear(phi), BORDERS, tails=tails)
    torch.testing.assert_close(output.loss(y), -direct.log_prob(y).mean())
    predictive = output.predictive
    torch.testing.assert_close(predictive.log_prob(y), direct.log_prob(y))
    torch.testing.assert_close(predictive.mean[:, 0], direct.mean)
    torch.testing.assert_close(predictive.variance[:, 0], direct.variance)
    torch.testing.assert_close(predictive.total, predictive.variance)
    assert not predictive.epistemic.any()
    torch.testing.assert_close(predictive.quantile(0.3)[:, 0], direct.icdf(torch.tensor(0.3)))
    assert predictive.interval(0.8).shape == (5, 1, 2)
    # 20,000 draws: six standard errors of the mean, failing once in 1e8 seeds
    draws = predictive.sample(20_000, generator=torch.Generator().manual_seed(3))
    assert bool(((draws.mean(0) - predictive.mean).abs() < 6 * (predictive.variance / 20_000).sqrt()).all())


def test_curvature_is_the_hessian_of_the_loss():
    head = Bars(3, BORDERS).double()
    f = torch.randn(1, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    family, y = head.likelihood(), torch.tensor([[0.3]], dtype=torch.float64)
    exact = torch.autograd.functional.hessian(lambda g: -family.log_prob(g, y).sum(), f)[0, :, 0]
    root = family.hessian_root(f)[:, 0]
    torch.testing.assert_close(root.mT @ root, exact)


def test_borders_are_quantiles_with_repeats_merged():
    y = torch.arange(101.0)
    torch.testing.assert_close(Bars.quantiles(y, 4), torch.tensor([0.0, 25.0, 50.0, 75.0, 100.0]))
    assert Bars.quantiles(torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 2]), 4).tolist() == [0.0, 0.25, 2.0]


def test_training_finds_two_modes():
    generator = torch.Generator().manual_seed(5)
    y = torch.where(torch.rand(400, generator=generator) < 0.25, -1.0, 1.0)
    y = y + 0.05 * torch.randn(400, generator=generator)
    borders = torch.linspace(-2, 2, 9)
    head = bdl.last_layer.Bars(1, borders)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=100)
    phi = torch.zeros(400, 1)

    def closure():
        optimiser.zero_grad()
        loss = head(phi).loss(y)
        loss.backward()
        return loss

    optimiser.step(closure)
    shares = torch.histogram(y, borders).hist / 400
    torch.testing.assert_close(torch.softmax(head(phi[:1]).mean[0], -1), shares, atol=1e-3, rtol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ArgumentError, match="increase strictly"):
        Bars(3, torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(UnknownNameError, match="half-normal"):
        Bars(3, BORDERS, tails="fat")
    with pytest.raises(ArgumentError, match="two different"):
        Bars.quantiles(torch.ones(5), 3)
    head = Bars(3, BORDERS, tails="none").double()
    output = head(torch.zeros(2, 3).double())
    with pytest.raises(LabelError, match="index 1"):
        output.loss(torch.tensor([0.0, 3.0]))
    with pytest.raises(ShapeError, match="one number"):
        output.loss(torch.zeros(2, 2))
    with pytest.raises(UnsupportedError, match=r"head\.linear"):
        head.posterior()
