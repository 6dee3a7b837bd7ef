"""Feature uncertainty: samples of whole networks that end in a Bayesian head push a mixture of closed forms."""

import copy

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.last_layer import Classification, Generative, Regression
from bayesdl.posteriors import SamplePosterior, ScaledPosterior

D, S = 5, 3
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])


def members(made):
    """Three differently trained copies of one network with a head, in eval mode."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, D), nn.Tanh(), nn.Linear(D, 2))
    found = []
    for _ in range(S):
        member = bdl.replace(net, "2", made(), keep_weights=False).eval()
        with torch.no_grad():
            for parameter in member.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        found.append(member)
    return found


def model(found, likelihood):
    states = [member.state_dict() for member in found]
    return bdl.BayesianModel(found[0], SamplePosterior.from_states(states, WEIGHTS), likelihood)


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options", [{}, {"bound": "km_reduced", "noise": "gamma"}, {"covariance": "lowrank", "likelihood": "bernoulli"}]
)
def test_probabilities_are_the_mixture_of_the_heads_own(options):
    found = members(lambda: Classification(D, 2, num_data=50, init_scale=2.0, **options))
    head = found[0][2]
    bayes = model(found, head.likelihood())
    expected = sum(w * member(X).predictive.probs for w, member in zip(WEIGHTS, found, strict=True))
    assert torch.allclose(bayes(X).probs, expected, atol=1e-6)
    parts = torch.stack([member(X).latent.variance for member in found])
    assert torch.allclose(bayes(X).latent.spreads, parts, rtol=1e-5)
    pred = bayes(X)
    assert torch.allclose(pred.total, pred.aleatoric + pred.epistemic)
    pieces = torch.cat([bayes(X[:3]).epistemic, bayes(X[3:]).epistemic])
    assert torch.allclose(pieces, pred.epistemic, atol=1e-6)


def test_regression_is_a_mixture_of_normals_and_its_variance_the_law_of_total_variance():
    found = members(lambda: Regression(D, 2, num_data=50, init_scale=2.0))
    noise = torch.tensor([0.2, 0.4])
    pred = model(found, bdl.Gaussian(noise=noise))(X)
    means = torch.stack([member(X).latent.mean for member in found])
    spreads = torch.stack([member(X).latent.variance for member in found])
    w = WEIGHTS.view(3, 1, 1)
    centre = (w * means).sum(0)
    epistemic = (w * (spreads + (means - centre).square())).sum(0)
    assert torch.allclose(pred.mean, centre, atol=1e-5)
    assert torch.allclose(pred.epistemic, epistemic, rtol=1e-4)
    assert torch.allclose(pred.aleatoric, noise.square().expand_as(centre))
    assert torch.allclose(pred.variance, pred.total, rtol=1e-4)
    assert torch.allclose(pred.latent.variance, epistemic, rtol=1e-4)
    y = torch.randn(7, 2, generator=torch.Generator().manual_seed(2))
    logs = torch.distributions.Normal(means, (spreads + noise.square()).sqrt()).log_prob(y).sum(-1)
    assert torch.allclose(pred.log_prob(y), torch.logsumexp(logs + WEIGHTS.log().unsqueeze(1), 0), atol=1e-4)
    assert pred.quantile(0.3).shape == (7, 2) and pred.entropy.shape == (7,)


def test_student_t_heads():
    found = members(lambda: Regression(D, 2, num_data=50, noise="gamma"))
    for member in found[1:]:  # one noise for all
        member[2].raw_shape, member[2].raw_rate = found[0][2].raw_shape, found[0][2].raw_rate
    pred = model(found, found[0][2].likelihood())(X)
    y = torch.zeros(7, 2)
    logs = torch.stack([member(X).predictive.log_prob(y) for member in found])
    assert torch.allclose(pred.log_prob(y), torch.logsumexp(logs + WEIGHTS.log().unsqueeze(1), 0), atol=1e-4)


def test_draws_are_functions_of_features_and_head_together():
    found = members(lambda: Regression(D, 2, num_data=50, init_scale=2.0))
    bayes = model(found, bdl.Gaussian(0.1))
    functions = bayes.draw(600, generator=torch.Generator().manual_seed(0))
    outputs = torch.stack([f(X) for f in functions])
    assert torch.equal(outputs[5], functions[5](X))
    latent = bayes(X).latent
    # 14 means within 5 standard errors: fails once in 100,000 seeds
    assert bool(((outputs.mean(0) - latent.mean).abs() < 5 * (latent.variance / 600).sqrt()).all())
    assert torch.allclose(outputs.var(0), latent.variance, rtol=0.35)


def test_files_temperatures_moves_and_heads_of_densities(tmp_path):
    found = members(lambda: Classification(D, 2, num_data=50, init_scale=2.0))
    bayes = model(found, "categorical")
    bayes.save(tmp_path / "b.safetensors")
    assert torch.equal(bdl.load(tmp_path / "b.safetensors", found[0])(X).probs, bayes(X).probs)
    cold = bdl.BayesianModel(found[0], ScaledPosterior(bayes.posterior, torch.tensor(2.0)), "categorical")
    assert torch.allclose(cold(X).latent.spreads, bayes(X).latent.spreads / 4)
    assert torch.allclose(copy.deepcopy(bayes).double()(X.double()).probs.float(), bayes(X).probs, atol=1e-5)
    joined = bayes.predict([X[:3], X[3:]])
    assert torch.allclose(joined.probs, bayes(X).probs, atol=1e-6) and joined.latent.spreads.shape == (S, 7, 2)
    assert bayes.tune("heldout", [(X, torch.arange(7) % 2)])(X).probs.shape == (7, 2)
    found = members(lambda: Generative(D, 2, num_data=50))
    expected = sum(w * member(X).predictive.probs for w, member in zip(WEIGHTS, found, strict=True))
    assert torch.allclose(model(found, "categorical")(X).probs, expected, atol=1e-5)
