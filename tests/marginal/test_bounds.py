"""Minibatch bounds of the evidence: never above it, equal to it for one batch of everything, with its gradients."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.errors import ArgumentError
from bayesdl.evidence import log_evidence
from bayesdl.marginal import MinibatchEvidence
from bayesdl.posteriors import GaussianPosterior

N = 24
G = torch.Generator().manual_seed(0)
IMAGES = torch.randn(N, 1, 5, 5, dtype=torch.float64, generator=G)
X = torch.randn(N, 3, dtype=torch.float64, generator=G)
TARGETS = {
    "categorical": torch.randint(0, 3, (N,), generator=G),
    "gaussian": torch.randn(N, 3, dtype=torch.float64, generator=G),
    "poisson": torch.randint(0, 4, (N, 3), generator=G).double(),
}
NOISE = torch.tensor([0.5, 0.8, 1.3], dtype=torch.float64)


def network(images: bool = False) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if images:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double(), IMAGES
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), X


def prior_of(kind: str, size: int) -> Tensor:
    count = {"scalar": 1, "layer": 2, "parameter": size}[kind]
    return torch.linspace(0.3, 2.0, count, dtype=torch.float64)


def exact(net: nn.Module, x: Tensor, likelihood: str, precision: Tensor, noise: Tensor | None) -> Tensor:
    """The evidence of `full` Laplace over all data."""
    prior = bdl.GaussianPrior(precision=1.0)
    method = bdl.Laplace(structure="full")
    bayes = bdl.wrap(net, method, [(x, TARGETS[likelihood])], likelihood=likelihood, prior=prior, progress=False)
    assert isinstance(bayes.posterior, GaussianPosterior)
    return log_evidence(bayes.posterior, bayes.network, precision, noise)


def evidence(net: nn.Module, x: Tensor, likelihood: str, **options: Any) -> MinibatchEvidence:
    return MinibatchEvidence(net, likelihood, example=x, num_data=N, **options)


def noise_of(likelihood: str) -> Tensor | None:
    return NOISE if likelihood == "gaussian" else None


@pytest.mark.parametrize("kind", ["scalar", "layer", "parameter"])
@pytest.mark.parametrize("likelihood", sorted(TARGETS))
@pytest.mark.parametrize("images", [False, True])
def test_one_batch_of_everything_is_the_evidence(images: bool, likelihood: str, kind: str) -> None:
    net, x = network(images)
    made = evidence(net, x, likelihood, rows=kind == "parameter")
    precision = prior_of(kind, made.layout.numel)
    value = made.kernel(x, TARGETS[likelihood]).bound(precision, noise_of(likelihood))
    truth = exact(net, x, likelihood, precision, noise_of(likelihood))
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("likelihood", sorted(TARGETS))
def test_bounds_over_many_partitions(likelihood: str, rows: bool) -> None:
    net, x = network()
    y, noise, precision = TARGETS[likelihood], noise_of(likelihood), torch.tensor([0.2, 0.6], dtype=torch.float64)
    truth = float(exact(net, x, likelihood, precision, noise))
    joint, split = evidence(net, x, likelihood, rows=rows), evidence(net, x, likelihood, rows=rows, by_output=True)
    g = torch.Generator().manual_seed(1)
    for _ in range(8):
        order = torch.randperm(N, generator=g)
        means = []
        for size in (2, 6, 12):  # each partition refines the next
            batches = order.split(size)
            bounds = [[float(e.kernel(x[b], y[b]).bound(precision, noise)) for b in batches] for e in (joint, split)]
            means += [sum(values) / len(batches) for values in bounds]
        (fine, fine_split), (middle, middle_split), (coarse, coarse_split) = means[:2], means[2:4], means[4:]
        assert fine < middle < coarse < truth
        assert fine_split < middle_split < coarse_split
        assert fine_split < fine and middle_split < middle and coarse_split < coarse
    whole = float(split.kernel(x, y).bound(precision, noise))
    assert coarse_split < whole < truth


def test_a_random_batch_is_unbiased() -> None:
    # over all batches of two out of four, as over all partitions into two such batches
    net, x = network()
    y, precision = TARGETS["categorical"], torch.tensor(0.5, dtype=torch.float64)
    made = MinibatchEvidence(net, "categorical", example=x, num_data=4)
    pairs = {
        pair: float(made.kernel(x[list(pair)], y[list(pair)]).bound(precision)) for pair in combinations(range(4), 2)
    }
    scatter = 0.25 * sum(float(p.detach().square().sum()) for p in net.parameters())
    parts = {pair: float(made.kernel(x[list(pair)], y[list(pair)]).part(precision)) for pair in pairs}
    partitions = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    truth = sum(parts[a] + parts[b] for a, b in partitions) / 3 - scatter
    assert sum(pairs.values()) / 6 == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "layer", "parameter"])
def test_gradients(kind: str, by_output: bool) -> None:
    net, x = network()
    made = evidence(net, x, "gaussian", by_output=by_output, rows=kind == "parameter")
    kernel = made.kernel(x[:5], TARGETS["gaussian"][:5])
    precision = prior_of(kind, made.layout.numel).requires_grad_()
    noise = NOISE.clone().requires_grad_()
    assert torch.autograd.gradcheck(kernel.bound, (precision, noise))
    assert torch.autograd.gradcheck(
        lambda s: kernel.bound(0.7, s), (torch.tensor(0.9, dtype=torch.float64, requires_grad=True),)
    )


def test_minibatches_find_the_evidence_s_optimum_nearly() -> None:
    # halves: the bound's maximum lies near the evidence's, on the side of stronger priors (smaller determinants)
    net, x = network()
    made = evidence(net, x, "categorical")
    y = TARGETS["categorical"]
    kernels = [made.kernel(x[b], y[b]) for b in torch.arange(N).split(N // 2)]
    leaf = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([leaf], lr=0.05)
    for step in range(400):
        optimizer.zero_grad()
        (-kernels[step % 2].bound(leaf.exp())).backward()
        optimizer.step()
    prior = bdl.GaussianPrior(precision=1.0)
    method = bdl.Laplace(structure="full")
    bayes = bdl.wrap(net, method, [(x, y)], likelihood="categorical", prior=prior, progress=False)
    best = bayes.tune("evidence", prior="layer")
    found = log_evidence(bayes.posterior, bayes.network, leaf.detach().exp())
    start = float(bayes.log_evidence())
    assert float(best.log_evidence()) - float(found) < 0.2 * (float(best.log_evidence()) - start)


def test_refusals_and_the_user_s_network() -> None:
    net, x = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    y = TARGETS["categorical"]
    kernel = evidence(net, x, "categorical").kernel(x, y)
    with pytest.raises(ArgumentError, match="rows=True"):
        kernel.bound(torch.ones(31, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="must be positive"):
        kernel.bound(-1.0)
    with pytest.raises(ArgumentError, match="has none that is open"):
        kernel.bound(1.0, 0.5)
    with pytest.raises(ArgumentError, match="pass noise="):
        evidence(net, x, "gaussian").kernel(x, TARGETS["gaussian"]).bound(1.0)
    with pytest.raises(ArgumentError, match="num_data=0"):
        MinibatchEvidence(net, "categorical", example=x, num_data=0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert evidence(net, x, "categorical").layers == ("0", "2")
