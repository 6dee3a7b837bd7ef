"""A survey of torch.nn: curvature of every class that holds parameters equals the oracle, or is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from bayesdl.curvature import estimate
from bayesdl.errors import ShapeError, UnsupportedError
from tests import oracles
from tests.cases import EXAMPLES, real, targets, tokens, triple
from tests.networks import OUTPUTS
from tests.untouched import untouched

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

Made = tuple[Callable[[], nn.Module], Callable[[torch.Generator], Any]]


def _pair(*widths: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda g: tuple(real(3, width)(g) for width in widths)


def _two_states(inputs: int, hidden: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda g: (real(inputs)(g), real(hidden)(g))


LAYERS: dict[str, Made] = {
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: _Through(nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=2.0), "log_prob"),
        real(4),
    ),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), real(4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), real(2, 3, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), real(2, 2, 3, 2)),
    "Bilinear": (lambda: nn.Bilinear(3, 2, 4), _pair(3, 2)),
    "Conv1d": (lambda: nn.Conv1d(4, 2, 2, groups=2, dilation=2, padding=1, padding_mode="circular"), real(4, 5)),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 2, stride=2, groups=2, padding=1, padding_mode="replicate"), real(2, 3, 3)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=(1, 2, 1), padding=1, padding_mode="reflect"), real(1, 2, 3, 2)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 2, 3, stride=2, groups=2, padding=1), real(4, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 2, 2, dilation=2, output_padding=1, stride=2), real(2, 2, 2)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(1, 2, 2, padding=1, bias=False), real(1, 2, 2, 3)),
    "Embedding": (lambda: nn.Embedding(7, 3, padding_idx=0), tokens(5, 7)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(7, 3, mode="max"), tokens(5, 7)),
    "GRU": (lambda: _First(nn.GRU(3, 2, 2, batch_first=True, bidirectional=True)), real(3, 3)),
    "GRUCell": (lambda: nn.GRUCell(3, 2), _two_states(3, 2)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), real(4, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), real(4, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), real(2, 3, 2)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2, affine=True), real(2, 2, 2, 2)),
    "LSTM": (lambda: _First(nn.LSTM(3, 2, batch_first=True, proj_size=1)), real(3, 3)),
    "LSTMCell": (lambda: _First(nn.LSTMCell(3, 2)), real(3)),
    "LayerNorm": (lambda: nn.LayerNorm([2, 3]), real(4, 2, 3)),
    "Linear": (lambda: nn.Linear(3, 4), real(2, 3)),
    "MultiheadAttention": (lambda: _First(nn.MultiheadAttention(4, 2, batch_first=True)), triple(4, 4)),
    "PReLU": (lambda: nn.PReLU(4), real(4, 2)),
    "ParameterDict": (lambda: _Held(nn.ParameterDict({"a": torch.zeros(3), "b": torch.zeros(3)})), real(3)),
    "ParameterList": (lambda: _Held(nn.ParameterList([torch.zeros(3), torch.zeros(3)])), real(3)),
    "RMSNorm": (lambda: nn.RMSNorm(4), real(3, 4)),
    "RNN": (lambda: _First(nn.RNN(3, 2, 2, batch_first=True)), real(3, 3)),
    "RNNCell": (lambda: nn.RNNCell(3, 2), _two_states(3, 2)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), real(4, 3)),
    "Transformer": (lambda: nn.Transformer(4, 2, 1, 1, 5, batch_first=True), _pair(4, 4)),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 5, batch_first=True), 2),
        _pair(4, 4),
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(4, 2, 5, batch_first=True), _pair(4, 4)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 2),
        real(3, 4),
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 5, 0.1, "gelu", batch_first=True, norm_first=True),
        real(3, 4),
    ),
}
REPARAMETRISED: dict[str, Made] = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), real(4)),
    "weight_norm_of_a_convolution": (lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), real(2, 4)),
    "weight_norm_of_a_recurrent_layer": (
        lambda: _First(parametrizations.weight_norm(nn.GRU(3, 2, batch_first=True), "weight_hh_l0")),
        real(3, 3),
    ),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), real(4)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), real(3)),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5), real(4)),
}
# by name: classes that run only once they have seen data, containers, and what cannot stand alone
LAZY = sorted(name for name in dir(nn) if name.startswith("Lazy"))
ABSTRACT = {"RNNBase", "RNNCellBase"}


class _Through(nn.Module):
    """A module by another method than its forward."""

    def __init__(self, layer: nn.Module, method: str) -> None:
        super().__init__()
        self.layer, self.method = layer, method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.layer, self.method)(x)


class _First(nn.Module):
    """The first of several outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *x: Tensor) -> Tensor:
        return self.layer(*x)[0]


class _Held(nn.Module):
    """Two parameters in a container."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.held.values() if isinstance(self.held, nn.ParameterDict) else self.held
        return x * first + second


class Around(nn.Module):
    """A layer, a non-linearity and a fixed mixture into `OUTPUTS`: all parameters are the layer's."""

    def __init__(self, layer: nn.Module, example: Any) -> None:
        super().__init__()
        self.layer = layer
        self.count = len(example) if isinstance(example, tuple) else 1
        with torch.no_grad():
            width = layer(*example).flatten(1).shape[1] if self.count > 1 else layer(example).flatten(1).shape[1]
        g = torch.Generator().manual_seed(7)
        self.register_buffer("mixture", torch.randn(width, OUTPUTS, dtype=torch.float64, generator=g))

    def forward(self, *x: Tensor) -> Tensor:
        return torch.tanh(self.layer(*x)).flatten(1) @ self.mixture


def made(build: Callable[[], nn.Module], inputs: Callable[[torch.Generator], Any]) -> tuple[nn.Module, Any]:
    """A redrawn layer with something around it, in float64 and in train mode, and inputs."""
    x = inputs(torch.Generator().manual_seed(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = build().double().eval()
        for parameter in layer.parameters():
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    return Around(layer, x).train(), x


@pytest.mark.parametrize("name", [*LAYERS, *REPARAMETRISED])
def test_full_and_diagonal_curvature_equal_the_oracle(name: str) -> None:
    net, x = made(*(LAYERS | REPARAMETRISED)[name])
    y = targets("categorical")
    with untouched(net):
        found = estimate(net, [(x, y)], "categorical", structure="full", progress=False)
        diagonal = estimate(net, [(x, y)], "categorical", structure="diag", progress=False)
    assert found.layout.names == tuple(n for n, _ in net.named_parameters())
    jac, f = oracles.jacobian(net, x, found.layout.names), oracles.outputs(net, x)
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", f))
    assert float(truth.abs().max()) > 1e-6
    close = {"rtol": 1e-7, "atol": 1e-10 * float(truth.abs().max())}
    torch.testing.assert_close(found.to_dense(), truth, **close)
    torch.testing.assert_close(diagonal.to_dense(), torch.diag(truth.diagonal()), **close)


def test_no_class_with_parameters_is_missing() -> None:
    def makes_parameters(cls: type[nn.Module]) -> bool:
        bases = [b for b in cls.__mro__ if b is not nn.Module and "__init__" in vars(b)]
        return any("Parameter" in base.__init__.__code__.co_names for base in bases if base is not object)  # type: ignore[misc]

    classes = {name: getattr(nn, name) for name in dir(nn) if inspect.isclass(getattr(nn, name))}
    modules = {name: cls for name, cls in classes.items() if issubclass(cls, nn.Module) and cls is not nn.Module}
    holding = {name for name, cls in modules.items() if makes_parameters(cls)} - ABSTRACT - set(LAZY)
    assert len(holding) > 20
    assert holding <= set(LAYERS), sorted(holding - set(LAYERS))


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_are_refused_by_name(name: str) -> None:
    cls = getattr(nn, name)
    layer = (
        cls(affine=True)
        if "Instance" in name
        else cls()
        if "Norm" in name
        else cls(*((2, 1) if "Conv" in name else (2,)))
    )
    with pytest.raises(UnsupportedError, match=r"'0\.\w+' is lazy.*run one batch"):
        estimate(nn.Sequential(layer), [(torch.zeros(2, 2), torch.zeros(2))], "categorical", progress=False)


def test_layers_that_are_losses_are_refused() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=2.0)

        def forward(self, x: Tensor) -> Any:
            return self.loss(x, torch.zeros(len(x), dtype=torch.long))

    with pytest.raises(ShapeError, match="returned _ASMoutput"):
        estimate(Loss(), [(torch.randn(EXAMPLES, 4), targets("categorical"))], "categorical", progress=False)


def test_embeddings_that_rewrite_their_weight_are_refused() -> None:
    for layer in (nn.Embedding(7, 3, max_norm=1.0), nn.EmbeddingBag(7, 3, max_norm=1.0)):
        with pytest.raises(UnsupportedError, match="max_norm"):
            estimate(nn.Sequential(layer), [(torch.zeros(2, 2), torch.zeros(2))], "categorical", progress=False)


PLAIN: dict[str, nn.Module] = {
    **{
        name: getattr(nn, name)()
        for name in ("CELU", "ELU", "GELU", "Hardsigmoid", "Hardswish", "Hardtanh", "Identity")
    },
    **{name: getattr(nn, name)() for name in ("LeakyReLU", "LogSigmoid", "Mish", "ReLU6", "SELU", "Sigmoid", "SiLU")},
    **{
        name: getattr(nn, name)()
        for name in ("Hardshrink", "RReLU", "Softplus", "Softshrink", "Softsign", "Tanhshrink")
    },
    **{name: getattr(nn, name)() for name in ("Dropout", "Dropout1d", "AlphaDropout", "FeatureAlphaDropout")},
    "ReLU": nn.ReLU(inplace=True),
    "GLU": nn.GLU(1),
    "Softmax": nn.Softmax(1),
    "Softmin": nn.Softmin(1),
    "LogSoftmax": nn.LogSoftmax(1),
    "Threshold": nn.Threshold(0.1, -1.0),
    "AvgPool1d": nn.AvgPool1d(2),
    "MaxPool1d": nn.MaxPool1d(2),
    "LPPool1d": nn.LPPool1d(2, 2),
    "AdaptiveAvgPool1d": nn.AdaptiveAvgPool1d(2),
    "AdaptiveMaxPool1d": nn.AdaptiveMaxPool1d(2),
    "LocalResponseNorm": nn.LocalResponseNorm(2),
    "CircularPad1d": nn.CircularPad1d(1),
    "ReflectionPad1d": nn.ReflectionPad1d(1),
    "ReplicationPad1d": nn.ReplicationPad1d(1),
    "ZeroPad1d": nn.ZeroPad1d(1),
    "Upsample": nn.Upsample(scale_factor=2, mode="linear"),
    "Flatten": nn.Flatten(2),
    "BatchNorm1d": nn.BatchNorm1d(4, affine=False),
    "InstanceNorm1d": nn.InstanceNorm1d(4),
}


@pytest.mark.parametrize("name", PLAIN)
def test_layers_without_parameters_let_cotangents_through(name: str) -> None:
    layers = nn.Sequential(nn.Conv1d(2, 4, 1), PLAIN[name], nn.Conv1d(2 if name == "GLU" else 4, 3, 2))
    net, x = made(lambda: layers, real(2, 5))
    y = targets("categorical")
    found = estimate(net, [(x, y)], "categorical", structure="full", progress=False)
    assert {block.kind for block in found.layout.blocks} == {"linear"}
    jac, f = oracles.jacobian(net, x, found.layout.names), oracles.outputs(net, x)
    truth = oracles.ggn(jac, oracles.lambda_formula("categorical", f))
    torch.testing.assert_close(found.to_dense(), truth, rtol=1e-7, atol=1e-10 * float(truth.abs().max()))
