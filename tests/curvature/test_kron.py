"""Kronecker factors against their definition, row by row, and where they must be exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import estimate
from bayesdl.curvature.kron import Kron
from bayesdl.errors import ArgumentError, UnknownNameError, UnsupportedError
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from tests import oracles
from tests.cases import BY_NAME, real, targets

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# layer and whether it has a bias
DEFINED = [
    ("mlp", "0", True),
    ("mlp", "2", True),
    ("linear_without_bias", "", False),
    ("conv1d", "0", True),
    ("conv1d_same", "0", True),
    ("conv2d", "0", True),
    ("conv2d_groups", "0", False),
    ("conv2d_depthwise", "0", True),
    ("conv2d_reflect", "0", True),
    ("conv3d", "0", True),
    ("layer_twice", "inner", True),
    ("shared_module", "first", True),
    ("tied_layers", "first", True),
    ("sequence", "inner", True),
    ("sequence_first", "head", True),
    ("flat_tokens", "inner", True),
    ("frames", "conv", True),
    ("frames", "head", True),
]


def roots(f: Tensor) -> Tensor:
    """Cotangents `(K, N, C)` of the categorical Hessian by eigenvalues, another root than the library's."""
    values, vectors = torch.linalg.eigh(oracles.lambda_formula("categorical", f))
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(1)).permute(2, 0, 1)


def fitted(net: nn.Module, x: Any, y: Tensor, likelihood: str = "categorical", **options: Any) -> Kron:
    found = estimate(net, [(x, y)], likelihood, structure="kron", progress=False, **options)
    assert isinstance(found, Kron)
    return found


@pytest.mark.parametrize(("name", "layer", "bias"), DEFINED)
def test_block_equals_the_definition(name: str, layer: str, bias: bool) -> None:
    case = BY_NAME[name]
    net, x = case.network(), case.data()
    own = {id(p) for p in net.get_submodule(layer).parameters()}
    names = [n for n, p in net.named_parameters() if id(p) in own]
    found = fitted(net, x, targets("categorical"), select=names)
    calls = oracles.captures(net, layer, x, roots(oracles.outputs(net, x)))
    factors = oracles.linear_kron(calls, bias)
    block = oracles.kron_block(factors, bias)
    torch.testing.assert_close(found.to_dense(), block, rtol=1e-8, atol=1e-12)
    trace = sum(inner.trace() * outer.trace() for inner, outer in factors)
    torch.testing.assert_close(found.eigenvalues().sum(), trace, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
def test_exact_for_one_linear_layer_and_one_datum(kind: str) -> None:
    net, x, y = BY_NAME["single_layer"].network(), BY_NAME["single_layer"].data()[:1], torch.tensor([2])
    jac, f = oracles.jacobian(net, x, ["weight", "bias"]), oracles.outputs(net, x)
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", f))
    if kind == "empirical":
        truth = oracles.outer_gradients(jac, oracles.score("categorical", f, y))
    torch.testing.assert_close(fitted(net, x, y, kind=kind).to_dense(), truth, rtol=1e-8, atol=1e-12)


def test_exact_for_a_linear_model_of_constant_curvature() -> None:
    # Lambda is the same for all data, so A (x) G is the whole GGN
    net, x = BY_NAME["single_layer"].network(), BY_NAME["single_layer"].data()
    noise = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    found = fitted(net, x, targets("gaussian"), resolve("gaussian", noise=noise))
    jac = oracles.jacobian(net, x, ["weight", "bias"])
    truth = oracles.ggn(jac, oracles.lambda_formula("gaussian", oracles.outputs(net, x), noise))
    torch.testing.assert_close(found.to_dense(), truth, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "select"),
    [
        ("layer_norm", ["1"]),
        ("batch_norm_2d", ["1"]),
        ("bare_parameters", ["gain"]),
        ("biases_only", ["2.bias"]),
        ("bag_by_offsets", ["bag"]),
        ("attention_bias_only", ["attention.in_proj_bias"]),
        ("transposed_conv2d", ["0.bias"]),
    ],
)
def test_blocks_without_a_kronecker_form_are_exact(name: str, select: list[str]) -> None:
    case = BY_NAME[name]
    net, x = case.network(), case.data()
    found = fitted(net, x, targets("categorical"), select=select)
    jac = oracles.jacobian(net, x, Network(net, select=select).names)
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", oracles.outputs(net, x)))
    torch.testing.assert_close(found.to_dense(), truth, rtol=1e-8, atol=1e-12)


def test_large_blocks_without_a_kronecker_form_keep_their_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesdl.curvature.kron.EXACT", 4)
    case = BY_NAME["bare_parameters"]
    net, x = case.network(), case.data()
    found = fitted(net, x, targets("categorical"), select=["gain"])
    jac = oracles.jacobian(net, x, ["gain"])
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", oracles.outputs(net, x)))
    torch.testing.assert_close(found.to_dense(), torch.diag(truth.diagonal()), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("padding", [0, None])
def test_embedding_equals_a_linear_layer_on_one_hot_rows(padding: int | None) -> None:
    # padding is no datum: it neither meets the table nor counts as a row
    name = "embedding" if padding == 0 else "embedding_no_padding"
    net, x = BY_NAME[name].network(), BY_NAME[name].data()
    found = fitted(net, x, targets("categorical"), select="embed")
    ((_, _, g),) = oracles.captures(net, "embed", x, roots(oracles.outputs(net, x)))
    used = torch.ones_like(x, dtype=torch.bool) if padding is None else x != padding
    hot = torch.nn.functional.one_hot(x[used], 7).double()
    rows = g[:, used]
    inner, outer = hot.T @ hot / len(hot), torch.einsum("knd,kne->de", rows, rows)
    torch.testing.assert_close(found.to_dense(), torch.kron(inner, outer), rtol=1e-8, atol=1e-12)


def test_embedding_of_one_token_is_exact_whatever_the_padding() -> None:
    net = BY_NAME["embedding"].network()
    x = torch.tensor([[3, 0, 0, 0, 0]])
    found = fitted(net, x, torch.tensor([1]), select="embed")
    jac = oracles.jacobian(net, x, ["embed.weight"])
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", oracles.outputs(net, x)))
    torch.testing.assert_close(found.to_dense(), truth, rtol=1e-8, atol=1e-12)


def test_exact_where_the_input_is_constant() -> None:
    net = nn.Linear(3, 2).double()
    x = real(3)(torch.Generator().manual_seed(0))[:1].expand(8, 3).clone()
    found = fitted(net, x, targets("categorical", 2))
    jac = oracles.jacobian(net, x, ["weight", "bias"])
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", oracles.outputs(net, x)))
    torch.testing.assert_close(found.to_dense(), truth, rtol=1e-8, atol=1e-12)


# --- shared="reduce" ---

REDUCED = [row for row in DEFINED if row[0] not in ("flat_tokens", "frames")]


@pytest.mark.parametrize(("name", "layer", "bias"), REDUCED)
def test_reduced_block_equals_the_definition(name: str, layer: str, bias: bool) -> None:
    case = BY_NAME[name]
    net, x = case.network(), case.data()
    own = {id(p) for p in net.get_submodule(layer).parameters()}
    names = [n for n, p in net.named_parameters() if id(p) in own]
    found = fitted(net, x, targets("categorical"), select=names, shared="reduce")
    calls = oracles.captures(net, layer, x, roots(oracles.outputs(net, x)))
    block = oracles.kron_block(oracles.reduced_kron(calls, bias, first=name != "sequence_first"), bias)
    torch.testing.assert_close(found.to_dense(), block, rtol=1e-8, atol=1e-12)
    plain = fitted(net, x, targets("categorical"), select=names)
    single = name in ("mlp", "linear_without_bias")
    assert torch.allclose(plain.to_dense(), found.to_dense(), rtol=1e-8) is single  # T = 1: one and the same


class Pooled(nn.Module):
    """Token-wise linear layers behind which positions are averaged: linear throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)).mean(1)


def test_reduce_is_exact_for_a_linear_network_that_averages_positions() -> None:
    torch.manual_seed(0)
    net, x = Pooled().double(), real(6, 4)(torch.Generator().manual_seed(1))
    for name in ("inner", "head"):
        found = fitted(net, x, targets("gaussian"), "gaussian", select=name, shared="reduce")
        jac = oracles.jacobian(net, x, found.layout.names)
        exact = oracles.ggn(jac, torch.eye(3, dtype=torch.float64).expand(len(x), 3, 3))
        torch.testing.assert_close(found.to_dense(), exact, rtol=1e-8, atol=1e-12)
        plain = fitted(net, x, targets("gaussian"), "gaussian", select=name)
        assert float((plain.to_dense() - exact).norm() / exact.norm()) > 0.1


def test_reduce_averages_projections_over_their_own_positions() -> None:
    case = BY_NAME["attention_across"]  # three queries, five keys and values
    net, x = case.network(), case.data()
    found = fitted(net, x, targets("categorical"), select=["attention.in_proj_weight"], shared="reduce")
    means = [part.mean(1) for part in x]
    expected = torch.stack([m.T @ m / len(m) for m in means])
    torch.testing.assert_close(found.inner[0] / found.rows[0], expected, rtol=1e-8, atol=1e-12)


def test_reduced_sums_of_batches_parts_and_bases() -> None:
    net, x, y = BY_NAME["sequence"].network(), BY_NAME["sequence"].data(), targets("categorical")
    whole = fitted(net, x, y, shared="reduce")
    parts = fitted(net, x[:3], y[:3], shared="reduce") + fitted(net, x[3:], y[3:], shared="reduce")
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=1e-8, atol=1e-12)
    assert whole.options == parts.fresh().options == {"shared": "reduce"}
    with pytest.raises(UnsupportedError, match="fit both alike"):
        _ = whole + fitted(net, x, y)
    bases = estimate(net, [(x, y)], "categorical", structure="ekfac", shared="reduce", progress=False)
    exact = estimate(net, [(x, y)], "categorical", structure="full", progress=False).to_dense()
    torch.testing.assert_close(bases.eigenvalues().sum(), exact.trace(), rtol=1e-8, atol=0.0)
    mixed = {"inner": "kron", "*": "diag"}
    group = estimate(net, [(x, y)], "categorical", structure=mixed, shared="reduce", progress=False)
    assert group.options == {"shared": "reduce"}
    width = len(next(part for part in group.parts if isinstance(part, Kron)).to_dense())  # type: ignore[attr-defined]
    alone = fitted(net, x, y, select="inner", shared="reduce").to_dense()
    assert len(alone) == width


def test_reduced_laplace_survives_a_file(tmp_path: Path) -> None:
    net, x, y = BY_NAME["sequence"].network(), BY_NAME["sequence"].data(), targets("categorical")
    prior = bdl.GaussianPrior(precision=1.0)
    bayes = bdl.wrap(net, bdl.Laplace(shared="reduce"), [(x, y)], likelihood="categorical", prior=prior, progress=False)
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", net)
    assert again.posterior.curvature.options == {"shared": "reduce"}  # type: ignore[attr-defined]
    assert torch.equal(again(x).mean, bayes(x).mean)
    plain = bdl.wrap(net, bdl.Laplace(), [(x, y)], likelihood="categorical", prior=prior, progress=False)
    assert not torch.allclose(plain(x).mean, bayes(x).mean)


def test_sharing_that_is_unknown_or_of_no_use_is_refused() -> None:
    net, data = BY_NAME["mlp"].network(), [(BY_NAME["mlp"].data(), targets("categorical"))]
    with pytest.raises(UnknownNameError, match="shared='mean' is not known"):
        estimate(net, data, "categorical", shared="mean", progress=False)
    with pytest.raises(ArgumentError, match='belongs to structure="kron" or "ekfac"'):
        estimate(net, data, "categorical", structure="full", shared="reduce", progress=False)
    with pytest.raises(ArgumentError, match='belongs to structure="kron" or "ekfac"'):
        method = bdl.Laplace(structure={"*": "diag"}, shared="reduce")
        bdl.wrap(net, method, data, likelihood="categorical", progress=False)
