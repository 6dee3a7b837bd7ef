"""Heads of class densities: Bayes' rule against quadrature, conjugate updates in any order, classes that appear."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import bayesdl as bdl
from bayesdl.errors import ArgumentError, LabelError, NotFittedError, ShapeError, UnknownNameError, UnsupportedError
from bayesdl.last_layer import ClassStatistics, Generative, Prototype, PseudoCounts
from tests.untouched import untouched

D, K, N = 3, 3, 120
KINDS = ["isotropic", "diag", "full"]


def data(n=N, seed=0, features=D):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(K, (n,), generator=generator)
    centres = 2.0 * torch.randn(K, features, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mix = torch.randn(features, features, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return centres[y] + torch.randn(n, features, generator=generator, dtype=torch.float64) @ mix, y


def nodes(count=60):
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.as_tensor(points), torch.as_tensor(weights / weights.sum())


# --- statistics ---


@pytest.mark.parametrize("diagonal", [False, True])
def test_statistics_merge_to_the_whole_in_any_order(diagonal):
    z, y = data()
    whole = ClassStatistics.of(z, y, diagonal=diagonal)
    parts = [ClassStatistics.of(z[i::7], y[i::7], diagonal=diagonal) for i in range(7)]
    parts.append(ClassStatistics.empty(D, 1, diagonal=diagonal))
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merged + part
        assert torch.equal(merged.counts, whole.counts)
        assert torch.allclose(merged.mean, whole.mean, rtol=1e-12) and torch.allclose(merged.scatter, whole.scatter)
    dense = sum((z[y == k] - z[y == k].mean(0)).mT @ (z[y == k] - z[y == k].mean(0)) for k in range(K))
    assert torch.allclose(whole.scatter, dense.diagonal() if diagonal else dense)
    centre, scatter = whole.background()
    total = (z - z.mean(0)).mT @ (z - z.mean(0))
    assert torch.allclose(centre, z.mean(0)) and torch.allclose(scatter, total.diagonal() if diagonal else total)
    assert whole.degrees == N - K
    with pytest.raises(LabelError, match="integers from 0"):
        ClassStatistics.of(z, -y, diagonal=diagonal)
    with pytest.raises(ShapeError, match="cannot be merged"):
        whole + ClassStatistics.of(z, y, diagonal=not diagonal)


# --- prototypes ---


@pytest.mark.parametrize("kind", KINDS)
def test_batch_is_sequential_in_any_order(kind):
    z, y = data()
    fresh, _ = data(20, 1)
    whole = Prototype(D, K, covariance=kind).observe(z, y)(fresh).mean
    one_by_one = Prototype(D, covariance=kind)
    for i in torch.randperm(N, generator=torch.Generator().manual_seed(0)):
        one_by_one.observe(z[i : i + 1], y[i : i + 1])
    assert torch.allclose(one_by_one(fresh).mean, whole, rtol=1e-10)
    by_class = Prototype(D, covariance=kind)
    for k in (2, 0, 1):
        by_class.observe(z[y == k], y[y == k])
    assert torch.allclose(by_class(fresh).mean, whole, rtol=1e-10)


@pytest.mark.parametrize("noise", [0.7, torch.tensor([0.3, 0.8, 1.5]), "pooled"])
def test_isotropic_predictive_is_a_quadrature_over_the_means(noise):
    z, y = data(features=1)
    head = Prototype(1, K, noise=noise, prior_mean=0.5, prior_precision=0.4).observe(z, y)
    fresh, _ = data(9, 1, features=1)
    s = noise if not isinstance(noise, str) else head.scatter.sum() / (N - K)
    s = torch.as_tensor(s, dtype=torch.float64).expand(K)
    points, weights = nodes()
    joint = []
    for k in range(K):
        mine = z[y == k, 0]
        precision = 0.4 + len(mine) / s[k]
        mean = (0.4 * 0.5 + mine.sum() / s[k]) / precision
        means = mean + points / precision.sqrt()
        density = (Normal(means, s[k].sqrt()).log_prob(fresh).exp() * weights).sum(-1)
        joint.append(density * (1.0 + len(mine)) / (K + N))
    expected = torch.stack(joint, -1)
    out = head(fresh)
    assert torch.allclose(out.mean, expected.log(), rtol=1e-9)
    assert torch.allclose(out.predictive.probs, expected / expected.sum(-1, keepdim=True), rtol=1e-9)
    assert torch.allclose(out.ood_score("density"), -expected.sum(-1).log())


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_pooled_predictive_is_a_dense_normal(kind):
    z, y = data()
    head = Prototype(D, K, covariance=kind, prior_count=0.5, shrinkage=0.2 if kind == "full" else 0.0).observe(z, y)
    fresh, _ = data(9, 1)
    scatter = sum((z[y == k] - z[y == k].mean(0)).mT @ (z[y == k] - z[y == k].mean(0)) for k in range(K)) / (N - K)
    if kind == "diag":
        sigma = torch.diag(scatter.diagonal())
    else:
        sigma = 0.8 * scatter + 0.2 * scatter.diagonal().mean() * torch.eye(D).double()
    for k in range(K):
        n = int((y == k).sum())
        mean = z[y == k].sum(0) / (0.5 + n)
        dense = MultivariateNormal(mean, sigma * (1 + 1 / (0.5 + n))).log_prob(fresh)
        assert torch.allclose(head(fresh).mean[:, k], dense + math.log((1 + n) / (K + N)))
        apart = torch.einsum("bi,ij,bj->b", fresh - mean, torch.linalg.inv(sigma), fresh - mean)
        assert torch.allclose(head.discriminant().distances(fresh, predictive=False)[:, k], apart)
    nearest = head.discriminant().distances(fresh, predictive=False).amin(-1)
    assert torch.allclose(head(fresh).ood_score("mahalanobis"), nearest)
    whole = (z - z.mean(0)).mT @ (z - z.mean(0)) / (N - 1)
    whole = torch.diag(whole.diagonal()) if kind == "diag" else whole
    away = torch.einsum("bi,ij,bj->b", fresh - z.mean(0), torch.linalg.inv(whole), fresh - z.mean(0))
    assert torch.allclose(head(fresh).ood_score("relative_mahalanobis"), nearest - away)


def test_a_fitted_distance_is_chi_square_for_many_data_and_invariant_to_linear_maps():
    z, y = data(20000)
    head = Prototype(D, K, covariance="full").observe(z, y)
    fresh, labels = data(4000, 1)
    apart = head.discriminant().distances(fresh, predictive=False)[torch.arange(4000), labels]
    # mean d, variance 2 d: within 5 standard errors of 4000 draws, fails once in two million seeds
    assert abs(float(apart.mean()) - D) < 5 * math.sqrt(2 * D / 4000)
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    other = Prototype(D, K, covariance="full").observe(z @ matrix, y)
    assert torch.allclose(other(fresh @ matrix).ood_score("mahalanobis"), head(fresh).ood_score("mahalanobis"))


def test_a_new_class_leaves_the_densities_of_the_others():
    z, y = data()
    head = Prototype(D, K, noise=0.5).observe(z, y)
    before = head.discriminant().log_densities(z, predictive=True)
    head.observe(torch.full((5, D), 9.0).double(), torch.full((5,), 4))
    assert head.out_features == 5
    found = head(z)
    assert torch.allclose(head.discriminant().log_densities(z, predictive=True)[:, :K], before)
    # class 3 was skipped: it has the prior alone
    prior = MultivariateNormal(torch.zeros(D).double(), (100.0 + 0.5) * torch.eye(D).double())
    assert torch.allclose(head.discriminant().log_densities(z, predictive=True)[:, 3], prior.log_prob(z))
    assert found.predictive.probs.shape == (N, 5)
    assert int(head(torch.full((1, D), 9.0).double()).mean.argmax()) == 4


def test_prototypes_in_a_network(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, D), nn.Tanh(), nn.Linear(D, K))
    x, y = torch.randn(60, 4), torch.arange(60) % K
    head = Prototype(D, K, covariance="full", shrinkage=0.1)
    with untouched(net):
        copy = bdl.replace(net, "2", head).eval()
    with torch.no_grad():
        head.observe(copy[:2](x), y)
    bayes = bdl.BayesianModel(copy, head.posterior(), head.likelihood())
    assert torch.allclose(bayes(x).probs, copy(x).predictive.probs.float(), atol=1e-5)
    functions = bayes.draw(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(functions[0](x), functions[0](x))
    mean = torch.stack([f(x).exp() for f in functions]).mean(0)  # of the joint density over draws of the means
    assert torch.allclose(mean, bayes(x).latent.mean.exp(), rtol=0.3)
    bayes.save(tmp_path / "b.safetensors")
    assert torch.equal(bdl.load(tmp_path / "b.safetensors", copy)(x).probs, bayes(x).probs)
    again = Prototype(D, covariance="full", shrinkage=0.1)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(copy[:2](x)).mean, head(copy[:2](x)).mean)
    assert head.float().means.dtype is torch.float64 and head.bfloat16().scatter.dtype is torch.float64


def test_features_of_tokens_and_refusals():
    z, y = data()
    head = Prototype(D).observe(z.reshape(6, 20, D), y.reshape(6, 20))
    assert head(z.reshape(6, 20, D)).predictive.probs.shape == (6, 20, K)
    assert head(z.reshape(6, 20, D)).ood_score("density").shape == (6, 20)
    labels = y.clone()
    labels[::2] = -100
    kept = Prototype(D).observe(z, labels)
    assert torch.equal(kept.counts, torch.bincount(y[1::2]))
    assert float(head(z).loss(y)) == pytest.approx(-float(head(z).predictive.log_prob(y).mean()))
    with pytest.raises(NotFittedError, match="knows no class"):
        Prototype(D)(z)
    with pytest.raises(NotFittedError, match="spread within a class"):
        Prototype(D).observe(z[:1], y[:1])(z)
    with pytest.raises(ArgumentError, match='leave noise="pooled"'):
        Prototype(D, noise=1.0, covariance="diag")
    with pytest.raises(UnknownNameError, match="covariance 'round'"):
        Prototype(D, covariance="round")
    with pytest.raises(ArgumentError, match="2 noises were given"):
        Prototype(D, noise=torch.ones(2)).observe(z, y)(z)
    with pytest.raises(ShapeError, match="in_features=3"):
        head.observe(z[:, :2], y)


# --- pseudo-counts ---


def test_pseudo_counts():
    counts = PseudoCounts(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert float(counts.epistemic) == pytest.approx(0.144738, abs=1e-6)
    torch.manual_seed(0)
    probs = torch.distributions.Dirichlet(counts.alpha).sample((200000,))
    expected = -torch.special.xlogy(probs, probs).sum(-1).mean()
    assert float(counts.aleatoric) == pytest.approx(float(expected), abs=3e-3)  # 5 standard errors
    # features that are one-hot and far apart for their noise: the counts of a Dirichlet-multinomial
    z = torch.eye(K, dtype=torch.float64)[torch.tensor([0, 0, 0, 1, 1, 2])] * 100
    head = Prototype(K, noise=1e-4, prior_precision=1e-12).observe(z, torch.tensor([0, 0, 0, 1, 1, 2]))
    found = head.pseudo_counts(100 * torch.eye(K, dtype=torch.float64))
    assert torch.allclose(found.alpha, 1.0 + torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()), atol=1e-6)
    far = head.pseudo_counts(torch.full((1, K), 1e4, dtype=torch.float64))
    assert torch.allclose(far.alpha, torch.ones(1, K).double()) and float(far.vacuity) == 1.0
    features, labels = data()
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one = Prototype(D, covariance="full").observe(features, labels).pseudo_counts(features)
    other = Prototype(D, covariance="full").observe(features @ matrix, labels).pseudo_counts(features @ matrix)
    assert torch.allclose(one.alpha, other.alpha)


# --- the generative head ---


def generative(covariance="diag", features=1, classes=2, **options):
    head = Generative(features, classes, num_data=N, covariance=covariance, init_doubt=0.5, **options).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_generative_predictive_and_bound_against_quadrature(covariance):
    head = generative(covariance, counts=torch.tensor([3.0, 8.0]))
    phi = torch.linspace(-2, 2, 7, dtype=torch.float64).unsqueeze(1)
    sigma = head.log_noise.exp()
    doubt = head.log_doubt.exp().reshape(2) * (sigma.square() if covariance == "full" else 1.0)
    points, weights = nodes()
    means = head.mean + doubt.sqrt().unsqueeze(1) * points
    logs = Normal(means, sigma).log_prob(phi.unsqueeze(1))  # (7, 2, nodes)
    joint = (logs.exp() * weights).sum(-1) * torch.tensor([4.0, 9.0]) / 13
    out = head(phi)
    assert torch.allclose(out.mean, joint.log(), rtol=1e-6)
    assert torch.allclose(out.predictive.probs, joint / joint.sum(-1, keepdim=True))
    # the bound, and what it bounds: E_q[log p(y | phi)] over both means and the probabilities of the classes
    y = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    found = head.terms(out, nn.functional.one_hot(y, 2).double())
    torch.manual_seed(0)
    shares = torch.distributions.Dirichlet(torch.tensor([4.0, 9.0]).double()).sample((200,)).log()
    both = torch.stack(torch.broadcast_tensors(logs[:, 0, :, None], logs[:, 1, None, :]), -1)
    grid = torch.einsum("i,j->ij", weights, weights)
    exact = []
    for share in shares:
        value = torch.log_softmax(both + share, -1)[torch.arange(7), :, :, y]
        exact.append((value * grid).sum((-1, -2)))
    assert bool((found < torch.stack(exact).mean(0)).all())
    picked = (logs * weights).sum(-1)[torch.arange(7), y]
    expected = picked + (torch.digamma(torch.tensor([4.0, 9.0])) - torch.digamma(torch.tensor(13.0)))[y]
    assert torch.allclose(found, expected - joint.sum(-1).log(), rtol=1e-5)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_generative_divergence_is_that_of_dense_normals(covariance):
    head = generative(covariance, features=D, classes=K, noise_prior=None)
    own = head.discriminant()
    prior = MultivariateNormal(torch.zeros(D).double(), 100.0 * torch.eye(D).double())
    total = 0.0
    for k in range(K):
        spread = own.doubt[k] * own.noise @ own.noise.mT if covariance == "full" else torch.diag(own.doubt[k])
        total += torch.distributions.kl_divergence(MultivariateNormal(own.mean[k], spread), prior)
    assert torch.allclose(head.divergence(), total)


def test_two_certain_classes_are_logistic_regression():
    head = generative("full", features=D)
    with torch.no_grad():
        head.log_doubt.fill_(-60.0)
    phi, _ = data(9)
    odds = head(phi).mean.diff(dim=-1)[:, 0]
    sigma = head.discriminant().noise @ head.discriminant().noise.mT
    weight = torch.linalg.solve(sigma, head.mean[1] - head.mean[0])
    middle = 0.5 * (head.mean[0] + head.mean[1])
    assert torch.allclose(odds, (phi - middle) @ weight)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_generative_fits_features_in_closed_form_and_training_gets_there(covariance):
    z, y = data()
    fitted = Generative(D, K, num_data=N, covariance=covariance).double().fit(z, y, prior_count=0.5)
    conjugate = Prototype(D, K, covariance=covariance, prior_count=0.5).observe(z, y)
    assert torch.allclose(fitted(z).mean, conjugate(z).mean, rtol=1e-5)
    trained = Generative(D, K, num_data=N, covariance=covariance, counts=torch.bincount(y)).double()
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.05)
    start = float(trained(z).loss(y).detach())
    for _ in range(300):
        optimizer.zero_grad()
        trained(z).loss(y).backward()
        optimizer.step()
    assert float(trained(z).loss(y).detach()) < start - 0.5
    fresh, labels = data(200, 1)
    assert trained(fresh).predictive.log_prob(labels).mean() > -0.9
    assert trained(fresh + 30).ood_score("density").mean() > trained(fresh).ood_score("density").mean()
    with pytest.raises(UnsupportedError, match="no score 'relative_mahalanobis'"):
        trained(z).ood_score("relative_mahalanobis")
    assert torch.allclose(fitted.alpha.float(), 1.0 + torch.bincount(y))
    ours, theirs = fitted.pseudo_counts(fresh), conjugate.pseudo_counts(fresh)
    assert torch.allclose(ours.alpha, theirs.alpha, rtol=1e-4)


def test_generative_in_a_network_and_refusals(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, D), nn.Tanh(), nn.Linear(D, K))
    head = Generative(D, K, num_data=N)
    copy = bdl.replace(net, "2", head)
    x, y = torch.randn(30, 4), torch.arange(30) % K
    copy(x).loss(y).backward()
    assert all(p.grad is not None for p in copy.parameters())
    bayes = bdl.BayesianModel(copy.eval(), head.posterior(), head.likelihood())
    assert torch.allclose(bayes(x).probs, copy(x).predictive.probs, atol=1e-6)
    bayes.save(tmp_path / "b.safetensors")
    assert torch.equal(bdl.load(tmp_path / "b.safetensors", copy)(x).probs, bayes(x).probs)
    with pytest.raises(ShapeError, match="labels hold 4 classes"):
        head.fit(torch.randn(8, D), torch.arange(8) % 4)
    with pytest.raises(UnknownNameError, match="covariance 'shared'"):
        Generative(D, K, num_data=N, covariance="shared")
    with pytest.raises(ArgumentError, match="none of them negative"):
        Generative(D, K, num_data=N, counts=torch.tensor([1.0, -1.0, 2.0]))
