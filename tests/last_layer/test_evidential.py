"""Evidential heads: losses, predictive and its split against Monte Carlo, torch's own families and quadrature."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Dirichlet, Gamma, Normal, kl_divergence

import bayesdl as bdl
from bayesdl.errors import ArgumentError, LabelError, ShapeError, UnknownNameError, UnsupportedError
from bayesdl.last_layer.evidential import DirichletCategorical, Evidential, divergence_from_uniform, gamma_parameters
from bayesdl.latent import GaussianLatent

DRAWS = 200_000


def head(**options):
    torch.manual_seed(0)
    return Evidential(4, 3, **options).double()


def features(*shape):
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def inverse_softplus(x):
    return torch.log(torch.expm1(x))


def close_to_draws(value, draws):
    """Within six standard errors of the mean of independent draws `(S, ...)`: fails for one seed in 1e8 a number."""
    assert bool(((value - draws.mean(0)).abs() < 6 * draws.std(0) / math.sqrt(len(draws))).all())


def test_mutual_information_has_its_closed_form():
    f = inverse_softplus(torch.tensor([[1e-12, 1.0, 2.0]], dtype=torch.float64))
    latent = GaussianLatent(f, torch.zeros_like(f))
    predictive = DirichletCategorical().predictive(latent, torch.zeros(1, 3, dtype=torch.float64))
    # H(alpha / alpha_0) + sum p_k (psi(alpha_k + 1) - psi(alpha_0 + 1)) at alpha = (1, 2, 3), by hand
    assert float(predictive.epistemic) == pytest.approx(0.144738, abs=5e-7)
    torch.testing.assert_close(predictive.probs, torch.tensor([[1.0, 2.0, 3.0]]).double() / 6)


def test_the_split_of_classes_is_monte_carlo():
    made, phi = head(), features(5)
    alpha = 1 + nn.functional.softplus(made.linear(phi).detach())
    torch.manual_seed(2)
    p = Dirichlet(alpha).sample((DRAWS,))
    predictive = made(phi).predictive
    close_to_draws(predictive.aleatoric, Categorical(probs=p).entropy())
    close_to_draws(predictive.probs, p)
    torch.testing.assert_close(predictive.total, predictive.entropy)
    # Kullback-Leibler divergence of p(y | p) from p(y): the other form of the mutual information
    close_to_draws(predictive.epistemic, (p * (p / predictive.probs).log()).sum(-1))


@pytest.mark.parametrize("loss", ["cross-entropy", "bayes-risk"])
def test_the_losses_are_expectations(loss):
    made, phi, y = head(loss=loss, regularisation=0.0), features(5), torch.tensor([0, 1, 2, 2, 0])
    torch.manual_seed(3)
    p = Dirichlet(1 + nn.functional.softplus(made.linear(phi).detach())).sample((DRAWS,))
    onehot = nn.functional.one_hot(y, 3)
    drawn = -(p.log() * onehot).sum(-1) if loss == "cross-entropy" else (onehot - p).square().sum(-1)
    close_to_draws(made(phi).loss(y).detach(), drawn.mean(-1))


def test_regularisation_is_the_divergence_of_wrong_evidence_and_anneals():
    made, phi, y = head(), features(5), torch.tensor([0, 1, 2, 2, 0])
    alpha = 1 + nn.functional.softplus(made.linear(phi))
    wrong = torch.where(nn.functional.one_hot(y, 3).bool(), 1.0, alpha)
    expected = kl_divergence(Dirichlet(wrong), Dirichlet(torch.ones_like(wrong)))
    torch.testing.assert_close(divergence_from_uniform(wrong), expected)
    full = made(phi).loss(y)
    made.regularisation = 0.0
    none = made(phi).loss(y)
    made.regularisation = 0.3
    torch.testing.assert_close(made(phi).loss(y) - none, 0.3 * expected.mean())
    torch.testing.assert_close(full - none, expected.mean())


def test_regression_is_the_marginal_of_its_hierarchy():
    made, phi = head(likelihood="gaussian", regularisation=0.0), features(1)
    g, nu, a, b = (v.detach()[0] for v in gamma_parameters(made.linear(phi)))
    y = torch.tensor([[0.3, -0.5, 1.2]], dtype=torch.float64)
    # quadrature over u = log precision; m is integrated out: y | s^2 ~ N(g, s^2 (1 + 1 / nu))
    u = torch.linspace(-40, 12, 200_001, dtype=torch.float64)[:, None]
    weight = Gamma(a, b).log_prob(u.exp()) + u
    joint = weight + Normal(g, ((1 + 1 / nu) * (-u).exp()).sqrt()).log_prob(y)
    log_density = torch.logsumexp(joint, 0) + math.log(52 / 200_000)
    output = made(phi)
    torch.testing.assert_close(output.predictive.log_prob(y)[0], log_density.sum(), atol=1e-8, rtol=0)
    torch.testing.assert_close(output.loss(y), -log_density.sum(), atol=1e-8, rtol=0)


def test_the_split_of_numbers_is_that_of_the_hierarchy():
    made, phi = head(likelihood="gaussian"), features(5)
    with torch.no_grad():
        made.linear.bias[6:9] = 5.0  # shapes near 6: E[s^2] has a variance, so that draws can check it
    predictive = made(phi).predictive
    g, nu, a, b = (v.detach() for v in gamma_parameters(made.linear(phi)))
    torch.manual_seed(4)
    variance = 1 / Gamma(a, b).sample((DRAWS,))
    close_to_draws(predictive.aleatoric, variance)
    close_to_draws(predictive.epistemic, variance / nu)
    torch.testing.assert_close(predictive.total, predictive.variance)
    torch.testing.assert_close(predictive.mean, g)


def test_regression_penalises_evidence_at_errors():
    made, phi, y = head(likelihood="gaussian", regularisation=0.0), features(5), torch.zeros(5, 3).double()
    none = made(phi).loss(y)
    made.regularisation = 0.2
    g, nu, a, _ = gamma_parameters(made.linear(phi))
    torch.testing.assert_close(made(phi).loss(y) - none, 0.2 * (g.abs() * (2 * nu + a)).sum(-1).mean())


def test_tokens_are_examples():
    made, phi = head(), features(2, 7)
    y = torch.arange(14).reshape(2, 7) % 3
    torch.testing.assert_close(made(phi).loss(y), made(phi.flatten(0, 1)).loss(y.flatten()))
    assert made(phi).predictive.probs.shape == (2, 7, 3)
    flat = made(phi.flatten(0, 1)).predictive.epistemic
    torch.testing.assert_close(made(phi).predictive.epistemic.flatten(), flat)
    torch.testing.assert_close(made(phi).ood_score("epistemic").flatten(), flat)
    y[0, 0] = -100
    keep = y.flatten() != -100
    torch.testing.assert_close(made(phi).loss(y), made(phi.flatten(0, 1)[keep]).loss(y.flatten()[keep]))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_it_takes_the_place_of_a_layer(likelihood):
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    made = bdl.last_layer.Evidential(4, 3, likelihood=likelihood)
    replaced = bdl.last_layer.replace(network, "2", made)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(replaced(x).mean[:, :3], network(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnknownNameError, match="gaussian"):
        head(likelihood="poisson")
    with pytest.raises(UnknownNameError, match="bayes-risk"):
        head(loss="brier")
    with pytest.raises(ArgumentError, match="negative"):
        head(regularisation=-1.0)
    with pytest.raises(LabelError, match="outside"):
        head()(features(1)).loss(torch.tensor([3]))
    with pytest.raises(ShapeError, match="expected"):
        head(likelihood="gaussian")(features(2)).loss(torch.zeros(2, 2))
    with pytest.raises(ShapeError, match="old layer"):
        head().start_from(nn.Linear(4, 2))
    with pytest.raises(UnsupportedError, match="posterior"):
        head().posterior()
    with pytest.raises(UnsupportedError, match="Categorical"):
        DirichletCategorical().hessian_root(torch.zeros(1, 3))
