"""Evidence tuning: a true optimum, reached by both algorithms, without a refit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature.registry import STRUCTURES
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.evidence import effective_parameters, log_evidence
from bayesdl.model import BayesianModel
from bayesdl.posteriors import GaussianPosterior
from bayesdl.tuning.surface import Surface
from tests import oracles


def data(likelihood: str) -> tuple[Tensor, Tensor]:
    """40 points that a small network can learn in part."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, dtype=torch.float64, generator=g)
    signal = torch.stack([torch.sin(2 * x[:, 0]), x[:, 0] * x[:, 1]], 1)
    noise = torch.randn(40, 2, dtype=torch.float64, generator=g) * torch.tensor([0.1, 0.5], dtype=torch.float64)
    y = signal + noise
    return x, (y[:, 0] > 0).long() if likelihood == "categorical" else y


@cache
def trained(likelihood: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = data(likelihood)
    loss = nn.CrossEntropyLoss() if likelihood == "categorical" else nn.MSELoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03, weight_decay=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
    return net.requires_grad_(False)


def fitted(likelihood: str, noise: Any = None, prior: Any = 1.0, **options: Any) -> BayesianModel:
    """A fit whose prior is given, so that nothing is tuned but an open noise."""
    family = bdl.Gaussian(noise) if likelihood == "gaussian" else likelihood
    return bdl.wrap(
        trained(likelihood),
        bdl.Laplace(**options),
        [data(likelihood)],
        likelihood=family,
        prior=bdl.GaussianPrior(prior),
        progress=False,
    )


def gaussian(model: BayesianModel) -> GaussianPosterior:
    assert isinstance(model.posterior, GaussianPosterior)
    return model.posterior


def slopes(model: BayesianModel) -> Tensor:
    """Derivatives of the evidence in the logarithms of prior precision and open noise, in one vector."""
    posterior = gaussian(model)
    precision = posterior.precision.log().requires_grad_()
    leaves = [precision]
    noise = None
    if posterior.noise is not None:
        leaves.append((posterior.noise if posterior.parts else posterior.noise[:1]).log().requires_grad_())
        noise = leaves[1].exp().expand(len(posterior.noise))
    value = log_evidence(posterior, model.network, precision.exp(), noise)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, leaves)])


PER_PARAMETER = ["diag", "full", "lowrank", "dual"]
CASES = [
    ("categorical", "ggn", 1.0),
    ("categorical", "ggn", 0.4),
    ("gaussian", "ggn", 1.0),
    ("gaussian", "ggn", 0.4),
    ("gaussian", "mc", 1.0),
    ("gaussian", "empirical", 1.0),
]


@pytest.mark.parametrize("prior", ["scalar", "layer"])
@pytest.mark.parametrize(("likelihood", "kind", "temperature"), CASES)
@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_both_algorithms_reach_the_same_stationary_point(
    structure: str, likelihood: str, kind: str, temperature: float, prior: str
) -> None:
    bayes = fitted(likelihood, structure=structure, kind=kind, temperature=temperature)
    before = bayes.log_evidence()
    gradient = bayes.tune("evidence", prior=prior)
    fixed = bayes.tune("evidence", prior=prior, algorithm="fixed_point", steps=3000)
    assert float(gradient.log_evidence()) > float(before)
    assert float(slopes(gradient).abs().max()) < 1e-3
    assert float(slopes(fixed).abs().max()) < 1e-3
    torch.testing.assert_close(gaussian(fixed).precision, gaussian(gradient).precision, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(gaussian(fixed).noise, gaussian(gradient).noise, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(fixed.log_evidence(), gradient.log_evidence(), rtol=1e-6, atol=1e-6)
    if prior == "layer":
        assert gaussian(gradient).precision.shape == (2,)
        assert float(gradient.log_evidence()) >= float(bayes.tune("evidence").log_evidence()) - 1e-6


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_optimum_is_better_than_its_neighbours(structure: str) -> None:
    bayes = fitted("gaussian", structure=structure).tune("evidence")
    posterior, best = gaussian(bayes), float(bayes.log_evidence())
    assert posterior.noise is not None
    for factor in (0.8, 1.25):
        assert float(log_evidence(posterior, bayes.network, posterior.precision * factor)) < best
        for c in range(2):
            noise = posterior.noise.clone()
            noise[c] *= factor
            assert float(log_evidence(posterior, bayes.network, noise=noise)) < best


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
@pytest.mark.parametrize("kind", ["ggn", "empirical"])
def test_evidence_at_any_noise_equals_a_fit_at_that_noise(structure: str, kind: str) -> None:
    # curvature at unit noise, scaled, is the curvature at the noise asked for
    noise = torch.tensor([0.3, 0.3], dtype=torch.float64)
    if kind == "ggn" and structure != "ekfac":  # whose bases are those of unit noise: exact at equal noises only
        noise = torch.tensor([0.2, 0.7], dtype=torch.float64)
    opened = fitted("gaussian", structure=structure, kind=kind)
    closed = fitted("gaussian", noise, structure=structure, kind=kind)
    value = log_evidence(gaussian(opened), opened.network, torch.tensor(1.0, dtype=torch.float64), noise)
    torch.testing.assert_close(value, closed.log_evidence(), rtol=1e-10, atol=1e-10)
    dense = gaussian(closed).curvature.to_dense()
    weights = torch.cat([p.flatten() for p in trained("gaussian").parameters()])
    x, y = data("gaussian")
    log_lik = oracles.log_likelihood("gaussian", oracles.outputs(trained("gaussian"), x), y, noise)
    torch.testing.assert_close(value, oracles.log_evidence(log_lik, dense, 1.0, weights), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prior", ["scalar", "layer", "parameter"])
@pytest.mark.parametrize("structure", [*sorted(STRUCTURES), {"0": "full", "*": "kron"}])
def test_gradients_of_the_evidence(structure: Any, prior: str) -> None:
    bayes = fitted("gaussian", structure=structure)
    posterior = gaussian(bayes)
    count = {"scalar": 1, "layer": 2, "parameter": posterior.layout.numel}[prior]
    precision = torch.linspace(0.7, 1.9, count, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    heat = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

    def value(p: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return log_evidence(posterior, bayes.network, p, s, t)

    if prior == "parameter" and structure not in PER_PARAMETER:
        with pytest.raises(UnsupportedError, match='structure="diag" or "full"'):
            value(precision, noise, heat)
    else:
        assert torch.autograd.gradcheck(value, (precision, noise, heat))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("structure", PER_PARAMETER)
def test_one_precision_per_parameter(structure: str, likelihood: str) -> None:
    bayes = fitted(likelihood, structure=structure)
    gradient = bayes.tune("evidence", prior="parameter", steps=2000)
    fixed = bayes.tune("evidence", prior="parameter", solver="fixed-point", steps=3000)
    assert gaussian(gradient).precision.shape == (gaussian(bayes).layout.numel,)
    assert float(gradient.log_evidence()) > float(bayes.tune("evidence", prior="layer").log_evidence())
    torch.testing.assert_close(fixed.log_evidence(), gradient.log_evidence(), rtol=1e-6, atol=1e-6)
    assert float(slopes(fixed).abs().max()) < 1e-3
    assert float(slopes(gradient).abs().max()) < 1e-3


def test_one_precision_per_parameter_in_closed_form() -> None:
    # diagonal curvature h: theta^2 = 1/d - 1/(h + d), a quadratic in d for every parameter alone
    bayes = fitted("categorical", structure="diag").tune("evidence", prior="parameter", steps=2000)
    posterior = gaussian(bayes)
    h = posterior.curvature.to_dense().diagonal()
    square = torch.cat([p.flatten() for p in trained("categorical").parameters()]).square()
    truth = (-h * square + (h.square() * square.square() + 4 * square * h).sqrt()) / (2 * square)
    torch.testing.assert_close(posterior.precision, truth, rtol=1e-4, atol=0.0)


def test_per_parameter_is_refused_where_it_is_not_exact() -> None:
    for structure in ("kron", "ekfac"):
        with pytest.raises(UnsupportedError, match='structure="diag" or "full"'):
            fitted("categorical", structure=structure).tune("evidence", prior="parameter")


@pytest.mark.parametrize("prior", ["scalar", "layer", "keep"])
@pytest.mark.parametrize("structure", [*sorted(STRUCTURES), {"0": "full", "*": "kron"}, {"0": "diag", "*": "full"}])
@pytest.mark.parametrize("noise", [False, "scalar", "output"])
def test_eigen_coordinates_change_nothing(structure: Any, prior: str, noise: bool | str) -> None:
    bayes = fitted("gaussian", structure=structure, temperature=0.5)
    surface = Surface.of(gaussian(bayes), bayes.network, prior, noise)
    log_precision, log_noise = surface.start()
    log_precision = log_precision + 0.3 if prior != "keep" else log_precision
    log_noise = None if log_noise is None else log_noise - 0.2
    level = surface.level(log_noise)
    truth = log_evidence(gaussian(bayes), bayes.network, surface.precision(log_precision), level)
    torch.testing.assert_close(surface.value(log_precision, log_noise), truth, rtol=1e-10, atol=1e-10)


def test_single_precision_blocks_of_a_mixed_structure() -> None:
    # one block to a group: eigenvalues of each alone, in the fit's own dtype
    bayes = fitted("categorical", structure={"0": "full", "*": "kron"}, dtype=torch.float32)
    posterior = gaussian(bayes)
    surface = Surface.of(posterior, bayes.network, "layer", False)
    log_precision = torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert surface.eigen is not None and surface.eigen.values.dtype == torch.float64
    truth = log_evidence(posterior, bayes.network, log_precision.exp())
    torch.testing.assert_close(surface.value(log_precision, None), truth, rtol=1e-6, atol=1e-5)


def test_a_common_noise_is_the_best_common_noise() -> None:
    bayes = fitted("gaussian", structure="kron")
    common = bayes.tune("evidence", noise="scalar", prior="keep")
    noise = gaussian(common).noise
    assert noise is not None and noise[0] == noise[1]
    fixed = bayes.tune("evidence", noise="scalar", prior="keep", solver="fixed-point", steps=1000)
    torch.testing.assert_close(gaussian(fixed).noise, noise, rtol=1e-4, atol=0.0)
    best = float(common.log_evidence())
    for factor in (0.9, 1.1):
        assert float(log_evidence(gaussian(common), common.network, noise=noise * factor)) < best
    assert float(bayes.tune("evidence", noise="output", prior="keep").log_evidence()) > best
    kept = bayes.tune("evidence", noise=False)
    torch.testing.assert_close(gaussian(kept).noise, gaussian(bayes).noise, rtol=0.0, atol=0.0)


def test_the_evidence_has_no_maximum_in_the_temperature() -> None:
    # (log-likelihood - scatter / 2) / T, and a rest that no temperature changes
    bayes = fitted("categorical", structure="full", prior=0.8)
    posterior = gaussian(bayes)
    values = [float(log_evidence(posterior, bayes.network, temperature=t)) for t in (0.5, 1.0, 2.0, 4.0)]
    slope = posterior.log_likelihood - 0.5 * 0.8 * sum(
        float(p.square().sum()) for p in trained("categorical").parameters()
    )
    for t, value in zip((0.5, 2.0, 4.0), (values[0], *values[2:]), strict=True):
        assert value - values[1] == pytest.approx(slope * (1 / t - 1), rel=1e-9)
    assert values == sorted(values)
    with pytest.raises(UnsupportedError, match="no maximum in the temperature"):
        bayes.tune("evidence", temperature=True)


def test_the_temperature_of_a_gaussian_likelihood_is_its_noise() -> None:
    hot = fitted("gaussian", structure="kron", temperature=3.0).tune("evidence", temperature=True)
    plain = fitted("gaussian", structure="kron").tune("evidence")
    assert gaussian(hot).temperature == 1.0
    torch.testing.assert_close(gaussian(hot).noise, gaussian(plain).noise, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(gaussian(hot).precision, gaussian(plain).precision, rtol=1e-4, atol=0.0)


def test_the_prior_is_kept_where_it_was_given() -> None:
    given = fitted("gaussian", prior=3.0, structure="kron")
    assert float(gaussian(given).precision) == 3.0
    assert float(slopes(given)[1:].abs().max()) < 1e-3  # the open noise alone was tuned
    kept = given.tune("evidence", prior="keep")
    assert float(gaussian(kept).precision) == 3.0


def test_nothing_is_refitted_and_the_first_model_stays() -> None:
    bayes = fitted("gaussian", structure="kron")
    precision, noise = gaussian(bayes).precision.clone(), gaussian(bayes).noise
    tuned = bayes.tune("evidence", prior="layer")
    assert gaussian(tuned).curvature is gaussian(bayes).curvature
    assert tuned is not bayes
    assert torch.equal(gaussian(bayes).precision, precision)
    torch.testing.assert_close(gaussian(bayes).noise, noise, rtol=0.0, atol=0.0)
    assert isinstance(tuned.likelihood, bdl.Gaussian)
    torch.testing.assert_close(torch.as_tensor(tuned.likelihood.noise), gaussian(tuned).noise)
    assert any("prior precision" in finding.text for finding in tuned.record.findings)


def test_the_evidence_is_at_its_maximum_after_another_rule_too() -> None:
    net = trained("categorical")
    bayes = bdl.wrap(net, "laplace", [data("categorical")], likelihood="categorical", progress=False)
    assert float(slopes(bayes).abs().max()) > 1e-2  # without a prior, wrap tunes for no harm
    assert float(slopes(bayes.tune("evidence")).abs().max()) < 1e-3


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_effective_parameters_by_eigenvalues(structure: str) -> None:
    bayes = fitted("categorical", structure=structure, prior=0.8, temperature=0.5)
    values = torch.linalg.eigvalsh(gaussian(bayes).curvature.to_dense())
    truth = float((values / (values + 0.8)).sum())
    assert effective_parameters(gaussian(bayes)) == pytest.approx(truth, rel=1e-8)


def test_an_evidence_without_a_maximum_is_said() -> None:
    # at weights of zero no prior is too narrow
    torch.manual_seed(0)
    net = nn.Linear(2, 2).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    bayes = bdl.wrap(net, "laplace", [data("categorical")], likelihood="categorical", progress=False)
    assert any("bound" in finding.text for finding in bayes.tune("evidence").diagnose().warnings)


def test_refusals() -> None:
    bayes = fitted("categorical")
    with pytest.raises(ArgumentError, match="'weights'.*scalar"):
        bayes.tune("evidence", prior="weights")
    with pytest.raises(ArgumentError, match="'adam'"):
        bayes.tune("evidence", algorithm="adam")
    with pytest.raises(ArgumentError, match="'newton'"):
        bayes.tune("evidence", solver="newton")
    with pytest.raises(ArgumentError, match="noise='both'"):
        bayes.tune("evidence", noise="both")
    with pytest.raises(UnsupportedError, match="no open noise"):
        bayes.tune("evidence", noise="scalar")
    with pytest.raises(UnsupportedError, match="each output alone"):
        fitted("gaussian", kind="mc").tune("evidence", noise="output")
    plain = bdl.wrap(trained("categorical"), "map", likelihood="categorical")
    with pytest.raises(UnsupportedError, match="heldout"):
        plain.tune("evidence")
    with pytest.raises(UnsupportedError, match="laplace"):
        plain.log_evidence()
