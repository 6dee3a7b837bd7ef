"""BackPACK as a second source: equal where it is right, refused where it is wrong, and the user's network untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl import curvature
from bayesdl.errors import ArgumentError, MissingDependencyError, NonFiniteError, UnsupportedError
from bayesdl.integrations import backpack
from tests import oracles
from tests.cases import BY_NAME, behind, mlp, real, targets
from tests.networks import OUTPUTS
from tests.untouched import untouched

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]  # the peer's own

NOISE = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
NETWORKS: dict[str, tuple[Any, Any]] = {
    "mlp": (mlp, real(4)),
    "nested": (
        lambda: nn.Sequential(mlp(5, 6), nn.Sequential(nn.Sigmoid(), nn.Linear(6, OUTPUTS, bias=False))),
        real(4),
    ),
    "conv1d": (behind(nn.Conv1d(2, 3, 2), nn.ELU(inplace=True), nn.Dropout(0.5), features=12), real(2, 5)),
    "conv2d": (behind(nn.Conv2d(2, 4, 2, padding=1, groups=2), nn.MaxPool2d(2), features=16), real(2, 3, 3)),
    "conv3d": (behind(nn.Conv3d(1, 2, 2), features=16), real(1, 3, 3, 3)),
    "transposed": (behind(nn.ConvTranspose2d(2, 2, 2, stride=2), features=32), real(2, 2, 2)),
    "batch_norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, OUTPUTS)),
        real(4),
    ),
}


@pytest.fixture(autouse=True)
def installed() -> None:
    pytest.importorskip("backpack")


def problem(name: str) -> tuple[nn.Module, Tensor]:
    build, inputs = NETWORKS[name]
    torch.manual_seed(0)
    return copy.deepcopy(build()).double().train(), inputs(torch.Generator().manual_seed(1))


def loader(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[:3], y[:3]), (x[3:], y[3:])]


@pytest.mark.parametrize("likelihood", ["categorical", bdl.Gaussian(0.7), bdl.Gaussian(NOISE)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_diagonal_is_ours_and_the_oracles(name: str, likelihood: Any) -> None:
    net, x = problem(name)
    kind = likelihood if isinstance(likelihood, str) else "gaussian"
    data = loader(x, targets(kind))
    with untouched(net):
        theirs = backpack.estimate(net, data, likelihood, progress=False)
    ours = curvature.estimate(net, data, likelihood, structure="diag", progress=False)
    assert theirs.layout == ours.layout
    torch.testing.assert_close(theirs.to_dense(), ours.to_dense(), rtol=1e-9, atol=1e-12)
    jac = oracles.jacobian(net, x, ours.layout.names)
    noise = 1.0 if isinstance(likelihood, str) else likelihood.noise
    truth = oracles.ggn(jac, oracles.lambda_formula(kind, oracles.outputs(net, x), noise)).diagonal()
    torch.testing.assert_close(theirs.to_dense().diagonal(), truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("likelihood", ["categorical", bdl.Gaussian(NOISE)])
@pytest.mark.parametrize("name", ["mlp", "nested"])
def test_kronecker_factors_of_linear_layers_are_ours(name: str, likelihood: Any) -> None:
    net, x = problem(name)
    data = loader(x, targets(likelihood if isinstance(likelihood, str) else "gaussian"))
    with untouched(net):
        theirs = backpack.estimate(net, data, likelihood, structure="kron", progress=False)
    ours = curvature.estimate(net, data, likelihood, structure="kron", bias="separate", progress=False)
    assert theirs.layout == ours.layout
    for key, value in ours.tensors().items():
        torch.testing.assert_close(theirs.tensors()[key], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(theirs.logdet(1.0, 2.0), ours.logdet(1.0, 2.0))


def test_long_biases_keep_their_diagonal() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 1025), nn.Tanh(), nn.Linear(1025, OUTPUTS)).double(), real(2)(torch.Generator())
    options: dict[str, Any] = {"structure": "kron", "select": "0", "progress": False}
    theirs = backpack.estimate(net, [(x, targets("categorical"))], "categorical", **options)
    ours = curvature.estimate(net, [(x, targets("categorical"))], "categorical", bias="separate", **options)
    for key, value in ours.tensors().items():
        torch.testing.assert_close(theirs.tensors()[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("select", ["last_layer", "requires_grad", r"weight$"])
def test_selections(select: str) -> None:
    net, x = problem("mlp")
    net[0].weight.requires_grad_(False)
    data = loader(x, targets("categorical"))
    with untouched(net):
        theirs = backpack.estimate(net, data, "categorical", select=select, progress=False)
    ours = curvature.estimate(net, data, "categorical", structure="diag", select=select, progress=False)
    torch.testing.assert_close(theirs.to_dense(), ours.to_dense(), rtol=1e-9, atol=1e-12)


def test_half_networks_have_float32_curvature() -> None:
    net, x = problem("mlp")
    found = backpack.estimate(net.float(), [(x, targets("categorical"))], "categorical", progress=False)
    assert found.to_dense().dtype == torch.float32


def backpacks_factors(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """KFLR of the first layer's weight, straight from BackPACK."""
    from backpack import backpack as context
    from backpack import extend
    from backpack.extensions import KFLR

    module, loss = extend(copy.deepcopy(net).eval()), extend(nn.CrossEntropyLoss(reduction="sum"))
    with context(KFLR()):
        loss(module(x), y).backward()
    return module[0].weight.kflr


def test_their_kronecker_factors_of_a_convolution_are_mis_scaled_and_ours_are_not() -> None:
    # patches of white noise meet independent cotangents, so that a product of their moments has about the trace of the
    # exact block; seed fixed
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.Flatten(), nn.Linear(32, OUTPUTS)).double()
    x, y = torch.randn(64, 1, 5, 5, dtype=torch.float64), torch.zeros(64, dtype=torch.long)
    f = oracles.outputs(net, x)
    jac = oracles.jacobian(net, x, ["0.weight"])
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", f)).trace()
    ours = curvature.estimate(net, [(x, y)], "categorical", structure="kron", select="0", progress=False)
    outer, inner = backpacks_factors(net, x, y)
    theirs = outer.trace() * inner.trace()
    assert 0.9 < float(ours.to_dense().trace() / truth) < 1.1
    assert float(theirs / truth) > 3.0


def test_what_backpack_gets_wrong_or_does_not_know_is_refused() -> None:
    x, y = real(4)(torch.Generator().manual_seed(1)), targets("categorical")

    def refused(net: nn.Module, inputs: Any, match: str, **options: Any) -> None:
        with untouched(net), pytest.raises(UnsupportedError, match=match):
            backpack.estimate(net, [(inputs, y)], options.pop("likelihood", "categorical"), progress=False, **options)

    net, images = problem("conv2d")
    refused(net, images, "'0' is no linear layer.*mis-scales", structure="kron")
    refused(BY_NAME["layer_twice"].network(), x, "'network' is a Twice.*nn.Sequential alone")
    layer = nn.Linear(4, 4)
    refused(nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3)).double(), x, "'2' shares a layer")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    tied[2].weight = tied[0].weight
    refused(tied, x, "'2' shares")
    refused(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)).double(), x, "BackPACK cannot.*GELU")
    refused(mlp().double(), x, "gaussian with its noise given", likelihood="gaussian")
    refused(mlp().double(), x, "not of Poisson", likelihood="poisson")
    with pytest.raises(ArgumentError, match=r"structure='full'.*\['diag', 'kron'\]"):
        backpack.estimate(mlp(), [(x, y)], "categorical", structure="full")
    broken = mlp().double()
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        backpack.estimate(broken, [(x, y)], "categorical", progress=False)


def test_its_absence_is_an_error_with_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "backpack", None)
    with pytest.raises(MissingDependencyError, match=r"bayesdl\[laplace\]"):
        backpack.estimate(mlp().double(), [(real(4)(torch.Generator()), targets("categorical"))], "categorical")
