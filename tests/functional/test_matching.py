"""Matching recovers known priors, leaves the network alone, and its priors work everywhere."""

import math

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, SelectionError, ShapeError, UnknownNameError, UnsupportedError
from bayesdl.functional import GP, Grid, LogNormal, Measurement
from bayesdl.functional.families import (
    FAMILIES,
    CouplingFamily,
    GaussianFamily,
    HierarchicalFamily,
    LocatedFamily,
    Slot,
)
from bayesdl.functional.functions import Pushforward
from bayesdl.network import Network
from tests.untouched import untouched

X = torch.linspace(-2, 2, 40).unsqueeze(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def net(width=20):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))


def matched(network, target, inputs=X, **options):
    options = {"distance": "energy", "steps": 60, "progress": False, "generator": generator(), **options}
    return bdl.functional.match(network, target, inputs, **options)


@pytest.mark.parametrize("distance", ["energy", "mmd", "gaussian-w2", "moments", "sw"])
def test_a_linear_layer_recovers_the_scale_of_a_linear_kernel(distance):
    """f = w.x with w ~ N(0, sigma^2 / D) has the kernel sigma^2 x.x' / D."""
    linear = nn.Linear(3, 1, bias=False)
    x = torch.randn(60, 3, generator=generator())
    sigma = 2.5
    target = GP("linear", lengthscale=math.sqrt(3.0), variance=sigma**2)
    places = Measurement(x, num_points=20)
    prior = matched(linear, target, x, distance=distance, steps=250, num_functions=256, lr=0.03, measurement=places)
    found = prior.report.parameters["weight"]["std"]
    assert found == pytest.approx(sigma, rel=0.08)
    assert prior.precision["weight"] == pytest.approx(3.0 / found**2)


def test_matching_recovers_a_known_prior_of_the_same_network():
    network = net(40)

    push = Pushforward(Network(network))
    law = GaussianFamily(push.slots)
    with torch.no_grad():
        law.raw.copy_(torch.tensor([2.0, 0.5, 1.5, 0.3]).double().expm1().log())

    class Known:
        outputs = 1

        def sample(self, inputs, n, source):
            with torch.no_grad():
                return push(law.draw(n, source), inputs, source)

    prior = matched(network, Known(), steps=150, num_functions=256)
    assert prior.report.fit.covariance_error < 0.15 < prior.report.before.covariance_error
    assert prior.report.fit.std[0] == pytest.approx(prior.report.fit.target_std[0], rel=0.1)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_matching_brings_functions_closer_and_repeats(family):
    network = net()
    with untouched(network):
        first = matched(network, GP(lengthscale=1.0), family=family)
    second = matched(network, GP(lengthscale=1.0), family=family)
    parameters = dict(network.named_parameters())
    draws = [prior.sample(parameters, generator(3)) for prior in (first, second)]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in parameters)
    assert first.report.fit == second.report.fit
    assert first.report.fit.covariance_error < 0.6 * first.report.before.covariance_error
    assert "covariance error" in str(first.report)
    other = matched(network, GP(lengthscale=1.0), family=family, generator=generator(1))
    assert not torch.equal(other.sample(parameters, generator(3))["0.weight"], draws[0]["0.weight"])


def test_patience_ends_a_match_that_no_longer_gains():
    options = {"steps": 400, "num_functions": 64, "distance": "moments"}
    found = matched(nn.Linear(1, 1, bias=False), GP("linear", variance=0.8), patience=20, **options)
    trace = found.report.trace
    assert 40 <= len(trace) < 400
    assert sum(trace[-20:]) >= sum(trace[-40:-20])
    assert found.report.parameters["weight"]["std"] == pytest.approx(math.sqrt(0.8), rel=0.2)
    # up to there it is the same match
    assert (
        trace == matched(nn.Linear(1, 1, bias=False), GP("linear", variance=0.8), **options).report.trace[: len(trace)]
    )
    for patience, distance in ((0, "moments"), (5, "w1")):
        with pytest.raises(ArgumentError, match=f"patience={patience}"):
            matched(net(), GP(), patience=patience, distance=distance)


def test_trained_values_are_never_read():
    one, two = net(), net()
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.mul_(3.0)
    assert matched(one, GP(), steps=5) == matched(two, GP(), steps=5)


def test_critics_lower_the_error_too():
    prior = matched(net(), GP(), distance=bdl.functional.Wasserstein(inner_steps=15), steps=25, num_functions=64)
    assert prior.report.fit.covariance_error < prior.report.before.covariance_error
    prior = matched(net(), GP(), distance="dsw", steps=25, num_functions=64)
    assert prior.report.fit.covariance_error < prior.report.before.covariance_error


def test_hyper_priors_and_several_outputs_and_images():
    wide = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(30, 2, generator=generator())
    prior = matched(wide, GP("rbf", LogNormal(0.0, 0.3), outputs=3), x, steps=5, measurement=Measurement(x, 20))
    assert set(prior.precision) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2))
    images = torch.randn(20, 1, 6, 6, generator=generator())
    prior = matched(conv, GP(lengthscale=5.0, outputs=2), images, steps=5)
    assert prior.precision["0.weight"] == pytest.approx(9.0 / prior.report.parameters["0.weight"]["std"] ** 2)


def test_every_function_has_its_own_variances():
    law = HierarchicalFamily((Slot("w", (5, 4), 4),))
    v = law.variances(50, generator())
    assert len(v.unique()) == 50
    # f = w.x of one weight row is t distributed with 2 * shape degrees: shape 3, excess kurtosis 6 / (6 - 4) = 3
    draws = law.draw(200_000, generator(1))["w"][:, 0, 0].detach().double()
    assert float(draws.var()) == pytest.approx(3 / 2 / 4, rel=0.03)  # E v / fan-in = rate / (shape - 1) / 4
    assert float((draws / draws.std()).pow(4).mean()) > 4.5


def test_gradient_of_the_hierarchical_draws():
    law = HierarchicalFamily((Slot("w", (1,), 1),), start=5.0)
    mean = law.variances(200_000, generator()).mean()
    mean.backward()
    shape, rate = (float(v.detach()) for v in law.hyper())
    slope = torch.sigmoid(law.raw_shape.detach())  # of softplus
    assert float(law.raw_shape.grad) == pytest.approx(float(slope) * -rate / (shape - 1) ** 2, rel=0.05)
    assert float(law.raw_rate.grad) == pytest.approx(float(slope) / (shape - 1), rel=0.02)


def test_located_weights_have_the_moments_of_their_prior():
    slots = (Slot("0.weight", (3, 2), 2), Slot("0.bias", (3,), 1), Slot("2.weight", (1, 3), 3, output=True))
    law = LocatedFamily(slots)
    law.start(generator(7))
    with torch.no_grad():
        law.raw.copy_(torch.tensor([0.5, 0.2, 2.0]).double().expm1().log())
    prior = law.prior()
    expected = torch.randn(3, 2, generator=generator(7)) / math.sqrt(2.0)
    torch.testing.assert_close(prior.mean["0.weight"], expected)
    assert not bool(prior.mean["2.weight"].any())
    assert prior.precision == pytest.approx({"0.weight": 2 / 0.25, "0.bias": 1 / 0.04, "2.weight": 3 / 4})
    drawn = law.draw(20_000, generator(1))
    for name, value in drawn.items():  # twelve entries, two moments, at five standard errors
        spread = prior.precision[name] ** -0.5
        assert bool(((value.mean(0) - prior.mean[name]).abs() < 5 * spread / math.sqrt(20_000)).all())
        assert bool(((value.var(0) / spread**2 - 1).abs() < 5 * math.sqrt(2 / 20_000)).all())
    assert law.describe()["0.weight"]["size of means"] == pytest.approx(
        float((expected * 2**0.5).square().mean()) ** 0.5
    )
    # without hidden layers it is the Gaussian family
    assert LocatedFamily(slots[2:]).prior() == GaussianFamily(slots[2:]).prior()


@pytest.mark.slow
def test_located_weights_come_closer_to_short_lengthscales():
    torch.manual_seed(0)
    layers = [nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)]
    options = {"distance": "gaussian-w2", "steps": 140, "num_functions": 128}
    errors = [
        matched(nn.Sequential(*layers), GP(lengthscale=0.4), family=family, **options).report.fit.covariance_error
        for family in ("gaussian", "located")
    ]
    assert errors[1] < 0.7 * errors[0]


def test_the_output_layer_is_found_by_running():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(5, 2), nn.Linear(1, 5)

        def forward(self, x):
            return self.last(self.first(x).tanh())

    push = Pushforward(Network(Backwards()), example=X[:1])
    assert [slot.name for slot in push.slots if slot.output] == ["last.weight", "last.bias"]
    push = Pushforward(Network(nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 2), nn.Softplus())), example=X[:1])
    assert [slot.name for slot in push.slots if slot.output] == ["1.weight", "1.bias"]


def test_couplings_draw_what_their_prior_draws_and_refuse_large_layers():
    slots = (Slot("0.weight", (3, 2), 2), Slot("0.bias", (3,), 1), Slot("2.weight", (1, 3), 3))
    law = CouplingFamily(slots)
    with torch.no_grad():
        for number, parameter in enumerate(law.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(number)).double())
    prior = law.prior()
    assert [layer.names for layer in prior.layers] == [("0.bias", "0.weight"), ("2.weight",)]
    drawn = {name: value.detach() for name, value in law.draw(20_000, generator(50)).items()}
    shapes = {slot.name: torch.zeros(slot.shape) for slot in slots}
    again = [prior.sample(shapes, generator(60 + i)) for i in range(4000)]
    for name, value in drawn.items():
        other = torch.stack([one[name] for one in again])
        for power in (1, 2):  # twelve entries, two moments, at five standard errors
            gap = value.pow(power).mean(0) - other.pow(power).mean(0)
            error = (value.pow(power).var(0) / 20_000 + other.pow(power).var(0) / 4000).sqrt()
            assert bool((gap.abs() < 5 * error).all())
    value = {name: tensor[0].double() for name, tensor in drawn.items()}
    alone = torch.stack([prior.log_prob(value)])
    assert bool(torch.isfinite(alone).all())
    with pytest.raises(UnsupportedError, match='family="spline"'):
        CouplingFamily((Slot("0.weight", (101, 100), 100),))


def test_the_box_comes_from_the_inputs_alone():
    x = torch.randn(30, 2, generator=generator())
    low, high = Measurement(x).box
    assert torch.equal(low, x.amin(0)) and torch.equal(high, x.amax(0))
    points = Measurement(x, num_points=50, real=0.4).draw(generator())
    assert points.shape == (50, 2)
    real = (points.unsqueeze(1) == x).all(2).any(1)
    assert int(real.sum()) == 20
    assert bool(((points >= low) & (points <= high)).all())
    assert torch.equal(Grid(-1, 1, 5).draw(generator()).flatten(), torch.linspace(-1, 1, 5))


def test_the_prior_serves_laplace_samplers_and_map():
    network = net()
    data = [(X, X.sin())]
    prior = matched(network, GP(), steps=20)
    for options in ({"bias": "separate"}, {"structure": "diag"}, {"structure": "full"}):
        bayes = bdl.wrap(
            network, bdl.Laplace(**options), data, likelihood=bdl.Gaussian(0.1), prior=prior, progress=False
        )
        assert bool((bayes(X).variance > 0).all())
    tensors = dict(network.named_parameters())
    expected = sum(
        torch.distributions.Normal(0.0, prior.precision[n] ** -0.5).log_prob(p.double()).sum()
        for n, p in tensors.items()
    )
    assert torch.allclose(prior.log_prob(tensors), expected.detach())
    sampler = bdl.samplers.SGLD(network.named_parameters(), lr=1e-9, num_data=40, prior=prior, temperature=0.0)
    before = {n: p.detach().clone() for n, p in tensors.items()}
    for p in tensors.values():
        p.grad = torch.zeros_like(p)
    sampler.step()
    for n, p in tensors.items():
        assert torch.allclose(p, before[n] * (1 - 1e-9 * prior.precision[n] / 40))
    hierarchy = matched(net(), GP(), family="hierarchical", steps=5)
    scales = hierarchy.gibbs(tensors, hierarchy.start(tensors, generator()), 1.0, generator())
    assert set(scales) == set(tensors)
    other = nn.Linear(1, 1)
    with pytest.raises(ArgumentError, match="none for 'weight'"):
        prior.log_prob(dict(other.named_parameters()))
    with pytest.raises(ArgumentError, match="none for 'weight'"):
        hierarchy.log_prob(dict(other.named_parameters()))


def test_any_prior_is_evaluated():
    report = bdl.functional.evaluate(net(), bdl.GaussianPrior(1.0), GP(), X, num_functions=300, generator=generator())
    assert report.fit.std[0] > 2.0  # twenty unscaled units
    assert any("standard deviation" in note for note in report.notes)


def test_normalisation_is_held_or_refused():
    normed = nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    prior = matched(normed, GP(), steps=3)
    assert any("held at one and zero: ['1.bias', '1.weight']" in note for note in prior.report.notes)
    # it is evaluated, and used, as it was matched
    with torch.no_grad():
        normed[1].weight.mul_(5.0)
    options = {"num_functions": 400, "generator": generator()}
    found, start = bdl.functional.evaluate(normed, prior, GP(), X, **options).fit, prior.report.fit
    assert found.std[0] == pytest.approx(start.std[0], rel=0.15)  # standard errors of 3 %: 400 functions
    method = bdl.Laplace(select=list(prior.precision))
    data = [(X, X.sin())]
    bayes = bdl.wrap(normed, method, data, likelihood=bdl.Gaussian(0.1), prior=prior, progress=False)
    assert bool((bayes(X).variance > 0).all())
    with pytest.raises(UnsupportedError, match="batch norm"):
        matched(nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), GP(), steps=3)


def test_tokens_are_measured_at_inputs_alone():
    embedding = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 1))
    tokens = torch.randint(0, 5, (30, 3), generator=generator())
    prior = matched(embedding, GP(lengthscale=3.0), tokens, steps=3, extra={"0.weight": 1.0})
    assert set(prior.precision) == {"2.weight", "2.bias"}
    assert "num_points=30, real=1.0" in prior.report.setting["measurement"]


def test_refusals():
    network = net()
    for call in (matched, lambda n, t, x: bdl.functional.evaluate(n, bdl.GaussianPrior(1.0), t, x)):
        with pytest.raises(ShapeError, match=r"shape \(40,\); expected \(N, features\)"):
            call(network, GP(), X[:, 0])
    with pytest.raises(ShapeError, match="set outputs="):
        matched(network, GP(outputs=2))
    with pytest.raises(UnknownNameError, match="distance 'wasserstein'"):
        matched(network, GP(), distance="wasserstein")
    with pytest.raises(UnknownNameError, match="family 'flow'"):
        matched(network, GP(), family="flow")
    with pytest.raises(ArgumentError, match="steps=0"):
        matched(network, GP(), steps=0)
    with pytest.raises(ArgumentError, match="no closed moments"):
        matched(network, GP(lengthscale=LogNormal(0.0, 1.0)), distance="moments", steps=2)
    embedding = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(4, 1))
    with pytest.raises(SelectionError, match="'0.weight' belongs to Embedding"):
        bdl.functional.match(embedding, GP(), torch.arange(5).unsqueeze(1), progress=False)
    with pytest.raises(ArgumentError, match="no box to draw from"):
        Measurement(torch.zeros(5, 1, 2, 2), num_points=10, real=1.0)
