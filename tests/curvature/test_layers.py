"""Every layer type and way of sharing against the dense oracle: full and diag, for each kind of curvature."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesdl.curvature.cotangents import CURVATURE_KINDS
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.plan import plan
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from tests import oracles
from tests.cases import BY_NAME, CASES, Case, targets

# torch's own remark about even kernels
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@cache
def prepared(name: str) -> tuple[Network, Layout, Any, Tensor, Tensor]:
    """Network, layout, inputs, and the oracle's outputs and Jacobian, once a case."""
    case: Case = BY_NAME[name]
    net, x = case.network(), case.data()
    network = Network(net, select=case.select, example=x)
    layout = plan(network, x)
    return network, layout, x, oracles.outputs(net, x), oracles.jacobian(net, x, network.names)


def dense_oracle(f: Tensor, jac: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "ggn":
        return oracles.ggn(jac, oracles.lambda_formula("categorical", f))
    if kind == "empirical":
        return oracles.outer_gradients(jac, oracles.score("categorical", f, y))
    drawn = resolve("categorical").sample(f, 2, torch.Generator().manual_seed(5))
    return sum(oracles.outer_gradients(jac, oracles.score("categorical", f, t)) for t in drawn) / 2


@pytest.mark.parametrize("kind", CURVATURE_KINDS)
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_full_and_diagonal_equal_the_dense_oracle(name: str, kind: str) -> None:
    network, layout, x, f, jac = prepared(name)
    y = targets("categorical")
    truth = dense_oracle(f, jac, y, kind)
    for structure in ("full", "diag"):
        found = fit_curvature(
            network,
            layout,
            [(x, y)],
            resolve("categorical"),
            structure=structure,
            kind=kind,
            samples=2,
            generator=torch.Generator().manual_seed(5),
            progress=False,
        ).curvature.to_dense()
        expected = truth if structure == "full" else torch.diag(truth.diagonal())
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(truth.abs().max()))


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_closed_forms_are_used_where_they_exist(name: str) -> None:
    _, layout, *_ = prepared(name)
    kinds = {parameter: block.kind for block in layout.blocks for parameter in block.parameters}
    assert kinds == {parameter: BY_NAME[name].kinds.get(parameter, "linear") for parameter in layout.names}


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_separate_bias_blocks_give_the_same_matrix(name: str) -> None:
    network, joint, x, f, jac = prepared(name)
    layout = plan(network, x, "separate")
    assert len(layout.blocks) >= len(joint.blocks)
    assert all(len(block.parameters) == 1 for block in layout.blocks)
    y = targets("categorical")
    found = fit_curvature(
        network, layout, [(x, y)], resolve("categorical"), structure="full", kind="ggn", progress=False
    )
    truth = dense_oracle(f, jac, y, "ggn")
    torch.testing.assert_close(found.curvature.to_dense(), truth, rtol=1e-8, atol=1e-10 * float(truth.abs().max()))


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_predictive_covariance_of_every_layer_equals_the_oracle(name: str) -> None:
    network, layout, x, f, jac = prepared(name)
    y = targets("categorical")
    for structure in ("full", "diag", "kron"):
        fit = fit_curvature(
            network, layout, [(x, y)], resolve("categorical"), structure=structure, kind="ggn", progress=False
        )
        mean, factors = layer_factors(network, layout, x, identity_cotangents, torch.float64)
        torch.testing.assert_close(mean, f)
        precision = 0.5 * fit.curvature.to_dense() + 2.0 * torch.eye(layout.numel, dtype=torch.float64)
        truth = oracles.linearized_covariance(jac, precision)
        torch.testing.assert_close(fit.curvature.quad(factors, 0.5, 2.0), truth, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(
            fit.curvature.marginal(factors, 0.5, 2.0), truth.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-10
        )
