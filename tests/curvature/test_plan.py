"""The plan: closed forms where they hold, exact per-example gradients where they do not, and the flat layout."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.curvature import estimate
from bayesdl.curvature.layout import Block, Layout
from bayesdl.curvature.plan import plan
from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.network import Network
from tests import oracles
from tests.cases import BY_NAME, CASES, mlp, real, targets

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def layout_of(net: nn.Module, x: Any, select: Any = "all", bias: str = "joint") -> Layout:
    return plan(Network(net, select=select, example=x), x, bias)


def kinds(layout: Layout) -> dict[str, str]:
    return {name: block.kind for block in layout.blocks for name in block.parameters}


def check(net: nn.Module, batches: list[tuple[Any, Tensor]]) -> None:
    """Full curvature equals the oracle's."""
    found = estimate(net, batches, "categorical", structure="full", progress=False)
    truth = torch.zeros_like(found.to_dense())
    for x, _ in batches:
        jac, f = oracles.jacobian(net, x, found.layout.names), oracles.outputs(net, x)
        truth += oracles.ggn(jac, oracles.lambda_formula("categorical", f))
    torch.testing.assert_close(found.to_dense(), truth, rtol=1e-8, atol=1e-10 * float(truth.abs().max()))


# --- closed forms that would be wrong ---


class Doubled(nn.Linear):
    """A subclass that does more than its type says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Squared(nn.Linear):
    """Not linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight**2, self.bias)


class Unbatched(nn.Module):
    """Convolution over the batch, of all things: its input has no batch axis where one is expected."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x.T).T))


@pytest.mark.parametrize("layer", [Doubled, Squared])
def test_a_subclass_with_another_forward_falls_back(layer: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(layer(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = real(4)(torch.Generator().manual_seed(1))
    assert kinds(layout_of(net, x)) == {
        "0.weight": "dense",
        "0.bias": "dense",
        "2.weight": "linear",
        "2.bias": "linear",
    }
    check(net, [(x, targets("categorical"))])


def test_a_convolution_without_a_batch_axis_falls_back() -> None:
    torch.manual_seed(0)
    net, x = Unbatched().double(), real(4)(torch.Generator().manual_seed(1))
    assert kinds(layout_of(net, x))["conv.weight"] == "dense"
    check(net, [(x, targets("categorical"))])


def test_a_hook_that_changes_a_layers_output_falls_back() -> None:
    torch.manual_seed(0)
    net, x = mlp().double(), real(4)(torch.Generator().manual_seed(1))
    net[0].register_forward_hook(lambda module, inputs, output: 3.0 * output)
    assert kinds(layout_of(net, x))["0.weight"] == "dense"
    check(net, [(x, targets("categorical"))])


def test_a_parametrised_weight_is_exact_in_its_own_parameters() -> None:
    torch.manual_seed(0)
    net = mlp()
    nn.utils.parametrizations.weight_norm(net[0])
    net, x = net.double(), real(4)(torch.Generator().manual_seed(1))
    names = {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}
    assert {name for name, kind in kinds(layout_of(net, x)).items() if kind == "dense"} == names
    check(net, [(x, targets("categorical"))])


# --- batch axes ---


@pytest.mark.parametrize("length", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["sequence", "sequence_first", "flat_tokens"])
def test_positions_as_many_as_examples_are_not_confused(name: str, length: int) -> None:
    net, x = BY_NAME[name].network(), real(length, 4)(torch.Generator().manual_seed(1))
    assert set(kinds(layout_of(net, x)).values()) == {"linear"}
    check(net, [(x, targets("categorical"))])


@pytest.mark.parametrize("name", ["mlp", "batch_norm_2d", "embedding", "sequence_first", "bare_parameters", "frames"])
def test_batches_of_one_example(name: str) -> None:
    case = BY_NAME[name]
    net, x, y = case.network(), case.data(), targets("categorical")
    assert kinds(layout_of(net, x[:1])) == kinds(layout_of(net, x))
    check(net, [(x[:1], y[:1]), (x[1:], y[1:])])


class Sometimes(nn.Module):
    """Layers that take part in some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.extra, self.norm = nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 0:
            x = torch.tanh(self.norm(self.extra(x + self.embed((x[:, 0] > 1).long()))))
        return self.head(x)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_a_layer_that_takes_no_part_in_a_batch_adds_nothing(structure: str) -> None:
    torch.manual_seed(0)
    net, x, y = Sometimes().double(), real(4)(torch.Generator().manual_seed(1)).abs(), targets("categorical")

    def found(batches: list[tuple[Tensor, Tensor]], select: str) -> Tensor:
        return estimate(net, batches, "categorical", structure=structure, select=select, progress=False).to_dense()

    for select in ("embed", "extra", "norm"):
        torch.testing.assert_close(found([(x, y), (-x, y)], select), found([(x, y)], select))
    head = Network(net.head)
    plain = estimate(head, [(-x, y)], "categorical", structure=structure, progress=False).to_dense()
    if structure != "kron":  # whose factors are averaged over the batches before they are multiplied
        torch.testing.assert_close(found([(x, y), (-x, y)], "head"), found([(x, y)], "head") + plain)


def test_gradients_scaled_by_word_counts_are_no_derivatives() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(20, 3)).double()
    x, y = BY_NAME["embedding"].data(), targets("categorical")
    found = estimate(net, [(x, y)], "categorical", structure="full", progress=False)
    net[0].scale_grad_by_freq = False
    truth = estimate(net, [(x, y)], "categorical", structure="full", progress=False)
    torch.testing.assert_close(found.to_dense(), truth.to_dense())


class Routed(nn.Module):
    """Each example passes through one of two experts, chosen by its own values."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        h = x.new_zeros(len(x), 4)
        h[chosen] = self.left(x[chosen])
        h[~chosen] = self.right(x[~chosen])
        return self.head(torch.tanh(h))


def test_experts_that_see_a_part_of_the_batch_fall_back() -> None:
    torch.manual_seed(0)
    net, x = Routed().double(), real(4)(torch.Generator().manual_seed(1))
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    assert kinds(layout_of(net, x)) == {
        name: "linear" if name.startswith("head") else "dense" for name, _ in net.named_parameters()
    }
    check(net, [(x, targets("categorical"))])


class Tabled(nn.Module):
    """A table of one row per position behind which every unit may be dead."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.table = nn.Parameter(torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(x) + self.table)[:, -1])


def test_an_example_without_a_gradient_proves_nothing_about_the_others() -> None:
    torch.manual_seed(0)
    net, x, y = Tabled().double(), real(1, 4)(torch.Generator().manual_seed(1)), targets("categorical")
    with torch.no_grad():
        net.inner.bias.copy_(-1e-3 + torch.zeros(4))
        net.inner.weight.copy_(torch.eye(4))
        x[:2] = -x[:2].abs()  # the first two examples are dead
    assert kinds(layout_of(net, x))["table"] == "dense"
    check(net, [(x, y)])
    check(net, [(x[:1], y[:1]), (x[1:], y[1:])])


# --- precision ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "batch_norm_2d", "layer_norm", "embedding", "sequence", "frames"])
def test_closed_forms_survive_lower_precision(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    net, x = case.network().to(dtype), case.data()
    x = x.to(dtype) if x.is_floating_point() else x
    assert kinds(layout_of(net, x)) == {n: case.kinds.get(n, "linear") for n, _ in net.named_parameters()}


# --- the flat layout ---


@pytest.mark.parametrize("bias", ["joint", "separate"])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_flat_vectors_and_blocks_are_inverse_to_each_other(name: str, bias: str) -> None:
    case = BY_NAME[name]
    net, x = case.network(), case.data()
    network = Network(net, select=case.select, example=x)
    layout = plan(network, x, bias)
    assert layout.numel == network.num_parameters == sum(block.numel for block in layout.blocks)
    assert len({block.name for block in layout.blocks}) == len(layout.blocks)
    flat = torch.arange(layout.numel, dtype=torch.float64)
    assert torch.equal(layout.join(layout.split(flat)), flat)
    stacked = torch.stack([flat, -flat]).unsqueeze(1)
    assert torch.equal(layout.join(layout.split(stacked)), stacked)
    for block, part in zip(layout.blocks, layout.split(flat), strict=True):
        assert part.shape == (block.groups, block.rows, block.columns)
    values = layout.to_dict(flat)
    assert {n: v.shape for n, v in values.items()} == {n: p.shape for n, p in network.parameters.items()}
    assert torch.equal(layout.flatten(values), flat)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_blocks_follow_the_networks_order() -> None:
    layout = layout_of(BY_NAME["encoder_layer"].network(), BY_NAME["encoder_layer"].data())
    first = [layout.names.index(block.parameters[0]) for block in layout.blocks]
    assert first == sorted(first)


def test_separate_blocks_are_named_by_their_parameters() -> None:
    net, x = mlp().double(), real(4)(torch.Generator())
    assert [block.name for block in layout_of(net, x).blocks] == ["0", "2"]
    separate = layout_of(net, x, bias="separate")
    assert [block.name for block in separate.blocks] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def _small() -> Layout:
    blocks = (
        Block("a", "linear", ("a.weight", "a.bias"), ((2, 3), (2,)), ("a",), 1, 2, 4),
        Block("e", "rows", ("e.weight",), ((5, 2),), ("e",), 1, 2, 5, padding=3),
    )
    return Layout(blocks, ("a.weight", "a.bias", "e.weight"), ((2, 3), (2,), (5, 2)))


def test_shifts_by_form() -> None:
    layout, like = _small(), torch.zeros(1, dtype=torch.float64)
    scalar = layout.shifts(0.1, like)
    assert [s.tolist() for s in scalar] == [0.1, 0.1]  # all digits of a double
    assert [s.tolist() for s in layout.shifts(torch.tensor([1.0, 2.0]), like)] == [1.0, 2.0]
    parameter = layout.shifts(torch.arange(1.0, 19.0), like)
    assert [tuple(s.shape) for s in parameter] == [(1, 2, 4), (1, 2, 5)]
    assert parameter[0][0, 0].tolist() == [1.0, 2.0, 3.0, 7.0]  # the bias is the last column
    with pytest.raises(ArgumentError, match=r"\(3,\).*\(2,\).*\(18,?\)"):
        layout.shifts(torch.ones(3), like)
    with pytest.raises(ArgumentError, match="-1"):
        layout.shifts(-1.0, like)
    with pytest.raises(ShapeError, match="17.*18"):
        layout.to_dict(torch.zeros(17))


def test_padding_rows_stay_at_zero() -> None:
    layout = _small()
    flat = torch.arange(1.0, 37.0).view(2, 18)
    changed = layout.without_padding(flat)
    assert torch.equal(flat, torch.arange(1.0, 37.0).view(2, 18))
    zero = (changed == 0).nonzero().tolist()
    assert zero == [[0, 14], [0, 15], [1, 14], [1, 15]]
    assert torch.equal(changed[changed != 0], flat[changed != 0])
