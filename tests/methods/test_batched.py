"""Chains that share their passes are the chains they would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.errors import ArgumentError, LabelError, NonFiniteError, UnsupportedError
from bayesdl.methods import batched
from tests.untouched import untouched


class Cast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def net(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).double()


def loader(n: int = 40) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(3, (n,), generator=g)), batch_size=10, shuffle=True)


def sampled(network: nn.Module, sampler: str, parallel: str, **options: object) -> bdl.BayesianModel:
    settings = {"chains": 3, "num_samples": 4, "thin": 3, "burn_in": 5, "lr": 0.02, **options}
    method = bdl.SGMCMC(sampler, parallel=parallel, **settings)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(1)
    return bdl.wrap(network, method, loader(), likelihood="categorical", generator=g, progress=False)


@pytest.mark.parametrize("sampler", ["sgld", "sghmc", "baoab", "sgnht", "psgld", "sa-sgld", "entropy-mcmc", "cyclical"])
def test_the_same_chains_as_one_after_another(sampler: str) -> None:
    network = net()
    with untouched(network):
        together = sampled(network, sampler, "batched").posterior
    alone = sampled(network, sampler, "sequential").posterior
    assert torch.equal(together.chains, alone.chains)
    assert torch.allclose(together.weights, alone.weights)
    for name, value in alone.snapshots.items():
        assert torch.allclose(together.snapshots[name], value, rtol=1e-8, atol=1e-10), name


def test_chains_from_the_prior_and_regression() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=g, dtype=torch.float64)
    data = DataLoader(TensorDataset(x, x[:, :3].sin()), batch_size=10)
    found = [
        bdl.wrap(
            net(),
            bdl.SGMCMC("sghmc", chains=2, num_samples=3, thin=2, burn_in=2, lr=0.001, start="prior", parallel=parallel),
            data,
            likelihood=bdl.Gaussian(0.5),
            generator=torch.Generator().manual_seed(1),
            progress=False,
        )(x).mean
        for parallel in ("batched", "sequential")
    ]
    assert torch.allclose(*found, rtol=1e-8)


def test_on_a_cpu_auto_is_sequential_and_equal_bit_for_bit() -> None:
    auto, alone = (sampled(net(), "sgld", parallel).posterior for parallel in ("auto", "sequential"))
    assert all(torch.equal(auto.snapshots[name], value) for name, value in alone.snapshots.items())


def test_what_cannot_be_batched_says_why() -> None:
    with pytest.raises(UnsupportedError, match="batch norm '1'"):
        sampled(net(nn.BatchNorm1d(6)), "sgld", "batched")
    with pytest.raises(UnsupportedError, match="several passes"):
        sampled(net(), "structured", "batched")
    with pytest.raises(ArgumentError, match="parallel='fast'"):
        sampled(net(), "sgld", "fast")
    with pytest.raises(ArgumentError, match="workers=2"):
        sampled(net(), "sgld", "batched", workers=2)


@pytest.mark.parametrize("sampler", ["sghmc", "sgnht"])
def test_divergence_names_the_chain_and_the_parameter(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three chains has a gradient of NaN at its third step, however chains are moved."""
    original, calls = batched._gradients, []

    def broken(*arguments: Any) -> torch.Tensor:
        found = original(*arguments)
        calls.append(1)
        if len(calls) == 3:
            found[1, 6 * 4 + 2] = torch.nan  # in the first layer's bias
        return found

    monkeypatch.setattr(batched, "_gradients", broken)
    with pytest.raises(NonFiniteError, match=r"chain 1 diverged at step 2: .* 1 of 6 gradients of parameter '0.bias'"):
        sampled(net(), sampler, "batched")


def test_parameters_of_several_dtypes_share_no_memory() -> None:
    with pytest.raises(UnsupportedError, match="2 dtypes or devices"):
        sampled(nn.Sequential(net(), Cast(), nn.Linear(3, 3)), "sgld", "batched")


def test_wrong_labels_are_named() -> None:
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, torch.full((20,), 7)), batch_size=10)
    with pytest.raises(LabelError, match="target 7"):
        method = bdl.SGMCMC("sgld", chains=2, num_samples=2, thin=1, burn_in=0, lr=0.01, parallel="batched")
        bdl.wrap(net(), method, data, likelihood="categorical", progress=False)


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return out


class Tagger(nn.Module):
    """Class scores for every token, named as transformers name their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 6), nn.Linear(6, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.tokens(input_ids)) * attention_mask.unsqueeze(-1))
        return out


def tagged() -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(7, (12, 4), generator=g), torch.randint(3, (12, 4), generator=g)
    labels[0, 1] = -100
    ones = torch.ones(4, 4, dtype=torch.long)
    return [{"input_ids": ids[i : i + 4], "attention_mask": ones, "labels": labels[i : i + 4]} for i in (0, 4, 8)]


def inputs_and(y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return list(zip(x.split(10), y.split(10), strict=True))


G = torch.Generator().manual_seed(2)
BINARY, REAL = torch.randint(2, (30, 1), generator=G).double(), torch.randn(30, 3, dtype=torch.float64, generator=G)
CLASSES = inputs_and(torch.randint(3, (30,), generator=G))


def to(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


CASES: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "bernoulli": (lambda: to(1), inputs_and(BINARY), {"likelihood": "bernoulli"}, {}),
    "poisson": (lambda: to(1), inputs_and(BINARY), {"likelihood": "poisson"}, {}),
    "gaussian": (lambda: to(3), inputs_and(REAL), {"likelihood": bdl.Gaussian(noise=0.5)}, {}),
    "heteroscedastic": (lambda: to(2), inputs_and(REAL[:, :1]), {"likelihood": "heteroscedastic"}, {}),
    "tokens": (lambda: Tagger().double(), tagged(), {"likelihood": "categorical", "batch": "huggingface"}, {}),
    "tied weights": (lambda: Tied().double(), CLASSES, {"likelihood": "categorical"}, {}),
    "last layer": (lambda: to(3), CLASSES, {"likelihood": "categorical"}, {"select": "last_layer"}),
    "laplace prior": (lambda: to(3), CLASSES, {"likelihood": "categorical", "prior": bdl.LaplacePrior(1.0)}, {}),
    "half-Cauchy scales": (
        lambda: to(3),
        CLASSES,
        {"likelihood": "categorical", "prior": bdl.HorseshoePrior()},
        {"burn_in": 25, "lr": 1e-3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_whatever_the_task_the_chains_are_those_of_one_after_another(name: str) -> None:
    make, data, about, own = CASES[name]
    found = []
    for parallel in ("auto", "sequential"):
        torch.manual_seed(0)
        settings = {"chains": 4, "num_samples": 3, "thin": 2, "burn_in": 3, "lr": 0.01, **own}
        method = bdl.SGMCMC("sghmc", parallel=parallel, **settings)
        generator = torch.Generator().manual_seed(1)
        found.append(bdl.wrap(make(), method, data, generator=generator, progress=False, **about))
    assert any("4 chains share one pass a step" in f.text for f in found[0].diagnose().findings)
    for key, value in found[1].posterior.snapshots.items():
        assert torch.allclose(found[0].posterior.snapshots[key], value, rtol=1e-8, atol=1e-10), key
