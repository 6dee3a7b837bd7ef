"""One pass over the data: likelihoods, sums, splits, statistics, refusals, and what stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.curvature import estimate
from bayesdl.curvature.chunking import chunk_size
from bayesdl.curvature.cotangents import cotangent_rule
from bayesdl.curvature.estimate import fit_curvature
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.plan import plan
from bayesdl.curvature.registry import STRUCTURES
from bayesdl.errors import (
    UnsupportedError,
)
from bayesdl.likelihoods import resolve
from bayesdl.network import Network
from tests import oracles
from tests.cases import BY_NAME, LIKELIHOODS, mlp, real, targets
from tests.untouched import untouched

NOISE = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)


def problem(likelihood: str) -> tuple[nn.Module, Tensor, Tensor, Any]:
    """Network with four outputs, inputs, targets, and the likelihood (unequal noises for "gaussian")."""
    torch.manual_seed(0)
    net = mlp(outputs=4).double()
    family = resolve(likelihood, noise=NOISE) if likelihood == "gaussian" else resolve(likelihood)
    return net, real(4)(torch.Generator().manual_seed(1)), targets(likelihood, 4), family


def dense(net: nn.Module, data: Any, likelihood: Any = "categorical", **options: Any) -> Tensor:
    return estimate(net, data, likelihood, progress=False, **options).to_dense()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


@pytest.fixture(params=sorted(STRUCTURES))
def structure(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- the right numbers for every likelihood ---


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_ggn_of_every_likelihood(likelihood: str) -> None:
    net, x, y, family = problem(likelihood)
    jac, f = oracles.jacobian(net, x, [n for n, _ in net.named_parameters()]), oracles.outputs(net, x)
    lam = oracles.lambda_formula(likelihood, f, NOISE)
    if likelihood != "heteroscedastic":  # whose Hessian depends on y; the formula is its expectation
        close(oracles.lambda_autograd(likelihood, f, y, NOISE), lam)
    truth = oracles.ggn(jac, lam)
    close(dense(net, [(x, y)], family, structure="full"), truth)
    close(dense(net, [(x, y)], family, structure="diag"), torch.diag(truth.diagonal()))


def test_heteroscedastic_formula_is_the_expected_hessian() -> None:
    # E over y of the Hessian is Gaussian quadrature of degree two: y = m +- s are exact for a quadratic in y
    f = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, log_variance = f.chunk(2, -1)
    spread = (0.5 * log_variance).exp()
    hessians = [oracles.lambda_autograd("heteroscedastic", f, mean + sign * spread) for sign in (-1.0, 1.0)]
    close(sum(hessians) / 2, oracles.lambda_formula("heteroscedastic", f))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_empirical_fisher_of_every_likelihood(likelihood: str) -> None:
    # three peers return twice this for regression
    net, x, y, family = problem(likelihood)
    jac, f = oracles.jacobian(net, x, [n for n, _ in net.named_parameters()]), oracles.outputs(net, x)
    truth = oracles.outer_gradients(jac, oracles.score(likelihood, f, y, NOISE))
    close(dense(net, [(x, y)], family, structure="full", kind="empirical"), truth)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_monte_carlo_fisher_of_every_likelihood(likelihood: str) -> None:
    net, x, y, family = problem(likelihood)
    jac, f = oracles.jacobian(net, x, [n for n, _ in net.named_parameters()]), oracles.outputs(net, x)
    drawn = family.sample(f, 3, torch.Generator().manual_seed(4))
    truth = sum(oracles.outer_gradients(jac, oracles.score(likelihood, f, t, NOISE)) for t in drawn) / 3
    options = {"kind": "mc", "samples": 3, "generator": torch.Generator().manual_seed(4)}
    close(dense(net, [(x, y)], family, structure="full", **options), truth)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_monte_carlo_fisher_converges_to_the_ggn(likelihood: str) -> None:
    # 2,000 draws at 8 inputs: each entry has a relative standard error of about 1-2%; 15% is beyond
    # six of them for all five families (failure rate below 1e-8 over seeds; the seed is fixed)
    net, x, y, family = problem(likelihood)
    rule = cotangent_rule(family, "mc", 2_000, torch.Generator().manual_seed(9))
    f = oracles.outputs(net, x)
    vectors = rule(f, y)
    found = torch.einsum("knc,knd->ncd", vectors, vectors)
    truth = oracles.lambda_formula(likelihood, f, NOISE)
    assert float((found - truth).norm() / truth.norm()) < 0.15


def test_without_a_generator_the_draws_come_from_a_fixed_seed() -> None:
    net, x, y, family = problem("categorical")
    state = torch.get_rng_state()
    first = dense(net, [(x, y)], family, kind="mc", structure="diag")
    torch.manual_seed(123)
    second = dense(net, [(x, y)], family, kind="mc", structure="diag")
    torch.set_rng_state(state)
    assert torch.equal(first, second)
    other = dense(net, [(x, y)], family, kind="mc", structure="diag", generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first, other)


# --- sums over the data ---


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
def test_batches_their_order_and_chunks_do_not_matter(structure: str, kind: str) -> None:
    net, x, y, family = problem("categorical")
    whole = dense(net, [(x, y)], family, structure=structure, kind=kind)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    splits = [(x[order[:3]], y[order[:3]]), (x[order[3:4]], y[order[3:4]]), (x[order[4:]], y[order[4:]])]
    close(dense(net, splits, family, structure=structure, kind=kind), whole)
    close(dense(net, [(x, y)], family, structure=structure, kind=kind, memory=1), whole)


def test_chunks_of_positions_and_per_example_gradients(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["position_embedding"]
    net, x, y = case.network(), case.data(), targets("categorical")
    whole = dense(net, [(x, y)], structure=structure)
    monkeypatch.setattr("bayesdl.curvature.factor.CHUNK", 1)
    close(dense(net, [(x, y)], structure=structure, memory=1), whole)


def test_twice_the_data_is_twice_the_curvature(structure: str) -> None:
    net, x, y, family = problem("categorical")
    once = dense(net, [(x, y)], family, structure=structure)
    close(dense(net, [(x, y), (x, y)], family, structure=structure), 2.0 * once)
    close(dense(net, [(torch.cat([x, x]), torch.cat([y, y]))], family, structure=structure), 2.0 * once)


def test_statistics_beside_the_curvature() -> None:
    net, x, y, family = problem("gaussian")
    network = Network(net)
    fit = fit_curvature(
        network,
        plan(network, x),
        [(x[:3], y[:3]), (x[3:], y[3:])],
        family,
        structure="diag",
        kind="ggn",
        progress=False,
    )
    f = oracles.outputs(net, x)
    assert fit.num_data == 8
    assert fit.squared_error is not None
    close(torch.tensor(fit.log_likelihood, dtype=torch.float64), oracles.log_likelihood("gaussian", f, y, NOISE))
    close(fit.squared_error, (y - f).square().sum(0))


def test_open_noise_keeps_the_curvature_of_each_output() -> None:
    net, x, y, _ = problem("gaussian")
    network = Network(net)
    fit = fit_curvature(
        network, plan(network, x), [(x, y)], resolve("gaussian"), structure="full", kind="ggn", progress=False
    )
    jac = oracles.jacobian(net, x, network.names)
    assert len(fit.parts) == 4
    for c, part in enumerate(fit.parts):
        close(part.to_dense(), jac[:, c].T @ jac[:, c])
    close(fit.curvature.to_dense(), torch.einsum("ncp,ncq->pq", jac, jac))


def test_curvature_is_single_precision_for_half_networks(structure: str) -> None:
    torch.manual_seed(0)
    net = mlp().bfloat16()
    x, y = real(4)(torch.Generator().manual_seed(1)).float(), targets("categorical")
    found = estimate(net, [(x, y)], "categorical", structure=structure, progress=False)
    assert found.to_dense().dtype == torch.float32
    wide = net.float()
    truth = estimate(wide, [(x, y)], "categorical", structure=structure, progress=False).to_dense()
    assert float((found.to_dense() - truth).norm() / truth.norm()) < 0.05


def test_dtype_on_request(structure: str) -> None:
    net, x, y, family = problem("categorical")
    net = net.float()
    found = estimate(net, [(x, y)], family, structure=structure, dtype=torch.float64, progress=False)
    assert found.to_dense().dtype == torch.float64


# --- memory ---


def _layout(activations: int, outputs: int, dense_parameters: int) -> Layout:
    from bayesdl.curvature.layout import Block

    block = Block("b", "dense", ("b",), ((dense_parameters,),), (), 1, dense_parameters, 1)
    return Layout((block,), ("b",), ((dense_parameters,),), activations, outputs)


def test_chunks_grow_with_memory_and_shrink_with_outputs_and_per_example_gradients() -> None:
    base = chunk_size(_layout(1000, 10, 1), "kron", torch.float32, memory=1 << 24)
    assert base == (1 << 24) // (4 * 10 * 3002)
    assert chunk_size(_layout(1000, 10, 1), "kron", torch.float32, memory=1 << 25) >= 2 * base
    assert chunk_size(_layout(1000, 1000, 1), "kron", torch.float32, memory=1 << 24) == 1
    assert chunk_size(_layout(1000, 10, 100_000), "kron", torch.float32, memory=1 << 24) == 2
    assert chunk_size(_layout(1000, 10, 1), "kron", torch.float32, width=1, memory=1 << 24) >= 10 * base
    assert chunk_size(_layout(1000, 10, 1), "kron", torch.float32, memory=1) == 1
    # by default: near the caches on a CPU, but not fewer examples than convolutions need, and within the budget
    per_example = 3 * 4 * 10 * 100
    assert chunk_size(_layout(100, 10, 0), "kron", torch.float32) == pytest.approx((32 << 20) / per_example, rel=0.01)
    assert chunk_size(_layout(10_000, 10, 0), "kron", torch.float32) == 256
    assert chunk_size(_layout(1_000_000, 10, 0), "kron", torch.float32) == (512 << 20) // (per_example * 10_000)
    elsewhere = chunk_size(_layout(100, 10, 0), "kron", torch.float32, device=torch.device("meta"))
    assert elsewhere == pytest.approx((512 << 20) / per_example, rel=0.01)


def test_full_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y, family = problem("categorical")
    monkeypatch.setattr("bayesdl.curvature.full.MAX_BYTES", 1000)
    with pytest.raises(UnsupportedError, match=r"GB.*kron.*diag"):
        dense(net, [(x, y)], family, structure="full")


# --- what stays as it was ---


@pytest.mark.parametrize("kind", ["ggn", "mc", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "batch_norm_2d", "tied_embedding", "attention", "lstm", "in_place_residual"])
def test_the_users_network_stays_as_it_is(name: str, structure: str, kind: str) -> None:
    case = BY_NAME[name]
    net, x, y = case.network(), case.data(), targets("categorical")
    fired = []
    net.register_forward_hook(lambda *_: None)
    for parameter in list(net.parameters())[:2]:
        parameter.grad = torch.ones_like(parameter)
        parameter.register_hook(fired.append)
    assert net.training
    with untouched(net):
        estimate(net, [(x, y)], "categorical", structure=structure, kind=kind, progress=False)
    assert not fired


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_2d", "instance_norm_tracked"])
def test_a_network_in_train_mode_is_fitted_in_eval_mode(name: str) -> None:
    case = BY_NAME[name]
    net, x, y = case.network(), case.data(), targets("categorical")
    assert net.training
    trained = dense(net, [(x, y)], structure="full")
    close(trained, dense(net.eval(), [(x, y)], structure="full"))


def test_dropout_is_off() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double().train()
    x, y = real(4)(torch.Generator()), targets("categorical")
    jac = oracles.jacobian(net, x, [n for n, _ in net.named_parameters()])
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", oracles.outputs(net, x)))
    close(dense(net, [(x, y)], structure="full"), truth)


@pytest.mark.parametrize("name", ["mlp", "bare_parameters", "lstm"])
def test_works_under_no_grad_and_inference_mode(name: str) -> None:
    case = BY_NAME[name]
    net, x, y = case.network(), case.data(), targets("categorical")
    truth = dense(net, [(x, y)], structure="full")
    with torch.no_grad():
        close(dense(net, [(x, y)], structure="full"), truth)
    with torch.inference_mode():
        inside = x.clone()
        found = dense(net, [(inside, y)], structure="full")
    close(found.clone(), truth)
