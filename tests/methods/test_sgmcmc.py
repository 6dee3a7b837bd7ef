"""The loop around the samplers: the law it samples, its step size, its streams, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bayesdl as bdl
from bayesdl.errors import (
    ArgumentError,
    LossScaleError,
    NonFiniteError,
    StepSizeError,
    UnknownNameError,
    UnsupportedError,
)
from bayesdl.methods import CHAINS, METHODS
from bayesdl.methods.base import Task
from bayesdl.methods.chains import cycle_of
from bayesdl.methods.energy import survey
from bayesdl.methods.stepsize import largest_curvature
from bayesdl.network import Network
from tests.samplers.chains import assert_mean
from tests.untouched import untouched

NOISE, PRECISION = 0.5, 2.0
Batches = list[tuple[Tensor, Tensor]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regression(count: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 2, generator=seeded(1))
    return x, x @ torch.tensor([[1.0], [-0.5]]) + 0.3 + NOISE * torch.randn(count, 1, generator=seeded(2))


def conjugate(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (weight, bias) given the data."""
    wide = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    precision = wide.T @ wide / NOISE**2 + PRECISION * torch.eye(3, dtype=torch.float64)
    covariance = torch.linalg.inv(precision)
    return covariance @ wide.T @ y.double().flatten() / NOISE**2, covariance


def linear(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(2, 1)


def small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))


def fit(net: nn.Module, method: Any, data: Any, **options: Any) -> bdl.BayesianModel:
    arguments: dict[str, Any] = {
        "likelihood": bdl.Gaussian(noise=NOISE),
        "prior": bdl.GaussianPrior(PRECISION),
        "progress": False,
        **options,
    }
    return bdl.wrap(net, method, data, **arguments)


def flat(bayes: bdl.BayesianModel) -> Tensor:
    return torch.cat([bayes.posterior.snapshots[n].flatten(1) for n in ("weight", "bias")], 1).double()


def test_the_chain_samples_the_conjugate_posterior() -> None:
    """BAOAB has the exact variance at every step size; 16 chains, 4 sd: fails once in some thousand seeds."""
    x, y = regression()
    temperature = 0.25
    method = bdl.SGMCMC("baoab", num_samples=50, thin=4, burn_in=60, chains=16, start="prior", temperature=temperature)
    samples = flat(fit(linear(), method, [(x, y)], generator=seeded())).view(16, 50, 3)
    mean, covariance = conjugate(x, y)
    for i in range(3):
        error = samples[..., i] - mean[i]
        spread = float((temperature * covariance[i, i]).sqrt())
        assert_mean(error.mean(1) / spread + 1.0, 1.0, 0.2)
        assert_mean(error.square().mean(1) / spread**2, 1.0, 0.1)


def test_batches_of_unequal_size_weigh_by_what_they_hold() -> None:
    x, y = regression(10)
    net, data = linear(), [(x[:7], y[:7]), (x[7:], y[7:])]
    network = Network(net)
    task = Task(network, (net,), bdl.Gaussian(noise=NOISE), None, data, None, False)
    energy, _ = survey(task, data)
    assert (energy.num_data, energy.num_batches, energy.counted) == (10, 2, 10)
    losses = [energy.loss(network, network.module(), a, b) for a, b in data]
    exact = -Normal(net(x), NOISE).log_prob(y).sum() / 10
    assert float(torch.stack(losses).mean().detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    means = torch.stack([-Normal(net(a), NOISE).log_prob(b).mean() for a, b in data]).mean()
    assert abs(float((means - exact).detach())) > 1e-3  # which the mean over each batch does not give


def test_dropped_examples_count() -> None:
    x, y = regression(10)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, drop_last=True, shuffle=True)
    net = linear()
    energy, findings = survey(Task(Network(net), (net,), bdl.Gaussian(noise=NOISE), None, loader, None, False), loader)
    assert (energy.num_data, energy.counted) == (10, 8)
    assert any("drops 2 of 10 examples" in f.text for f in findings)


def test_at_zero_temperature_the_loop_is_sgd() -> None:
    x, y = regression()
    data = list(zip(x.split(16), y.split(16), strict=True))
    net = linear()
    bayes = fit(net, bdl.SGMCMC("sgld", temperature=0.0, lr=0.01, num_samples=3, thin=2, burn_in=4), data)
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, weight_decay=PRECISION / 40)
    visited = []
    for step in range(10):
        a, b = data[step % 3]
        visited.append(torch.cat([p.detach().flatten() for p in (twin.weight, twin.bias)]))
        optimizer.zero_grad()
        (-Normal(twin(a), NOISE).log_prob(b).sum() * (3 / 40)).backward()
        optimizer.step()
    rows = flat(bayes).float()
    assert len(rows) == 3
    places = [[i for i, point in enumerate(visited) if torch.allclose(point, row, atol=1e-7)] for row in rows]
    assert all(len(found) == 1 for found in places)
    first = places[0][0]
    assert first >= 4 and [found[0] for found in places] == [first, first + 2, first + 4]


def priors() -> Iterator[tuple[Any, str]]:
    yield bdl.GaussianPrior(PRECISION), "gaussian"
    yield bdl.GaussianPrior(torch.tensor([0.5, 60.0, 3.0])), "per parameter"
    yield bdl.StudentTPrior(df=3.0, scale=0.2), "student"
    yield bdl.LaplacePrior(scale=0.3), "laplace"


@pytest.mark.parametrize("prior", [pytest.param(p, id=n) for p, n in priors()])
def test_largest_curvature_is_that_of_the_potential(prior: Any) -> None:
    """Against the Hessian of U by automatic differentiation; the likelihood is quadratic, so that GGN and it agree."""
    x, y = (t.double() for t in regression())
    net = linear().double()
    network = Network(net)
    data = [(x[:30], y[:30]), (x[30:], y[30:])]
    energy, _ = survey(Task(network, (net,), bdl.Gaussian(noise=NOISE), None, data, None, False), data)

    def potential(theta: Tensor) -> Tensor:
        values = {"weight": theta[:2].view(1, 2), "bias": theta[2:]}
        outputs = nn.functional.linear(x, values["weight"], values["bias"])
        return -Normal(outputs, NOISE).log_prob(y).sum() - prior.log_prob(values)

    theta = torch.cat([net.weight.detach().flatten(), net.bias.detach()])
    hessian = torch.autograd.functional.hessian(potential, theta)
    found = largest_curvature(network, energy, data, prior, seeded())
    assert found == pytest.approx(float(torch.linalg.eigvalsh(hessian).max()), rel=1e-8)
    scales = {"weight": torch.tensor([[0.3, 4.0]]).double(), "bias": torch.tensor([2.0]).double()}
    root = torch.tensor([0.3, 4.0, 2.0]).double().sqrt()
    turned = largest_curvature(network, energy, data, prior, seeded(), scales)
    expected = torch.linalg.eigvalsh(root.unsqueeze(1) * hessian * root).max()
    assert turned == pytest.approx(float(expected), rel=1e-8)


def test_default_step_and_its_limit() -> None:
    x, y = regression()
    largest = float(torch.linalg.eigvalsh(torch.linalg.inv(conjugate(x, y)[1])).max())
    bayes = fit(linear(), bdl.SGMCMC("sghmc", num_samples=2, thin=1), [(x, y)])
    assert bayes.cost["lr"] == pytest.approx(0.2 * 40 / largest, rel=1e-5)
    for name, limit in (("sgld", 2.0), ("sghmc", 2 * 1.9), ("baoab", 4.0)):
        method = bdl.SGMCMC(name, num_samples=2, thin=1, lr=limit * 40 / largest * 0.99)
        fit(linear(), method, [(x, y)])
        with pytest.raises(StepSizeError, match=rf"the largest admissible lr is {limit * 40 / largest:.4g}"):
            fit(linear(), replace(method, lr=limit * 40 / largest * 1.01), [(x, y)])


def test_chains_depend_on_their_number_alone() -> None:
    x, y = regression()
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, generator=seeded(5))
    method = bdl.SGMCMC("sghmc", num_samples=3, thin=2)
    one = flat(fit(linear(), method, loader))
    several = fit(linear(), replace(method, chains=3), loader)
    assert several.posterior.chains.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    three = flat(several).view(3, 3, 3)
    assert torch.equal(three[0], one)
    assert not torch.equal(three[1], three[0]) and not torch.equal(three[1], three[2])
    assert torch.equal(flat(fit(linear(), method, loader)), one)  # whatever the loader has done since
    before = loader.generator.get_state()  # type: ignore[union-attr]
    fit(linear(), method, loader)
    assert torch.equal(loader.generator.get_state(), before)  # type: ignore[union-attr]


@pytest.mark.dist
def test_processes_run_the_same_chains() -> None:
    x, y = regression()
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    method = bdl.SGMCMC("sa-sgld", num_samples=3, thin=2, chains=3)
    here, there = (fit(small(), replace(method, workers=n), loader) for n in (1, 2))
    for name, value in here.posterior.snapshots.items():
        assert torch.equal(value, there.posterior.snapshots[name]), name


@pytest.mark.parametrize("name", ["sghmc", "cyclical", "sa-sgld"])
def test_an_interrupted_run_goes_on_bit_for_bit(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    x, y = regression()
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    method = bdl.SGMCMC(name, num_samples=4, thin=5, burn_in=3, cycles=2, explore=0.5, chains=2)
    whole = fit(small(), method, loader)
    calls = 0
    log_prob = bdl.Gaussian.log_prob

    def killed(self: bdl.Gaussian, f: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 24:  # three of the survey, then in the second half of the first chain
            raise KeyboardInterrupt
        return log_prob(self, f, target)

    stored = replace(method, store=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bdl.Gaussian, "log_prob", killed)
        fit(small(), stored, loader)
    again = fit(small(), stored, loader)
    for key, value in whole.posterior.snapshots.items():
        assert torch.equal(value, again.posterior.snapshots[key]), key
    assert torch.equal(whole.posterior.weights, again.posterior.weights)
    finished = fit(small(), stored, loader)  # nothing is left to do
    assert all(torch.equal(v, finished.posterior.snapshots[k]) for k, v in whole.posterior.snapshots.items())


def test_what_moves_and_what_stays() -> None:
    x, y = regression()
    net = small()
    with untouched(net):
        bayes = fit(net, bdl.SGMCMC("sgld", num_samples=3, thin=1, start="prior"), [(x, y)])
        held = bayes.posterior.snapshots
        norm = {"1.running_mean", "1.running_var"}
        assert set(held) == {name for name, _ in net.named_parameters()} | norm
        assert len(held["1.running_mean"].unique(dim=0)) == 3  # statistics of each sample's own pass
        findings = str(bayes.diagnose())
        assert "dropout is off" in findings and "1 batch-norm layers" in findings
        last = fit(net, bdl.SGMCMC("sgld", num_samples=3, thin=1, select="last_layer"), [(x, y)])
        assert set(last.posterior.snapshots) == {"4.weight", "4.bias"}
        assert not any("batch-norm" in f.text for f in last.diagnose().findings)
    started = fit(net, bdl.SGMCMC("sgld", num_samples=2, thin=1, burn_in=0, lr=1e-9, start="prior"), [(x, y)])
    assert float((started.posterior.snapshots["0.weight"][0] - net[0].weight.detach()).abs().min()) > 1e-4


def test_structured_chains_draw_groups_apart() -> None:
    x, y = regression()
    bayes = fit(linear(), bdl.SGMCMC("structured", base="sgld", groups=[["weight"], ["bias"]], num_samples=40, thin=1,
                                     burn_in=0, reservoir=5), [(x, y)])  # fmt: skip
    rows = bayes.posterior.snapshots
    assert len(rows["weight"].unique(dim=0)) == 5 == len(rows["bias"].unique(dim=0))
    pairs = torch.cat([rows["weight"].flatten(1), rows["bias"]], 1).unique(dim=0)
    assert len(pairs) > 10  # of 25 combinations, against 5 steps


@pytest.mark.parametrize(
    ("total", "cycles", "samples", "explore"), [(100, 4, 8, 0.9), (37, 3, 6, 0.5), (10, 2, 8, 0.9)]
)
def test_cycles(total: int, cycles: int, samples: int, explore: float) -> None:
    cycle, share, thin = cycle_of(total, cycles, samples, explore)
    sampling = [i for i in range(cycle) if i / cycle >= share]
    assert len(sampling) == thin * samples / cycles and cycle >= total // cycles
    bayes = fit(linear(), bdl.SGMCMC("cyclical", num_samples=8, thin=3, burn_in=4, cycles=2), [regression()])
    assert len(bayes.posterior.weights) == 8
    by_cycle = bayes.posterior.weights.view(2, 4)
    assert torch.allclose(by_cycle.sum(1), torch.tensor([0.5, 0.5])) and bool((by_cycle.diff(dim=1) < 0).all())


def test_names_are_shorthand() -> None:
    for name in CHAINS:
        made = METHODS[name]()
        assert isinstance(made, bdl.SGMCMC) and made.label == name and made.name == "sgmcmc"
    assert METHODS["cyclical"]() == bdl.SGMCMC("cyclical")
    assert fit(linear(), "sgld", [regression()]).method_name == "sgld"


class Summed(bdl.Likelihood):
    def distribution(self, f: Tensor) -> Distribution:
        return Normal(f, NOISE)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return self.distribution(f).log_prob(y).mean()


def test_refusals() -> None:
    data = [regression()]
    for bad, error, message in (
        (bdl.SGMCMC("sgdl"), UnknownNameError, "sampler 'sgdl' is not known"),
        (bdl.SGMCMC("cyclical", base="structured"), UnknownNameError, "sampler 'structured' is not known"),
        (bdl.SGMCMC(num_samples=1), ArgumentError, "num_samples=1"),
        (bdl.SGMCMC(thin=0), ArgumentError, "thin=0"),
        (bdl.SGMCMC(chains=1.5), ArgumentError, "chains=1.5"),  # type: ignore[arg-type]
        (bdl.SGMCMC(start="cold"), ArgumentError, "start='cold'"),
        (bdl.SGMCMC(schedule="cosine"), ArgumentError, "schedule='cosine'"),
        (bdl.SGMCMC(lr=0.0), ArgumentError, "lr=0.0"),
        (bdl.SGMCMC(explore=1.0), ArgumentError, "explore=1.0"),
        (bdl.SGMCMC("structured", base="sa-sgld"), UnsupportedError, "weights of its steps"),
        (bdl.SGMCMC("structured", store="x"), UnsupportedError, "takes no store"),
        (bdl.SGMCMC(options={"weight_decay": 0.1}), ArgumentError, r"prior_precision=4 \(lam = N wd"),
    ):
        with pytest.raises(error, match=message):
            fit(linear(), bad, data)
    with pytest.raises(LossScaleError, match=r"log_prob of Summed returned shape \(\) for 40 examples"):
        fit(linear(), bdl.SGMCMC(num_samples=2, thin=1), data, likelihood=Summed())
    sharded = DataLoader(
        TensorDataset(*regression()), sampler=DistributedSampler(TensorDataset(*regression()), 2, 0), batch_size=4
    )
    with pytest.raises(ArgumentError, match="every chain needs all of them"):
        fit(linear(), "sgld", sharded)


def test_divergence_is_named() -> None:
    x, y = regression()
    cubed = bdl.as_module(lambda p, x: (x @ p["w"]) ** 3 * 5, {"w": torch.tensor([[0.1], [0.1]])})
    method = bdl.SGMCMC("sgld", lr=0.16, num_samples=60, thin=1, temperature=200.0)
    with pytest.raises((NonFiniteError, StepSizeError), match=r"chain 0 diverged at step \d+: .*lower lr"):
        fit(cubed, method, [(x, y)], prior=bdl.GaussianPrior(0.001))
