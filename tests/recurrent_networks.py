"""Recurrent networks in all the forms that torch's layers take, and layers of two inputs or of bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.networks import OUTPUTS


class Last(nn.Module):
    """A recurrent layer over `(B, T, 4)`, read at its outputs and at its last states."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(4, 3, **options)
        directions = 2 if self.cell.bidirectional else 1
        width = self.cell.proj_size or 3
        self.head = nn.Linear(directions * width, OUTPUTS)
        self.tail = nn.Linear(3, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.cell(x if self.cell.batch_first else x.transpose(0, 1))
        output = output if self.cell.batch_first else output.transpose(0, 1)
        last = state[-1] if isinstance(state, tuple) else state
        return self.head(output).mean(1) + self.tail(last.sum(0))


class Packed(nn.Module):
    """Sequences of their own lengths, packed and unpacked again."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(4, 3, batch_first=True, **options)
        self.head = nn.Linear(6 if self.cell.bidirectional else 3, OUTPUTS)
        self.tail = nn.Linear(3, OUTPUTS)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.detach().cpu(), batch_first=True, enforce_sorted=False)
        output, state = self.cell(packed)
        output, _ = pad_packed_sequence(output, batch_first=True)
        last = state[-1] if isinstance(state, tuple) else state
        return self.head(torch.tanh(output).sum(1)) + self.tail(last.sum(0))


class Started(nn.Module):
    """Initial states computed from another input, the same layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.cell, self.head = nn.Linear(2, 3), nn.GRU(4, 3, batch_first=True), nn.Linear(3, OUTPUTS)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        _, state = self.cell(x, torch.tanh(self.start(z)).unsqueeze(0))
        return self.head(self.cell(x[:, :2], state)[0][:, -1])


class Stepped(nn.Module):
    """A cell stepped by its owner."""

    def __init__(self, kind: type[nn.RNNCellBase], **options: Any) -> None:
        super().__init__()
        self.cell, self.head = kind(4, 3, **options), nn.Linear(3, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        assert state is not None
        return self.head(state[0] * state[1] if isinstance(state, tuple) else state)


class Pair(nn.Module):
    """A bilinear form of two inputs."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.form, self.head = nn.Bilinear(4, 2, 3, bias=bias), nn.Linear(3, OUTPUTS)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.form(a, b)))


class PairOfPositions(Pair):
    """The same at every position of two sequences."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a, b).mean(1)


class Bag(nn.Module):
    """A bag of embeddings, its entries weighed where there are weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, **options), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.bag(x, per_sample_weights=weights)))


class FlatBag(Bag):
    """Bags given by offsets into one long vector."""

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        offsets = torch.arange(len(x), device=x.device) * x.shape[1]
        return self.head(torch.tanh(self.bag(x.flatten(), offsets)))
