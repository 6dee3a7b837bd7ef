"""Covariances between examples of two batches, for every structure, against J P^-1 J'^T with dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bayesdl.curvature import cross as module
from bayesdl.curvature.cross import cross
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.gram import gram
from bayesdl.curvature.registry import STRUCTURES
from bayesdl.errors import ShapeError
from tests import oracles
from tests.conformance import test_structures as battery

NETWORKS = ("mlp", "position_embedding", "batch_norm_2d", "conv2d_groups", "bare_parameters", "encoder_layer")


def factors_of(name: str, where: slice) -> list[Factor]:
    view, layout, x = battery.network(name)
    return layer_factors(view, layout, x[where], identity_cotangents, torch.float64)[1]


def jacobian(name: str) -> Tensor:
    view, _, x = battery.network(name)
    return oracles.jacobian(view.module(), x, view.names)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("limit", [1, 1 << 23])
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", limit)
    first, second = factors_of(name, slice(0, 5)), factors_of(name, slice(3, 8))
    _, layout, _ = battery.network(name)
    g = torch.Generator().manual_seed(0)
    for mine, other, block in zip(first, second, layout.blocks, strict=True):
        weight = torch.rand(block.groups, block.rows, block.columns, dtype=torch.float64, generator=g)
        rows, columns = mine.jacobian(), other.jacobian()
        close(cross(mine, other), torch.einsum("bkp,clp->bkcl", rows, columns))
        close(cross(mine, other, weight), torch.einsum("bkp,p,clp->bkcl", rows, weight.flatten(), columns))


@pytest.mark.parametrize("structure", [*sorted(STRUCTURES), "mixed"])
@pytest.mark.parametrize("name", NETWORKS[1:])
def test_structures(structure: str, name: str) -> None:
    found, layout = battery.fitted(structure, "ggn", name), battery.network(name)[1]
    shift, diagonal = battery.shifts(layout, "block")
    inverse = torch.linalg.inv(0.7 * found.to_dense() + torch.diag(diagonal))
    jac = jacobian(name)
    first, second = factors_of(name, slice(0, 5)), factors_of(name, slice(3, 8))
    close(found.cross(first, second, 0.7, shift), torch.einsum("bkp,pq,clq->bkcl", jac[:5], inverse, jac[3:]))
    close(found.cross(first, first, 0.7, shift), torch.einsum("bkp,pq,clq->bkcl", jac[:5], inverse, jac[:5]))


@pytest.mark.parametrize("structure", ["full", "lowrank", "diag"])
def test_pieces_and_one_prior_precision_per_parameter(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 1)
    name = "bare_parameters"
    found, layout = battery.fitted(structure, "ggn", name), battery.network(name)[1]
    shift, diagonal = battery.shifts(layout, "parameter")
    inverse = torch.linalg.inv(0.7 * found.to_dense() + torch.diag(diagonal))
    jac, whole = jacobian(name), factors_of(name, slice(None))
    close(found.cross(whole, whole, 0.7, shift), torch.einsum("bkp,pq,clq->bkcl", jac, inverse, jac))


def test_without_weights_it_is_the_gram_matrix() -> None:
    factors: Any = factors_of("mlp", slice(None))
    whole = torch.stack([cross(f, f) for f in factors]).sum(0)
    close(whole.flatten(2).flatten(0, 1), gram(factors))


def test_factors_of_different_kinds() -> None:
    rows, linear = factors_of("position_embedding", slice(None))[0], factors_of("mlp", slice(None))[0]
    with pytest.raises(ShapeError, match="one kind"):
        cross(rows, linear)
