"""Many outputs: class subsets without bias, a last layer without C x C matrices, and budgets that hold."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import estimate
from bayesdl.curvature.chunking import chunk_size, cotangent_width
from bayesdl.curvature.layout import Block, Layout
from bayesdl.curvature.registry import empty
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.likelihoods import Bernoulli, Categorical
from bayesdl.posteriors import GaussianPosterior
from bayesdl.posteriors.linear import Jacobians
from tests import oracles
from tests.position_networks import CLASSES, tagger


def outer(root: Tensor) -> Tensor:
    return torch.einsum("k...c,k...d->...cd", root, root)


def problem(outputs: int = 7) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    source = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, dtype=torch.float64, generator=source)
    return net, x, torch.randint(0, outputs, (12,), generator=source)


# --- class subsets ---


def test_all_classes_are_exact() -> None:
    f = torch.randn(5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = oracles.lambda_formula("categorical", f)
    torch.testing.assert_close(outer(Categorical().subset_root(f, 6, None)), expected)
    torch.testing.assert_close(outer(Categorical().subset_root(f, 99, None)), expected)
    assert Categorical().subset_root(f, 2, None).shape == (3, 5, 3, 6)


@pytest.mark.parametrize("classes", [1, 3])
def test_a_subset_is_unbiased(classes: int) -> None:
    f = 2.0 * torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    many = f.expand(40_000, 4, 6)
    found = outer(Categorical().subset_root(many, classes, torch.Generator().manual_seed(1)))
    error = (found.mean(0) - oracles.lambda_formula("categorical", f)).abs()
    # 144 entries, each a mean of 40,000 independent draws: beyond 6 standard errors with p < 3e-7 in all (fixed seed)
    assert bool((error <= 6.0 * found.std(0) / math.sqrt(len(many)) + 1e-12).all())
    assert float(found.std(0).max()) > 1e-3  # there is something to average


def test_nothing_left_to_draw_from() -> None:
    f = torch.tensor([[2000.0, 0.0, -5.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
    root = Categorical().subset_root(f, 1, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(root).all())
    assert float(root[:, 0].abs().max()) == 0.0


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "ekfac"])
def test_curvature_of_a_subset(structure: str) -> None:
    net, x, y = problem()
    options: dict[str, Any] = {"structure": structure, "progress": False}
    exact = estimate(net, [(x, y)], "categorical", **options).to_dense()
    torch.testing.assert_close(estimate(net, [(x, y)], "categorical", classes=7, **options).to_dense(), exact)
    if structure != "full":
        return
    found = torch.stack(
        [
            estimate(net, [(x, y)], "categorical", classes=2, generator=torch.Generator().manual_seed(s), **options)
            .to_dense()
            .flatten()
            for s in range(150)
        ]
    )
    error = (found.mean(0) - exact.flatten()).abs()
    # 2,601 entries, 150 means of 12 draws: beyond 6 standard errors with p < 1e-4 in all (fixed seeds)
    assert bool((error <= 6.0 * found.std(0) / math.sqrt(len(found)) + 1e-12).all())


@pytest.mark.parametrize("memory", [1, None])
def test_a_subset_at_every_position(memory: int | None) -> None:
    net, x, y = tagger()
    options: dict[str, Any] = {"structure": "full", "progress": False, "memory": memory}
    exact = estimate(net, [(x, y)], "categorical", **options).to_dense()
    every = estimate(net, [(x, y)], "categorical", classes=CLASSES, **options).to_dense()
    torch.testing.assert_close(every, exact)
    one = estimate(net, [(x, y)], "categorical", classes=1, **options).to_dense()
    # the same draws whatever goes back at once
    torch.testing.assert_close(one, estimate(net, [(x, y)], "categorical", **options | {"classes": 1}).to_dense())
    assert float((one - exact).abs().max()) > 1e-3 * float(exact.abs().max())


def test_a_subset_by_the_method() -> None:
    net, x, y = problem()
    prior = bdl.GaussianPrior(precision=1.0)
    method = bdl.Laplace(structure="full", classes=7)
    found = bdl.wrap(net, method, [(x, y)], likelihood="categorical", prior=prior, progress=False)
    other = bdl.wrap(
        net, bdl.Laplace(structure="full"), [(x, y)], likelihood="categorical", prior=prior, progress=False
    )
    torch.testing.assert_close(found(x).latent.covariance, other(x).latent.covariance)


def test_where_there_is_no_subset() -> None:
    net, x, y = problem()
    for options in ({"classes": 0}, {"classes": 2, "kind": "mc"}, {"classes": True}):
        with pytest.raises(ArgumentError, match="classes="):
            estimate(net, [(x, y)], "categorical", progress=False, **options)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match='kind="mc"'):
        Bernoulli().subset_root(torch.zeros(2, 3), 1, None)


# --- the last layer, one output at a time ---


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_variances_of_a_diagonal_last_layer_need_no_square_of_classes(
    bias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = problem()
    method = bdl.Laplace(select="last_layer", structure="diag", bias=bias)
    options: dict[str, Any] = {
        "likelihood": "categorical",
        "progress": False,
        "prior": bdl.GaussianPrior(precision=0.5),
    }
    model = bdl.wrap(net, method, [(x, y)], **options)
    features = net[1](net[0](x)).detach()
    rows = torch.cat([features, features.new_ones(len(x), 1)], -1)
    p = torch.softmax(net(x).detach(), -1)
    curvature = (p * (1 - p)).T @ rows.square()
    expected = rows.square() @ (1.0 / (curvature + 0.5)).T
    torch.testing.assert_close(model(x).latent.variance, expected)
    monkeypatch.setattr("bayesdl.posteriors.gaussian.JOINT_OUTPUTS", 2)
    monkeypatch.setattr("torch.eye", lambda *_, **__: pytest.fail("a C x C matrix was formed"))
    again = bdl.wrap(net, method, [(x, y)], **options)
    latent = again(x).latent
    assert latent.covariance is None
    torch.testing.assert_close(latent.variance, expected)
    mean_field = net(x).detach() / torch.sqrt(1 + math.pi / 8 * expected)
    torch.testing.assert_close(again(x).mean, torch.softmax(mean_field, -1))
    drawn = again.draw(2)[0](x)
    assert drawn.shape == (12, 7)


@pytest.mark.parametrize("rule", ["heldout", "training", "evidence"])
def test_tuning_without_a_square_of_classes(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = problem()
    method = bdl.Laplace(select="last_layer", structure="diag")
    options: dict[str, Any] = {
        "likelihood": "categorical",
        "progress": False,
        "prior": bdl.GaussianPrior(precision=0.5),
    }
    arguments = () if rule == "evidence" else ([(x, y)],)
    expected = bdl.wrap(net, method, [(x, y)], **options).tune(rule, *arguments).posterior
    monkeypatch.setattr("bayesdl.posteriors.gaussian.JOINT_OUTPUTS", 2)
    monkeypatch.setattr("bayesdl.tuning.grid.JOINT_OUTPUTS", 2)
    found = bdl.wrap(net, method, [(x, y)], **options).tune(rule, *arguments).posterior
    assert isinstance(found, GaussianPosterior) and isinstance(expected, GaussianPosterior)
    torch.testing.assert_close(found.precision, expected.precision)


def test_a_layer_that_is_not_the_last_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Centred(nn.Module):
        """As many outputs as its only layer, and not those."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            f = self.head(x)
            return 2.0 * (f - f.mean(-1, keepdim=True))

    torch.manual_seed(0)
    net, (_, x, _) = Centred().double(), problem()
    y = torch.arange(12) % 5
    jac = oracles.jacobian(net, x, ["head.weight", "head.bias"])
    expected = oracles.ggn(jac, oracles.lambda_formula("categorical", net(x).detach())).diagonal()
    monkeypatch.setattr("bayesdl.posteriors.gaussian.JOINT_OUTPUTS", 2)
    method = bdl.Laplace(select="head", structure="diag")
    options: dict[str, Any] = {
        "likelihood": "categorical",
        "progress": False,
        "prior": bdl.GaussianPrior(precision=0.5),
    }
    model = bdl.wrap(net, method, [(x, y)], **options)
    assert isinstance(model.posterior, GaussianPosterior)
    torch.testing.assert_close(model.posterior.curvature.to_dense().diagonal(), expected)
    variance = torch.einsum("ncp,p->nc", jac.square(), 1.0 / (expected + 0.5))
    torch.testing.assert_close(model(x).latent.variance, variance)


def test_kron_refuses_what_does_not_fit() -> None:
    block = Block("head", "linear", ("w",), ((50_000, 1024),), ("head",), 1, 50_000, 1024)
    layout = Layout((block,), ("w",), ((50_000, 1024),))
    with pytest.raises(UnsupportedError, match=r"'head' \(50000 outputs.*10\.0 GB.*\"diag\""):
        empty("kron", layout, torch.float32, torch.device("meta"))
    assert empty("diag", layout, torch.float32, torch.device("meta")).layout is layout


# --- budgets ---


def test_cotangents_at_once_follow_the_budget() -> None:
    layout = Layout((), (), (), activations=1000, outputs=100, positions=4)
    example = 3 * 1000 * 4  # bytes per example and cotangent
    assert cotangent_width(layout, "kron", torch.float32, torch.Size((2, 4, 100)), 10 * example) == 5
    assert cotangent_width(layout, "kron", torch.float32, torch.Size((2, 4, 100)), 20 * example) == 10
    assert cotangent_width(layout, "kron", torch.float64, torch.Size((2, 4, 100)), 20 * example) == 5
    # sequences twice as long as the planned one, shorter ones, and a budget for nothing
    assert cotangent_width(layout, "kron", torch.float32, torch.Size((2, 8, 100)), 20 * example) == 5
    assert cotangent_width(layout, "kron", torch.float32, torch.Size((2, 1, 100)), 20 * example) == 10
    assert cotangent_width(layout, "kron", torch.float32, torch.Size((2, 8, 100)), 1) == 1
    # examples at once are planned for the outputs of one position
    assert chunk_size(layout, "kron", torch.float32, memory=300 * example) == 3


@pytest.mark.parametrize("memory_in_columns", [2, 5])
def test_many_outputs_of_a_deep_selection_go_back_a_few_at_a_time(
    memory_in_columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = problem()
    monkeypatch.setattr("bayesdl.posteriors.gaussian.JOINT_OUTPUTS", 2)
    options: dict[str, Any] = {
        "likelihood": "categorical",
        "progress": False,
        "prior": bdl.GaussianPrior(precision=0.5),
    }
    expected = bdl.wrap(net, bdl.Laplace(), [(x, y)], **options)
    assert isinstance(expected.posterior, GaussianPosterior)
    example = 3 * expected.posterior.layout.activations * 8
    widths: list[int] = []
    factors = Jacobians._factors

    def counted(self: Jacobians, inputs: Tensor, *cotangents: Any) -> Any:
        found = factors(self, inputs, *cotangents)
        widths.append(found[1][0].g.shape[1] * len(found[0]))
        return found

    monkeypatch.setattr(Jacobians, "_factors", counted)
    method = bdl.Laplace(memory=memory_in_columns * example)
    model = bdl.wrap(net, method, [(x, y)], **options)
    found = model(x).latent
    assert max(widths) <= memory_in_columns
    torch.testing.assert_close(found.variance, expected(x).latent.variance)
    torch.testing.assert_close(found.mean, expected(x).latent.mean)


# --- the whole of it ---


@pytest.mark.slow
def test_fifty_thousand_classes_in_two_gigabytes() -> None:
    """Peak resident memory of the whole process: Python, torch, the network's own 0.2 GB, fit, tuning, prediction."""
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks" / "many_outputs.py"), "--quick"]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    figures = json.loads(run.stdout)
    assert figures["shape"]["classes"] == 50_000
    assert figures["peak resident memory of the process, GB"]["prediction"] < 2.0
