from __future__ import annotations

import importlib
import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import bayesdl as bdl
from bayesdl.errors import ArgumentError, MissingDependencyError, ShapeError, UnsupportedError
from tests.untouched import untouched

pytest.importorskip("botorch", reason="the package whose models these are")

from botorch.acquisition import LogExpectedImprovement, qKnowledgeGradient, qLogExpectedImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.models.transforms import ChainedInputTransform, Log, Normalize, Standardize
from botorch.optim import optimize_acqf
from botorch.posteriors import GPyTorchPosterior
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.sampling import SobolQMCNormalSampler

from bayesdl.integrations.botorch import Surrogate

BOUNDS = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth(x: Tensor, outputs: int = 1) -> Tensor:
    peak = -(x - 0.4).square().sum(-1, keepdim=True)
    return torch.cat([peak, x[..., :1]], -1)[..., :outputs]


def network(outputs: int = 1, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def wrapped(method: Any, targets: int = 1, outputs: int | None = None, likelihood: Any = None) -> bdl.BayesianModel:
    data = [(points(30), truth(points(30), targets))]
    nets = [network(outputs or targets, seed) for seed in range(3)]
    chosen = bdl.Gaussian(noise=0.1) if likelihood is None else likelihood
    model = nets if method == "ensemble" else nets[0]
    return bdl.wrap(model, method, data, likelihood=chosen, prior=bdl.GaussianPrior(1.0), progress=False)


def drawn(outputs: int = 1) -> bdl.BayesianModel:
    return wrapped(bdl.Laplace(predictive="samples"), outputs)


@pytest.mark.parametrize("method", ["laplace", "vbll", bdl.Laplace(structure="diag", select="last_layer")])
@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("q", [1, 3])
def test_moments_are_those_of_the_joint_of_each_batch(method: Any, targets: int, q: int) -> None:
    bayes = wrapped(method, targets)
    x = points(4, 5, q)
    found = Surrogate(bayes, num_outputs=targets).posterior(x)
    assert isinstance(found, GPyTorchPosterior)
    assert found.mean.shape == (4, 5, q, targets)
    for i in range(4):
        for j in range(5):
            joint = bayes.joint(x[i, j])
            torch.testing.assert_close(found.mean[i, j], joint.mean)
            torch.testing.assert_close(found.distribution.covariance_matrix[i, j], joint.matrix, rtol=1e-6, atol=1e-9)
    alone = bayes(x.flatten(0, 2)).latent.variance
    torch.testing.assert_close(found.variance.flatten(0, 2), alone)


def test_means_alone_where_the_network_gives_variances_too() -> None:
    bayes = wrapped("laplace", 1, 2, bdl.Heteroscedastic())
    surrogate, x = Surrogate(bayes), points(3, 2)
    found, joint = surrogate.posterior(x), bayes.joint(x[0])
    torch.testing.assert_close(found.distribution.covariance_matrix[0], joint.covariance[:, 0, :, 0])
    torch.testing.assert_close(found.mean[0], joint.mean[:, :1])
    noisy = surrogate.posterior(x, observation_noise=True)
    torch.testing.assert_close((noisy.variance - found.variance).flatten(0, 1), bayes(x.flatten(0, 1)).aleatoric)


def test_observation_noise_and_outputs() -> None:
    surrogate, x = Surrogate(wrapped("laplace", 2), num_outputs=2), points(3, 2)
    plain = surrogate.posterior(x)
    noisy = surrogate.posterior(x, observation_noise=True)
    torch.testing.assert_close(noisy.variance, plain.variance + 0.01)
    given = torch.tensor([[[0.5, 2.0]]])
    torch.testing.assert_close(
        surrogate.posterior(x, observation_noise=given).variance, plain.variance + given.double().expand(3, 2, 2)
    )
    second = surrogate.posterior(x, output_indices=[1])
    torch.testing.assert_close(second.mean, plain.mean[..., 1:])
    torch.testing.assert_close(second.variance, plain.variance[..., 1:])
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    scalar = surrogate.posterior(x, posterior_transform=ScalarizedPosteriorTransform(weights))
    torch.testing.assert_close(scalar.mean, (plain.mean @ weights).unsqueeze(-1))
    joint = surrogate.bayes.joint(x[0]).covariance
    expected = torch.einsum("c,bcde,e->bd", weights, joint, weights).diagonal()
    torch.testing.assert_close(scalar.variance[0, :, 0], expected)


def test_samples_have_the_latent_covariance() -> None:
    # 4,000 draws: entries of a correlation have a standard deviation below 0.016 sqrt(2), of which 0.14 is six
    # (failure rate below 2e-9 an entry over seeds; the seed is fixed)
    found = Surrogate(wrapped("laplace")).posterior(points(3))
    torch.manual_seed(0)
    draws = found.rsample(torch.Size([4000])).squeeze(-1)
    matrix = found.distribution.covariance_matrix
    scale = matrix.diagonal().sqrt()
    assert float(((torch.cov(draws.T) - matrix) / scale / scale.unsqueeze(1)).abs().max()) < 0.14


@pytest.mark.filterwarnings("ignore:.*added jitter")  # of BoTorch, where a point comes twice
@pytest.mark.parametrize("method", ["laplace", "vbll", "ensemble", "samples"])
def test_a_point_that_comes_twice_has_one_value(method: str) -> None:
    bayes = drawn() if method == "samples" else wrapped(method)
    x = points(2, 1).expand(2, 3, 2)
    draws = Surrogate(bayes).posterior(x).rsample(torch.Size([5]))
    torch.testing.assert_close(draws, draws[:, :, :1].expand_as(draws), rtol=0, atol=1e-3)
    assert float(draws.std(0).max()) > 1e-2


@pytest.mark.parametrize("method", ["ensemble", "samples"])
def test_draws_are_functions(method: str) -> None:
    bayes = wrapped("ensemble", 2) if method == "ensemble" else drawn(2)
    surrogate, x = Surrogate(bayes, num_outputs=2, num_samples=7), points(4, 3)
    found = surrogate.posterior(x)
    assert isinstance(found, EnsemblePosterior)
    again = surrogate.posterior(x[1, 2:])
    torch.testing.assert_close(again.values, found.values[1][:, 2:])
    if method == "ensemble":
        for seed in range(3):
            torch.testing.assert_close(found.values[:, seed], network(2, seed)(x))
    else:
        assert found.values.shape == (4, 7, 3, 2)
        other = Surrogate(bayes, num_outputs=2, num_samples=7, generator=torch.Generator().manual_seed(5))
        assert not torch.equal(other.posterior(x).values, found.values)
    with pytest.raises(UnsupportedError, match="samples, whose draws hold no observation noise"):
        surrogate.posterior(x, observation_noise=True)


def test_mixtures_of_last_layers_are_drawn_from() -> None:
    # 1,000 functions: means within six standard errors (failure rate below 2e-9 an entry over seeds), variances within
    # six of theirs where the kurtosis is below 4 (6 * sqrt(3 / 1000) = 0.33); the seed is fixed
    nets = [bdl.replace(network(1, s), "2", bdl.last_layer.Regression(8, 1, num_data=30).double()) for s in range(2)]
    bayes = bdl.wrap(nets, "ensemble", likelihood=bdl.Gaussian(noise=0.1), progress=False)
    found = Surrogate(bayes, num_samples=1000).posterior(points(4))
    latent = bayes(points(4)).latent
    assert latent.spreads is not None and found.values.shape == (1000, 4, 1)
    error = (latent.variance / 1000).sqrt()
    assert bool(((found.mean - latent.mean).abs() < 6 * error).all())
    torch.testing.assert_close(found.variance, latent.variance, rtol=0.33, atol=0)


@pytest.mark.parametrize("method", ["laplace", "vbll", "ensemble"])
def test_gradients_reach_the_points(method: str) -> None:
    surrogate = Surrogate(wrapped(method))

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        found = surrogate.posterior(x)
        return found.mean, found.variance

    for shape in ((2, 1), (1, 2)):
        x = points(*shape).requires_grad_()
        assert torch.autograd.gradcheck(moments, (x,), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["laplace", "vbll"])
def test_expected_improvement_is_the_closed_form(method: str) -> None:
    bayes, x, best = wrapped(method), points(6), -0.05
    found = LogExpectedImprovement(Surrogate(bayes), best_f=best)(x.unsqueeze(1)).exp()
    latent, unit = bayes(x).latent, Normal(0.0, 1.0)
    sd = latent.variance.sqrt()
    u = (latent.mean - best) / sd
    expected = (latent.mean - best) * unit.cdf(u) + sd * unit.log_prob(u).exp()
    torch.testing.assert_close(found, expected.squeeze(-1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("method", "q"), [("laplace", 1), ("vbll", 2), ("ensemble", 2)])
def test_acquisitions_are_optimised(method: str, q: int) -> None:
    surrogate = Surrogate(wrapped(method))
    kind = LogExpectedImprovement if q == 1 else qLogExpectedImprovement
    acquisition = kind(surrogate, best_f=-0.3)
    torch.manual_seed(0)
    x, value = optimize_acqf(
        acquisition, BOUNDS, q=q, num_restarts=3, raw_samples=32, options={"maxiter": 30, "seed": 0}
    )
    assert x.shape == (q, 2)
    with torch.no_grad():
        elsewhere = acquisition(points(200, q, seed=7))
    assert float(value) > float(elsewhere.max()) - 1e-3


def test_refits_leave_earlier_surrogates_alone() -> None:
    net = network().float()
    data = [(points(20).float(), truth(points(20)).float())]
    with untouched(net):
        bayes = bdl.wrap(net, "laplace", data, likelihood=bdl.Gaussian(noise=0.1), progress=False)
        surrogate, x = Surrogate(bayes), points(3, 2)
        before = surrogate.posterior(x)
        assert before.mean.dtype is torch.float64
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    Surrogate(bdl.wrap(net, "laplace", data, likelihood=bdl.Gaussian(noise=0.1), progress=False)).posterior(x)
    after = surrogate.posterior(x)
    assert torch.equal(after.mean, before.mean) and torch.equal(after.variance, before.variance)
    torch.testing.assert_close(surrogate.posterior(x.float()).mean, before.mean, rtol=1e-5, atol=1e-6)


def test_conditioning_is_the_fit_on_all_data() -> None:
    x, y = points(30), truth(points(30))
    method = bdl.VBLL(tuning="evidence")
    part = bdl.wrap(network(), method, [(x[:20], y[:20])], likelihood="gaussian", progress=False)
    surrogate = Surrogate(part)
    before = surrogate.posterior(points(5, 1)).variance
    grown = surrogate.condition_on_observations(x[20:], y[20:])
    direct = Surrogate(part.update([(x[20:], y[20:])]))
    torch.testing.assert_close(grown.posterior(points(5, 2)).mean, direct.posterior(points(5, 2)).mean)
    assert bool((grown.posterior(points(5, 1)).variance < before).all())
    torch.testing.assert_close(surrogate.posterior(points(5, 1)).variance, before)
    with pytest.raises(UnsupportedError, match="no exact update"):
        Surrogate(wrapped("laplace")).condition_on_observations(x, y)
    with pytest.raises(UnsupportedError, match=r"conditioning takes \(n, d\)"):
        surrogate.condition_on_observations(x.unsqueeze(0), y.unsqueeze(0))


def scaled(method: Any = "vbll", outcome: Any = None) -> tuple[bdl.BayesianModel, Any, Any, Tensor, Tensor]:
    """A regression of two targets on transformed data, both transforms as fitted, and the data before them."""
    x = points(30) * torch.tensor([10.0, 0.2]) + torch.tensor([-5.0, 3.0])
    y = (truth(points(30), 2) * torch.tensor([3.0, 20.0])).exp() + torch.tensor([1.0, 50.0])
    inputs, outcome = Normalize(d=2), Standardize(m=2) if outcome is None else outcome
    data = [(inputs(x), outcome(y)[0])]
    likelihood = bdl.Gaussian(noise=0.1)
    model = [network(2, seed) for seed in range(3)] if method == "ensemble" else network(2)
    return bdl.wrap(model, method, data, likelihood=likelihood, progress=False), inputs, outcome, x, y


@pytest.mark.parametrize("q", [1, 3])
def test_transforms_go_forth_and_back(q: int) -> None:
    bayes, inputs, outcome, x, y = scaled()
    surrogate = Surrogate(bayes, num_outputs=2, input_transform=inputs, outcome_transform=outcome)
    there = x[: 2 * q].reshape(2, q, 2)
    low, high = x.min(0).values, x.max(0).values
    inner = Surrogate(bayes, num_outputs=2).posterior((there - low) / (high - low))
    found = surrogate.posterior(there)
    assert isinstance(found, GPyTorchPosterior)
    mean, sd = y.mean(0), y.std(0)
    torch.testing.assert_close(found.mean, mean + sd * inner.mean)
    matrix, scale = inner.distribution.covariance_matrix, sd.repeat(q)
    torch.testing.assert_close(found.distribution.covariance_matrix, matrix * scale * scale.unsqueeze(1))
    second = surrogate.posterior(there, output_indices=[-1])
    torch.testing.assert_close(second.mean, found.mean[..., 1:])
    torch.testing.assert_close(second.variance, found.variance[..., 1:])
    noisy = surrogate.posterior(there, observation_noise=True)
    torch.testing.assert_close((noisy.variance - found.variance), (0.01 * sd**2).expand(2, q, 2))
    assert torch.equal(surrogate.train().posterior(there).mean, found.mean)  # in any mode, and nothing was learned
    x = there.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda at: surrogate.posterior(at).mean, (x,))


def test_logarithms_of_targets_come_back_as_log_normals() -> None:
    bayes, inputs, outcome, x, _ = scaled(outcome=Log())
    found = Surrogate(bayes, num_outputs=2, input_transform=inputs, outcome_transform=outcome).posterior(x[:4])
    latent = bayes(inputs.eval()(x[:4])).latent
    mean = (latent.mean + latent.variance / 2).exp()
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, mean**2 * latent.variance.expm1())
    assert bool((found.rsample(torch.Size([5])) > 0).all())


def test_each_member_comes_back() -> None:
    bayes, inputs, outcome, x, _ = scaled("ensemble", Log())
    found = Surrogate(bayes, num_outputs=2, input_transform=inputs, outcome_transform=outcome).posterior(x[:4])
    assert isinstance(found, EnsemblePosterior)
    for seed in range(3):
        torch.testing.assert_close(found.values[seed], network(2, seed)(inputs.eval()(x[:4])).exp())
    torch.testing.assert_close(found.mean, found.values.mean(0))


def test_conditioning_goes_through_the_transforms() -> None:
    bayes, inputs, outcome, x, y = scaled(bdl.VBLL(tuning="evidence"))
    grown = Surrogate(bayes, num_outputs=2, input_transform=inputs, outcome_transform=outcome)
    grown = grown.condition_on_observations(x[:3] + 0.1, y[:3])
    scale = [t.eval() for t in (inputs, outcome)]
    direct = bayes.update([(scale[0](x[:3] + 0.1), scale[1](y[:3])[0])])
    expected = y.mean(0) + y.std(0) * direct(inputs(x[5:9])).latent.mean
    torch.testing.assert_close(grown.posterior(x[5:9]).mean, expected)


@pytest.mark.parametrize("batches", [(), (2,)])
def test_fantasies_are_updates_on_what_was_drawn(batches: tuple[int, ...]) -> None:
    bayes, inputs, outcome, x, _ = scaled(bdl.VBLL(tuning="evidence"))
    surrogate = Surrogate(bayes, num_outputs=2, input_transform=inputs, outcome_transform=outcome)
    there = x[:6].reshape(2, 3, 2)[: len(batches) + 1].reshape(*batches, 3, 2)
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    fantasies = surrogate.fantasize(there, sampler)
    assert fantasies.batch_shape == (4, *batches) and fantasies.num_outputs == 2
    targets = sampler(surrogate.posterior(there, observation_noise=True))
    found = fantasies.posterior(x[6:8])
    noisy = fantasies.posterior(x[6:8], observation_noise=True)
    assert found.mean.shape == (4, *batches, 2, 2)
    for at in itertools.product(*map(range, (4, *batches))):
        direct = surrogate.condition_on_observations(there[at[1:]], targets[at]).posterior(x[6:8], None, True)
        torch.testing.assert_close(found.mean[at], direct.mean)
        torch.testing.assert_close(noisy.distribution.covariance_matrix[at], direct.distribution.covariance_matrix)
    # without noise the functions go through what was drawn
    little = torch.full((1, 2), 1e-10)
    through = surrogate.fantasize(there, sampler, little).posterior(there)
    expected = sampler(surrogate.posterior(there, observation_noise=little))
    torch.testing.assert_close(outcome.eval()(through.mean)[0], outcome(expected)[0], rtol=0, atol=1e-3)


def test_knowledge_gradients_are_differentiable() -> None:
    surrogate = Surrogate(wrapped("vbll"))
    sampler = SobolQMCNormalSampler(torch.Size([3]), seed=0)
    gradient = qKnowledgeGradient(surrogate, num_fantasies=3, sampler=sampler)
    x = points(2, 1 + 3).requires_grad_()
    means = surrogate.fantasize(x[:, :1], sampler).posterior(x[:, 1:].transpose(0, 1).unsqueeze(2)).mean
    torch.testing.assert_close(gradient(x), means.mean(0).flatten())
    assert torch.autograd.gradcheck(gradient, (x,), atol=1e-6, rtol=1e-4)


def test_fantasies_that_are_not_exact() -> None:
    sampler = SobolQMCNormalSampler(torch.Size([2]), seed=0)
    for method in ("laplace", "ensemble"):
        with pytest.raises(UnsupportedError, match="fantasies need an exact update"):
            Surrogate(wrapped(method)).fantasize(points(3), sampler)
    with pytest.raises(UnsupportedError, match="leave it out"):
        Surrogate(wrapped("vbll")).fantasize(points(3), sampler).posterior(points(3), output_indices=[0])


def test_transforms_that_saw_nothing() -> None:
    bayes, inputs, _, x, _ = scaled()
    with pytest.raises(ArgumentError, match="a Normalize that changes nothing"):
        Surrogate(bayes, num_outputs=2, input_transform=Normalize(d=2))
    with pytest.raises(ArgumentError, match="a Normalize that changes nothing"):
        Surrogate(bayes, num_outputs=2, input_transform=ChainedInputTransform(a=inputs, b=Normalize(d=2)))
    Surrogate(bayes, num_outputs=2, input_transform=Normalize(d=2, bounds=BOUNDS))
    with pytest.raises(RuntimeError, match="must be called on outcome data"):
        Surrogate(bayes, num_outputs=2, outcome_transform=Standardize(m=2)).posterior(x)


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="needs a regression"):
        Surrogate(bdl.wrap(network(2), "map", likelihood="categorical"))
    with pytest.raises(ArgumentError, match="num_outputs=0"):
        Surrogate(wrapped("laplace"), num_outputs=0)
    with pytest.raises(ShapeError, match="has 2 outputs and num_outputs=1"):
        Surrogate(wrapped("laplace", 2)).posterior(points(3))
    with pytest.raises(ArgumentError, match=r"output_indices=\[1\]"):
        Surrogate(wrapped("laplace")).posterior(points(3), output_indices=[1])
    with pytest.raises(ShapeError, match="expected"):
        Surrogate(wrapped("laplace")).posterior(torch.zeros(2))


def test_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import bayesdl.integrations.botorch as bridge

    monkeypatch.setitem(sys.modules, "botorch.models.model", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "bayesdl\[botorch\]"'):
        importlib.reload(bridge)
