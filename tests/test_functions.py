"""Plain functions of parameters: the same curvature and posterior as the module they stand for."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import bayesdl as bdl
from bayesdl.curvature import estimate
from bayesdl.errors import ArgumentError, StaleModelError
from tests import oracles
from tests.cases import mlp, real, targets
from tests.untouched import untouched


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flat(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, p["inner"], p["shift"])) @ p["head"]


def nested(p: dict[str, Any], x: Tensor, z: Tensor, scale: float) -> Tensor:
    h = torch.tanh(x @ p["encoder"]["weight"] + p["encoder"]["table"][p["which"]])
    return scale * (h * z) @ p["head.weight"] + p["gain"]


FLAT = {"inner": drawn(5, 4, seed=1), "shift": drawn(5, seed=2), "head": drawn(5, 3, seed=3)}
NESTED = {
    "encoder": {"weight": drawn(4, 2, seed=1), "table": drawn(3, 2, seed=2)},
    "which": torch.tensor(1),
    "head.weight": drawn(2, 3, seed=3),
    "gain": drawn(seed=4),
}
X, Y = real(4)(torch.Generator().manual_seed(0)), targets("categorical")
PROBLEMS: dict[str, tuple[nn.Module, Any]] = {
    "flat": (bdl.as_module(flat, FLAT), X),
    "nested": (bdl.as_module(functools.partial(nested, scale=0.5), NESTED), (X, drawn(8, 2, seed=5))),
    "keywords": (bdl.as_module(functools.partial(nested, scale=0.5), NESTED), {"z": drawn(8, 2, seed=5), "x": X}),
}


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_curvature_equals_the_oracle(name: str, structure: str) -> None:
    net, x = PROBLEMS[name]
    with untouched(net):
        found = estimate(net, [(x, Y)], "categorical", structure=structure, progress=False)
    same = (x["x"], x["z"]) if isinstance(x, dict) else x
    jac, f = oracles.jacobian(net, same, found.layout.names), oracles.outputs(net, same)
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", f))
    if structure == "diag":
        truth = torch.diag(truth.diagonal())
    if structure == "kron":  # exact for each parameter
        sizes = [
            len(block) for block in found.layout.split(torch.zeros(found.layout.numel)) for block in block.flatten(1)
        ]
        truth = truth * torch.block_diag(*[torch.ones(n, n, dtype=torch.float64) for n in sizes])
    torch.testing.assert_close(found.to_dense(), truth, rtol=1e-7, atol=1e-9)


def test_names_are_paths_and_memory_is_shared() -> None:
    net = PROBLEMS["nested"][0]
    names = ["gain", "encoder.weight", "encoder.table", "head.weight"]
    assert sorted(n for n, _ in net.named_parameters()) == sorted(names)
    assert [n for n, _ in net.named_buffers()] == ["which"]
    assert net.encoder.weight.data_ptr() == NESTED["encoder"]["weight"].data_ptr()
    assert all(p.requires_grad for p in net.parameters())
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    assert next(bdl.as_module(flat, {"a": frozen}).parameters()) is frozen
    assert not NESTED["gain"].requires_grad
    assert "flat" in repr(PROBLEMS["flat"][0])


def test_tied_tensors_are_one_parameter() -> None:
    weight = drawn(4, 4, seed=1)
    net = bdl.as_module(lambda p, x: torch.tanh(x @ p["first"]) @ p["second"], {"first": weight, "second": weight})
    assert len(list(net.parameters())) == 1
    found = estimate(net, [(X, Y)], "categorical", structure="full", progress=False)
    jac, f = oracles.jacobian(net, X, ["first"]), oracles.outputs(net, X)
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", f))
    torch.testing.assert_close(found.to_dense(), truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["laplace", "swag", "temperature", "map"])
def test_methods_take_functions(method: str) -> None:
    net = bdl.as_module(flat, {name: value.clone() for name, value in FLAT.items()})
    data = [(X, Y), (X, Y)]
    options: dict[str, Any] = {"likelihood": "categorical", "progress": False}
    g = torch.Generator().manual_seed(0)
    with untouched(net):
        bayes = bdl.wrap(net, method, data, generator=g, **options)
        pred = bayes(X, num_samples=4, generator=g)
    assert pred.mean.shape == (8, 3)
    assert bool(pred.mean.isfinite().all())


def test_laplace_is_that_of_the_module_behind_the_function() -> None:
    torch.manual_seed(0)
    net = mlp().double().eval()
    function = bdl.as_module(lambda p, x: functional_call(net, p, (x,)), dict(net.named_parameters()))
    method = bdl.Laplace(structure="full")
    both = [
        bdl.wrap(m, method, [(X, Y)], likelihood="categorical", prior=bdl.GaussianPrior(2.0), progress=False)
        for m in (net, function)
    ]
    torch.testing.assert_close(both[1](X).latent.covariance, both[0](X).latent.covariance, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(both[1].log_evidence(), both[0].log_evidence())
    assert [n for n, _ in function.named_parameters()] == [n for n, _ in net.named_parameters()]


def test_writing_to_the_tensors_is_noticed() -> None:
    values = {name: value.clone() for name, value in FLAT.items()}
    bayes = bdl.wrap(bdl.as_module(flat, values), "map", likelihood="categorical", progress=False)
    values["head"].add_(1.0)
    with pytest.raises(StaleModelError, match="'head'"):
        bayes(X)


def test_a_saved_posterior_finds_its_function_again(tmp_path: Any) -> None:
    net = bdl.as_module(flat, FLAT)
    bayes = bdl.wrap(net, "laplace", [(X, Y)], likelihood="categorical", progress=False)
    bayes.save(tmp_path / "b.safetensors")
    loaded = bdl.load(tmp_path / "b.safetensors", bdl.as_module(flat, FLAT))
    torch.testing.assert_close(loaded(X).mean, bayes(X).mean)


def test_refusals() -> None:
    for wrong in (mlp(), "network", None):
        with pytest.raises(ArgumentError, match="a function of"):
            bdl.as_module(wrong, FLAT)  # type: ignore[arg-type]
    for empty in ({}, [FLAT["inner"]]):
        with pytest.raises(ArgumentError, match="dictionary of tensors"):
            bdl.as_module(flat, empty)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="'a.b' is a list"):
        bdl.as_module(flat, {"a": {"b": [1.0]}})
    for taken in ({"forward": FLAT["head"]}, {"a": FLAT["head"], "a.b": FLAT["head"]}, {"a.b": X, "a": X}):
        with pytest.raises(ArgumentError, match="cannot name"):
            bdl.as_module(flat, taken)
    for nameless in ({"": X}, {"a..b": X}, {3: X}):
        with pytest.raises(ArgumentError, match="is none"):
            bdl.as_module(flat, nameless)  # type: ignore[dict-item]
    net = mlp().train()
    for behind in (lambda p, x: functional_call(net, p, (x,)), functools.partial(functional_call, net)):
        with pytest.raises(ArgumentError, match="train mode"):
            bdl.as_module(behind, dict(net.named_parameters()))
