"""The explicit attention of the private clone against torch's own composite layers, option by option."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesdl.attention import ExplicitAttention, ExplicitEncoder
from bayesdl.clone import structural_clone
from bayesdl.explicit import explicit
from bayesdl.network import Network

B, L, S, E, H = 3, 4, 5, 6, 2
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6}

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence_first": {"batch_first": False},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "both_added": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
    "own_widths": {"kdim": 3, "vdim": 7},
    "own_widths_no_bias": {"kdim": 3, "vdim": 7, "bias": False},
    "dropout": {"dropout": 0.5},
}
NEEDS = ((False, True), (True, True), (True, False))
MASKS = ("none", "boolean", "numbers", "per_head", "padding", "padding_numbers", "both", "causal", "causal_padding")


def redrawn(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = (0.5 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)).to(dtype)
    return module.eval()


def clone_of(module: nn.Module) -> nn.Module:
    return explicit(structural_clone(module, lambda p: p, lambda b: b))


def masks(kind: str, keys: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    hidden = torch.rand(L, keys, generator=g) < 0.4
    hidden[:, 0] = False
    padding = torch.zeros(B, keys, dtype=torch.bool)
    padding[0, -2:], padding[1, -1:] = True, True
    numbers = torch.randn(L, keys, generator=g, dtype=torch.float64)
    causal = torch.ones(L, keys, dtype=torch.bool).tril().logical_not()
    return {
        "none": {},
        "boolean": {"attn_mask": hidden},
        "numbers": {"attn_mask": numbers},
        "per_head": {"attn_mask": hidden.expand(B * H, L, keys) & (torch.arange(B * H) % 2 == 0)[:, None, None]},
        "padding": {"key_padding_mask": padding},
        "padding_numbers": {"key_padding_mask": torch.randn(B, keys, generator=g, dtype=torch.float64)},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal_padding": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
    }[kind]


def inputs(layer: nn.MultiheadAttention, alike: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    query = torch.randn(B, L, E, generator=g, dtype=torch.float64).to(dtype)
    key = torch.randn(B, S, layer.kdim, generator=g, dtype=torch.float64).to(dtype)
    value = torch.randn(B, S, layer.vdim, generator=g, dtype=torch.float64).to(dtype)
    found = (query, query, query) if alike else (query, key, value)
    return found if layer.batch_first else tuple(x.transpose(0, 1) for x in found)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_option_gives_the_original_outputs(name: str, kind: str) -> None:
    for dtype, close in CLOSE.items():
        layer = redrawn(nn.MultiheadAttention(E, H, **({"batch_first": True} | LAYERS[name])), dtype)
        ours = clone_of(layer)
        assert type(ours) is ExplicitAttention
        for alike in (True, False) if layer._qkv_same_embed_dim else (False,):
            call = {k: v.to(dtype) if _number(v) else v for k, v in masks(kind, L if alike else S).items()}
            x = inputs(layer, alike, dtype)
            options = [{"need_weights": n, "average_attn_weights": a} for n, a in NEEDS]
            for more, grad in itertools.product(options, (True, False)):
                with torch.set_grad_enabled(grad):
                    truth, found = layer(*x, **call, **more), ours(*x, **call, **more)
                torch.testing.assert_close(found[0], truth[0], rtol=close, atol=close)
                assert (found[1] is None) == (truth[1] is None)
                if truth[1] is not None:
                    torch.testing.assert_close(found[1], truth[1], rtol=close, atol=close)


def _number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_a_query_that_sees_no_key_gets_no_nan() -> None:
    layer = redrawn(nn.MultiheadAttention(E, H, batch_first=True))
    x = inputs(layer, True, torch.float64)
    mask = torch.zeros(L, L, dtype=torch.bool)
    mask[1] = True
    truth = layer(*x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(clone_of(layer)(*x, attn_mask=mask, need_weights=False)[0], truth)
    assert bool(truth.isfinite().all())


def test_examples_without_a_batch_axis_and_missing_masks_are_as_in_torch() -> None:
    layer = redrawn(nn.MultiheadAttention(E, H, batch_first=True))
    ours, x = clone_of(layer), torch.randn(L, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x, x, x), layer(x, x, x))
    with pytest.raises(RuntimeError, match="is_causal"):
        ours(x[None], x[None], x[None], is_causal=True)


def test_training_mode_keeps_the_dropout_of_the_original() -> None:
    layer = redrawn(nn.MultiheadAttention(E, H, batch_first=True, dropout=0.5)).train()
    ours, x = clone_of(layer).train(), inputs(layer, True, torch.float64)
    torch.manual_seed(0)
    truth = layer(*x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours(*x), truth, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_encoder_equals_torchs_fused_path(padded: bool, norm_first: bool, grad: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 8, batch_first=True, norm_first=norm_first, activation="gelu")
    net = redrawn(nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=not norm_first))
    ours = clone_of(net)
    assert type(ours) is ExplicitEncoder
    x = torch.randn(B, L, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    call = masks("padding", L) if padded else {}
    mask = call.get("key_padding_mask")
    with torch.no_grad():
        truth = net(x, src_key_padding_mask=mask)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x, src_key_padding_mask=mask), truth, rtol=1e-12, atol=1e-12)
    if padded:
        with torch.no_grad():  # padding on the left: torch packs nothing
            truth = net(x, src_key_padding_mask=mask.flip(1))
            torch.testing.assert_close(ours(x, src_key_padding_mask=mask.flip(1)), truth, rtol=1e-12, atol=1e-12)
            causal = torch.ones(L, L, dtype=torch.bool).triu(1)
            truth = net(x, mask=causal, src_key_padding_mask=mask)
            found = ours(x, mask=causal, src_key_padding_mask=mask)
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_decoder_layer_and_transformer_equal_the_original() -> None:
    net = redrawn(nn.Transformer(E, H, 1, 1, 8, batch_first=True))
    g = torch.Generator().manual_seed(0)
    source, target = (torch.randn(B, n, E, dtype=torch.float64, generator=g) for n in (S, L))
    causal = nn.Transformer.generate_square_subsequent_mask(L).double()
    with torch.no_grad():
        truth = net(source, target, tgt_mask=causal, tgt_is_causal=True)
        torch.testing.assert_close(
            clone_of(net)(source, target, tgt_mask=causal, tgt_is_causal=True), truth, rtol=1e-12, atol=1e-12
        )


def test_users_module_names_and_tensors_stay_as_they_were() -> None:
    net = redrawn(nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 8, batch_first=True), 2))
    classes = [type(m) for m in net.modules()]
    switches = [layer.activation_relu_or_gelu for layer in net.layers]
    network = Network(net)
    assert [type(m) for m in net.modules()] == classes
    assert [layer.activation_relu_or_gelu for layer in net.layers] == switches
    assert net.use_nested_tensor
    assert list(network.tensors) == [name for name, _ in net.named_parameters()]
    assert network.names == tuple(network.tensors)
    assert any(type(m) is ExplicitAttention for m in network.module().modules())


def test_subclasses_and_patched_layers_are_left_alone() -> None:
    class Own(nn.MultiheadAttention):
        pass

    patched = nn.MultiheadAttention(E, H)
    patched.forward = patched.forward  # type: ignore[method-assign]
    twin = clone_of(nn.Sequential(Own(E, H), patched))
    assert [type(m) for m in twin] == [Own, nn.MultiheadAttention]
