"""Every structure x every kind of curvature: all queries against the dense matrix that the structure stands for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.curvature.cotangents import CURVATURE_KINDS
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import STRUCTURES, Recipe, empty
from bayesdl.curvature.structure import Structure, weighted_curvature
from bayesdl.errors import ArgumentError, NumericalError, UnsupportedError
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from tests import oracles
from tests.cases import BY_NAME, OUTPUTS, targets

# between them: plain, positional and grouped linear blocks, embeddings with padding, norms, per-example gradients
NETWORKS = ("position_embedding", "batch_norm_2d", "conv2d_groups", "bare_parameters")
SCALE = 0.7
# diagonal in rotated coordinates, where one prior precision per parameter is not
ROTATED = ("kron", "kron-lowrank", "ekfac")


@cache
def network(name: str) -> tuple[Network, Layout, Any]:
    net, x = BY_NAME[name].network(), BY_NAME[name].data()
    view = Network(net)
    return view, plan(view, x), x


def recipe(structure: str, layout: Layout) -> Recipe:
    """What `structure=` is given; "mixed" is full for the first block and diagonal for the rest."""
    return {layout.blocks[0].name: "full", "*": "diag"} if structure == "mixed" else structure


@cache
def fitted(structure: str, kind: str, name: str) -> Structure:
    view, layout, x = network(name)
    return fit_curvature(
        view,
        layout,
        [(x, targets("categorical"))],
        resolve("categorical"),
        structure=recipe(structure, layout),
        kind=kind,
        generator=torch.Generator().manual_seed(7),
        progress=False,
    ).curvature


@cache
def rows(name: str) -> tuple[Tensor, list[Factor]]:
    """Jacobian by the oracle `(N, C, P)`, and the library's factors of it."""
    view, layout, x = network(name)
    module = view.module()
    return oracles.jacobian(module, x, view.names), layer_factors(view, layout, x, identity_cotangents, torch.float64)[
        1
    ]


def shifts(layout: Layout, form: str) -> tuple[Tensor, Tensor]:
    """A prior precision as the library takes it, and its diagonal in flat order."""
    generator = torch.Generator().manual_seed(11)
    if form == "scalar":
        return torch.tensor(1.3, dtype=torch.float64), torch.full((layout.numel,), 1.3, dtype=torch.float64)
    if form == "block":
        value = 0.5 + torch.rand(len(layout.blocks), dtype=torch.float64, generator=generator)
        owner = {name: i for i, block in enumerate(layout.blocks) for name in block.parameters}
        parts = zip(layout.names, layout.sizes, strict=True)
        return value, torch.cat([value[owner[name]].expand(size) for name, size in parts])
    value = 0.5 + torch.rand(layout.numel, dtype=torch.float64, generator=generator)
    return value, value


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * max(1.0, float(expected.abs().max())))


@pytest.fixture(params=[*sorted(STRUCTURES), "mixed"])
def structure(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["scalar", "block", "parameter"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("kind", CURVATURE_KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_queries_agree_with_the_dense_matrix(structure: str, kind: str, name: str, form: str) -> None:
    found, (_, layout, _) = fitted(structure, kind, name), network(name)
    jac, factors = rows(name)
    shift, diagonal = shifts(layout, form)
    if form == "parameter" and structure in ROTATED:
        with pytest.raises(UnsupportedError, match="diag.*full"):
            found.logdet(SCALE, shift)
        with pytest.raises(UnsupportedError, match="diag.*full"):
            found.quad(factors, SCALE, shift)
        return
    precision = SCALE * found.to_dense() + torch.diag(diagonal)
    inverse = torch.linalg.inv(precision)
    close(found.logdet(SCALE, shift), torch.linalg.slogdet(precision)[1])
    vectors = torch.randn(2, 3, layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(found.solve(vectors, SCALE, shift), vectors @ inverse)
    close(found.product(vectors), vectors @ found.to_dense())
    covariance = oracles.linearized_covariance(jac, precision)
    close(found.quad(factors, SCALE, shift), covariance)
    close(found.marginal(factors, SCALE, shift), covariance.diagonal(dim1=1, dim2=2))
    close(found.quad_prepared(found.prepared(factors), SCALE, shift), covariance)
    # the draws are linear in the base noise, so their covariance is known without a single random number
    root = found.sample(torch.eye(layout.numel, dtype=torch.float64), SCALE, shift)
    if structure not in ("lowrank", "dual") or form == "scalar":
        close(root, root.T)
    close(root.T @ root, inverse)
    noise = torch.randn(4, layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    close(found.sample(noise, SCALE, shift), noise @ root)


@pytest.mark.parametrize("kind", CURVATURE_KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_matrix_is_symmetric_and_its_eigenvalues_are_known(structure: str, kind: str, name: str) -> None:
    found = fitted(structure, kind, name)
    dense = found.to_dense()
    close(dense, dense.T)
    close(found.eigenvalues().sort().values, torch.linalg.eigvalsh(dense).clamp(min=0))


@pytest.mark.parametrize("name", NETWORKS)
def test_sums_and_multiples(structure: str, name: str) -> None:
    found = fitted(structure, "ggn", name)
    dense = found.to_dense()
    weight = torch.tensor(0.3, dtype=torch.float64)
    close(found.scaled(weight).to_dense(), 0.3 * dense)
    close((found + found).to_dense(), 2.0 * dense)
    weights = torch.tensor([0.3, 1.2], dtype=torch.float64)
    close(weighted_curvature([found, found], weights).to_dense(), 1.5 * dense)
    with pytest.raises(ArgumentError, match="must agree"):
        weighted_curvature([found], weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_data_twice_is_all_the_data(structure: str, name: str) -> None:
    view, layout, x = network(name)
    y = targets("categorical")
    halves = []
    for piece in (slice(0, 3), slice(3, None)):
        data = [(x[piece], y[piece])]
        options: dict[str, Any] = {"structure": recipe(structure, layout), "kind": "ggn", "progress": False}
        halves.append(fit_curvature(view, layout, data, resolve("categorical"), **options).curvature)
    if structure == "ekfac":  # whose bases are each data set's own
        with pytest.raises(UnsupportedError, match="different bases"):
            halves[0] + halves[1]
        return
    close((halves[0] + halves[1]).to_dense(), fitted(structure, "ggn", name).to_dense())


def test_tensors_round_trip_and_map(structure: str) -> None:
    found = fitted(structure, "ggn", "position_embedding")
    tensors = found.tensors()
    assert all(isinstance(value, Tensor) for value in tensors.values())
    close(found.with_tensors(tensors).to_dense(), found.to_dense())
    single = found.map(lambda t: t.float())
    assert single.to_dense().dtype == torch.float32
    torch.testing.assert_close(single.to_dense().double(), found.to_dense(), rtol=1e-4, atol=1e-5)
    meta = empty(found.recipe, found.layout, torch.float32, torch.device("meta"))
    close(meta.with_tensors(tensors).to_dense(), found.to_dense())


@pytest.mark.parametrize("form", ["scalar", "block", "parameter"])
def test_queries_are_differentiable_in_scale_and_shift(structure: str, form: str) -> None:
    if form == "parameter" and structure in ROTATED:
        pytest.skip("refused; tested above")
    name = "bare_parameters"
    found, (_, layout, _) = fitted(structure, "ggn", name), network(name)
    factors = rows(name)[1]
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    shift = shifts(layout, form)[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: found.logdet(a, b), (scale, shift))
    assert torch.autograd.gradcheck(lambda a, b: found.quad(factors, a, b)[:2], (scale, shift))
    assert torch.autograd.gradcheck(lambda a, b: found.marginal(factors, a, b)[:2], (scale, shift))
    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: found.scaled(w).logdet(SCALE, shift.detach()), (weight,))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_precision_that_is_not_positive_is_refused(structure: str, bad: float) -> None:
    found = fitted(structure, "ggn", "bare_parameters")
    with pytest.raises(ArgumentError, match="positive"):
        found.logdet(1.0, bad)
    with pytest.raises(ArgumentError, match="positive"):
        found.quad(rows("bare_parameters")[1], 1.0, bad)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(structure: str, bad: float) -> None:
    found = fitted(structure, "ggn", "bare_parameters")
    with pytest.raises(ArgumentError, match="scale=.* expected a positive number"):
        found.logdet(bad, 1.0)
    with pytest.raises(ArgumentError, match="scale=.* expected a positive number"):
        found.quad(rows("bare_parameters")[1], bad, 1.0)


def test_wrong_shapes_are_named(structure: str) -> None:
    found = fitted(structure, "ggn", "bare_parameters")
    size = found.layout.numel
    with pytest.raises((ArgumentError, UnsupportedError), match=r"\(7,\)"):
        found.logdet(1.0, torch.ones(7))
    with pytest.raises(ArgumentError, match=f"expected \\(samples, {size}\\)"):
        found.sample(torch.zeros(2, size + 1), 1.0, 1.0)
    with pytest.raises(ValueError, match=f"{size}"):
        found.solve(torch.zeros(size - 1), 1.0, 1.0)


@pytest.mark.parametrize("kind", CURVATURE_KINDS)
@pytest.mark.parametrize("select", ["all", "last_layer", "0.bias"])
def test_curvature_of_a_partial_selection_is_not_zero(structure: str, kind: str, select: str) -> None:
    # a peer's empirical Fisher of the last layer is exactly zero on its diagonal
    net, x = BY_NAME["mlp"].network(), BY_NAME["mlp"].data()
    view = Network(net, select=select, example=x)
    data, layout = [(x, targets("categorical"))], plan(view, x)
    found = fit_curvature(
        view, layout, data, resolve("categorical"), structure=recipe(structure, layout), kind=kind, progress=False
    )
    dense = found.curvature.to_dense()
    assert bool((dense.diagonal() > 0).all())
    jac = oracles.jacobian(net, x, view.names)
    if kind == "empirical":
        truth = oracles.outer_gradients(jac, oracles.score("categorical", oracles.outputs(net, x), data[0][1]))
        if structure in ("full", "diag"):
            close(dense.diagonal(), truth.diagonal())


@pytest.mark.parametrize("kind", CURVATURE_KINDS)
def test_a_flat_likelihood_is_an_error(structure: str, kind: str) -> None:
    net = nn.Linear(4, OUTPUTS).double()
    with torch.no_grad():
        net.bias.copy_(torch.tensor([1e5, 0.0, 0.0]))
    x, y = BY_NAME["mlp"].data(), torch.zeros(8, dtype=torch.long)
    view = Network(net)
    layout = plan(view, x)
    chosen = recipe(structure, layout)
    with pytest.raises(NumericalError, match="exactly zero"):
        fit_curvature(view, layout, [(x, y)], resolve("categorical"), structure=chosen, kind=kind, progress=False)


def test_only_curvatures_of_one_kind_over_the_same_parameters_add(structure: str) -> None:
    mine = fitted(structure, "ggn", "mlp")
    other = fitted("diag" if structure != "diag" else "full", "ggn", "mlp")
    with pytest.raises(ArgumentError, match="fit both alike"):
        mine + other
    # equal shapes, another layer: the sum would be of nothing
    layout = mine.layout
    renamed = replace(layout, blocks=tuple(replace(b, parameters=("other",)) for b in layout.blocks))
    with pytest.raises(ArgumentError, match="different parameters"):
        mine + replace(mine, layout=renamed)
