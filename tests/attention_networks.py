"""Networks of attention, transposed and GPT-like layers, and of position embeddings, that curvature must get right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.networks import OUTPUTS


class Cross(nn.Module):
    """Attention of three queries over five keys of their own width, with whatever options are given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.head = nn.Linear(4, OUTPUTS)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer, parts = self.attention, (query, key, value)
        if not layer.batch_first:
            parts = tuple(part.transpose(0, 1) for part in parts)
        h = torch.tanh(layer(*parts, need_weights=False)[0])
        return self.head(h).mean(1 if layer.batch_first else 0)


class Padded(nn.Module):
    """A stack of torch's encoder layers with right-padded examples."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu")
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        # torch's fused path leaves zeros where its plain path leaves numbers: nobody should read these positions
        h = self.encoder(x, src_key_padding_mask=hidden).masked_fill(hidden.unsqueeze(-1), 0.0)
        return self.head(h).sum(1)


class Decoder(nn.Module):
    """torch's decoder layer with a causal mask over its own positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True, norm_first=True)
        self.head = nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x)
        return self.head(self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True)).mean(1)


class AttentionTwice(nn.Module):
    """One attention layer on all positions and then on some, and a second layer over the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
        self.second.in_proj_weight, self.second.in_proj_bias = self.first.in_proj_weight, self.first.in_proj_bias
        self.second.out_proj = self.first.out_proj
        self.head = nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x, x, x)[0])
        h = torch.tanh(self.first(h[:, :2], h, h)[0])
        return self.head(self.second(h, h, h)[0]).mean(1)


class WeightsOnly(nn.Module):
    """The output depends on the attention weights and not on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(3, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(4 * self.attention(x, x, x)[1][:, 0]))


class Conv1D(nn.Module):
    """A linear layer that stores its weight as (in, out), under the name it has in transformers."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class ChannelsFirst(nn.LayerNorm):
    """A layer norm over the second axis, as in convolutional networks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Patches(nn.Module):
    """Bare parameters as vision transformers have them: class token, positions with and without a first axis, gain."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 4, 4))
        self.table, self.gain = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        h = h + self.gain * torch.tanh(self.body(h))
        return self.head(torch.tanh(h + self.table)).mean(1)


class Places(nn.Module):
    """Position embeddings: looked up with a first axis of one, or without; shared by two sums."""

    def __init__(self, leading: bool, twice: bool = False) -> None:
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(7, 4), nn.Embedding(6, 4), nn.Linear(4, OUTPUTS)
        self.leading, self.twice = leading, twice

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1], device=x.device)
        h = torch.tanh(self.embed(x) + self.place(where[None] if self.leading else where))
        if self.twice:
            h = torch.tanh(h * self.place((where + 1)[None] if self.leading else where + 1))
        return self.head(h).mean(1)


class SummedPlaces(Places):
    """A consumer for whom a batch axis would change the meaning."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.place(torch.arange(x.shape[1], device=x.device))
        return self.head(torch.tanh(self.embed(x) + rows.cumsum(0))).mean(1)
