"""Networks x data that curvature must get right: one entry a layer type, a way of sharing, or a shape convention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUTS = 3
EXAMPLES = 8
LIKELIHOODS = ("categorical", "bernoulli", "gaussian", "poisson", "heteroscedastic")


@dataclass(frozen=True)
class Case:
    """A network, inputs, and which kinds of block the plan must find (closed forms must not be lost silently).

    Attributes:
        build: makes the network; parameters are redrawn afterwards, so that no weight is a round number.
        inputs: from a generator.
        kinds: block kind by parameter name; a name that is absent is "linear".
        select: as for `bayesdl.curvature.estimate`.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    kinds: dict[str, str]
    select: Any = "all"

    def network(self, seed: int = 1) -> nn.Module:
        """The network in float64 and, on purpose, in train mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.build().double().train()
            for parameter in net.parameters():
                parameter.data.normal_(std=0.5)
            for name, buffer in net.named_buffers():
                if buffer.is_floating_point():
                    buffer.normal_().abs_().add_(0.3) if name.endswith("var") else buffer.normal_()
        return net

    def data(self, seed: int = 2) -> Any:
        """Inputs of `EXAMPLES` examples."""
        return self.inputs(torch.Generator().manual_seed(seed))


def targets(likelihood: str, outputs: int = OUTPUTS, count: int = EXAMPLES, seed: int = 3) -> Tensor:
    """Targets that the family allows, in the shape that the library takes."""
    g = torch.Generator().manual_seed(seed)
    if likelihood == "categorical":
        return torch.randint(outputs, (count,), generator=g)
    if likelihood == "bernoulli":
        return torch.randint(2, (count, outputs), generator=g).double()
    if likelihood == "poisson":
        return torch.poisson(torch.full((count, outputs), 2.0, dtype=torch.float64), generator=g)
    width = outputs // 2 if likelihood == "heteroscedastic" else outputs
    return torch.randn(count, width, dtype=torch.float64, generator=g)


def real(*shape: int) -> Callable[[torch.Generator], Tensor]:
    """Standard normal inputs `(EXAMPLES, *shape)`."""
    return lambda g: torch.randn(EXAMPLES, *shape, dtype=torch.float64, generator=g)


def tokens(length: int, vocabulary: int) -> Callable[[torch.Generator], Tensor]:
    """Token indices with repetitions in every row, index 0 among them."""

    def make(g: torch.Generator) -> Tensor:
        x = torch.randint(vocabulary, (EXAMPLES, length), generator=g)
        x[:, 1] = x[:, 0]
        x[::2, -1] = 0
        return x

    return make


def mlp(width: int = 5, outputs: int = OUTPUTS) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs))


def behind(*layers: nn.Module, features: int) -> Callable[[], nn.Module]:
    """Layers, a non-linearity and a linear head."""
    return lambda: nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(features, OUTPUTS))


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


def _frozen() -> nn.Module:
    net = mlp()
    net[0].weight.requires_grad_(False)
    return net


def _with_norm(norm: nn.Module, length: int | None = None) -> Callable[[], nn.Module]:
    if length is None:
        return lambda: nn.Sequential(nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, OUTPUTS))
    return lambda: nn.Sequential(nn.Conv1d(2, 4, 1), norm, nn.Tanh(), nn.Flatten(), nn.Linear(4 * length, OUTPUTS))


def _scale(*names: str) -> dict[str, str]:
    return {f"{name}.{part}": "scale" for name in names for part in ("weight", "bias")}


CASES = [
    Case("mlp", mlp, real(4), {}),
    Case("linear_without_bias", lambda: nn.Linear(4, OUTPUTS, bias=False), real(4), {}),
    Case("single_layer", lambda: nn.Linear(4, OUTPUTS), real(4), {}),
    Case("conv1d", behind(nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), features=18), real(4, 5), {}),
    Case("conv1d_same", behind(nn.Conv1d(2, 3, 4, padding="same"), features=15), real(2, 5), {}),
    Case("conv2d", behind(nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)), features=24), real(2, 5, 3), {}),
    Case("conv2d_groups", behind(nn.Conv2d(4, 4, 2, groups=2, dilation=2, bias=False), features=16), real(4, 4, 4), {}),
    Case("conv2d_depthwise", behind(nn.Conv2d(3, 3, 2, groups=3), features=12), real(3, 3, 3), {}),
    Case("conv2d_same", behind(nn.Conv2d(1, 2, 2, padding="same"), features=18), real(1, 3, 3), {}),
    Case(
        "conv2d_reflect", behind(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), features=18), real(1, 3, 3), {}
    ),
    Case(
        "conv2d_circular_stride",
        behind(nn.Conv2d(1, 2, 3, stride=2, padding=(1, 2), padding_mode="circular"), features=12),
        real(1, 3, 4),
        {},
    ),
    Case(
        "conv3d", behind(nn.Conv3d(2, 2, 2, stride=(1, 2, 1), padding=1, groups=2), features=64), real(2, 3, 2, 3), {}
    ),
    Case("layer_norm", _with_norm(nn.LayerNorm(4)), real(4), _scale("1")),
    Case("layer_norm_2d", _with_norm(nn.LayerNorm([4, 3]), 3), real(2, 3), _scale("1")),
    Case("rms_norm", _with_norm(nn.RMSNorm(4, eps=0.1)), real(4), _scale("1")),
    Case("group_norm", _with_norm(nn.GroupNorm(2, 4, eps=0.1), 3), real(2, 3), _scale("1")),
    Case("batch_norm", _with_norm(nn.BatchNorm1d(4)), real(4), _scale("1")),
    Case("batch_norm_1d_positions", _with_norm(nn.BatchNorm1d(4), 3), real(2, 3), _scale("1")),
    Case(
        "batch_norm_2d",
        behind(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), features=8),
        real(1, 3, 3),
        _scale("1"),
    ),
    Case("instance_norm", _with_norm(nn.InstanceNorm1d(4, affine=True, eps=0.1), 3), real(2, 3), _scale("1")),
    Case(
        "instance_norm_tracked",
        _with_norm(nn.InstanceNorm1d(4, affine=True, track_running_stats=True), 3),
        real(2, 3),
        _scale("1"),
    ),
    Case("embedding", lambda: Tokens(False), tokens(5, 7), {"embed.weight": "rows"}),
    Case("embedding_no_padding", lambda: Tokens(False, None), tokens(5, 7), {"embed.weight": "rows"}),
    Case(
        "position_embedding",
        lambda: Tokens(True),
        tokens(5, 7),
        {"embed.weight": "rows", "place.weight": "dense"},
    ),
    Case("tied_embedding", TiedOutput, tokens(4, OUTPUTS), {"embed.weight": "dense"}),
    Case("bare_parameters", Bare, real(4), {"gain": "dense", "shift": "dense"}),
    Case(
        "transposed_conv",
        behind(nn.ConvTranspose1d(2, 3, 2, stride=2), features=18),
        real(2, 3),
        {"0.weight": "dense", "0.bias": "dense"},
    ),
    Case(
        "attention",
        Attention,
        real(3, 4),
        {
            "attention.in_proj_weight": "dense",
            "attention.in_proj_bias": "dense",
            "attention.out_proj.weight": "dense",
            "attention.out_proj.bias": "dense",
        },
    ),
    Case(
        "encoder_layer",
        Encoder,
        real(3, 4),
        {
            "layer.self_attn.in_proj_weight": "dense",
            "layer.self_attn.in_proj_bias": "dense",
            "layer.self_attn.out_proj.weight": "dense",
            "layer.self_attn.out_proj.bias": "dense",
            **_scale("layer.norm1", "layer.norm2"),
        },
    ),
    Case(
        "lstm",
        Recurrent,
        real(3, 4),
        {f"cell.{n}_l0": "dense" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    ),
    Case("layer_twice", Twice, real(4), {}),
    Case("shared_module", SharedModule, real(4), {}),
    Case("tied_layers", TiedLayers, real(4), {}),
    Case("sequence", Sequence, real(3, 4), {}),
    Case("sequence_first", SequenceFirst, real(3, 4), {}),
    Case("flat_tokens", FlatTokens, real(3, 4), {}),
    Case(
        "flat_tokens_position_major",
        FlatTokensPositionMajor,
        real(3, 4),
        {f"{layer}.{part}": "dense" for layer in ("inner", "head") for part in ("weight", "bias")},
    ),
    Case("frames", Frames, real(2, 2, 4, 4), _scale("norm", "group")),
    Case("weight_used_elsewhere", Elsewhere, real(4), {"inner.weight": "dense", "inner.bias": "dense"}),
    Case("in_place_residual", Residual, real(4), {}),
    Case("per_example", PerExample, real(4), {"inner.weight": "dense", "inner.bias": "dense"}),
    Case("scalar_parameter", Scalar, real(4), {"gain": "dense"}),
    Case(
        "layers_without_a_batch",
        Query,
        real(4),
        dict.fromkeys(("query", "key.weight", "key.bias", "both.weight", "both.bias"), "dense"),
    ),
    Case(
        "sparse_embedding",
        lambda: nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(20, OUTPUTS)),
        tokens(5, 7),
        {"0.weight": "rows"},
    ),
    Case(
        "bag",
        lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, OUTPUTS)),
        tokens(5, 7),
        {"0.weight": "dense"},
    ),
    Case("prelu", behind(nn.Linear(4, 4), nn.PReLU(4), features=4), real(4), {"1.weight": "dense"}),
    Case("two_inputs", TwoInputs, lambda g: (real(4)(g), real(2)(g)), {}),
    Case("frozen_selected", _frozen, real(4), {}),
    Case("frozen_left_out", _frozen, real(4), {"0.bias": "shift"}, "requires_grad"),
    Case("biases_only", mlp, real(4), {"0.bias": "shift", "2.bias": "shift"}, r"bias$"),
    Case("weights_only", mlp, real(4), {}, r"weight$"),
    Case("one_layer", mlp, real(4), {}, "0"),
    Case("last_layer", mlp, real(4), {}, "last_layer"),
    Case(
        "conv_bias_only",
        behind(nn.Conv2d(2, 4, 2, groups=2), features=16),
        real(2, 3, 3),
        {"0.bias": "shift"},
        ["0.bias", "3.weight"],
    ),
    Case(
        "frames_partial",
        Frames,
        real(2, 2, 4, 4),
        {"conv.bias": "shift", "norm.weight": "scale", "group.bias": "scale"},
        ["conv.bias", "norm.weight", "group.bias", "last.weight"],
    ),
    Case(
        "norm_bias_only",
        _with_norm(nn.LayerNorm(4)),
        real(4),
        {"1.bias": "scale"},
        ["1.bias", "3"],
    ),
]
BY_NAME = {case.name: case for case in CASES}
