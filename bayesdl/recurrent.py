"""Recurrent layers with their products in the open: the weights of inputs and of states meet in modules of their own.

`nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells run in one composite call. On the library's private clone they run step by
step: one product of `weight_ih` with the whole sequence, one of `weight_hh` (and of an LSTM's `weight_hr`) at every
step. Parameters, their names and the outputs stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bayesdl.maps import LinearMap, Part, differentiated, dissect

State = tuple[Tensor, ...]  # what a cell carries on, its output first
# contribution of the inputs, contribution of the state, state -> next state
Step = Callable[[Tensor, Tensor, State], State]


def _lstm(inputs: Tensor, states: Tensor, state: State) -> State:
    enter, forget, candidate, leave = (inputs + states).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _gru(inputs: Tensor, states: Tensor, state: State) -> State:
    (reset, update, candidate), (reset_h, update_h, candidate_h) = inputs.chunk(3, -1), states.chunk(3, -1)
    keep = (update + update_h).sigmoid()
    new = (candidate + (reset + reset_h).sigmoid() * candidate_h).tanh()
    return ((1.0 - keep) * new + keep * state[0],)


def _tanh(inputs: Tensor, states: Tensor, state: State) -> State:
    return ((inputs + states).tanh(),)


def _relu(inputs: Tensor, states: Tensor, state: State) -> State:
    return ((inputs + states).relu(),)


@final
class ExplicitLSTM(nn.LSTM):
    """`nn.LSTM` in eval mode, step by step. Made by `expose`, never by its constructor."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not _takes(self, input, hx, 2):
            return super().forward(input, hx)
        return _sequence(self, _lstm, input, hx)


@final
class ExplicitGRU(nn.GRU):
    """`nn.GRU` in eval mode, step by step."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not _takes(self, input, hx, 1):
            return super().forward(input, hx)
        output, state = _sequence(self, _gru, input, None if hx is None else (hx,))
        return output, state[0]


@final
class ExplicitRNN(nn.RNN):
    """`nn.RNN` in eval mode, step by step."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not _takes(self, input, hx, 1):
            return super().forward(input, hx)
        step = _tanh if self.nonlinearity == "tanh" else _relu
        output, state = _sequence(self, step, input, None if hx is None else (hx,))
        return output, state[0]


@final
class ExplicitLSTMCell(nn.LSTMCell):
    """`nn.LSTMCell`, its two products apart."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        state = _cell_state(self, input, hx, 2)
        if state is None:
            return super().forward(input, hx)
        return cast(tuple[Tensor, Tensor], _step(self, _lstm, _inputs(self, "", input), "", state))


@final
class ExplicitGRUCell(nn.GRUCell):
    """`nn.GRUCell`, its two products apart."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        state = _cell_state(self, input, None if hx is None else (hx,), 1)
        return (
            super().forward(input, hx) if state is None else _step(self, _gru, _inputs(self, "", input), "", state)[0]
        )


@final
class ExplicitRNNCell(nn.RNNCell):
    """`nn.RNNCell`, its two products apart."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        state = _cell_state(self, input, None if hx is None else (hx,), 1)
        if state is None:
            return super().forward(input, hx)
        return _step(self, _tanh if self.nonlinearity == "tanh" else _relu, _inputs(self, "", input), "", state)[0]


EXPLICIT: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: ExplicitLSTM,
    nn.GRU: ExplicitGRU,
    nn.RNN: ExplicitRNN,
    nn.LSTMCell: ExplicitLSTMCell,
    nn.GRUCell: ExplicitGRUCell,
    nn.RNNCell: ExplicitRNNCell,
}


def expose(layer: nn.Module) -> None:
    """Replace a recurrent layer of a private clone by its explicit equivalent, in place; other modules stay."""
    cls = EXPLICIT.get(type(layer))
    if cls is None:
        return
    parts = {}
    for weight in layer._parameters:
        if weight.startswith("weight_"):
            name = weight.removeprefix("weight_")
            bias = f"bias_{name}"
            has_bias = layer._parameters.get(bias) is not None
            parts[Part(name, weight, bias if has_bias else None)] = LinearMap()
    dissect(layer, cls, parts)


def _takes(layer: nn.RNNBase, input: Any, hx: Any, count: int) -> bool:
    """Whether a call is one for the explicit steps; torch itself runs all others, and refuses what is wrong."""
    states = () if hx is None else hx if count == 2 else (hx,)
    value = input.data if isinstance(input, PackedSequence) else input
    if layer.training or not differentiated(layer, value, *states):
        return False
    if not isinstance(input, PackedSequence) and (
        input.dim() != 3 or input.shape[0 if not layer.batch_first else 1] == 0
    ):
        return False
    if any(state.dim() != 3 for state in states):
        return False
    if hx is not None:
        sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
        layer.check_forward_args(value, hx, sizes)
    return True


def _sequence(layer: nn.RNNBase, step: Step, input: Any, hx: State | None) -> tuple[Any, State]:
    """Outputs in the form of the inputs, and the last states `(layers * directions, B, H)`.

    The examples of a packed sequence are unpacked in the order in which they were packed by their owner, so that the
    batch axis of every product is the axis of the examples. Padded steps leave the state alone.
    """
    lengths = None
    if isinstance(input, PackedSequence):
        value, lengths = pad_packed_sequence(input, batch_first=True)
        lengths = lengths.to(value.device)
    else:
        value = input if layer.batch_first else input.transpose(0, 1)
    directions = 2 if layer.bidirectional else 1
    last: list[State] = []
    for depth in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[:directions]:
            start = _zeros(layer, value) if hx is None else tuple(s[len(last)] for s in hx)
            output, state = _scan(layer, step, f"_l{depth}{suffix}", value, start, lengths)
            outputs.append(output)
            last.append(state)
        value = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    states = tuple(torch.stack(column) for column in zip(*last, strict=True))
    if isinstance(input, PackedSequence):
        return _repacked(value, input), states
    return (value if layer.batch_first else value.transpose(0, 1)), states


def _scan(
    layer: nn.RNNBase, step: Step, suffix: str, value: Tensor, state: State, lengths: Tensor | None
) -> tuple[Tensor, State]:
    """One layer in one direction: outputs `(B, T, H)` and the last state."""
    inputs = _inputs(layer, suffix, value).unbind(1)
    outputs: list[Tensor] = [value] * len(inputs)
    times = range(len(inputs))
    for t in reversed(times) if suffix.endswith("_reverse") else times:
        new = _step(layer, step, inputs[t], suffix, state)
        if lengths is None:
            state, outputs[t] = new, new[0]
            continue
        alive = (lengths > t).unsqueeze(1)
        state = tuple(torch.where(alive, after, before) for after, before in zip(new, state, strict=True))
        outputs[t] = torch.where(alive, new[0], 0.0)
    return torch.stack(outputs, 1), state


def _inputs(layer: nn.Module, suffix: str, value: Tensor) -> Tensor:
    return _product(layer, f"ih{suffix}", value)


def _step(layer: nn.Module, step: Step, inputs: Tensor, suffix: str, state: State) -> State:
    output, *rest = step(inputs, _product(layer, f"hh{suffix}", state[0]), state)
    if f"weight_hr{suffix}" in layer._parameters:
        output = _product(layer, f"hr{suffix}", output)
    return (output, *rest)


def _product(layer: nn.Module, name: str, value: Tensor) -> Tensor:
    weight, bias = layer._parameters[f"weight_{name}"], layer._parameters.get(f"bias_{name}")
    return cast(nn.Module, layer._modules[name])(value, weight, bias)


def _zeros(layer: nn.RNNBase, value: Tensor) -> State:
    output = value.new_zeros(len(value), layer.proj_size or layer.hidden_size)
    return (output, value.new_zeros(len(value), layer.hidden_size)) if isinstance(layer, nn.LSTM) else (output,)


def _repacked(value: Tensor, like: PackedSequence) -> PackedSequence:
    # by hand: packing anew could break ties between equal lengths the other way
    if like.sorted_indices is not None:
        value = value.index_select(0, like.sorted_indices)
    steps = torch.arange(len(value))
    lengths = (like.batch_sizes.unsqueeze(0) > steps.unsqueeze(1)).sum(1)
    data = pack_padded_sequence(value, lengths, batch_first=True, enforce_sorted=True).data
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


def _cell_state(layer: nn.RNNCellBase, input: Tensor, hx: State | None, count: int) -> State | None:
    """The state `(B, H)` to step from; None where torch itself is to run the call, or to refuse it."""
    if not differentiated(layer, input, *(hx or ())) or input.dim() != 2:
        return None
    if hx is None:
        return (input.new_zeros(len(input), layer.hidden_size),) * count
    shape = (len(input), layer.hidden_size)
    return tuple(hx) if all(state.shape == shape for state in hx) else None
