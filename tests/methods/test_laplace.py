"""Laplace on linear models is exact Bayesian linear regression; on networks it is the linearised Gaussian."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.batch import batch_size
from bayesdl.curvature.cotangents import CURVATURE_KINDS
from bayesdl.curvature.registry import STRUCTURES
from bayesdl.errors import ArgumentError, UnknownNameError, UnsupportedError
from bayesdl.model import BayesianModel
from bayesdl.posteriors import GaussianPosterior
from bayesdl.posteriors.linear import Jacobians
from tests import oracles
from tests.cases import BY_NAME, mlp, real, targets

FEATURES = 3
NOISES = {1: torch.tensor([0.4], dtype=torch.float64), 2: torch.tensor([0.3, 1.7], dtype=torch.float64)}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * max(1.0, float(expected.abs().max())))


def gaussian(model: BayesianModel) -> GaussianPosterior:
    assert isinstance(model.posterior, GaussianPosterior)
    return model.posterior


def flat_order(outputs: int) -> Tensor:
    """Indices of (weight, bias) in the oracle's order, where the weights of one output lie side by side."""
    index = torch.arange(outputs * (FEATURES + 1)).view(outputs, FEATURES + 1)
    return torch.cat([index[:, :-1].flatten(), index[:, -1]])


def regression(outputs: int, precision: Any = 0.7, mean: Any = 0.0) -> tuple[nn.Linear, Tensor, Tensor, Any]:
    """A linear layer at the exact posterior mean, its data, and the oracle. Priors are in the layer's flat order."""
    g = torch.Generator().manual_seed(outputs)
    x = torch.randn(20, FEATURES, dtype=torch.float64, generator=g)
    y = x @ torch.randn(FEATURES, outputs, dtype=torch.float64, generator=g) + 0.5
    y = y + torch.randn(20, outputs, dtype=torch.float64, generator=g) * NOISES[outputs]
    order = flat_order(outputs)
    back = torch.argsort(order)
    prior = [value[back] if isinstance(value, Tensor) and value.dim() else value for value in (precision, mean)]
    oracle = oracles.BayesianLinearRegression(with_one(x), y, prior[0], NOISES[outputs], prior[1])
    net = nn.Linear(FEATURES, outputs).double()
    weights = oracle.mean.view(outputs, FEATURES + 1)
    with torch.no_grad():
        net.weight.copy_(weights[:, :-1])
        net.bias.copy_(weights[:, -1])
    return net, x, y, oracle


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def wrapped(net: nn.Module, data: Any, likelihood: Any, prior: Any = None, **options: Any) -> BayesianModel:
    return bdl.wrap(net, bdl.Laplace(**options), data, likelihood=likelihood, prior=prior, progress=False)


# --- linear models: exact ---


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_linear_model_is_bayesian_linear_regression(structure: str, outputs: int) -> None:
    net, x, y, oracle = regression(outputs)
    data = [(x[:7], y[:7]), (x[7:], y[7:])]
    bayes = wrapped(net, data, bdl.Gaussian(NOISES[outputs]), bdl.GaussianPrior(0.7), structure=structure)
    order, posterior = flat_order(outputs), gaussian(bayes)
    eye = torch.eye(len(order), dtype=torch.float64)
    close(posterior.structure.solve(eye, posterior.scale, posterior.shift), oracle.covariance[order][:, order])
    close(bayes.log_evidence(), oracle.log_evidence())
    points = torch.randn(5, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    mean, latent, predictive = oracle.predict(with_one(points))
    pred = bayes(points)
    close(pred.mean, mean)
    close(pred.latent.covariance, latent)
    # a peer returns the regression variance without noise
    close(pred.variance, predictive.diagonal(dim1=1, dim2=2))
    close(pred.epistemic, latent.diagonal(dim1=1, dim2=2))
    close(pred.aleatoric, NOISES[outputs].square().expand(5, outputs))
    goal = torch.randn(5, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    close(pred.log_prob(goal), torch.distributions.MultivariateNormal(mean, predictive).log_prob(goal))


@pytest.mark.parametrize("outputs", [1, 2])
def test_prior_precision_and_mean_per_parameter(outputs: int) -> None:
    count = outputs * (FEATURES + 1)
    g = torch.Generator().manual_seed(3)
    precision = 0.2 + torch.rand(count, dtype=torch.float64, generator=g)
    centre = torch.randn(count, dtype=torch.float64, generator=g)
    net, x, y, oracle = regression(outputs, precision, centre)
    prior = bdl.GaussianPrior(precision, mean=centre)
    bayes = wrapped(net, [(x, y)], bdl.Gaussian(NOISES[outputs]), prior, structure="full")
    close(bayes.log_evidence(), oracle.log_evidence())
    points = torch.randn(5, FEATURES, dtype=torch.float64, generator=g)
    mean, _, predictive = oracle.predict(with_one(points))
    close(bayes(points).mean, mean)
    close(bayes(points).variance, predictive.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_open_noise_at_the_right_value_gives_the_same_regression(structure: str, outputs: int) -> None:
    # curvature is kept at unit noise, per output; evaluating it at the true noise must change nothing
    net, x, y, oracle = regression(outputs)
    bayes = wrapped(net, [(x, y)], "gaussian", bdl.GaussianPrior(0.7), structure=structure)
    exact = gaussian(bayes).with_prior(torch.tensor(0.7, dtype=torch.float64), NOISES[outputs])
    bayes = bayes.replaced(posterior=exact, likelihood=bdl.Gaussian(NOISES[outputs]))
    close(bayes.log_evidence(), oracle.log_evidence())
    points = torch.randn(5, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    close(bayes(points).variance, oracle.predict(with_one(points))[2].diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_drawn_functions_are_distributed_as_the_regression(structure: str) -> None:
    # relative error of a variance from 2,000 draws has standard deviation 3.2%: 20% is six of them
    # (failure rate about 2e-9 an entry over seeds; the seed is fixed)
    net, x, y, oracle = regression(2)
    points = torch.randn(3, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    _, latent, _ = oracle.predict(with_one(points))
    for predictive in ("linearized", "samples"):
        options = {"structure": structure, "predictive": predictive}
        bayes = wrapped(net, [(x, y)], bdl.Gaussian(NOISES[2]), bdl.GaussianPrior(0.7), **options)
        functions = bayes.draw(2000, generator=torch.Generator().manual_seed(0))
        outputs = torch.stack([function(points) for function in functions])
        scale = latent.diagonal(dim1=1, dim2=2).sqrt()
        assert bool(((outputs.mean(0) - net(points)).abs() < 6 * scale / 2000**0.5).all())
        for b in range(3):
            found = torch.cov(outputs[:, b].T)
            assert float((found - latent[b]).abs().max() / latent[b].abs().max()) < 0.2


# --- networks: the linearised Gaussian ---


def network(likelihood: str = "categorical", outputs: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = mlp(outputs=outputs).double()
    return net, real(4)(torch.Generator().manual_seed(1)), targets(likelihood, outputs)


@pytest.mark.parametrize("kind", CURVATURE_KINDS)
@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_predictive_covariance_is_that_of_the_structures_own_matrix(structure: str, kind: str) -> None:
    net, x, y = network()
    bayes = wrapped(net, [(x, y)], "categorical", bdl.GaussianPrior(2.0), structure=structure, kind=kind)
    posterior = gaussian(bayes)
    dense = posterior.curvature.to_dense() + 2.0 * torch.eye(posterior.layout.numel, dtype=torch.float64)
    points = real(4)(torch.Generator().manual_seed(5))
    jac = oracles.jacobian(net, points, posterior.layout.names)
    latent = bayes(points).latent
    close(latent.mean, oracles.outputs(net, points))
    close(latent.covariance, oracles.linearized_covariance(jac, dense))


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "poisson", "heteroscedastic", "gaussian"])
def test_log_evidence_by_hand(structure: str, likelihood: str) -> None:
    net, x, y = network(likelihood, 4)
    family = bdl.Gaussian(0.6) if likelihood == "gaussian" else likelihood
    bayes = wrapped(net, [(x, y)], family, bdl.GaussianPrior(1.5, mean=0.1), structure=structure)
    dense = gaussian(bayes).curvature.to_dense()
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    log_lik = oracles.log_likelihood(likelihood, oracles.outputs(net, x), y, 0.6)
    close(bayes.log_evidence(), oracles.log_evidence(log_lik, dense, 1.5, weights, 0.1))


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_temperature_multiplies_the_covariance(structure: str) -> None:
    # p^(1/T) of a Gaussian has T times its covariance
    net, x, y = network()
    one = wrapped(net, [(x, y)], "categorical", bdl.GaussianPrior(2.0), structure=structure)
    cold = wrapped(net, [(x, y)], "categorical", bdl.GaussianPrior(2.0), structure=structure, temperature=0.3)
    close(cold(x).latent.covariance, 0.3 * one(x).latent.covariance)
    close(cold(x).latent.mean, one(x).latent.mean)
    f = oracles.outputs(net, x)
    warm, cool = (
        torch.stack([g(x) for g in b.draw(3, generator=torch.Generator().manual_seed(0))]) for b in (one, cold)
    )
    close(cool - f, 0.3**0.5 * (warm - f))
    # its evidence is that of the tempered likelihood under the prior of precision p / T
    dense = gaussian(cold).curvature.to_dense() / 0.3
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    log_lik = oracles.log_likelihood("categorical", oracles.outputs(net, x), y)
    close(cold.log_evidence(), oracles.log_evidence(log_lik / 0.3, dense, 2.0 / 0.3, weights))


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_marginals_alone_beyond_many_outputs(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = network()
    bayes = wrapped(net, [(x, y)], "categorical", structure=structure)
    joint = bayes(x).latent
    monkeypatch.setattr("bayesdl.posteriors.gaussian.JOINT_OUTPUTS", 2)
    alone = bayes(x).latent
    assert alone.covariance is None
    close(alone.variance, joint.variance)


@pytest.mark.parametrize("name", ["mlp", "batch_norm_2d", "position_embedding", "attention", "encoder_layer", "lstm"])
def test_linearised_draws_are_the_outputs_plus_a_jacobian_product(name: str) -> None:
    case = BY_NAME[name]
    net, x, y = case.network(), case.data(), targets("categorical")
    bayes = wrapped(net, [(x, y)], "categorical", bdl.GaussianPrior(5.0), structure="diag")
    posterior = gaussian(bayes)
    noise = torch.randn(2, posterior.layout.numel, generator=torch.Generator().manual_seed(3)).double()
    deltas = posterior.structure.sample(noise, posterior.scale, posterior.shift)
    # padding has no gradient, so its row takes no part
    jac, f = oracles.jacobian(net, x, posterior.layout.names), oracles.outputs(net, x)
    for function, delta in zip(bayes.draw(2, generator=torch.Generator().manual_seed(3)), deltas, strict=True):
        close(function(x), f + jac @ delta)
        assert torch.equal(function(x), function(x))
        close(torch.cat([function(x[:3]), function(x[3:])]), function(x))


@pytest.mark.parametrize("name", ["mlp", "batch_norm_2d", "encoder_layer"])
def test_sampled_draws_are_the_network_at_drawn_weights(name: str) -> None:
    case = BY_NAME[name]
    net, x, y = case.network(), case.data(), targets("categorical")
    options = {"structure": "diag", "predictive": "samples"}
    bayes = wrapped(net, [(x, y)], "categorical", bdl.GaussianPrior(50.0), **options)
    posterior = gaussian(bayes)
    noise = torch.randn(2, posterior.layout.numel, generator=torch.Generator().manual_seed(3)).double()
    deltas = posterior.structure.sample(noise, posterior.scale, posterior.shift)
    other = oracles.evaluated(net)
    origin = [p.detach().clone() for p in other.parameters()]
    functions = bayes.draw(2, generator=torch.Generator().manual_seed(3))
    pred = bayes(x, num_samples=2, generator=torch.Generator().manual_seed(3))
    for i, (function, delta) in enumerate(zip(functions, deltas, strict=True)):
        pieces = delta.split([p.numel() for p in origin])
        with torch.no_grad():
            for p, start, piece in zip(other.parameters(), origin, pieces, strict=True):
                p.copy_(start + piece.view_as(p))
            truth = other(x)
        close(function(x).detach(), truth)
        assert torch.equal(function(x), function(x))
        close(pred.latent.samples[i].detach(), truth)


@pytest.mark.parametrize("predictive", ["linearized", "samples"])
def test_predictions_repeat_and_do_not_depend_on_the_batch(predictive: str) -> None:
    net, x, y = network()
    bayes = wrapped(net, [(x, y)], bdl.Categorical(link="mc"), bdl.GaussianPrior(3.0), predictive=predictive)

    def probs(data: list[Tensor], seed: int | None = 5) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return bayes.predict(data, num_samples=16, generator=generator).probs

    whole = probs([x])
    assert torch.equal(probs([x]), whole)
    assert torch.equal(probs([x], None), probs([x], None))
    assert float((probs([x], 6) - whole).abs().max()) > 1e-4
    close(probs([x[:3], x[3:4], x[4:]]), whole)
    close(bayes(x, num_samples=16, generator=torch.Generator().manual_seed(5)).probs.detach(), whole)
    functions = bayes.draw(2, generator=torch.Generator().manual_seed(5))
    again = bayes.draw(2, generator=torch.Generator().manual_seed(5))
    other = bayes.draw(2, generator=torch.Generator().manual_seed(6))
    for a, b, c in zip(functions, again, other, strict=True):
        assert torch.equal(a(x), b(x))
        assert not torch.equal(a(x), c(x))


def test_chunks_of_a_prediction_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = network()
    bayes = wrapped(net, [(x, y)], "categorical")
    whole = bayes(x).latent
    monkeypatch.setattr(sys.modules["bayesdl.curvature.chunking"], "DEFAULT_MEMORY", 1)
    pieces = bayes(x).latent
    close(pieces.mean, whole.mean)
    close(pieces.covariance, whole.covariance)


def test_monte_carlo_curvature_follows_the_generator() -> None:
    net, x, y = network()

    def matrix(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        method = bdl.Laplace(kind="mc", structure="diag")
        bayes = bdl.wrap(net, method, [(x, y)], likelihood="categorical", generator=generator, progress=False)
        return gaussian(bayes).curvature.to_dense()

    assert torch.equal(matrix(1), matrix(1))
    assert not torch.equal(matrix(1), matrix(2))
    assert torch.equal(matrix(None), matrix(None))


@pytest.mark.parametrize("name", ["mlp", "bare_parameters", "encoder_layer"])
def test_threads_predict_while_the_users_own_thread_runs_the_network(name: str) -> None:
    case = BY_NAME[name]
    net, x, y = case.network().eval(), case.data(), targets("categorical")
    bayes = wrapped(net, [(x, y)], "categorical", structure="diag")
    sampled = wrapped(net, [(x, y)], "categorical", structure="diag", predictive="samples")
    points = case.data(5)
    function = bayes.draw(1, generator=torch.Generator().manual_seed(0))[0]

    def answers() -> list[Tensor]:
        return [bayes(points).probs.detach(), sampled(points, num_samples=4).probs.detach(), function(points).detach()]

    expected, plain = answers(), net(points).detach()
    differing: list[int] = []

    def work() -> None:
        for _ in range(10):
            differing.append(sum(not torch.equal(a, b) for a, b in zip(answers(), expected, strict=True)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    wrong = 0
    while any(thread.is_alive() for thread in threads):
        wrong += not torch.equal(net(points).detach(), plain)
    for thread in threads:
        thread.join()
    assert len(differing) == 40
    assert sum(differing) == 0
    assert wrong == 0


# --- options ---


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"structure": "dense"}, UnknownNameError, "'dense'.*full"),
        ({"kind": "exact"}, UnknownNameError, "'exact'.*ggn"),
        ({"predictive": "exact"}, ArgumentError, "linearized"),
        ({"temperature": 0.0}, ArgumentError, "positive"),
        ({"temperature": float("nan")}, ArgumentError, "positive"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], text: str) -> None:
    net, x, y = network()
    with pytest.raises(error, match=text):
        wrapped(net, [(x, y)], "categorical", **options)


def test_a_prior_that_does_not_fit_is_refused_at_the_fit() -> None:
    net, x, y = network()
    count = sum(p.numel() for p in net.parameters())
    with pytest.raises(UnsupportedError, match=r"diag.*full"):
        wrapped(net, [(x, y)], "categorical", bdl.GaussianPrior(torch.linspace(1.0, 2.0, count)), structure="kron")
    with pytest.raises(ArgumentError, match=rf"\(7,\).*\({count},?\)"):
        wrapped(net, [(x, y)], "categorical", bdl.GaussianPrior(torch.ones(7)), structure="diag")
    with pytest.raises(ArgumentError, match="mean"):
        wrapped(net, [(x, y)], "categorical", bdl.GaussianPrior(1.0, mean=torch.zeros(7)), structure="diag")


def test_a_prior_precision_per_layer_follows_the_order_of_layers() -> None:
    net, x, y = network()
    prior = bdl.GaussianPrior(torch.tensor([1.0, 1e12]))
    bayes = wrapped(net, [(x, y)], "categorical", prior, structure="kron")
    assert bayes.layers == ("0", "2")
    jac = oracles.jacobian(net, x, [n for n, _ in net.named_parameters()])
    first = gaussian(bayes).curvature.to_dense()[:25, :25] + torch.eye(25, dtype=torch.float64)
    close(bayes(x).latent.covariance, oracles.linearized_covariance(jac[..., :25], first))


def test_an_explicit_prior_and_noise_are_kept_and_said() -> None:
    net, x, y = network("gaussian")
    bayes = wrapped(net, [(x, y)], bdl.Gaussian(0.3), bdl.GaussianPrior(4.0))
    assert float(gaussian(bayes).precision) == 4.0
    assert gaussian(bayes).noise is None
    assert not bayes.record.findings
    tuned = wrapped(net, [(x, y)], "gaussian")
    text = str(tuned.diagnose())
    assert "prior precision" in text
    assert "noise" in text


def test_many_classes_at_the_last_layer_need_no_cotangent_per_example(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 9)).double()
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randint(0, 9, (40,))
    model = bdl.wrap(net, bdl.Laplace(select="last_layer"), [(x, y)], likelihood="categorical", progress=False)
    joint = model(x).latent
    monkeypatch.setattr("bayesdl.posteriors.gaussian.JOINT_OUTPUTS", 2)
    # the first piece is small, the rest runs at once
    monkeypatch.setattr(sys.modules["bayesdl.curvature.chunking"], "DEFAULT_MEMORY", 7 * 8 * 3 * 9 * 9)
    sizes: list[int] = []
    parts = Jacobians.parts

    def counted(self: Jacobians, inputs: Tensor) -> Any:
        sizes.append(batch_size(inputs))
        return parts(self, inputs)

    monkeypatch.setattr(Jacobians, "parts", counted)
    latent = model(x).latent
    assert sizes == [7, 33]
    assert latent.covariance is None
    torch.testing.assert_close(latent.variance, joint.variance)
    torch.testing.assert_close(latent.mean, joint.mean)
