"""Outputs at every position: the curvature is that of the flattened outputs, Lambda block diagonal over positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.curvature import estimate
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.plan import plan
from bayesdl.errors import LabelError
from bayesdl.likelihoods import Categorical
from bayesdl.network import Network
from tests import oracles
from tests.position_networks import CASES, CLASSES, ClassesFirst, tagger


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    return CASES[request.param]()


def flat_jacobian(net: nn.Module, x: Tensor, names: Any = None) -> tuple[Tensor, Tensor]:
    """J `(B, T, C, P)` and f `(B, T, C)` of the flattened outputs."""
    f = oracles.outputs(net, x)
    axis = 1 if f.dim() == 4 else -1
    names = names or [name for name, _ in net.named_parameters()]
    module = oracles.evaluated(net)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, value: Tensor) -> Tensor:
            return self.inner(value).movedim(axis, -1).flatten(1)

    jac = oracles.jacobian(Flat(), x, [f"inner.{name}" for name in names])
    f = f.movedim(axis, -1).flatten(1, -2)
    return jac.unflatten(1, f.shape[1:]), f


def dense_ggn(net: nn.Module, x: Tensor, y: Tensor, names: Any = None) -> Tensor:
    jac, f = flat_jacobian(net, x, names)
    counted = (y.flatten(1) != -100).double()
    lam = oracles.lambda_formula("categorical", f) * counted[..., None, None]
    return torch.einsum("btcp,btcd,btdq->pq", jac, lam, jac)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


def dense(net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    return estimate(net, data, "categorical", progress=False, **options).to_dense()


# one cotangent at a time, a few, all at once
@pytest.mark.parametrize("memory", [1, 20_000, None])
def test_exact_ggn_of_all_layers(case: tuple[nn.Module, Tensor, Tensor], memory: int | None) -> None:
    net, x, y = case
    expected = dense_ggn(net, x, y)
    close(dense(net, x, y, structure="full", memory=memory), expected)
    close(dense(net, x, y, structure="diag", memory=memory), torch.diag(expected.diagonal()))
    low = dense(net, x, y, structure="lowrank", rank=len(expected), memory=memory)
    torch.testing.assert_close(low, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("memory", [1, 20_000, None])
def test_exact_ggn_of_the_last_layer(case: tuple[nn.Module, Tensor, Tensor], memory: int | None) -> None:
    net, x, y = case
    names = ["head.weight", "head.bias"]
    expected = dense_ggn(net, x, y, names)
    for bias in ("joint", "separate"):
        close(dense(net, x, y, structure="full", select="head", bias=bias, memory=memory), expected)
        diagonal = torch.diag(expected.diagonal())
        close(dense(net, x, y, structure="diag", select="head", bias=bias, memory=memory), diagonal)


def test_kron_keeps_its_factors_whatever_goes_back_at_once(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    for structure in ("kron", "ekfac"):
        close(dense(net, x, y, structure=structure, memory=1), dense(net, x, y, structure=structure))


def test_kron_counts_inputs_once_however_many_cotangents_go_back() -> None:
    net, x, y = tagger()
    data = [(x, y), (x[:, :2], y[:, :2])]  # 12 and 6 cotangents an example
    for structure in ("kron", "ekfac"):
        options: dict[str, Any] = {"structure": structure, "progress": False}
        few = estimate(net, data, "categorical", memory=1, **options).to_dense()
        close(few, estimate(net, data, "categorical", **options).to_dense())


def test_kron_of_the_last_layer_counts_positions_as_data(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    _, f = flat_jacobian(net, x, ["head.weight"])
    counted = y.flatten() != -100
    vectors = torch.zeros(1, *oracles.outputs(net, x).shape, dtype=torch.float64)
    ((module, value, _),) = oracles.captures(net, "head", x, vectors)
    rows = oracles.patches(module, value)[0]
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], -1)[counted]
    outer = oracles.lambda_formula("categorical", f).flatten(0, 1)[counted].sum(0)
    expected = oracles.kron_block([(rows.T @ rows / len(rows), outer)])
    close(dense(net, x, y, structure="kron", select="head"), expected)


def test_kron_of_all_layers_by_its_definition() -> None:
    net, x, y = tagger()
    keep = (y != -100).any(1)  # an example without a counted position is none at all
    x, y = x[keep], y[keep]
    _, f = flat_jacobian(net, x)
    lam = oracles.lambda_formula("categorical", f) * (y != -100)[..., None, None]
    values, basis = torch.linalg.eigh(lam)
    root = basis * values.clamp(min=0).sqrt().unsqueeze(-2)  # (B, T, C, K)
    vectors = torch.zeros(4, CLASSES, *f.shape, dtype=torch.float64)
    for t in range(4):
        vectors[t, :, :, t] = root[:, t].permute(2, 0, 1)
    expected = oracles.kron_block(oracles.linear_kron(oracles.captures(net, "mix", x, vectors.flatten(0, 1))))
    close(dense(net, x, y, structure="kron", select="mix"), expected)


def test_empirical_takes_one_score_per_example(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    jac, f = flat_jacobian(net, x)
    counted = y.flatten(1) != -100
    onehot = torch.nn.functional.one_hot(y.flatten(1).clamp(min=0), CLASSES)
    scores = (torch.softmax(f, -1) - onehot) * counted.unsqueeze(-1)
    expected = oracles.outer_gradients(jac.flatten(1, 2), scores.flatten(1))
    close(dense(net, x, y, structure="full", kind="empirical"), expected)


@pytest.mark.parametrize("select", ["all", "head"])
def test_monte_carlo_fisher_is_unbiased(case: tuple[nn.Module, Tensor, Tensor], select: str) -> None:
    net, x, y = case
    expected = dense_ggn(net, x, y, ["head.weight", "head.bias"] if select == "head" else None)
    options: dict[str, Any] = {"structure": "full", "kind": "mc", "select": select, "samples": 50}
    found = [dense(net, x, y, generator=torch.Generator().manual_seed(seed), **options) for seed in range(40)]
    mean, spread = torch.stack(found).mean(0), torch.stack(found).std(0) / math.sqrt(len(found))
    # P^2 < 2e4 entries, each beyond 6 standard errors of 40 means with probability < 1e-6 (Student t, fixed seeds)
    assert bool(((mean - expected).abs() <= 6.0 * spread + 1e-12).all())


def test_draws_at_ignored_positions_count_nothing() -> None:
    net, x, y = tagger()
    y = torch.full_like(y, -100)
    y[0, 0] = 1
    found = dense(net, x, y, structure="full", kind="mc", samples=3)
    jac, _ = flat_jacobian(net, x)
    rows = jac[0, 0]  # the only position that counts
    outside = torch.eye(len(found), dtype=found.dtype) - torch.linalg.pinv(rows) @ rows
    assert float((found @ outside).abs().max()) < 1e-10 * float(found.abs().max())
    assert float(found.abs().max()) > 0


def test_what_is_ignored_changes_nothing_else() -> None:
    net, x, y = tagger()
    net.table.weight.data[5] = 0.3  # type: ignore[union-attr, operator]
    pointwise = nn.Sequential(net.table, nn.Linear(4, 3).double())  # type: ignore[list-item]
    flat = (x.flatten()[y.flatten() != -100], y.flatten()[y.flatten() != -100])
    for structure in ("full", "diag", "lowrank"):
        rank = {"rank": 3} if structure == "lowrank" else {}
        expected = estimate(pointwise, [flat], "categorical", structure=structure, progress=False, **rank).to_dense()
        torch.testing.assert_close(dense(pointwise, x, y, structure=structure, **rank), expected, rtol=1e-6, atol=1e-9)


def test_counts_and_log_likelihood_are_those_of_the_counted_positions(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    network = Network(net, output_axis="auto")
    layout = plan(network, x)
    options: dict[str, Any] = {"structure": "diag", "kind": "ggn", "progress": False}
    fit = fit_curvature(network, layout, [(x[:2], y[:2]), (x[2:], y[2:])], Categorical(), **options)
    axis = 1 if oracles.outputs(net, x).dim() == 4 else -1
    f = oracles.outputs(net, x).movedim(axis, 1)
    assert fit.num_data == int((y != -100).sum())
    expected = -torch.nn.functional.cross_entropy(f, y, reduction="sum")
    assert fit.log_likelihood == pytest.approx(float(expected), rel=1e-10)


def test_classes_first_by_an_argument() -> None:
    net, x, y = tagger()
    likelihood = Categorical(class_axis=1)
    first = estimate(ClassesFirst(net), [(x, y)], likelihood, structure="full", progress=False).to_dense()
    close(first, dense_ggn(net, x, y))


def test_another_ignored_target() -> None:
    net, x, y = tagger()
    other = y.clone()
    other[y == -100] = 0
    found = estimate(net, [(x, other)], Categorical(ignore_index=0), structure="full", progress=False).to_dense()
    close(found, dense_ggn(net, x, torch.where(other == 0, -100, other)))


def test_no_target_that_counts() -> None:
    net, x, y = tagger()
    with pytest.raises(LabelError, match="ignored"):
        dense(net, x, torch.full_like(y, -100))
