"""The exact Hessian against double backward passes and torch.func, and what its negative eigenvalues are allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.curvature import Accumulator, estimate
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.curvature.hessian import HESSIAN_STRUCTURES, MAX_DIAGONAL
from bayesdl.curvature.structure import Structure
from bayesdl.errors import ArgumentError, NumericalError, UnsupportedError
from bayesdl.network import Network
from bayesdl.posteriors import GaussianPosterior
from tests import oracles
from tests.cases import BY_NAME, LIKELIHOODS, mlp, real, targets
from tests.untouched import untouched

NETWORKS = ["mlp", "conv2d_groups", "layer_norm", "position_embedding", "attention", "lstm", "tied_layers", "sequence"]
SCALE = 0.7


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def fitted(name: str, structure: str = "full", **options: Any) -> Structure:
    case = BY_NAME[name]
    data = [(case.data(), targets("categorical"))]
    settings: dict[str, Any] = {"kind": "hessian", "structure": structure, "progress": False} | options
    return estimate(case.network(), data, "categorical", select=case.select, **settings)


def truth(name: str, names: tuple[str, ...]) -> Tensor:
    case = BY_NAME[name]
    return oracles.loss_hessian(case.network(), case.data(), targets("categorical"), "categorical", names)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_structure_keeps_its_part_of_the_dense_matrix(name: str) -> None:
    full = fitted(name)
    matrix = truth(name, full.layout.names)
    close(full.to_dense(), matrix)
    close(fitted(name, "diag").to_dense(), torch.diag(matrix.diagonal()))
    close(fitted(name, "lowrank", rank=10_000).to_dense(), matrix, 1e-7)
    close(full.eigenvalues().sort().values, torch.linalg.eigvalsh(matrix))


@pytest.mark.parametrize("name", ["mlp", "conv2d", "tied_layers", "layer_twice", "gru"])
def test_torch_func_agrees(name: str) -> None:
    case, full = BY_NAME[name], fitted(name)
    module, x, y = oracles.evaluated(case.network()), case.data(), targets("categorical")
    values = {n: p.detach() for n, p in module.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([values[n].numel() for n in full.layout.names])
        chosen = {n: p.reshape(values[n].shape) for n, p in zip(full.layout.names, pieces, strict=True)}
        return nn.functional.cross_entropy(functional_call(module, chosen, (x,)), y, reduction="sum")

    start = torch.cat([values[n].flatten() for n in full.layout.names])
    close(full.to_dense(), torch.func.jacfwd(torch.func.grad(loss))(start))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood(likelihood: str) -> None:
    torch.manual_seed(0)
    net, x, y = mlp(outputs=4).double(), real(4)(torch.Generator().manual_seed(1)), targets(likelihood, 4)
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    full = estimate(net, data, likelihood, kind="hessian", structure="full", progress=False)
    close(full.to_dense(), oracles.loss_hessian(net, x, y, likelihood, full.layout.names))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "poisson"])
def test_is_the_ggn_of_a_linear_model(likelihood: str) -> None:
    net, x = BY_NAME["single_layer"].network(), BY_NAME["single_layer"].data()
    data = [(x, targets(likelihood))]
    for structure in HESSIAN_STRUCTURES:
        pair = [
            estimate(net, data, likelihood, kind=kind, structure=structure, progress=False).to_dense()
            for kind in ("hessian", "ggn")
        ]
        close(pair[0], pair[1], 1e-7)


def test_twice_the_data_is_twice_the_hessian() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    for structure in HESSIAN_STRUCTURES:
        once, twice = (
            estimate(net, data, "categorical", kind="hessian", structure=structure, progress=False)
            for data in ([(x, y)], [(x, y)] * 2)
        )
        close(twice.to_dense(), 2.0 * once.to_dense())
        close((once + once).to_dense(), 2.0 * once.to_dense())
        close(once.scaled(torch.tensor(3.0)).to_dense(), 3.0 * once.to_dense())


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_lowrank_keeps_the_largest_magnitudes_with_their_signs(rank: int) -> None:
    found = fitted("mlp", "lowrank", rank=rank)
    values = torch.linalg.eigvalsh(truth("mlp", found.layout.names))
    best = values[values.abs().argsort(descending=True)[:rank]]
    kept = found.eigenvalues()
    kept = kept[kept != 0.0]
    close(kept.sort().values, best.sort().values, 1e-6)
    if rank > 1:
        assert float(best.min()) < 0.0 < float(best.max())


# --- queries ---


def shifts(found: Structure, form: str, level: float) -> tuple[Tensor, Tensor]:
    """A prior precision near `level`, and its diagonal in flat order."""
    layout, generator = found.layout, torch.Generator().manual_seed(11)
    count = {"scalar": 1, "block": len(layout.blocks), "parameter": layout.numel}[form]
    value = level * (1.0 + torch.rand(count, dtype=torch.float64, generator=generator))
    pairs = zip(layout.shifts(value, value), layout.blocks, strict=True)
    return value.squeeze(), layout.join([s.expand(b.groups, b.rows, b.columns) for s, b in pairs])


@pytest.mark.parametrize("structure", HESSIAN_STRUCTURES)
@pytest.mark.parametrize("form", ["scalar", "block", "parameter"])
def test_queries_agree_with_the_dense_matrix_where_it_is_positive(structure: str, form: str) -> None:
    found = fitted("mlp", structure, **({"rank": 9} if structure == "lowrank" else {}))
    least = float(torch.linalg.eigvalsh(found.to_dense())[0])
    assert least < -0.1
    shift, diagonal = shifts(found, form, -1.1 * SCALE * least)
    precision = SCALE * found.to_dense() + torch.diag(diagonal)
    inverse, size = torch.linalg.inv(precision), found.layout.numel
    close(found.logdet(SCALE, shift), torch.linalg.slogdet(precision)[1])
    vectors = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(found.solve(vectors, SCALE, shift), vectors @ inverse)
    net, x = BY_NAME["mlp"].network(), BY_NAME["mlp"].data()
    _, factors = layer_factors(Network(net), found.layout, x, identity_cotangents, torch.float64)
    covariance = oracles.linearized_covariance(oracles.jacobian(net, x, found.layout.names), precision)
    close(found.quad(factors, SCALE, shift), covariance)
    close(found.marginal(factors, SCALE, shift), covariance.diagonal(dim1=1, dim2=2))
    if form == "scalar":
        prepared = found.prepared(factors)
        close(found.quads_prepared(prepared, SCALE, shift.reshape(1))[0], covariance)
        close(found.marginals_prepared(prepared, SCALE, shift.reshape(1))[0], covariance.diagonal(dim1=1, dim2=2))
    root = found.sample(torch.eye(size, dtype=torch.float64), SCALE, shift)
    close(root.T @ root, inverse)


@pytest.mark.parametrize("structure", HESSIAN_STRUCTURES)
@pytest.mark.parametrize("form", ["scalar", "block", "parameter"])
def test_a_precision_that_is_not_positive_definite_is_refused(structure: str, form: str) -> None:
    found = fitted("mlp", structure, **({"rank": 9} if structure == "lowrank" else {}))
    least = float(torch.linalg.eigvalsh(found.to_dense())[0])
    shift, _ = shifts(found, form, -0.3 * SCALE * least)
    net, x = BY_NAME["mlp"].network(), BY_NAME["mlp"].data()
    _, factors = layer_factors(Network(net), found.layout, x, identity_cotangents, torch.float64)
    vectors = torch.ones(2, found.layout.numel, dtype=torch.float64)
    prepared = found.prepared(factors)
    queries = [
        lambda: found.logdet(SCALE, shift),
        lambda: found.solve(vectors, SCALE, shift),
        lambda: found.quad(factors, SCALE, shift),
        lambda: found.marginal(factors, SCALE, shift),
        lambda: found.sample(vectors, SCALE, shift),
    ]
    if form == "scalar":
        queries.append(lambda: found.quads_prepared(prepared, SCALE, shift.reshape(1)))
        queries.append(lambda: found.marginals_prepared(prepared, SCALE, shift.reshape(1)))
    for query in queries:
        with pytest.raises(NumericalError, match=r"not positive definite.*-\d.*larger shift.*kind=\"ggn\""):
            query()


def test_log_determinant_is_differentiable() -> None:
    for structure in HESSIAN_STRUCTURES:
        found = fitted("mlp", structure)
        inputs = tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (SCALE, 20.0))
        assert torch.autograd.gradcheck(found.logdet, inputs)


# --- Laplace ---


@pytest.mark.parametrize("structure", HESSIAN_STRUCTURES)
def test_laplace_predicts_saves_and_loads(structure: str, tmp_path: Path) -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    prior = bdl.GaussianPrior(precision=30.0)
    method = bdl.Laplace(structure=structure, kind="hessian")
    with untouched(net):
        bayes = bdl.wrap(net, method, [(x, y)], likelihood="categorical", prior=prior, progress=False)
    assert isinstance(bayes.posterior, GaussianPosterior)
    precision = bayes.posterior.curvature.to_dense() + 30.0 * torch.eye(bayes.posterior.layout.numel)
    jac = oracles.jacobian(net, x, bayes.posterior.layout.names)
    close(bayes(x).latent.covariance, oracles.linearized_covariance(jac, precision))  # type: ignore[attr-defined]
    bayes.save(tmp_path / "b.safetensors")
    again = bdl.load(tmp_path / "b.safetensors", net)
    assert torch.equal(again(x).mean, bayes(x).mean)
    assert isinstance(again.posterior, GaussianPosterior)
    low = again.posterior.with_prior(torch.tensor(1e-3, dtype=torch.float64))
    with pytest.raises(NumericalError, match="not positive definite"):
        low.structure.logdet(low.scale, low.shift)


def test_laplace_names_the_remedy_for_an_indefinite_hessian() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    with pytest.raises(NumericalError, match=r"smallest eigenvalue is about -.*prior precision.*kind=\"ggn\""):
        bdl.wrap(net, bdl.Laplace(structure="full", kind="hessian"), [(x, y)], likelihood="categorical", progress=False)


def test_evidence_of_a_linear_gaussian_model_is_exact() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 2, bias=False).double()
    x, y = real(4)(torch.Generator().manual_seed(1)), targets("gaussian", 2)
    noise = torch.tensor([0.5, 0.5], dtype=torch.float64)
    prior = bdl.GaussianPrior(precision=2.0)
    exact = oracles.BayesianLinearRegression(x, y, 2.0, noise)
    with torch.no_grad():
        net.weight.copy_(exact.mean.view(2, 4))
    method, likelihood = bdl.Laplace(structure="full", kind="hessian"), bdl.Gaussian(noise=0.5)
    bayes = bdl.wrap(net, method, [(x, y)], likelihood=likelihood, prior=prior, progress=False)
    close(bayes.log_evidence(), exact.log_evidence())
    # open noise: the Hessian is at unit noise, and scales with its square
    opened = bdl.wrap(net, method, [(x, y)], likelihood="gaussian", prior=prior, progress=False)
    assert isinstance(opened.posterior, GaussianPosterior)
    fixed = opened.posterior.with_prior(opened.posterior.precision, noise)
    close(fixed.scale * fixed.structure.to_dense(), exact.posterior_precision - 2.0 * torch.eye(8))


# --- refusals ---


@pytest.mark.parametrize("structure", ["kron", "ekfac", {"*": "full"}])
def test_other_structures_are_refused_with_the_alternatives(structure: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"'full', 'diag', 'lowrank'.*kind=\"ggn\""):
        fitted("mlp", structure)


def test_too_large_a_diagonal_is_refused_with_the_alternatives() -> None:
    width = MAX_DIAGONAL // 4
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
    data = [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(UnsupportedError, match=rf"limit {MAX_DIAGONAL}.*lowrank.*diagonal\(\)"):
        estimate(net, data, "categorical", kind="hessian", structure="diag", progress=False)
    with pytest.raises(UnsupportedError, match="GB"):
        estimate(net.double(), data, "categorical", kind="hessian", structure="full", progress=False)


class Changing:
    """A loader whose inputs differ from pass to pass."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.passes = x, y, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        yield self.x + 0.1 * self.passes, self.y


def test_lowrank_refuses_data_that_differ_between_its_passes() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    options: dict[str, Any] = {"kind": "hessian", "structure": "lowrank", "progress": False, "rank": 2}
    with pytest.raises(ArgumentError, match="two passes of the loader differ"):
        estimate(net, Changing(x, y), "categorical", **options)
    with pytest.raises(ArgumentError, match="read once"):
        estimate(net, iter([(x, y)]), "categorical", **options)


def test_partial_passes_resumed_and_accumulated_fits() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    loader = DataLoader(TensorDataset(x, y), batch_size=3, drop_last=True)
    with pytest.raises(ArgumentError, match="drop_last"):
        estimate(net, loader, "categorical", kind="hessian", structure="diag", progress=False)
    with pytest.raises(UnsupportedError, match="without resume="):
        estimate(net, [(x, y)], "categorical", kind="hessian", structure="diag", progress=False, resume="file")
    with pytest.raises(UnsupportedError, match="no sum of outer products"):
        Accumulator(net, "categorical", structure="diag", kind="hessian").update((x, y))


def test_saturated_outputs_have_no_curvature() -> None:
    net = nn.Linear(2, 2).double()
    with torch.no_grad():
        net.weight.copy_(1e4 * torch.eye(2))
    data = [(torch.ones(3, 2, dtype=torch.float64) * torch.tensor([1.0, 0.0]), torch.zeros(3, dtype=torch.long))]
    with pytest.raises(NumericalError, match="exactly zero"):
        estimate(net, data, "categorical", kind="hessian", structure="full", progress=False)
