"""Low rank against the dense matrix: exact where the rank suffices, near the best where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import estimate
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.lowrank import LowRank
from bayesdl.curvature.mixed import Mixed
from bayesdl.curvature.plan import plan
from bayesdl.errors import ArgumentError, NonFiniteError
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from bayesdl.posteriors import GaussianPosterior
from tests import oracles
from tests.cases import BY_NAME, mlp, real, targets

# between them every kind of block and factor
NETWORKS = [
    "mlp",
    "conv2d_groups",
    "conv3d",
    "layer_norm",
    "batch_norm_2d",
    "embedding",
    "position_embedding",
    "tied_embedding",
    "bare_parameters",
    "tied_layers",
    "sequence",
    "lstm",
    "biases_only",
]


def fitted(net: nn.Module, x: Any, likelihood: str = "categorical", outputs: int = 3, **options: Any) -> LowRank:
    y = targets(likelihood, outputs, len(x))
    found = estimate(net, [(x, y)], likelihood, structure="lowrank", progress=False, **options)
    assert isinstance(found, LowRank)
    return found


def truth(net: nn.Module, x: Any, names: tuple[str, ...]) -> Tensor:
    lam = oracles.lambda_formula("categorical", oracles.outputs(net, x))
    return oracles.ggn(oracles.jacobian(net, x, names), lam)


def wide() -> tuple[nn.Module, Tensor]:
    """A network whose 67 parameters and 60 examples give a spectrum over many decades."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return net, x * torch.tensor([3.0, 1.0, 0.3, 0.1], dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_full_rank_is_the_full_matrix(name: str) -> None:
    case = BY_NAME[name]
    net, x = case.network(), case.data()
    found = fitted(net, x, select=case.select, rank=10_000)
    matrix = truth(net, x, found.layout.names)
    close(found.to_dense(), matrix)
    assert found.image is None
    assert found.basis.shape[1] <= found.layout.numel
    unit = torch.eye(found.basis.shape[1], dtype=torch.float64)
    torch.testing.assert_close(found.basis.T @ found.basis, unit, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_truncation_is_near_the_best_of_its_rank(rank: int) -> None:
    net, x = wide()
    found = fitted(net, x, rank=rank)
    matrix = truth(net, x, found.layout.names)
    assert found.basis.shape == (67, rank)
    best = torch.linalg.eigvalsh(matrix).flip(0)
    kept = found.eigenvalues().sort(descending=True).values
    assert not bool(kept[rank:].any())
    assert bool((kept[:rank] <= best[:rank] * (1.0 + 1e-10)).all())  # Ritz values lie below (Cauchy interlacing)
    torch.testing.assert_close(kept[:rank], best[:rank], rtol=1e-2, atol=0.0)
    error, least = float((found.to_dense() - matrix).norm()), float(best[rank:].norm())
    assert least <= error <= 1.05 * least


@pytest.mark.parametrize("form", ["scalar", "block", "parameter"])
def test_truncated_queries_are_those_of_the_truncated_matrix(form: str) -> None:
    net, x = wide()
    found, points = fitted(net, x, rank=6), x[:5]
    size = found.layout.numel
    generator = torch.Generator().manual_seed(3)
    numbers = {"scalar": 1, "block": len(found.layout.blocks), "parameter": size}
    shift = 0.5 + torch.rand(numbers[form], dtype=torch.float64, generator=generator)
    pairs = zip(found.layout.shifts(shift, shift), found.layout.blocks, strict=True)
    parts = [s.expand(b.groups, b.rows, b.columns) for s, b in pairs]
    precision = 2.0 * found.to_dense() + torch.diag(found.layout.join(parts))
    jac = oracles.jacobian(net, points, found.layout.names)
    network = Network(net)
    _, factors = layer_factors(network, found.layout, points, identity_cotangents, torch.float64)
    covariance = oracles.linearized_covariance(jac, precision)
    close(found.quad(factors, 2.0, shift), covariance)
    close(found.marginal(factors, 2.0, shift), covariance.diagonal(dim1=1, dim2=2))
    close(found.logdet(2.0, shift), torch.linalg.slogdet(precision)[1])
    root = found.sample(torch.eye(size, dtype=torch.float64), 2.0, shift)
    close(root.T @ root, torch.linalg.inv(precision))
    close(found.solve(precision, 2.0, shift), torch.eye(size, dtype=torch.float64))


def test_monte_carlo_passes_draw_the_same_targets() -> None:
    net, x = BY_NAME["mlp"].network(), BY_NAME["mlp"].data()
    y = targets("categorical")
    dense = [
        estimate(net, [(x, y)], "categorical", structure=s, kind="mc", generator=g, progress=False).to_dense()
        for s, g in (("lowrank", torch.Generator().manual_seed(4)), ("full", torch.Generator().manual_seed(4)))
    ]
    close(dense[0], dense[1])


def test_open_noise_of_several_outputs_shares_the_basis() -> None:
    torch.manual_seed(0)
    net = mlp(outputs=4).double()
    x, y = real(4)(torch.Generator().manual_seed(1)), targets("gaussian", 4)
    network = Network(net)
    options: dict[str, Any] = {"structure": "lowrank", "kind": "ggn", "progress": False, "rank": 7}
    fit = fit_curvature(network, plan(network, x), [(x, y)], resolve("gaussian"), **options)
    jac = oracles.jacobian(net, x, network.names)
    for c, part in enumerate(fit.parts):
        assert isinstance(part, LowRank)
        projector = part.basis @ part.basis.T
        assert part.basis.shape[1] == 7
        close(part.to_dense(), projector @ jac[:, c].T @ jac[:, c] @ projector)
    close(fit.curvature.to_dense(), sum(part.to_dense() for part in fit.parts))  # type: ignore[arg-type]


def test_sums_of_other_data_keep_both_spans() -> None:
    net, x = wide()
    first, second = fitted(net, x[:30], rank=4), fitted(net, x[30:], rank=4)
    total = first + second
    assert total.basis.shape[1] == 8
    close(total.to_dense(), first.to_dense() + second.to_dense())


def test_single_precision_stays_positive() -> None:
    net, x = wide()
    exact = fitted(net, x, rank=20)
    found = fitted(net.float(), x.float(), rank=20)
    assert found.basis.dtype == torch.float32
    assert float((found.to_dense() - exact.to_dense()).norm() / exact.to_dense().norm()) < 1e-4
    network = Network(net)
    _, factors = layer_factors(network, found.layout, x.float(), identity_cotangents, torch.float32)
    assert bool((found.marginal(factors, 1.0, 1e-2) > 0).all())


def test_inference_mode_and_no_grad() -> None:
    net, x = BY_NAME["position_embedding"].network(), BY_NAME["position_embedding"].data()
    matrix = fitted(net, x).to_dense()
    with torch.no_grad():
        close(fitted(net, x).to_dense(), matrix)
    with torch.inference_mode():
        found = fitted(net, x.clone()).to_dense()
    close(found.clone(), matrix)


# --- options and files ---


@pytest.mark.parametrize("rank", [0, -3, 2.5, True])
def test_a_rank_that_is_no_positive_integer_is_refused(rank: Any) -> None:
    with pytest.raises(ArgumentError, match=f"rank={rank}; expected a positive integer"):
        fitted(*wide(), rank=rank)


@pytest.mark.parametrize("structure", ["kron", {"*": "diag"}])
def test_a_rank_without_use_is_refused(structure: Any) -> None:
    net, x = wide()
    data = [(x, targets("categorical", 3, len(x)))]
    with pytest.raises(ArgumentError, match='belongs to structure="lowrank"'):
        estimate(net, data, "categorical", structure=structure, rank=3, progress=False)
    with pytest.raises(ArgumentError, match='belongs to structure="lowrank"'):
        bdl.wrap(net, bdl.Laplace(structure=structure, rank=3), data, likelihood="categorical", progress=False)


def test_bad_weights_are_named_by_layer() -> None:
    net, x = wide()
    with torch.no_grad():
        net[2].weight.mul_(1e200)  # the square of what reaches layer 0 overflows
    with pytest.raises(NonFiniteError, match="batch 0: the curvature of layer '0'"):
        fitted(net, x, "gaussian")


def test_as_one_group_of_a_mixed_structure() -> None:
    net, x = BY_NAME["mlp"].network(), BY_NAME["mlp"].data()
    data = [(x, targets("categorical"))]
    recipe = {"2": "lowrank", "*": "ekfac"}
    found = estimate(net, data, "categorical", structure=recipe, rank=2, progress=False)
    assert isinstance(found, Mixed)
    alone = estimate(net, data, "categorical", structure="lowrank", select="2", rank=2, progress=False)
    other = estimate(net, data, "categorical", structure="ekfac", select="0", progress=False)
    close(found.parts[0].to_dense(), alone.to_dense())
    close(found.parts[1].to_dense(), other.to_dense())


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_save_load_and_tune(likelihood: str, tmp_path: Path) -> None:
    net, x = wide()
    data = [(x, targets(likelihood, 3, len(x)))]
    bayes = bdl.wrap(net, bdl.Laplace(structure="lowrank", rank=9), data, likelihood=likelihood, progress=False)
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", net)
    assert isinstance(again.posterior, GaussianPosterior)
    assert isinstance(again.posterior.curvature, LowRank)
    assert again.posterior.curvature.basis.shape == (67, 9)
    assert torch.equal(again(x).variance, bayes(x).variance)
    assert torch.equal(again.log_evidence(), bayes.log_evidence())
    tuned = bayes.tune("heldout", data)
    before, after = (-float(b(x).log_prob(data[0][1]).mean()) for b in (bayes, tuned))
    assert after <= before + 1e-2  # a grid of priors
