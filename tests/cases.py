"""Networks x data that curvature must get right: one entry a layer type, a way of sharing, or a shape convention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.attention_networks import (
    AttentionTwice,
    ChannelsFirst,
    Conv1D,
    Cross,
    Decoder,
    Padded,
    Patches,
    Places,
    SummedPlaces,
    WeightsOnly,
)
from tests.networks import (
    OUTPUTS,
    Attention,
    Bare,
    Elsewhere,
    Encoder,
    FlatTokens,
    FlatTokensPositionMajor,
    Frames,
    PerExample,
    Query,
    Recurrent,
    Residual,
    Scalar,
    Sequence,
    SequenceFirst,
    SharedModule,
    TiedLayers,
    TiedOutput,
    Tokens,
    Twice,
    TwoInputs,
)
from tests.recurrent_networks import Bag, FlatBag, Last, Packed, Pair, PairOfPositions, Started, Stepped

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


def sequences(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences padded to five steps, and their lengths, ties among them."""
    return real(5, 4)(g), torch.tensor([2, 5, 3, 3, 1, 5, 4, 2])[:EXAMPLES]


def mlp(width: int = 5, outputs: int = OUTPUTS) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs))


def behind(*layers: nn.Module, features: int) -> Callable[[], nn.Module]:
    """Layers, a non-linearity and a linear head."""
    return lambda: nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(features, OUTPUTS))


def _frozen() -> nn.Module:
    net = mlp()
    net[0].weight.requires_grad_(False)
    return net


def _with_norm(norm: nn.Module, length: int | None = None) -> Callable[[], nn.Module]:
    if length is None:
        return lambda: nn.Sequential(nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, OUTPUTS))
    return lambda: nn.Sequential(nn.Conv1d(2, 4, 1), norm, nn.Tanh(), nn.Flatten(), nn.Linear(4 * length, OUTPUTS))


def triple(keys: int, values: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Three queries, and five keys and values of the given widths."""
    return lambda g: (real(3, 4)(g), real(5, keys)(g), real(5, values)(g))


def _rows(*names: str) -> dict[str, str]:
    return {f"{name}.weight": "rows" for name in names}


def _dense(*parameters: str) -> dict[str, str]:
    return dict.fromkeys(parameters, "dense")


def _shift(*parameters: str) -> dict[str, str]:
    return dict.fromkeys(parameters, "shift")


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
    Case(
        "layer_norm_subclass",
        behind(nn.Conv2d(1, 3, 2), ChannelsFirst(3), features=12),
        real(1, 3, 3),
        _dense("1.weight", "1.bias"),
    ),
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
        {"embed.weight": "rows", "place.weight": "rows"},
    ),
    Case("bare_positions", Patches, real(3, 4), _dense("token", "places", "table", "gain")),
    Case("position_embedding_first_axis", lambda: Places(True), tokens(5, 7), _rows("embed", "place")),
    Case("position_embedding_twice", lambda: Places(False, True), tokens(5, 7), _rows("embed", "place")),
    Case(
        "position_embedding_summed", lambda: SummedPlaces(False), tokens(5, 7), _rows("embed") | _dense("place.weight")
    ),
    Case("tied_embedding", TiedOutput, tokens(4, OUTPUTS), {"embed.weight": "dense"}),
    Case("bare_parameters", Bare, real(4), {"gain": "dense", "shift": "dense"}),
    Case(
        "transposed_conv",
        behind(nn.ConvTranspose1d(2, 3, 2, stride=2), features=18),
        real(2, 3),
        _shift("0.bias"),
    ),
    Case(
        "transposed_conv_output_padding",
        behind(nn.ConvTranspose1d(4, 6, 2, stride=2, padding=1, output_padding=2, dilation=3, groups=2), features=48),
        real(4, 3),
        _shift("0.bias"),
    ),
    Case(
        "transposed_conv2d",
        behind(nn.ConvTranspose2d(2, 2, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0)), features=48),
        real(2, 3, 3),
        _shift("0.bias"),
    ),
    Case(
        "transposed_conv3d",
        behind(nn.ConvTranspose3d(2, 4, 2, stride=(1, 2, 1), padding=1, groups=2, bias=False), features=32),
        real(2, 3, 2, 3),
        {},
    ),
    Case(
        "transposed_conv_bias_only",
        behind(nn.ConvTranspose2d(2, 3, 2), features=27),
        real(2, 2, 2),
        _shift("0.bias"),
        ["0.bias", "3.weight"],
    ),
    Case(
        "weight_stored_transposed",
        lambda: nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(OUTPUTS, 5)),
        real(4),
        {},
    ),
    Case("attention", Attention, real(3, 4), {}),
    Case("encoder_layer", Encoder, real(3, 4), _scale("layer.norm1", "layer.norm2")),
    Case(
        "encoder_padded",
        Padded,
        lambda g: (real(4, 4)(g), torch.arange(4)[None] > torch.randint(1, 4, (EXAMPLES, 1), generator=g)),
        _scale(*(f"encoder.layers.{i}.norm{j}" for i in (0, 1) for j in (1, 2))),
    ),
    Case(
        "decoder_layer",
        Decoder,
        lambda g: (real(3, 4)(g), real(5, 4)(g)),
        _scale("layer.norm1", "layer.norm2", "layer.norm3"),
    ),
    Case("attention_across", lambda: Cross(batch_first=True), triple(4, 4), {}),
    Case(
        "attention_with_all_options",
        lambda: Cross(kdim=3, vdim=2, add_bias_kv=True, add_zero_attn=True, dropout=0.5),
        triple(3, 2),
        _shift(*(f"attention.{name}" for name in ("in_proj_bias", "bias_k", "bias_v"))),
    ),
    Case("attention_without_bias", lambda: Cross(batch_first=True, bias=False), triple(4, 4), {}),
    Case(
        "attention_weights_only",
        WeightsOnly,
        real(3, 4),
        {},
        ["attention.in_proj_weight", "attention.in_proj_bias", "head"],
    ),
    Case("attention_twice", AttentionTwice, real(3, 4), {}),
    Case(
        "attention_bias_only",
        Attention,
        real(3, 4),
        _shift("attention.in_proj_bias"),
        ["attention.in_proj_bias", "attention.out_proj.weight"],
    ),
    Case("attention_weight_only", Attention, real(3, 4), {}, ["attention.in_proj_weight"]),
    Case("lstm", Recurrent, real(3, 4), {}),
    Case("lstm_deep", lambda: Last(nn.LSTM, num_layers=2, dropout=0.5), real(3, 4), {}),
    Case("lstm_projected", lambda: Last(nn.LSTM, proj_size=2, batch_first=True, bidirectional=True), real(3, 4), {}),
    Case("gru", lambda: Last(nn.GRU, batch_first=True), real(3, 4), {}),
    Case("gru_both_ways", lambda: Last(nn.GRU, num_layers=2, bidirectional=True), real(3, 4), {}),
    Case("rnn", lambda: Last(nn.RNN, batch_first=True, bias=False), real(3, 4), {}),
    Case("rnn_relu", lambda: Last(nn.RNN, nonlinearity="relu", bidirectional=True), real(3, 4), {}),
    Case("recurrent_with_states", Started, lambda g: (real(3, 4)(g), real(2)(g)), {}),
    Case("lstm_packed", lambda: Packed(nn.LSTM, bidirectional=True), sequences, {}),
    Case("gru_packed", lambda: Packed(nn.GRU, num_layers=2), sequences, {}),
    Case("lstm_cell", lambda: Stepped(nn.LSTMCell), real(3, 4), {}),
    Case("gru_cell", lambda: Stepped(nn.GRUCell, bias=False), real(3, 4), {}),
    Case("rnn_cell", lambda: Stepped(nn.RNNCell, nonlinearity="relu"), real(3, 4), {}),
    Case(
        "recurrent_biases_only",
        lambda: Last(nn.GRU),
        real(3, 4),
        _shift("cell.bias_ih_l0", "cell.bias_hh_l0"),
        ["cell.bias_ih_l0", "cell.bias_hh_l0", "head"],
    ),
    Case("recurrent_weights_only", lambda: Last(nn.LSTM), real(3, 4), {}, r"weight"),
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
        {"0.weight": "rows"},
    ),
    Case("bag_padded", lambda: Bag(mode="mean", padding_idx=0), tokens(5, 7), _rows("bag")),
    Case("bag_largest", lambda: Bag(mode="max", padding_idx=0), tokens(5, 7), _rows("bag")),
    Case("bag_weighed", lambda: Bag(mode="sum"), lambda g: (tokens(5, 7)(g), real(5)(g)), _rows("bag")),
    Case("bag_by_offsets", lambda: FlatBag(mode="sum"), tokens(5, 7), _dense("bag.weight")),
    Case("bilinear", Pair, lambda g: (real(4)(g), real(2)(g)), {}),
    Case("bilinear_positions", lambda: PairOfPositions(False), lambda g: (real(3, 4)(g), real(3, 2)(g)), {}),
    Case("bilinear_bias_only", Pair, lambda g: (real(4)(g), real(2)(g)), _shift("form.bias"), ["form.bias", "head"]),
    Case("prelu", behind(nn.Linear(4, 4), nn.PReLU(4), features=4), real(4), {"1.weight": "scale"}),
    Case("prelu_single", behind(nn.Conv2d(1, 2, 2), nn.PReLU(), features=8), real(1, 3, 3), {"1.weight": "scale"}),
    Case("prelu_channels", behind(nn.Conv2d(1, 2, 2), nn.PReLU(2), features=8), real(1, 3, 3), {"1.weight": "scale"}),
    Case("synchronised_batch_norm", _with_norm(nn.SyncBatchNorm(4), 3), real(2, 3), _scale("1")),
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
