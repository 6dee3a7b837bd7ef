"""Small networks, each with one thing that curvature could get wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUTS = 3


class Twice(nn.Module):
    """One layer called twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class SharedModule(nn.Module):
    """One module object under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedLayers(nn.Module):
    """Two linear layers over one weight and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, OUTPUTS)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.sigmoid(self.first(x)))))


class Sequence(nn.Module):
    """Token-wise layers over `(B, T, 4)`, averaged at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x))).mean(1)


class SequenceFirst(Sequence):
    """The same with positions before the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.transpose(0, 1)))).mean(0)


class FlatTokens(Sequence):
    """Positions folded into the batch, `(B T, 4)`."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.inner(x.reshape(-1, x.shape[-1]))))
        return y.view(*x.shape[:2], OUTPUTS).mean(1)


class FlatTokensPositionMajor(Sequence):
    """Folded the other way round: `(T B, 4)`."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.inner(x.transpose(0, 1).reshape(-1, x.shape[-1]))))
        return y.view(x.shape[1], x.shape[0], OUTPUTS).mean(0)


class Frames(nn.Module):
    """A small convolutional network run on every frame of `(B, T, C, H, W)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, OUTPUTS)
        self.group, self.last = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x.flatten(0, 1))))
        h = torch.tanh(self.last(self.group(h))).mean((2, 3))
        return self.head(h).view(*x.shape[:2], OUTPUTS).mean(1)


class Tokens(nn.Module):
    """Embedding, position embedding without a batch axis, head."""

    def __init__(self, positions: bool, padding: int | None = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=padding)
        self.place = nn.Embedding(5, 4) if positions else None
        self.head = nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if self.place is not None:
            h = h + self.place(torch.arange(x.shape[1], device=x.device))
        return self.head(torch.tanh(h)).mean(1)


class TiedOutput(nn.Module):
    """The output layer reuses the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(OUTPUTS, 4), nn.Linear(4, OUTPUTS, bias=False)
        self.inner = nn.Linear(4, 4)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.embed(x)))).mean(1)


class Elsewhere(nn.Module):
    """A weight that is also used outside its layer's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)) + F.linear(x, self.inner.weight))


class Residual(nn.Module):
    """In-place sum over a layer's output, in-place ReLU by module and by function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, OUTPUTS)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h += x
        h = self.act(h)
        y = F.relu_(self.second(h))
        return self.head(y + h)


class Bare(nn.Module):
    """Parameters that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, OUTPUTS)
        self.gain, self.shift = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)) * self.gain + self.shift)


class Attention(nn.Module):
    """Self-attention by the composite layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0]).mean(1)


class Encoder(nn.Module):
    """torch's own encoder layer, which has a fused path in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)).mean(1)


class Recurrent(nn.Module):
    """An LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class PerExample(nn.Module):
    """A layer that is called once an example, at every example of the batch: no axis to find."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([torch.tanh(self.inner(row)) for row in x]))


class Scalar(nn.Module):
    """A parameter without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.gain = nn.Linear(4, OUTPUTS), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.gain


class Query(nn.Module):
    """A layer that runs on a parameter, and another that runs on the batch and on a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Parameter(torch.zeros(2, 4)), nn.Linear(4, 4), nn.Linear(4, OUTPUTS)
        self.both = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        constant = self.both(x.new_ones(2, 4)).sum(0)
        return self.head(torch.tanh(self.key(self.query).sum(0) + self.both(x) + constant))


class TwoInputs(nn.Module):
    """Two positional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, OUTPUTS), nn.Linear(2, OUTPUTS)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) * torch.sigmoid(self.right(b))
