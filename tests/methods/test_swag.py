"""SWAG: moments against recorded iterates, covariance of its draws, refreshed statistics, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError, NonFiniteError
from bayesdl.methods.base import Task
from bayesdl.methods.finetune import with_fresh_statistics
from bayesdl.methods.swag import SWAG, Moments
from bayesdl.network import Network
from bayesdl.posteriors import SamplePosterior
from tests.untouched import untouched


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


G = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, generator=G)
Y = torch.randint(2, (40,), generator=G)
DATA = list(zip(X.split(10), Y.split(10), strict=True))


def task(net: nn.Module, data: Any = DATA, likelihood: str = "categorical", **options: Any) -> Task:
    return Task(Network(net, **options), (net,), bdl.likelihoods.resolve(likelihood), None, data, None, False)


def iterates(net: nn.Module, method: SWAG, weight_decay: float = 0.0) -> list[Tensor]:
    """Flat weights after every step of plain SGD, in double precision."""
    twin = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=method.lr, momentum=method.momentum, weight_decay=weight_decay)
    found = []
    for _ in range(method.epochs):
        for x, y in DATA:
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(x), y).backward()
            optimizer.step()
            found.append(torch.cat([p.detach().reshape(-1) for p in twin.parameters()]).double())
    return found


@pytest.mark.parametrize("collects", [1, 2, 4, 9])
def test_moments_are_those_of_the_iterates(collects: int) -> None:
    method = SWAG(epochs=3, lr=0.1, rank=5, collects=collects, weight_decay=0.01)
    net = linear()
    with untouched(net):
        moments = method._train(task(net), DATA)
    steps = iterates(net, method, weight_decay=0.01)
    every = 4 // min(collects, 4)  # four batches an epoch
    kept = torch.stack(steps[every - 1 :: every])
    assert moments.count == len(kept)
    assert torch.allclose(moments.mean, kept.mean(0), atol=1e-6)
    assert torch.allclose(moments.variance, kept.var(0, unbiased=False), rtol=1e-3, atol=1e-9)
    running = kept.cumsum(0) / torch.arange(1, len(kept) + 1).unsqueeze(1)
    expected = (kept - running)[-5:]
    assert torch.allclose(torch.stack(list(moments.deviations)), expected, atol=1e-6)


def test_covariance_of_the_draws() -> None:
    # 20000 draws of 6 weights: entries of a sample covariance err by at most sqrt(2/20000) of the largest variance;
    # five such errors on 36 entries: false alarm below 3e-5
    moments = Moments(("w",), 3)
    rows = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row in rows:
        moments.collect([row])
    method = SWAG(rank=3)
    source = torch.Generator().manual_seed(2)
    draws = torch.stack([method._sample(moments, method._noise(moments, source))["w"] for _ in range(20_000)])
    low = torch.stack(list(moments.deviations))
    expected = 0.5 * torch.diag(moments.variance) + low.T @ low / (2 * (3 - 1))
    error = 5 * (2 / 20_000) ** 0.5 * float(expected.diagonal().max())
    assert torch.allclose(torch.cov(draws.T), expected, atol=error)
    assert torch.allclose(draws.mean(0), moments.mean, atol=5 * (float(expected.diagonal().max()) / 20_000) ** 0.5)
    only = SWAG(rank=3, diagonal=True)
    draws = torch.stack([only._sample(moments, only._noise(moments, source))["w"] for _ in range(20_000)])
    assert torch.allclose(torch.cov(draws.T), torch.diag(moments.variance), atol=error)


def test_near_equal_weights_keep_their_variance() -> None:
    moments = Moments(("w",), 2)
    for k in range(4):
        moments.collect([torch.full((1,), 1e6 + k, dtype=torch.float64)])
    assert float(moments.variance) == pytest.approx(1.25, rel=1e-12)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(x)))


def test_statistics_are_recomputed_for_new_weights() -> None:
    net = Norms()
    for _ in range(3):
        net(X + 10.0)  # statistics and counters of training, which must leave no trace
    given = {name: value.detach() + 0.5 for name, value in net.named_parameters()}
    with untouched(net):
        state = with_fresh_statistics(task(net), DATA, given)
    weight, bias = given["norm.0.weight"], given["norm.0.bias"]
    hidden = [x @ weight.T + bias for x, _ in DATA]
    assert torch.allclose(state["norm.1.running_mean"], torch.stack([h.mean(0) for h in hidden]).mean(0), atol=1e-6)
    assert torch.allclose(state["norm.1.running_var"], torch.stack([h.var(0) for h in hidden]).mean(0), atol=1e-6)
    assert set(state) == set(given) | {f"norm.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert all(torch.equal(state[name], given[name]) for name in given)


def test_every_sample_has_statistics_of_its_own() -> None:
    net = Norms()
    method = bdl.SWAG(epochs=1, lr=0.1, num_samples=3)
    posterior = bdl.wrap(net, method, DATA, likelihood="categorical", progress=False).posterior
    assert isinstance(posterior, SamplePosterior)
    means = posterior.snapshots["norm.1.running_mean"]
    assert not torch.allclose(means[0], means[1])


def test_selected_weights_alone_move() -> None:
    net = linear()
    method = bdl.SWAG(epochs=1, lr=0.1, num_samples=2)
    bayes = bdl.wrap(net, method, DATA, likelihood="categorical", select="2", progress=False)
    assert isinstance(bayes.posterior, SamplePosterior)
    assert set(bayes.posterior.snapshots) == {"2.weight", "2.bias"}


def test_frozen_and_compiled_networks_train_on_a_copy() -> None:
    net = linear()
    net[0].weight.requires_grad_(False)
    part = nn.Sequential(torch.compile(net[0], backend="eager"), *list(net)[1:])
    with untouched(net):
        bayes = bdl.wrap(part, bdl.SWAG(epochs=1, num_samples=2), DATA, likelihood="categorical", progress=False)
    assert isinstance(bayes.posterior, SamplePosterior)
    assert not torch.equal(bayes.posterior.snapshots["0.weight"][0], net[0].weight)


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"lr": -1.0}, {"lr": float("nan")}, {"epochs": 0}, {"rank": 1}, {"collects": 0}]
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="rank at least 2, lr positive"):
        bdl.wrap(linear(), bdl.SWAG(**wrong), DATA, likelihood="categorical", progress=False)


def test_divergence_says_to_lower_the_learning_rate() -> None:
    net = nn.Sequential(nn.Linear(3, 1))
    data = [(100 * X, Y.float())]
    with untouched(net), pytest.raises(NonFiniteError, match="lower (the learning rate|lr)"):
        bdl.wrap(net, bdl.SWAG(epochs=200, lr=10.0), data, likelihood=bdl.Gaussian(1.0), progress=False)


def test_loaders_without_a_length_give_one_snapshot_an_epoch() -> None:
    class Endless:
        def __iter__(self) -> Any:
            return iter(DATA)

    moments = SWAG(epochs=3, collects=2)._train(task(linear()), Endless())
    assert moments.count == 3
