"""Temperature scaling against an optimiser of its own, netcal, and known temperatures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.latent import SampleLatent
from bayesdl.likelihoods import Gaussian
from bayesdl.posteriors import PointPosterior, ScaledPosterior
from bayesdl.tuning.temperature import fit_noise, minimise


class Logits(nn.Module):
    """A network whose inputs are its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.one


def sharpened(factor: float, count: int = 4000, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits of a calibrated classifier times `factor`, and labels drawn from the calibrated probabilities."""
    g = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(count, classes, generator=g)
    labels = torch.multinomial(torch.softmax(logits, -1), 1, generator=g).squeeze(1)
    return factor * logits, labels


def fitted_temperature(bayes: bdl.BayesianModel) -> float:
    assert isinstance(bayes.posterior, ScaledPosterior)
    return float(bayes.posterior.temperature)


def wrap(x: Tensor, y: Tensor, likelihood: str = "categorical") -> bdl.BayesianModel:
    return bdl.wrap(Logits(), "temperature", [(x, y)], likelihood=likelihood, progress=False)


@pytest.mark.parametrize("factor", [2.5, 0.4, 1.0])
def test_known_temperatures_are_recovered(factor: float) -> None:
    # the standard error of log T at 4000 labels is about 0.02; 0.1 at T = 2.5 is two of them, with this seed below one
    assert fitted_temperature(wrap(*sharpened(factor))) == pytest.approx(factor, abs=0.1)


def test_optimum_against_scipy() -> None:
    from scipy.optimize import minimize_scalar

    x, y = sharpened(2.5)

    def nll(log_t: float) -> float:
        return float(nn.functional.cross_entropy(x.double() / math.exp(log_t), y))

    best = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    assert math.log(fitted_temperature(wrap(x, y))) == pytest.approx(best.x, abs=1e-5)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_optimum_against_netcal() -> None:
    scaling = pytest.importorskip("netcal.scaling")
    x, y = sharpened(2.5, classes=3)
    probs = torch.softmax(x.double(), -1).numpy()  # its search stands still in single precision
    peer = scaling.TemperatureScaling()
    peer.fit(probs, y.numpy())
    expected = torch.as_tensor(peer.transform(probs))
    assert torch.allclose(wrap(x, y)(x).probs.double(), expected, atol=5e-4)  # its prior on 1/T is N(1, 10)


def test_binary_temperature_is_that_of_two_classes() -> None:
    x, y = sharpened(2.5, classes=2)
    two = fitted_temperature(wrap(x, y))
    one = fitted_temperature(wrap((x[:, 1] - x[:, 0]).unsqueeze(1), y.double(), "bernoulli"))
    assert one == pytest.approx(two, rel=1e-5)


def test_accuracy_never_changes() -> None:
    x, y = sharpened(2.5)
    pred = wrap(x, y)(x)
    assert torch.equal(pred.probs.argmax(-1), x.argmax(-1))
    assert float(pred.epistemic.max()) == 0.0


def test_gradient_is_zero_at_the_optimum_and_the_nll_falls() -> None:
    x, y = sharpened(2.5)
    t = torch.tensor(fitted_temperature(wrap(x, y)), dtype=torch.float64, requires_grad=True)
    loss = nn.functional.cross_entropy(x.double() / t, y)
    assert abs(float(torch.autograd.grad(loss, t)[0])) < 1e-6
    assert float(loss.detach()) < float(nn.functional.cross_entropy(x.double(), y))


def test_a_given_temperature_needs_no_data() -> None:
    x, _ = sharpened(1.0)
    bayes = bdl.wrap(Logits(), bdl.Temperature(temperature=2.0), likelihood="categorical")
    assert torch.allclose(bayes(x).probs, torch.softmax(x / 2, -1), atol=1e-6)
    assert torch.allclose(bayes.draw(1)[0](x), x / 2)
    for wrong in (0.0, -1.0):
        with pytest.raises(ArgumentError, match="one positive number"):
            bdl.wrap(Logits(), bdl.Temperature(temperature=wrong), likelihood="categorical")


def test_tuning_twice_composes() -> None:
    x, y = sharpened(2.5)
    once = wrap(x, y)
    twice = once.tune("heldout", [(x, y)])
    assert isinstance(twice.posterior, ScaledPosterior) and isinstance(twice.posterior.base, PointPosterior)
    assert fitted_temperature(twice) == pytest.approx(fitted_temperature(once), rel=1e-5)
    given = bdl.wrap(Logits(), bdl.Temperature(temperature=7.0), likelihood="categorical").tune("heldout", [(x, y)])
    assert fitted_temperature(given) == pytest.approx(fitted_temperature(once), rel=1e-5)


def test_labels_without_a_finite_optimum_are_reported() -> None:
    x = 3.0 * torch.eye(4)
    bayes = wrap(x, torch.arange(4))  # always right: T -> 0
    assert any("search bound" in finding.text for finding in bayes.diagnose().warnings)
    assert fitted_temperature(bayes) == 1.0
    wrong = wrap(x, torch.arange(4).roll(1))  # always wrong: T -> infinity, the uniform distribution
    assert any("search bound" in finding.text for finding in wrong.diagnose().warnings)
    assert fitted_temperature(wrong) > 90


def test_regression_has_no_temperature() -> None:
    with pytest.raises(UnsupportedError, match="needs logits .* the likelihood is gaussian"):
        bdl.wrap(Logits(), "temperature", [(torch.ones(2, 1), torch.ones(2))], likelihood="gaussian")
    counts = bdl.wrap(Logits(), "map", likelihood="poisson")
    with pytest.raises(UnsupportedError, match="poisson likelihood has no output temperature"):
        counts.tune("heldout", [(torch.ones(2, 1), torch.ones(2))])


def test_the_search_keeps_the_best_of_several_minima() -> None:
    def two_wells(u: Tensor) -> Tensor:
        return (u - 1.0).square() * (u + 2.0).square() + 0.3 * u

    best = min((float(two_wells(torch.tensor(u / 1000).double())), u / 1000) for u in range(-4000, 4000))[1]
    assert minimise(two_wells, torch.device("cpu")) == pytest.approx(best, abs=1e-3)
    # a spike inside the bracket that a golden section search passes over
    assert minimise(lambda u: u.abs() - 5.0 * (u == 0), torch.device("cpu")) == pytest.approx(0.0, abs=1e-6)


def test_noise_of_a_point_is_its_residual() -> None:
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(200, 3, generator=g, dtype=torch.float64)
    target = mean + torch.tensor([0.1, 1.0, 5.0]) * torch.randn(200, 3, generator=g, dtype=torch.float64)
    noise = fit_noise(SampleLatent(mean.unsqueeze(0), torch.ones(1).double()), target)
    assert torch.allclose(noise, (target - mean).square().mean(0).sqrt(), rtol=1e-5)


def test_noise_of_a_mixture_minimises_the_joint_nll() -> None:
    g = torch.Generator().manual_seed(0)
    samples = torch.randn(4, 60, 2, generator=g, dtype=torch.float64)
    target = samples[0] + 0.3 * torch.randn(60, 2, generator=g, dtype=torch.float64)
    latent = SampleLatent(samples, torch.full((4,), 0.25).double())

    def nll(noise: Tensor) -> Tensor:
        each = torch.distributions.Normal(samples, noise).log_prob(target).sum(-1)
        return -(torch.logsumexp(each, 0) - math.log(4)).mean()

    noise = fit_noise(latent, target).requires_grad_()
    assert float(torch.autograd.grad(nll(noise), noise)[0].abs().max()) < 1e-5
    assert float(nll(noise.detach())) <= min(float(nll(noise.detach() * f)) for f in (0.5, 0.9, 1.1, 2.0))


def test_present_noise_is_kept_where_it_is_better() -> None:
    # two clusters of members: a local optimum of the noise spans both
    bayes = bdl.BayesianModel(Logits(), PointPosterior(), Gaussian(0.5))
    x, y = torch.zeros(100, 1), torch.cat([torch.full((50,), -0.5), torch.full((50,), 0.5)])
    tuned = bayes.tune("heldout", [(x, y)])
    assert torch.allclose(torch.as_tensor(tuned.likelihood.config()["noise"]), torch.tensor([0.5]))
