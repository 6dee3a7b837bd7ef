"""Networks drawn by hypothesis: random small compositions of the layers that torch has, with their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.networks import OUTPUTS

EXAMPLES = 4
WIDTH = 4  # of features, channels and tokens wherever a step leaves the shape as it is
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.SiLU,
    nn.Softplus,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.PReLU(),
    lambda: nn.Dropout(0.5),
)


class Recurrent(nn.Module):
    """A recurrent layer as a step on `(B, T, WIDTH)`."""

    def __init__(self, kind: type[nn.RNNBase], both: bool, deep: bool) -> None:
        super().__init__()
        self.cell = kind(
            WIDTH,
            WIDTH // 2 if both else WIDTH,
            2 if deep else 1,
            batch_first=True,
            bidirectional=both,
            dropout=0.5 * deep,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Attention(nn.Module):
    """Self-attention as a step."""

    def __init__(self, heads: int, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, heads, batch_first=True, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Positions(nn.Module):
    """A bare table added to a sequence, or an embedding looked up once for all examples."""

    def __init__(self, length: int, bare: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(length, WIDTH)) if bare else None
        self.embed = None if bare else nn.Embedding(length, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            return x + self.embed(torch.arange(x.shape[1], device=x.device))
        return x + self.table


class Multiplied(nn.Module):
    """A bilinear form of a step's input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x)


class Pooled(nn.Module):
    """One vector from a sequence."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flat":
            return x.flatten(1)
        return x.mean(1) if self.how == "mean" else x[:, -1]


class Steps(nn.Module):
    """Steps in a row, some of them with a way around."""

    def __init__(self, steps: list[nn.Module], around: list[bool], head: nn.Linear) -> None:
        super().__init__()
        self.steps, self.around, self.head = nn.ModuleList(steps), around, head

    def forward(self, x: Tensor) -> Tensor:
        for step, around in zip(self.steps, self.around, strict=True):
            y = step(x)
            x = x + y if around and y.shape == x.shape and x.is_floating_point() else y
        return self.head(x)


@dataclass(frozen=True)
class Architecture:
    """What was drawn: a network in float64 and in train mode, its inputs, and how it reads to a person."""

    net: nn.Module
    x: Tensor
    select: str
    text: str = field(default="")

    def __repr__(self) -> str:
        return f"{self.text} select={self.select!r} {self.net}"


def vectors(draw: st.DrawFn) -> tuple[list[nn.Module], Tensor, int]:
    """Steps on `(B, WIDTH)`, an input, and the features at the end."""
    made: list[nn.Module] = []
    for kind in draw(st.lists(st.sampled_from(["linear", "bare", "layer", "rms", "batch", "bilinear"]), max_size=3)):
        bias = draw(st.booleans())
        made.append(
            {
                "linear": lambda bias=bias: nn.Linear(WIDTH, WIDTH, bias=bias),
                "bare": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
                "layer": lambda bias=bias: nn.LayerNorm(WIDTH, bias=bias),
                "rms": lambda: nn.RMSNorm(WIDTH, eps=0.1),
                "batch": lambda: nn.BatchNorm1d(WIDTH),
                "bilinear": Multiplied,
            }[kind]()
        )
    return made, torch.randn(EXAMPLES, WIDTH, dtype=torch.float64), WIDTH


def images(draw: st.DrawFn) -> tuple[list[nn.Module], Tensor, int]:
    """Steps on `(B, WIDTH, 4, 4)`."""
    made: list[nn.Module] = []
    names = ["conv", "transposed", "batch", "group", "instance", "pool"]
    for kind in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        groups, bias = draw(st.sampled_from([1, 2, WIDTH])), draw(st.booleans())
        dilation, mode = draw(st.sampled_from([1, 2])), draw(st.sampled_from(["zeros", "circular", "replicate"]))
        made.append(
            {
                "conv": lambda g=groups, b=bias, d=dilation, m=mode: nn.Conv2d(
                    WIDTH, WIDTH, 3, padding=d, dilation=d, groups=g, bias=b, padding_mode=m
                ),
                "transposed": lambda g=groups, b=bias: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1, groups=g, bias=b),
                "batch": lambda: nn.BatchNorm2d(WIDTH),
                "group": lambda: nn.GroupNorm(2, WIDTH, eps=0.1),
                "instance": lambda: nn.InstanceNorm2d(WIDTH, affine=True, eps=0.1),
                "pool": lambda: nn.AvgPool2d(3, stride=1, padding=1),
            }[kind]()
        )
    last: list[nn.Module] = [nn.AvgPool2d(2), nn.Flatten()] if draw(st.booleans()) else [nn.MaxPool2d(4), nn.Flatten()]
    features = WIDTH * (4 if isinstance(last[0], nn.AvgPool2d) else 1)
    return [*made, *last], torch.randn(EXAMPLES, WIDTH, 4, 4, dtype=torch.float64), features


def sequences(draw: st.DrawFn) -> tuple[list[nn.Module], Tensor, int]:
    """Steps on `(B, T, WIDTH)`, behind an embedding or on numbers."""
    length = draw(st.sampled_from([1, 3, EXAMPLES]))
    made: list[nn.Module] = []
    x = torch.randn(EXAMPLES, length, WIDTH, dtype=torch.float64)
    if draw(st.booleans()):
        made.append(nn.Embedding(5, WIDTH, padding_idx=draw(st.sampled_from([None, 0]))))
        x = torch.randint(5, (EXAMPLES, length))
    names = ["linear", "attention", "encoder", "lstm", "gru", "rnn", "layer", "positions", "conv"]
    for kind in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        first, second = draw(st.booleans()), draw(st.booleans())
        made.append(
            {
                "linear": lambda b=first: nn.Linear(WIDTH, WIDTH, bias=b),
                "attention": lambda a=first, b=second: Attention(2 if a else 1, b),
                "encoder": lambda a=first: nn.TransformerEncoderLayer(WIDTH, 2, 5, batch_first=True, norm_first=a),
                "lstm": lambda a=first, b=second: Recurrent(nn.LSTM, a, b),
                "gru": lambda a=first, b=second: Recurrent(nn.GRU, a, b),
                "rnn": lambda a=first, b=second: Recurrent(nn.RNN, a, b),
                "layer": lambda: nn.LayerNorm(WIDTH),
                "positions": lambda n=length, a=first: Positions(n, a),
                "conv": lambda n=length: nn.Conv1d(n, n, 3, padding=1),  # positions as channels
            }[kind]()
        )
    how = draw(st.sampled_from(["flat", "mean", "last"]))
    return [*made, Pooled(how)], x, WIDTH * (length if how == "flat" else 1)


FAMILIES: dict[str, Callable[[st.DrawFn], tuple[list[nn.Module], Tensor, int]]] = {
    "vectors": vectors,
    "images": images,
    "sequences": sequences,
}


@st.composite
def architectures(draw: st.DrawFn, family: str) -> Architecture:
    """A network of a family: drawn steps, activations between them, ways around, a layer used again, a linear head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 10_000)))
        made, x, features = FAMILIES[family](draw)
        steps: list[nn.Module] = []
        for step in made:
            steps.append(step)
            if draw(st.booleans()) and not isinstance(step, nn.Embedding):
                steps.append(draw(st.sampled_from(ACTIVATIONS))())
        again = [i for i, step in enumerate(steps) if keeps_shape(step)]
        if again and draw(st.booleans()):
            chosen = draw(st.sampled_from(again))
            steps.insert(chosen + 1, steps[chosen])
        around = [draw(st.booleans()) and keeps_shape(step) for step in steps]
        net = Steps(steps, around, nn.Linear(features, OUTPUTS)).double().train()
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if tensor.is_floating_point():
                tensor.data.normal_(std=0.7)
            if name.endswith("var"):
                tensor.data.abs_().add_(0.3)
    select = draw(st.sampled_from(["all", "all", "last_layer", r"weight", "head"]))
    return Architecture(net, x, select, family)


def keeps_shape(step: Any) -> bool:
    """Whether a step can be run twice in a row, or gone around."""
    return not isinstance(step, (nn.Embedding, Pooled, nn.Flatten, nn.AvgPool2d, nn.MaxPool2d))
