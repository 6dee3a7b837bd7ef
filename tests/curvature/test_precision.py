"""Networks that run in half precision, as a whole or under autocast: curvature in float32, close to that in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesdl as bdl
from bayesdl.curvature import estimate
from bayesdl.errors import NonFiniteError, UnsupportedError
from tests.cases import BY_NAME, targets
from tests.untouched import untouched

# relative to the same rounded weights in float32; rounding errors of 8 and 11 bits, over a few layers
CLOSE = {torch.bfloat16: 0.03, torch.float16: 0.005}
NAMES = (
    *("mlp", "conv1d", "conv2d", "conv2d_circular_stride", "conv3d", "transposed_conv2d", "layer_norm", "rms_norm"),
    *("group_norm", "batch_norm_2d", "instance_norm", "embedding", "position_embedding", "bag_padded", "bilinear"),
    *("attention", "encoder_padded", "lstm", "gru_both_ways", "lstm_packed", "prelu", "bare_positions", "layer_twice"),
    *("tied_embedding", "weight_used_elsewhere", "sequence", "frames", "in_place_residual", "scalar_parameter"),
)


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple):
        return tuple(cast(part, dtype) for part in x)
    return x.to(dtype) if x.is_floating_point() else x


def dense(net: nn.Module, x: Any, structure: str, **options: Any) -> tuple[Tensor, list[str]]:
    found = estimate(net, [(x, targets("categorical"))], "categorical", structure=structure, progress=False, **options)
    return found.to_dense(), [block.kind for block in found.layout.blocks]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", NAMES)
def test_half_networks_have_the_curvature_of_their_rounded_weights(
    name: str, dtype: torch.dtype, structure: str
) -> None:
    case = BY_NAME[name]
    net = copy.deepcopy(case.network()).to(dtype)
    x = cast(case.data(), dtype)
    with untouched(net):
        found, kinds = dense(net, x, structure, select=case.select)
    truth, wide = dense(copy.deepcopy(net).float(), cast(x, torch.float32), structure, select=case.select)
    assert found.dtype == torch.float32
    assert kinds == wide
    assert error(found, truth) < CLOSE[dtype]


class Autocast(nn.Module):
    """A network whose forward, or a part of it, chooses a precision of its own."""

    def __init__(self, net: nn.Module, dtype: torch.dtype, back: bool) -> None:
        super().__init__()
        self.net, self.dtype, self.back = net, dtype, back

    def forward(self, *x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            output = self.net(*x)
        return output.float() if self.back else output


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    "name", ["mlp", "conv2d", "batch_norm_2d", "layer_norm", "embedding", "attention", "gru", "bag"]
)
def test_autocast_keeps_closed_forms_and_float32_factors(name: str, dtype: torch.dtype, back: bool) -> None:
    case = BY_NAME[name]
    plain = copy.deepcopy(case.network()).float()
    x = cast(case.data(), torch.float32)
    for structure in ("full", "kron"):
        found, kinds = dense(Autocast(plain, dtype, back), x, structure)
        truth, wide = dense(plain, x, structure)
        assert found.dtype == torch.float32
        assert kinds == wide
        assert error(found, truth) < CLOSE[dtype]


def rounded(p: dict[str, Tensor], x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(torch.tanh(F.linear(x, p["a"])), p["b"]).float()


def plain(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, p["a"])), p["b"])


def test_autocast_in_a_function_without_layers() -> None:
    g = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(5, 4, generator=g), "b": torch.randn(3, 5, generator=g)}
    x = torch.randn(8, 4, generator=g)
    found, kinds = dense(bdl.as_module(rounded, weights), x, "full")
    truth, _ = dense(bdl.as_module(plain, weights), x, "full")
    assert set(kinds) == {"dense"}
    assert error(found, truth) < CLOSE[torch.bfloat16]


def test_float32_layers_in_a_half_network() -> None:
    class Wide(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()).to(x.dtype)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).bfloat16()
    mixed = copy.deepcopy(net)
    norm = Wide(6)
    norm.load_state_dict(net[1].float().state_dict())
    mixed[1] = norm
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert error(dense(mixed, x, "full")[0], dense(net.float(), x.float(), "full")[0]) < CLOSE[torch.bfloat16]


def half(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().half()


def test_overflow_of_half_precision_is_an_error_that_names_its_place() -> None:
    net = half(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).half(), torch.zeros(8, 2)
    with pytest.raises(NonFiniteError, match=r"batch 0: the curvature of layer '\d' became NaN or infinite"):
        estimate(net, [(x, y)], bdl.Gaussian(1e-6), structure="diag", progress=False)  # 1 / noise is above 65,504
    net[2].weight.data.fill_(6e4)
    with pytest.raises(NonFiniteError, match="batch 0: the network's outputs"):
        estimate(net, [(100 * x, y)], bdl.Gaussian(1.0), structure="diag", progress=False)


@pytest.mark.parametrize("seed", range(8))
def test_batch_statistics_are_noticed_in_half_precision_too(seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).bfloat16()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    with pytest.raises(UnsupportedError, match="depends on the other examples"):
        dense(net, x, "diag")
