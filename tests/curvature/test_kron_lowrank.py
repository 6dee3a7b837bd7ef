"""Truncated Kronecker factors: the untruncated ones where nothing is cut, dense algebra where something is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import estimate, kron_lowrank
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.kron_lowrank import KronLowRank
from bayesdl.curvature.plan import plan
from bayesdl.errors import ArgumentError, UnsupportedError
from bayesdl.network import Network
from tests import oracles
from tests.cases import BY_NAME, targets

# plain, positional and grouped linear blocks, several uses of one layer, embeddings, norms, bare parameters
NETWORKS = ("mlp", "conv2d", "conv2d_groups", "layer_twice", "sequence", "position_embedding", "bare_parameters")
SCALE = 0.7


def fitted(name: str, rank: int | None = None, **options: Any) -> KronLowRank:
    net, x = BY_NAME[name].network(), BY_NAME[name].data()
    arguments: dict[str, Any] = {"structure": "kron-lowrank", "rank": rank, "progress": False, **options}
    found = estimate(net, [(x, targets("categorical"))], "categorical", **arguments)
    assert isinstance(found, KronLowRank)
    return found


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketches of two columns at rank one, so that layers of a few units are cut."""
    monkeypatch.setattr(kron_lowrank, "OVERSAMPLING", 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_full_rank_is_kron(name: str) -> None:
    found = fitted(name, 200)
    net, x = BY_NAME[name].network(), BY_NAME[name].data()
    plain = estimate(net, [(x, targets("categorical"))], "categorical", structure="kron", progress=False)
    assert not found.directions
    close(found.to_dense(), plain.to_dense())


@pytest.mark.parametrize("shape", ["scalar", "block"])
@pytest.mark.parametrize("name", NETWORKS)
def test_queries_agree_with_the_dense_matrix(name: str, shape: str, narrow: None) -> None:
    found = fitted(name, 1)
    assert found.directions and any(key.startswith("inner") for key in found.directions)
    net, x = BY_NAME[name].network(), BY_NAME[name].data()
    view = Network(net)
    layout = plan(view, x)
    jac = oracles.jacobian(view.module(), x, view.names)
    factors = layer_factors(view, layout, x, identity_cotangents, torch.float64)[1]
    generator = torch.Generator().manual_seed(0)
    if shape == "scalar":
        shift = torch.tensor(1.3).double()
        diagonal = shift.expand(layout.numel)
    else:
        shift = 0.5 + torch.rand(len(layout.blocks), generator=generator, dtype=torch.float64)
        pieces = [s.expand(b.groups, b.rows, b.columns) for b, s in zip(layout.blocks, shift, strict=True)]
        diagonal = layout.join(pieces)
    precision = SCALE * found.to_dense() + torch.diag(diagonal)
    inverse = torch.linalg.inv(precision)
    close(found.logdet(SCALE, shift), torch.linalg.slogdet(precision)[1])
    vectors = torch.randn(2, 3, layout.numel, dtype=torch.float64, generator=generator)
    close(found.solve(vectors, SCALE, shift), vectors @ inverse)
    close(found.product(vectors), vectors @ found.to_dense())
    covariance = oracles.linearized_covariance(jac, precision)
    close(found.quad(factors, SCALE, shift), covariance)
    close(found.marginal(factors, SCALE, shift), covariance.diagonal(dim1=1, dim2=2))
    prepared = found.prepared(factors)
    assert len(prepared) == found.num_prepared
    if shape == "scalar":
        close(found.quads_prepared(prepared, SCALE, shift.expand(2))[1], covariance)
        close(found.marginals_prepared(prepared, SCALE, shift.expand(2))[0], covariance.diagonal(dim1=1, dim2=2))
    root = found.sample(torch.eye(layout.numel, dtype=torch.float64), SCALE, shift)
    close(root, root.T)
    close(root.T @ root, inverse)
    between = found.cross(factors, factors, SCALE, shift)
    for row in range(len(x)):
        close(between[row, :, row], covariance[row])
    close(found.eigenvalues().sort().values, torch.linalg.eigvalsh(found.to_dense()).clamp(min=0))


def wide(rank: int, size: int = 120, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any, Any]:
    """A wide layer whose inputs lie in a space of a few dimensions, its curvature cut and whole, and the loader."""
    g = torch.Generator().manual_seed(0)
    basis = torch.randn(6, size, generator=g) * torch.logspace(0, -2, 6).unsqueeze(1)
    x = (torch.randn(50, 6, generator=g) @ basis).to(dtype)
    torch.manual_seed(0)
    net = nn.Linear(size, 3, bias=False).to(dtype)
    loader = list(zip(x.split(20), torch.randint(3, (50,), generator=g).split(20), strict=True))
    arguments: dict[str, Any] = {"progress": False, **options}
    cut = estimate(net, loader, "categorical", structure="kron-lowrank", rank=rank, **arguments)
    whole = estimate(net, loader, "categorical", structure="kron", **arguments)
    return cut, whole, (net, loader)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_inputs_of_few_dimensions_lose_nothing(dtype: torch.dtype, tolerance: float) -> None:
    cut, whole, _ = wide(6, dtype=dtype)
    assert set(cut.directions) == {"inner.0"} and cut.inner[0].shape == (1, 120, 22)
    close(cut.to_dense(), whole.to_dense(), tolerance)


def test_what_is_left_out_is_never_overestimated() -> None:
    cut, whole, _ = wide(3)
    missing = whole.to_dense() - cut.to_dense()
    assert float(torch.linalg.eigvalsh(missing).min()) > -1e-9
    # three of six directions, whose spectrum falls by a factor of 2.5 each: the trace of what is left
    kept = whole.eigen[0].values.sum(1)[0].sort(descending=True).values
    close(torch.trace(missing), kept[3:].sum(), 1e-6)


def test_batches_and_their_order_do_not_matter() -> None:
    cut, _, (net, loader) = wide(3)
    whole = [(torch.cat([x for x, _ in loader]), torch.cat([y for _, y in loader]))]
    for data in (whole, loader[::-1]):
        other = estimate(net, data, "categorical", structure="kron-lowrank", rank=3, progress=False)
        close(other.to_dense(), cut.to_dense(), 1e-10)
    halves = [estimate(net, [d], "categorical", structure="kron-lowrank", rank=3, progress=False) for d in loader]
    close((halves[0] + halves[1] + halves[2]).to_dense(), cut.to_dense(), 1e-10)
    other = estimate(net, loader, "categorical", structure="kron-lowrank", rank=4, progress=False)
    with pytest.raises(UnsupportedError, match="of rank 3 and 4"):
        cut + other
    close(cut.scaled(torch.tensor(0.25)).to_dense(), 0.25 * cut.to_dense())
    assert cut.fresh().is_zero() and not cut.is_zero()


@pytest.mark.parametrize("shared", ["expand", "reduce"])
def test_positions_are_shared_as_in_kron(shared: str) -> None:
    found = fitted("conv2d", 200, shared=shared)
    net, x = BY_NAME["conv2d"].network(), BY_NAME["conv2d"].data()
    options: dict[str, Any] = {"structure": "kron", "shared": shared, "progress": False}
    plain = estimate(net, [(x, targets("categorical"))], "categorical", **options)
    close(found.to_dense(), plain.to_dense())
    assert found.options == {"rank": 200, **({"shared": "reduce"} if shared == "reduce" else {})}


def test_laplace_takes_a_rank_for_its_kron(tmp_path: Path) -> None:
    cut, _, (net, loader) = wide(3)
    prior = bdl.GaussianPrior(0.1)
    options: dict[str, Any] = {"likelihood": "categorical", "prior": prior, "progress": False}
    bayes = bdl.wrap(net, bdl.Laplace(kron_rank=3), loader, **options)
    assert bayes.posterior.structure.name == "kron-lowrank" and bayes.posterior.curvature.rank == 3  # type: ignore[union-attr]
    x = torch.randn(7, 120, generator=torch.Generator().manual_seed(4)).double()
    variance = torch.einsum(
        "np,pq,nq->n",
        torch.kron(torch.eye(3)[:1], x),
        torch.linalg.inv(cut.to_dense() + 0.1 * torch.eye(360)).double(),
        torch.kron(torch.eye(3)[:1], x),
    )
    close(bayes(x).latent.variance[:, 0], variance)
    tuned = bayes.tune("evidence")
    assert float(tuned.log_evidence()) >= float(bayes.log_evidence())
    close(tuned.posterior.structure.to_dense(), cut.to_dense())  # type: ignore[union-attr]
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", net)
    assert torch.equal(again(x).latent.variance, bayes(x).latent.variance)
    assert again.posterior.curvature.rank == 3  # type: ignore[union-attr]
    mixed = bdl.Laplace(structure={"0": "full", "*": "kron"}, kron_rank=2)
    assert mixed.recipe == {"0": "full", "*": "kron-lowrank"}
    for wrong in ({"structure": "diag", "kron_rank": 2}, {"structure": "kron", "kron_rank": 0}):
        with pytest.raises(ArgumentError, match="kron_rank=2|rank=0"):
            bdl.wrap(net, bdl.Laplace(**wrong), loader, **options)


def test_another_layout_is_refused() -> None:
    cut, _, _ = wide(3)
    with pytest.raises(ArgumentError, match="different parameters"):
        cut + replace(cut, layout=replace(cut.layout, blocks=(replace(cut.layout.blocks[0], parameters=("w",)),)))
