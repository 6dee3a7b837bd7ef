"""Curvature operators against dense float64 matrices: products, solves, quadratic forms, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesdl as bdl
from bayesdl.curvature import CurvatureOperator, estimate, linearised, operator
from bayesdl.curvature.cotangents import KINDS
from bayesdl.curvature.factors import identity_cotangents, layer_factors
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from tests import oracles
from tests.cases import BY_NAME, LIKELIHOODS, mlp, real, targets
from tests.untouched import untouched

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

NOISE = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
# between them: plain, positional and grouped linear blocks, embeddings with padding, norms, attention, dense blocks
NETWORKS = [
    "mlp",
    "conv2d_groups",
    "transposed_conv",
    "layer_norm",
    "batch_norm_2d",
    "position_embedding",
    "tied_embedding",
    "bare_positions",
    "attention",
    "encoder_layer",
    "lstm",
    "layer_twice",
    "tied_layers",
    "sequence_first",
    "two_inputs",
    "per_example",
    "biases_only",
]


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(name: str = "mlp", kind: str = "ggn", **options: Any) -> CurvatureOperator:
    case = BY_NAME[name]
    data = [(case.data(), targets("categorical"))]
    return operator(case.network(), data, "categorical", kind=kind, select=case.select, **options)


def truth(name: str, names: tuple[str, ...]) -> Tensor:
    case = BY_NAME[name]
    net, x = case.network(), case.data()
    return oracles.ggn(oracles.jacobian(net, x, names), oracles.lambda_formula("categorical", oracles.outputs(net, x)))


@pytest.fixture(params=["forward", "backward", "factors"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way to a GGN product, forced."""
    cost = 1_000_000 if request.param == "factors" else 0
    monkeypatch.setattr(linearised, "COTANGENTS_PER_DIRECTION", cost)
    if request.param == "backward":
        monkeypatch.setattr(linearised, "push_forward", _no_forward_mode)
    return str(request.param)


def _no_forward_mode(*_: Any) -> Tensor:
    raise RuntimeError("no forward mode here")


@pytest.mark.parametrize("name", NETWORKS)
def test_ggn_products_are_those_of_the_dense_matrix(name: str, way: str) -> None:
    found = made(name)
    matrix, v = truth(name, found.layout.names), random(found.shape[0], 3)
    close(found.matmat(v), matrix @ v)
    close(found.matvec(v[:, 0]), matrix @ v[:, 0])
    close(found @ v, matrix @ v)
    close(found @ v[:, 1], matrix @ v[:, 1])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_likelihood_and_kind(likelihood: str, kind: str) -> None:
    torch.manual_seed(0)
    net = mlp(outputs=4).double()
    x, y = real(4)(torch.Generator().manual_seed(1)), targets(likelihood, 4)
    family = resolve(likelihood, noise=NOISE) if likelihood == "gaussian" else resolve(likelihood)
    data = [(x[:3], y[:3]), (x[3:], y[3:])]

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    found = operator(net, data, family, kind=kind, samples=2, generator=seeded())
    if kind == "hessian":
        matrix = oracles.loss_hessian(net, x, y, likelihood, found.layout.names, NOISE)
    else:
        options: dict[str, Any] = {"samples": 2, "generator": seeded(), "progress": False}
        matrix = estimate(net, data, family, structure="full", kind=kind, **options).to_dense()
    close(found.to_dense(), matrix)
    v = random(found.shape[0])
    close(found.matvec(v), matrix @ v)
    jac, f = oracles.jacobian(net, x, found.layout.names), oracles.outputs(net, x)
    if kind == "ggn":
        close(matrix, oracles.ggn(jac, oracles.lambda_formula(likelihood, f, NOISE)))
    if kind == "empirical":
        close(matrix, oracles.outer_gradients(jac, oracles.score(likelihood, f, y, NOISE)))
    assert found.num_data == len(x)
    assert found.log_likelihood == pytest.approx(float(oracles.log_likelihood(likelihood, f, y, NOISE)), rel=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_products_are_those_of_the_dense_matrix(name: str) -> None:
    case, found = BY_NAME[name], made(name, "hessian")
    names = found.layout.names
    matrix = oracles.loss_hessian(case.network(), case.data(), targets("categorical"), "categorical", names)
    close(found.to_dense(), matrix)
    v = random(found.shape[0], 2)
    close(found.matmat(v), matrix @ v)


def test_hessian_of_a_linear_model_is_its_ggn() -> None:
    close(made("single_layer", "hessian").to_dense(), truth("single_layer", ("weight", "bias")))


@pytest.mark.parametrize("kind", KINDS)
def test_products_do_not_depend_on_batches_or_memory(kind: str) -> None:
    net, x, y = BY_NAME["conv2d"].network(), BY_NAME["conv2d"].data(), targets("categorical")
    whole = operator(net, [(x, y)], "categorical", kind=kind)
    pieces = operator(net, DataLoader(TensorDataset(x, y), batch_size=3), "categorical", kind=kind, memory=1)
    if kind != "mc":  # whose draws follow the chunks
        v = random(whole.shape[0], 2)
        close(pieces @ v, whole @ v)
    many = random(pieces.shape[0], 40, seed=3)
    close(pieces.matmat(many)[:, :2], pieces.matmat(many[:, :2]))  # whatever goes through together


def test_open_noise_counts_as_one() -> None:
    torch.manual_seed(0)
    net = mlp(outputs=4).double()
    data = [(real(4)(torch.Generator()), targets("gaussian", 4))]
    v = random(sum(p.numel() for p in net.parameters()))
    close(operator(net, data, "gaussian") @ v, operator(net, data, bdl.Gaussian(noise=1.0)) @ v)


def test_dtype_of_products_is_that_of_the_clone() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    exact = operator(net, [(x, y)], "categorical")
    assert exact.dtype is torch.float64
    single = net.float()
    wide = operator(single, [(x, y)], "categorical", dtype=torch.float64)
    narrow = operator(single, [(x, y)], "categorical")
    half = operator(BY_NAME["mlp"].network().bfloat16(), [(x, y)], "categorical")
    v = random(exact.shape[0])
    assert (wide @ v).dtype is torch.float64
    assert (narrow @ v).dtype is torch.float32
    assert (half @ v).dtype is torch.float32
    again = operator(single.double(), [(x.float().double(), y)], "categorical")
    torch.testing.assert_close(wide @ v, again @ v, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((narrow @ v).double(), wide @ v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_network_stays_as_it_is(kind: str) -> None:
    net, x, y = BY_NAME["encoder_layer"].network(), BY_NAME["encoder_layer"].data(), targets("categorical")
    with untouched(net):
        found = operator(net, [(x, y)], "categorical", kind=kind)
        found.matmat(random(found.shape[0], 2))
        found.trace(6)


def test_inference_mode_and_no_grad() -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    for kind in ("ggn", "hessian"):
        found = operator(net, [(x, y)], "categorical", kind=kind)
        v = random(found.shape[0])
        expected = found @ v
        with torch.no_grad():
            close(found @ v, expected)
        with torch.inference_mode():
            inside = operator(net, [(x.clone(), y.clone())], "categorical", kind=kind) @ v.clone()
        close(inside.clone(), expected)


# --- solves and quadratic forms ---


def system(kind: str = "ggn", form: str = "scalar") -> tuple[CurvatureOperator, Tensor, Tensor, Tensor]:
    """Operator, right-hand sides, shift, dense precision at scale 0.7."""
    found = made("mlp", kind)
    generator = torch.Generator().manual_seed(2)
    count = {"scalar": 1, "block": len(found.layout.blocks), "parameter": found.shape[0]}[form]
    shift = 0.5 + torch.rand(count, dtype=torch.float64, generator=generator) + (30.0 if kind == "hessian" else 0.0)
    shift = shift.squeeze() if form == "scalar" else shift
    pairs = zip(found.layout.shifts(shift, shift), found.layout.blocks, strict=True)
    flat = found.layout.join([s.expand(b.groups, b.rows, b.columns) for s, b in pairs])
    return found, random(found.shape[0], 3, seed=4), shift, 0.7 * found.to_dense() + torch.diag(flat)


@pytest.mark.parametrize("form", ["scalar", "block", "parameter"])
@pytest.mark.parametrize("preconditioner", [None, "kron"])
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_solutions_are_those_of_the_dense_solver(form: str, preconditioner: str | None, kind: str) -> None:
    found, b, shift, precision = system(kind, form)
    solved = found.solve(b, 0.7, shift, tol=1e-11, preconditioner=preconditioner)
    close(solved.value, torch.linalg.solve(precision, b))
    assert solved.residual <= 1e-11
    assert 1 <= solved.iterations <= 60
    single = found.solve(b[:, 0], 0.7, shift, tol=1e-11, preconditioner=preconditioner)
    assert single.value.shape == (found.shape[0],)
    close(single.value, torch.linalg.solve(precision, b[:, 0]))


def test_kron_reduces_the_iterations_of_an_ill_conditioned_system() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = random(200, 12, seed=1) * torch.logspace(1, -2, 12, dtype=torch.float64)
    found = operator(net, [(x, targets("categorical", 3, 200))], "categorical")
    b = random(found.shape[0], seed=2)
    plain = found.solve(b, 1.0, 1e-2, tol=1e-8)
    turned = found.solve(b, 1.0, 1e-2, tol=1e-8, preconditioner="kron")
    torch.testing.assert_close(turned.value, plain.value, rtol=1e-4, atol=1e-4 * float(plain.value.abs().max()))
    assert 3 * turned.iterations < plain.iterations


@pytest.mark.parametrize("structure", ["diag", "kron", "ekfac", "lowrank", "full"])
def test_any_structure_preconditions(structure: str) -> None:
    found, b, shift, precision = system("ggn", "parameter")
    data = [(BY_NAME["mlp"].data(), targets("categorical"))]
    known = estimate(BY_NAME["mlp"].network(), data, "categorical", structure=structure, progress=False)
    solved = found.solve(b, 0.7, shift, tol=1e-10, preconditioner=known)
    close(solved.value, torch.linalg.solve(precision, b), 1e-7)
    if structure == "full":
        assert found.solve(b, 0.7, 0.5, preconditioner=known).iterations == 1


def test_quad_is_the_predictive_covariance() -> None:
    found, _, shift, precision = system("ggn", "parameter")
    net, x = BY_NAME["mlp"].network(), BY_NAME["mlp"].data()
    _, factors = layer_factors(Network(net), found.layout, x, identity_cotangents, torch.float64)
    expected = oracles.linearized_covariance(oracles.jacobian(net, x, found.layout.names), precision)
    close(found.quad(factors, 0.7, shift, tol=1e-11), expected)


@pytest.mark.parametrize("form", ["scalar", "block", "parameter"])
def test_solutions_and_covariances_are_differentiable(form: str) -> None:
    found, b, shift, _ = system("ggn", form)

    def solved(b: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return found.solve(b, scale, shift, tol=1e-12).value[:5]

    scale = torch.tensor(0.7, dtype=torch.float64)
    inputs = tuple(value.clone().requires_grad_() for value in (b[:, :1], scale, shift))
    assert torch.autograd.gradcheck(solved, inputs, eps=1e-5, atol=1e-6, rtol=1e-5, fast_mode=True)


def test_traces_diagonals_and_log_determinants_reach_the_operator() -> None:
    for kind in ("ggn", "hessian"):
        found, _, shift, precision = system(kind, "parameter")
        size, matrix = found.shape[0], found.to_dense()
        for method in ("hutchinson", "hutch++", "xtrace"):
            close(found.trace(size, method).value, matrix.trace())
        close(found.diagonal(size).value, matrix.diagonal())
        close(found.logdet(0.7, shift, num_probes=size).value, torch.linalg.slogdet(precision)[1])
        plain = torch.linalg.slogdet(0.7 * matrix + 40.0 * torch.eye(size, dtype=torch.float64))[1]
        close(found.logdet(0.7, 40.0, num_probes=size).value, plain)
        estimate = found.logdet(0.7, 40.0, num_probes=8, steps=20)
        # 6 standard errors of 8 probes: a t distribution with 7 degrees, failure below 1e-3 for another seed
        assert abs(float(estimate.value - plain)) < 6.0 * float(estimate.standard_error)


# --- outputs at positions, single elements, many outputs ---


class Tagger(nn.Module):
    """Logits at every token, through attention and an embedding with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)))


@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_outputs_at_positions_and_ignored_targets(kind: str) -> None:
    torch.manual_seed(0)
    net, generator = Tagger().double(), torch.Generator().manual_seed(1)
    x, y = torch.randint(7, (6, 3), generator=generator), torch.randint(5, (6, 3), generator=generator)
    y[0, 1] = y[4, 2] = -100
    found = operator(net, [(x, y)], "categorical", kind=kind)
    assert found.num_data == 16
    v = random(found.shape[0], 2)
    if kind == "ggn":
        flat, counted = nn.Sequential(net, nn.Flatten(0, 1)), y.flatten() != -100
        jac = oracles.jacobian(flat, x, [f"0.{name}" for name in found.layout.names])[counted]
        lam = oracles.lambda_formula("categorical", oracles.outputs(flat, x))[counted]
        matrix = oracles.ggn(jac, lam)
    else:
        options: dict[str, Any] = {"kind": kind, "structure": "full", "progress": False}
        matrix = estimate(net, [(x, y)], "categorical", **options).to_dense()
    close(found @ v, matrix @ v)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_single_elements_are_rows_and_columns_of_the_whole(kind: str, way: str) -> None:
    net, x, y = BY_NAME["mlp"].network(), BY_NAME["mlp"].data(), targets("categorical")
    chosen = operator(net, [(x, y)], "categorical", kind=kind, select=bdl.select.largest_magnitude(10))
    whole = operator(net, [(x, y)], "categorical", kind=kind).to_dense()
    names = chosen.layout.names
    marks = chosen.layout.to_dict(torch.ones(10))
    everything = {n: marks.get(n, torch.zeros_like(p)) for n, p in net.named_parameters()}
    where = torch.cat([everything[n].flatten() for n, _ in net.named_parameters()]).nonzero().squeeze(1)
    assert chosen.shape == (10, 10)
    assert set(names) <= set(everything)
    close(chosen.to_dense(), whole[where][:, where])


def test_closed_forms_of_the_likelihoods_hessian_times_are_those_of_the_root() -> None:
    f, u = random(5, 4, seed=1), random(5, 4, seed=2)
    for name in LIKELIHOODS:
        family = resolve(name, noise=NOISE) if name == "gaussian" else resolve(name)
        lam = oracles.lambda_formula(name, f, NOISE)
        close(family.hessian_times(f, u), torch.einsum("bcd,bd->bc", lam, u))
