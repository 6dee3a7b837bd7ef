"""The horseshoe: e^x E1(x), its known bounds, its Gibbs steps against the marginal."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import exp1
from scipy.stats import kstest
from torch import Tensor

from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.priors import HorseshoePrior, Prior
from bayesdl.priors.horseshoe import scaled_e1


def test_the_exponential_integral() -> None:
    x = torch.cat([torch.logspace(-30, 2.8, 500, dtype=torch.float64), torch.linspace(1.9, 2.1, 50).double()])
    expected = torch.from_numpy(exp1(x.numpy())) * torch.exp(x)
    assert torch.allclose(scaled_e1(x), expected, rtol=1e-12)
    big = torch.tensor([1e4, 1e300], dtype=torch.float64)
    assert torch.allclose(scaled_e1(big) * big, torch.tensor([1 - 1e-4, 1.0]).double(), rtol=1e-7)
    assert scaled_e1(torch.zeros(1)).isinf().all()
    with pytest.raises(ArgumentError):
        scaled_e1(torch.tensor([-1.0]))


def density(u: Tensor, tau: float) -> Tensor:
    prior = HorseshoePrior(tau, learn_scale=False)
    return torch.stack([prior.log_prob({"w": value.reshape(1)}) for value in u]).exp()


def test_density_bounds_and_mass() -> None:
    u = torch.logspace(-6, 4, 60, dtype=torch.float64)
    found, k = density(u, 1.0), 1 / math.sqrt(2 * math.pi**3)
    assert bool((k / 2 * torch.log1p(4 / u**2) < found).all()) and bool((found < k * torch.log1p(2 / u**2)).all())
    u = torch.logspace(-14, 7, 6001, dtype=torch.float64)
    x = u.square() / 2 / 0.09
    p = scaled_e1(x) / 0.3 / math.sqrt(2 * math.pi**3)
    assert torch.allclose(p[::500], density(u[::500], 0.3))
    assert float(2 * torch.trapezoid(p * u, u.log())) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("slab", [None, 2.0])
def test_gradient(slab: float | None) -> None:
    prior = HorseshoePrior(0.4, learn_scale=False, slab=slab)
    w = {"w": torch.tensor([-3.0, -0.2, 0.01, 1.0]).double()}
    step = 1e-6
    for i in range(4):
        e = torch.eye(4, dtype=torch.float64)[i] * step
        difference = (prior.log_prob({"w": w["w"] + e}) - prior.log_prob({"w": w["w"] - e})) / (2 * step)
        assert float(prior.grad(w)["w"][i]) == pytest.approx(float(difference), rel=1e-5)
    assert torch.allclose(prior.grad(w)["w"], Prior.grad(prior, w)["w"], rtol=1e-6)


def cdf(tau: float):
    """Distribution function of the marginal by quadrature."""
    u = torch.logspace(-12, 8, 40_001, dtype=torch.float64)
    p = scaled_e1(u.square() / 2 / tau**2) / tau / math.sqrt(2 * math.pi**3)
    cumulative = torch.cumulative_trapezoid(p * u, u.log())

    def evaluate(values):
        v = torch.as_tensor(values)
        half = cumulative[torch.searchsorted(u, v.abs()).clamp(1, len(cumulative)) - 1]
        return (0.5 + v.sign() * half).numpy()

    return evaluate


def test_draws_have_the_marginal(generator: torch.Generator) -> None:
    prior = HorseshoePrior(0.5, learn_scale=False)
    draws = prior.sample({"w": torch.empty(20_000, dtype=torch.float64)}, generator)["w"]
    assert kstest(draws.numpy(), cdf(0.5)).pvalue > 1e-6


def test_gibbs_steps_leave_the_marginal(generator: torch.Generator) -> None:
    # w given the scales is drawn exactly; 20,000 weights, started away from the law, 60 sweeps
    prior = HorseshoePrior(0.5, learn_scale=False)
    w = {"w": torch.full((20_000,), 0.5, dtype=torch.float64)}
    scales = prior.start(w, generator)
    for _ in range(60):
        scales = prior.gibbs(w, scales, 1.0, generator)
        variance = prior.variance(w, scales)["w"]
        w = {"w": torch.randn(20_000, dtype=torch.float64, generator=generator) * variance.sqrt()}
    # mixing is slow far in the tails: the centre of the law is tested
    centre = w["w"][w["w"].abs() < 2]
    law = cdf(0.5)
    low, high = float(law([-2.0])[0]), float(law([2.0])[0])
    assert kstest(centre.numpy(), lambda v: (law(v) - low) / (high - low)).pvalue > 1e-6
    assert len(centre) / 20_000 == pytest.approx(high - low, abs=0.02)


def test_gibbs_steps_of_tau(generator: torch.Generator) -> None:
    # without data tau stays half-Cauchy: log tau is symmetric about log scale with quartiles at +- log(1 + sqrt 2)
    prior = HorseshoePrior(0.7)
    w = {str(i): torch.zeros(2, dtype=torch.float64) for i in range(120)}
    scales = prior.start(w, generator)
    kept = []
    for k in range(40):
        variance = prior.variance(w, scales)
        w = {n: torch.randn(2, dtype=torch.float64, generator=generator) * variance[n].sqrt() for n in w}
        scales = prior.gibbs(w, scales, 1.0, generator)
        if k % 10 == 9:
            kept.append(torch.stack([scales[f"{n}/global"].sqrt() for n in w]))
    # 480 draws, not quite independent: the share below a quantile has a deviation of about 0.03
    tau = torch.cat(kept) / 0.7
    for share in (0.25, 0.5, 0.75):
        assert float((tau < math.tan(math.pi * share / 2)).double().mean()) == pytest.approx(share, abs=0.12)


def test_slabs_bound_the_variance(generator: torch.Generator) -> None:
    prior = HorseshoePrior(10.0, slab=0.5)
    w = {"w": torch.empty(1000)}
    scales = prior.start(w, generator)
    variance = prior.variance(w, scales)["w"]
    exact = 1 / (1 / (scales["w/local"] * scales["w/global"]) + 4)
    assert torch.allclose(variance.double(), exact, rtol=1e-5) and float(variance.max()) <= 0.25
    with pytest.raises(UnsupportedError, match="up to a constant"):
        prior.sample(w, generator)


def test_learned_scales_have_no_density() -> None:
    for ask in ("log_prob", "grad"):
        with pytest.raises(UnsupportedError, match="drawn by Gibbs"):
            getattr(HorseshoePrior(), ask)({"w": torch.ones(2)})
    for own in ({"scale": 0.0}, {"slab": -1.0}, {"step_cap": 0.0}):
        with pytest.raises(ArgumentError):
            HorseshoePrior(**own)
