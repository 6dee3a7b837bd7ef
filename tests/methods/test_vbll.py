"""VBLL in one call: equal to exact regression, one pass, any last layer, and its words."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.errors import ArgumentError, SelectionError, ShapeError, UnknownNameError, UnsupportedError
from tests.untouched import untouched

CALLS = [0]  # of any copy of the network below


class Counting(nn.Module):
    """A trunk that counts how often it is called."""

    def __init__(self, outputs):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, 6), nn.Tanh())
        self.fc = nn.Linear(6, outputs)

    def forward(self, x):
        CALLS[0] += 1
        return self.fc(self.trunk(x))


def data(outputs=2, n=90):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    noise = torch.tensor([0.1, 0.5])[:outputs]
    y = torch.stack([x.sin().sum(1), x[:, 0] * x[:, 1]], 1)[:, :outputs]
    return x, y + noise * torch.randn(n, outputs, generator=generator)


def batches(x, y, size=32):
    return list(zip(x.split(size), y.split(size), strict=True))


def wrapped(net, x, y, **options):
    return bdl.wrap(net, bdl.VBLL(**options), batches(x, y), likelihood="gaussian", progress=False)


@pytest.mark.parametrize("tuning", ["evidence", "training"])
def test_regression_is_the_exact_posterior_at_its_prior_and_noise(tuning):
    x, y = data()
    net = Counting(2)
    bayes = wrapped(net, x, y, tuning=tuning)
    fresh, _ = data(n=20)
    latent = bayes(fresh).latent
    with torch.no_grad():
        phi, at = net.trunk(x).double(), net.trunk(fresh).double()
    f, t = phi.mean(0), y.double().mean(0)
    precision = bayes.posterior.belief.regression.prior_precision
    for k in range(2):
        s2 = float(bayes.likelihood.noise[k]) ** 2
        inner = (phi - f).mT @ (phi - f) / s2 + precision[k] * torch.eye(6).double()
        mean = t[k] + (at - f) @ torch.linalg.solve(inner, (phi - f).mT @ (y[:, k].double() - t[k])) / s2
        variance = s2 / 90 + torch.einsum("bi,ij,bj->b", at - f, torch.linalg.inv(inner), at - f)
        assert torch.allclose(latent.mean[:, k].double(), mean, atol=1e-4)
        assert torch.allclose(latent.variance[:, k].double(), variance, rtol=1e-3)
    assert bayes.likelihood.noise[0] < bayes.likelihood.noise[1]  # one noise per output
    assert {f.topic for f in bayes.diagnose().findings} >= {"prior", "noise"}


def test_the_trunk_runs_once_over_the_data():
    x, y = data()
    net = Counting(2)
    CALLS[0] = 0
    bayes = wrapped(net, x, y, tuning="evidence")
    assert CALLS[0] == 3 + 2  # three batches, the first one's outputs for the proof, and the search for the last layer
    CALLS[0] = 0
    bayes(x)
    assert CALLS[0] == 1


def test_student_t_has_the_same_mean_and_wider_tails():
    x, y = data(1, n=12)
    net = Counting(1)
    plain, heavy = wrapped(net, x, y), wrapped(net, x, y, noise="gamma")
    p, h = plain(x), heavy(x)
    assert torch.allclose(p.mean, h.mean)
    assert torch.allclose(h.distribution.df, torch.full((12, 1), 11.0))
    far = p.mean + 6 * p.variance.sqrt()
    assert bool((h.log_prob(far) > p.log_prob(far)).all())
    # its scale is that of the plain noise: rate / shape = R / (n - 1)
    assert torch.allclose(h.likelihood.parameters(p.mean)[1] / 5.5, plain.likelihood.noise.float() ** 2, rtol=1e-4)
    assert torch.allclose(h.total, h.aleatoric + h.epistemic)


@pytest.mark.parametrize("tuning", ["evidence", "loo", "training"])
def test_given_noise_and_prior_are_kept(tuning):
    x, y = data()
    prior = bdl.GaussianPrior(precision=3.0)
    bayes = bdl.wrap(
        Counting(2),
        bdl.VBLL(tuning=tuning),
        batches(x, y),
        likelihood=bdl.Gaussian(noise=[0.2, 0.3]),
        prior=prior,
        progress=False,
    )
    assert bayes.likelihood.config() == {"noise": [0.2, 0.3]}
    assert torch.allclose(bayes.posterior.belief.regression.prior_precision, torch.tensor(3.0).double())


def test_leave_one_out_is_that_of_refits():
    x, y = data(1, n=30)
    net = Counting(1)
    bayes = wrapped(net, x, y, tuning="loo")
    regression = bayes.posterior.belief.regression
    from bayesdl.last_layer import ConjugateRegression, Statistics
    from bayesdl.last_layer.rules import leave_one_out_residuals

    with torch.no_grad():
        phi = net.trunk(x)
    _, left_out = leave_one_out_residuals(regression, phi, y)
    for n in range(0, 30, 7):
        rest = torch.arange(30) != n
        refit = ConjugateRegression.decompose(Statistics.of(phi[rest], y[rest]))
        refit = refit.with_hyperparameters(regression.ratio, regression.noise_variance)
        mean, _ = refit.latent(phi[n : n + 1].double())
        assert torch.allclose(y[n].double() - mean[0], left_out[n], rtol=1e-8)


def labelled():
    x, y = data()
    return x, (y[:, 0] > 0).long() + (y[:, 1] > 0.5).long()


def trained_classifier(x, labels):
    net = Counting(3)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return net


def test_classification_keeps_the_networks_means_on_request():
    x, labels = labelled()
    net = trained_classifier(x, labels)
    loader = batches(x, labels)
    kept = bdl.wrap(net, bdl.VBLL(mean="keep"), loader, likelihood="categorical", progress=False)
    assert torch.allclose(kept(x).latent.mean, net(x), atol=1e-5)
    assert float(kept(x).epistemic.min()) > 0
    refit = bdl.wrap(net, bdl.VBLL(mean="refit", tuning="evidence"), loader, likelihood="categorical", progress=False)
    assert refit.cost["bound"] > kept.cost["bound"]
    far = bdl.wrap(
        net, "vbll", loader, likelihood="categorical", prior=bdl.GaussianPrior(precision=1e6), progress=False
    )
    assert float(far(x).epistemic.max()) < 1e-3


@pytest.mark.parametrize("covariance", ["full", "diag", "shared"])
def test_classifier_is_uncertain_far_from_its_data(covariance):
    x, labels = labelled()
    net = trained_classifier(x, labels)
    bayes = bdl.wrap(net, bdl.VBLL(covariance=covariance), batches(x, labels), likelihood="categorical", progress=False)
    assert bayes(x).epistemic.mean() < bayes(30 * x).epistemic.mean()


def test_features_beyond_the_budget_go_through_a_file():
    x, labels = labelled()
    net = trained_classifier(x, labels)
    inside = bdl.wrap(net, "vbll", batches(x, labels), likelihood="categorical", progress=False)
    outside = bdl.wrap(net, bdl.VBLL(cache_bytes=500), batches(x, labels), likelihood="categorical", progress=False)
    assert torch.equal(inside(x).mean, outside(x).mean)


def test_full_training_learns_noise_and_leaves_the_network_alone():
    x, y = data(1, n=200)
    net = Counting(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=20)
    with untouched(net):
        bayes = bdl.wrap(net, bdl.VBLL(mode="full", epochs=60, lr=1e-2), loader, likelihood="gaussian", progress=False)
    before = (net(x) - y).square().mean()
    assert (bayes(x).mean - y).square().mean() < 0.5 * before
    assert 0.05 < float(bayes.likelihood.noise) < 1.0


def test_errors_name_the_layers():
    x, y = data()
    net = Counting(2)
    with pytest.raises(ArgumentError, match=r"choose one of \['trunk.0', 'fc'\]"):
        wrapped(net, x, y, layer="head")
    with pytest.raises(ShapeError, match="something follows the layer"):
        wrapped(net, x, y, layer="trunk.0")
    with pytest.raises(SelectionError, match="linear layers are"):
        wrapped(nn.Sequential(nn.Linear(3, 2), nn.Softplus()), x, y)
    with pytest.raises(UnsupportedError, match="poisson"):
        bdl.wrap(net, "vbll", batches(x, y), likelihood="poisson", progress=False)
    with pytest.raises(UnknownNameError, match="mode='frosen'"):
        wrapped(net, x, y, mode="frosen")
    with pytest.raises(ArgumentError, match="at least 3"):
        wrapped(net, x[:2], y[:2])
    with pytest.raises(ArgumentError, match="leave bdl.Gaussian"):
        bdl.wrap(net, bdl.VBLL(noise="gamma"), batches(x, y), likelihood=bdl.Gaussian(0.1), progress=False)


def test_constant_targets_are_told():
    x, y = data(1)
    bayes = wrapped(Counting(1), x, torch.zeros_like(y) + 1.0)
    assert any("end of the range" in finding.text for finding in bayes.diagnose().warnings)


def test_an_interpolating_last_layer_is_told():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, generator=generator), torch.randn(24, 1, generator=generator)
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 1))
    bayes = bdl.wrap(
        wide, "vbll", [(x, y)], likelihood="gaussian", prior=bdl.GaussianPrior(precision=1e-6), progress=False
    )
    assert any("left-out residuals" in finding.text for finding in bayes.diagnose().warnings)


def test_several_labels_are_several_problems_and_the_bound_is_the_evidence():
    x, y = data()
    labels = (y > 0.3).float()
    net = Counting(2)
    loader = batches(x, labels)
    bayes = bdl.wrap(net, bdl.VBLL(mean="refit"), loader, likelihood="bernoulli", progress=False)
    assert bayes(x).probs.shape == (90, 2)
    assert bayes(x).log_prob(labels).mean() > bdl.wrap(net, "map", likelihood="bernoulli")(x).log_prob(labels).mean()
    assert float(bayes.log_evidence()) == pytest.approx(bayes.cost["bound"], rel=1e-6)
    trained = bdl.wrap(net, bdl.VBLL(mode="full", epochs=3), loader, likelihood="bernoulli", progress=False)
    assert trained(x).probs.shape == (90, 2)
    with pytest.raises(UnsupportedError, match="has no log_evidence"):
        trained.log_evidence()


@pytest.mark.parametrize("case", ["tokens", "pixels", "classes first"])
def test_outputs_at_every_position_are_those_of_the_flattened_data(case):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, 3, generator=generator)
    y = (x.sum(-1) + 0.5 * torch.randn(24, 5, generator=generator) > 0).long()
    y[0], y[3, 2:] = -100, -100
    flat = Counting(2)
    kept = y.flatten() != -100
    oracle = bdl.wrap(flat, "vbll", [(x.flatten(0, 1)[kept], y.flatten()[kept])], likelihood="categorical")
    likelihood, inputs, targets = "categorical", x, y

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Counting(2)

        def forward(self, x):
            return self.inner(x).movedim(-1, 1)

    if case == "tokens":
        net = Counting(2)
    else:
        net = Moved()
        if case == "pixels":
            inputs, targets = x.reshape(6, 4, 5, 3), y.reshape(6, 4, 5)
        else:
            likelihood = bdl.Categorical(class_axis=1)
    layer = "fc" if case == "tokens" else "inner.fc"
    bayes = bdl.wrap(net, bdl.VBLL(layer=layer), batches(inputs, targets, 4), likelihood=likelihood, progress=False)
    found = bayes(inputs)
    assert found.mean.shape == (*inputs.shape[:-1], 2)
    expected = oracle(x.flatten(0, 1))
    assert torch.allclose(found.mean.reshape(-1, 2), expected.mean, atol=1e-5)
    assert torch.allclose(found.latent.variance.reshape(-1, 2), expected.latent.variance, rtol=1e-3)
    assert bayes.cost["bound"] == pytest.approx(oracle.cost["bound"], rel=1e-5)


def test_a_loader_without_a_target_that_counts_is_refused():
    x = torch.randn(4, 5, 3)
    with pytest.raises(ArgumentError, match="every target of the data is ignored"):
        bdl.wrap(Counting(2), "vbll", [(x, torch.full((4, 5), -100))], likelihood="categorical", progress=False)


def overfitted():
    """A network trained until it knows its few noisy targets by heart, and data it never saw."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(240, 3, generator=generator)
    y = x.sin().sum(1, keepdim=True) + 0.5 * torch.randn(240, 1, generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(1500):
        optimizer.zero_grad()
        (net(x[:80]) - y[:80]).square().mean().backward()
        optimizer.step()
    return net, (x[:80], y[:80]), (x[80:160], y[80:160]), (x[160:], y[160:])


def test_an_overfitted_network_does_not_collapse_the_noise():
    net, train, held_out, test = overfitted()
    nll = {}
    for rule in ("evidence", "loo", "training"):
        bayes = wrapped(net, *train, tuning=rule)
        nll[rule] = -float(bayes(test[0]).log_prob(test[1]).mean())
        told = [f.text for f in bayes.diagnose().warnings if "left-out residuals" in f.text]
        assert told
    assert wrapped(net, *train).likelihood == bayes.likelihood  # the default
    heavy = wrapped(net, *train, noise="gamma")
    options = {"likelihood": "gaussian", "progress": False}
    tuned = bdl.wrap(net, "vbll", batches(*train), validation=batches(*held_out), **options)
    plain = bdl.wrap(net, "map", batches(*held_out), **options)  # with the noise of held-out data
    bound = -float(plain(test[0]).log_prob(test[1]).mean()) + 0.1
    assert nll["training"] < bound
    assert -float(heavy(test[0]).log_prob(test[1]).mean()) < bound
    assert -float(tuned(test[0]).log_prob(test[1]).mean()) < bound
    assert min(nll["evidence"], nll["loo"]) > bound + 5
    assert not any("left-out" in f.text for f in tuned.diagnose().findings)


def test_a_network_without_jacobians_leaves_the_evidence_with_a_warning():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(3, 3)
            self.fc = nn.Linear(3, 1)

        def forward(self, x):
            return self.fc(x)

    x, y = data(1)
    bayes = wrapped(Unused(), x, y)
    assert any("those of the evidence" in finding.text for finding in bayes.diagnose().warnings)
    assert {f.topic: f.text for f in bayes.diagnose().findings}["noise"].endswith("by evidence")


def test_a_classifier_that_knows_its_labels_by_heart_is_not_harmed():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    labels = (x[:, 0] + 0.7 * torch.randn(400, generator=generator) > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 50), nn.ReLU(), nn.Linear(50, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(1000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:100]), labels[:100]).backward()
        optimizer.step()
    train, held_out, test = (batches(x[a:b], labels[a:b]) for a, b in ((0, 100), (100, 200), (200, 400)))
    options = {"likelihood": "categorical", "progress": False}

    def nll(bayes):
        return -float(torch.cat([bayes(a).log_prob(b) for a, b in test]).mean())

    plain = bdl.wrap(net, "map", **options)
    bayes = bdl.wrap(net, "vbll", train, **options)
    assert nll(bayes) < nll(plain)
    assert not bayes.diagnose().warnings
    assert any("so as to cost the training data" in f.text for f in bayes.diagnose().findings)
    refit = bdl.wrap(net, bdl.VBLL(mean="refit", tuning="evidence"), train, **options)
    if nll(refit) > nll(plain) + 0.1:  # the bound's own prior falls without end on separable features
        assert any("costs the training data" in f.text for f in refit.diagnose().warnings)
    tuned = bdl.wrap(net, "vbll", train, validation=held_out, **options)
    scaled = bdl.wrap(net, "temperature", held_out, **options)
    assert nll(tuned) < min(nll(bayes), nll(scaled) + 0.02)
