"""The explicit recurrent layers of the private clone against torch's own, option by option, and their factors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bayesdl.clone import structural_clone
from bayesdl.curvature import estimate
from bayesdl.explicit import explicit
from bayesdl.maps import parts_of
from bayesdl.network import Network
from tests import oracles
from tests.cases import BY_NAME, targets
from tests.networks import OUTPUTS
from tests.untouched import untouched

# of torch's own kernel for CPUs
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

B, T, IN, H = 4, 5, 3, 2
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6}
KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm_projected": (nn.LSTM, {"proj_size": 1}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}
CELLS: dict[str, tuple[type[nn.RNNCellBase], dict[str, Any]]] = {
    "lstm": (nn.LSTMCell, {}),
    "gru": (nn.GRUCell, {}),
    "rnn": (nn.RNNCell, {}),
    "rnn_relu": (nn.RNNCell, {"nonlinearity": "relu"}),
}


def redrawn(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = (0.7 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)).to(dtype)
    return module.eval()


def clone_of(module: nn.Module) -> nn.Module:
    ours = explicit(structural_clone(module, lambda p: p, lambda b: b))
    assert type(ours) is not type(module)
    return ours


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def states(layer: nn.RNNBase, dtype: torch.dtype = torch.float64, batch: int = B) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = drawn(count, batch, layer.proj_size or H, seed=2, dtype=dtype)
    return (h, drawn(count, batch, H, seed=3, dtype=dtype)) if isinstance(layer, nn.LSTM) else h


def same(found: Any, truth: Any, close: float) -> None:
    if isinstance(truth, PackedSequence):
        assert torch.equal(found.batch_sizes, truth.batch_sizes)
        for name in ("sorted_indices", "unsorted_indices"):
            mine, theirs = getattr(found, name), getattr(truth, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
        same(found.data, truth.data, close)
    elif isinstance(truth, tuple):
        assert isinstance(found, tuple)
        for mine, theirs in zip(found, truth, strict=True):
            same(mine, theirs, close)
    else:
        torch.testing.assert_close(found, truth, rtol=close, atol=close)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_gives_the_original_outputs(kind: str, bidirectional: bool, layers: int) -> None:
    cls, more = KINDS[kind]
    for bias, first, started in itertools.product((True, False), repeat=3):
        for dtype, close in CLOSE.items():
            options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias, "batch_first": first}
            layer = redrawn(cls(IN, H, **options, **more), dtype)
            ours, x = clone_of(layer), drawn(B, T, IN, dtype=dtype)
            hx = states(layer, dtype) if started else None
            x = x if first else x.transpose(0, 1)
            same(ours(x, hx), layer(x, hx), close)
            with torch.no_grad():
                same(ours(x, hx), layer(x, hx), 0.0)  # torch's own kernel


@pytest.mark.parametrize("lengths", [(5, 3, 3, 1), (3, 1, 5, 3)])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_give_the_original_outputs(kind: str, bidirectional: bool, lengths: tuple[int, ...]) -> None:
    cls, more = KINDS[kind]
    layer = redrawn(cls(IN, H, num_layers=2, bidirectional=bidirectional, batch_first=True, **more))
    sorted_already = list(lengths) == sorted(lengths, reverse=True)
    for enforced in {False, sorted_already}:
        packed = pack_padded_sequence(drawn(B, T, IN), torch.tensor(lengths), batch_first=True, enforce_sorted=enforced)
        for hx in (None, states(layer)):
            same(clone_of(layer)(packed, hx), layer(packed, hx), 1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_give_the_original_outputs(kind: str, bias: bool) -> None:
    cls, more = CELLS[kind]
    for dtype, close in CLOSE.items():
        cell = redrawn(cls(IN, H, bias=bias, **more), dtype)
        ours, x, h, c = clone_of(cell), *(drawn(B, n, seed=n, dtype=dtype) for n in (IN, H, H))
        state = (h, c) if cls is nn.LSTMCell else h
        for hx in (None, state):
            same(ours(x, hx), cell(x, hx), close)
            with torch.no_grad():
                same(ours(x, hx), cell(x, hx), 0.0)
            row = None if hx is None else (h[0], c[0]) if cls is nn.LSTMCell else h[0]
            same(ours(x[0], row), cell(x[0], row), close)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_torch_refuses_are_refused_and_unbatched_ones_run(kind: str) -> None:
    cls, more = KINDS[kind]
    layer = redrawn(cls(IN, H, batch_first=True, **more))
    ours = clone_of(layer)
    same(ours(drawn(T, IN)), layer(drawn(T, IN)), 1e-12)
    wrong = (
        (drawn(B, T, IN), states(layer, batch=B + 1)),
        (drawn(B, T, IN), states(layer, batch=1)),
        (drawn(B, T, IN + 1), None),
        (drawn(B, 0, IN), None),
        (drawn(B), None),
    )
    for x, hx in wrong:
        for network in (layer, ours):
            with pytest.raises((RuntimeError, ValueError)):
                network(x, hx)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_refuse_states_of_another_batch(kind: str) -> None:
    cls, more = CELLS[kind]
    cell = redrawn(cls(IN, H, **more))
    h = drawn(B + 1, H)
    for network in (cell, clone_of(cell)):
        with pytest.raises(RuntimeError):
            network(drawn(B, IN), (h, h) if cls is nn.LSTMCell else h)


def test_training_mode_subclasses_and_patched_layers_are_left_to_torch() -> None:
    class Own(nn.GRU):
        pass

    patched = nn.LSTM(IN, H)
    patched.forward = patched.forward  # type: ignore[method-assign]
    twin = explicit(structural_clone(nn.ModuleList([Own(IN, H), patched]), lambda p: p, lambda b: b))
    assert [type(m) for m in twin] == [Own, nn.LSTM]
    layer = redrawn(nn.LSTM(IN, H, num_layers=2, dropout=0.5, batch_first=True)).train()
    ours = clone_of(layer).train()
    torch.manual_seed(0)
    truth = layer(drawn(B, T, IN))
    torch.manual_seed(0)
    same(ours(drawn(B, T, IN)), truth, 0.0)


def test_derivatives_in_forward_mode_and_batches_of_weights_need_no_gradient_mode() -> None:
    network = Network(BY_NAME["lstm"].network())
    x, values = BY_NAME["lstm"].data(), {n: p.detach() for n, p in network.parameters.items()}
    step = {n: drawn(*p.shape, seed=i) for i, (n, p) in enumerate(values.items())}
    with torch.no_grad():
        _, slope = torch.func.jvp(
            lambda p: network.forward(network.module(), network.prepare(x), p), (values,), (step,)
        )
        stacked = {n: torch.stack([v, v + step[n]]) for n, v in values.items()}
        both = torch.func.vmap(lambda p: network.forward(network.module(), network.prepare(x), p))(stacked)
        plain = network(x)
        moved = network(x, {n: v[1] for n, v in stacked.items()})
    jac = oracles.jacobian(BY_NAME["lstm"].network(), x, network.names)
    direction = torch.cat([step[n].flatten() for n in network.names])
    torch.testing.assert_close(slope, jac @ direction)
    torch.testing.assert_close(both, torch.stack([plain, moved]))


def test_the_users_layers_stay_as_they_are() -> None:
    case = BY_NAME["gru_packed"]
    net = case.network()
    with untouched(net):
        network = Network(net)
        estimate(net, [(case.data(), targets("categorical"))], "categorical", progress=False)
    assert list(network.tensors) == [name for name, _ in net.named_parameters()]
    assert [part.module for part in parts_of(network.module().cell)] == ["ih_l0", "hh_l0", "ih_l1", "hh_l1"]


class SpelledLSTM(nn.Module):
    """`tests.networks.Recurrent` from linear layers and nothing of ours: i, f, g, o from two products a step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        cell = net.cell
        self.ih, self.hh, self.head = nn.Linear(4, 12).double(), nn.Linear(3, 12).double(), net.head
        for ours, name in ((self.ih, "ih"), (self.hh, "hh")):
            ours.weight.data = getattr(cell, f"weight_{name}_l0").detach().clone()
            ours.bias.data = getattr(cell, f"bias_{name}_l0").detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(len(x), 3), x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            i, f, g, o = (self.ih(x[:, t]) + self.hh(h)).split(3, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


def test_kron_has_the_factors_of_the_two_products() -> None:
    case = BY_NAME["lstm"]
    net, x, y = case.network(), case.data(), targets("categorical")
    spelled = SpelledLSTM(net)
    f = oracles.outputs(spelled, x)
    torch.testing.assert_close(f, oracles.outputs(net, x), rtol=1e-12, atol=1e-12)
    p = torch.softmax(f, -1)
    roots = torch.stack([p[:, k : k + 1].sqrt() * (torch.eye(OUTPUTS)[k] - p) for k in range(OUTPUTS)])
    found = estimate(net, [(x, y)], "categorical", structure="kron", progress=False)
    assert [block.name for block in found.layout.blocks] == ["cell.ih_l0", "cell.hh_l0", "head"]
    for name in ("ih", "hh"):
        truth = oracles.kron_block(oracles.linear_kron(oracles.captures(spelled, name, x, roots)))
        select = [f"cell.weight_{name}_l0", f"cell.bias_{name}_l0"]
        block = estimate(net, [(x, y)], "categorical", structure="kron", select=select, progress=False)
        torch.testing.assert_close(block.to_dense(), truth, rtol=1e-9, atol=1e-12)
