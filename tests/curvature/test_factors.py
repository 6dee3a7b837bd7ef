"""Cotangents that go back one after another add up to what they give together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bayesdl.curvature import estimate
from bayesdl.curvature.chunking import goes_in_turn
from bayesdl.curvature.diag import Diag
from bayesdl.curvature.factors import factors_in_turn, identity_cotangents, layer_factors
from bayesdl.curvature.kron import Kron
from bayesdl.curvature.passes import Tally
from bayesdl.curvature.plan import plan
from bayesdl.curvature.structure import Structure
from bayesdl.likelihoods import Categorical
from bayesdl.network import Network
from tests.cases import CASES, Case, targets
from tests.position_networks import CASES as POSITIONS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def close(actual: Structure, expected: Structure) -> None:
    for name, value in expected.tensors().items():
        scale = 1e-12 * float(value.abs().max()) + 1e-24  # behind instance norms all is rounding
        torch.testing.assert_close(actual.tensors()[name], value, rtol=1e-9, atol=scale)


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every fit sends its cotangents one after another, however small the network."""

    def switch() -> None:
        monkeypatch.setattr("bayesdl.curvature.factors.AT_ONCE", -1)
        monkeypatch.setattr("bayesdl.curvature.passes.goes_in_turn", lambda *_: True)

    return switch


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kron_is_the_same(case: Case, in_turn: Any) -> None:
    net, x, y = case.network(), case.data(), targets("categorical")
    options: dict[str, Any] = {"select": case.select, "progress": False}
    expected = [estimate(net, [(x, y)], "categorical", shared=s, **options) for s in ("expand", "reduce")]
    in_turn()
    for shared, truth in zip(("expand", "reduce"), expected, strict=True):
        close(estimate(net, [(x, y)], "categorical", shared=shared, **options), truth)


@pytest.mark.parametrize("name", sorted(POSITIONS))
@pytest.mark.parametrize("memory", [1, 20_000, None])
def test_kron_of_outputs_at_positions_is_the_same(name: str, memory: int | None, in_turn: Any) -> None:
    net, x, y = POSITIONS[name]()
    expected = estimate(net, [(x, y)], "categorical", progress=False)
    in_turn()
    close(estimate(net, [(x, y)], "categorical", memory=memory, progress=False), expected)


def convolutions() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers).double().eval(), torch.randn(6, 2, 8, 8, dtype=torch.float64)


def test_parts_are_one_cotangent_of_the_convolutions_then_all_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = convolutions()
    network = Network(net)
    layout = plan(network, x)
    output, whole = layer_factors(network, layout, x, identity_cotangents, torch.float64)
    monkeypatch.setattr("bayesdl.curvature.factors.AT_ONCE", -1)
    same, stream = factors_in_turn(network, layout, x, identity_cotangents, torch.float64)
    parts = list(stream)
    assert torch.equal(output, same)
    assert len(parts) == 5 + 1
    for i, block in enumerate(layout.blocks):
        present = [part[i].g.numel() > 0 for part in parts]
        large = whole[i].g.shape[3] > 1
        assert present == ([True] * 5 + [False] if large else [False] * 5 + [True]), block.name
        found = torch.cat([part[i].g for part in parts if part[i].g.numel()], 1)
        torch.testing.assert_close(found, whole[i].g, rtol=1e-12, atol=1e-14)
        if large:
            assert [part[i].again for part in parts[:-1]] == [False, True, True, True, True]


def test_small_networks_send_all_at_once() -> None:
    net, x = convolutions()
    network = Network(net)
    _, stream = factors_in_turn(network, plan(network, x), x, identity_cotangents, torch.float64)
    assert len(list(stream)) == 1


@pytest.mark.parametrize(
    ("net", "turns"),
    [
        (nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)), True),
        (nn.Sequential(nn.Flatten(), nn.Linear(10, 3)), False),
    ],
    ids=["convolution", "linear"],
)
def test_who_goes_in_turn(net: nn.Module, turns: bool) -> None:
    x = torch.randn(4, 2, 5)
    network = Network(net)
    layout = plan(network, x)
    kron = Kron.empty(layout, torch.float32, torch.device("cpu"))
    assert goes_in_turn(layout, [kron], torch.device("cpu")) is turns
    assert not goes_in_turn(layout, [kron], torch.device("meta"))


def test_more_examples_fit_where_gradients_of_one_cotangent_are_held() -> None:
    net, x = convolutions()
    network = Network(net)
    layout = plan(network, x)

    def step(made: type[Any]) -> int:
        curvature = made.empty(layout, torch.float64, torch.device("cpu"))
        return Tally(network, curvature, Categorical(), "ggn", 1, None, torch.float64, 1 << 20).step

    assert step(Kron) > step(Diag)
