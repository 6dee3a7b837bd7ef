"""Attention with its projections in the open: what curvature reads off a layer must be the call of a module.

`nn.MultiheadAttention` projects, attends and projects back in one composite call, and torch's encoder layers go
further and fuse everything in eval mode. On the library's private clone both are replaced by the same computation
step by step. Parameters, their names and the outputs stay the same.
"""

from __future__ import annotations

import math
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTIONS = ("in_proj_q", "in_proj_k", "in_proj_v")


@final
class Projection(nn.Module):
    """One of the three in-projections as a module without parameters, so that its calls can be hooked."""

    def __init__(self, part: int) -> None:
        super().__init__()
        self.part = part
        self.training = False

    def forward(self, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(value, weight, bias)


@final
class Repeated(nn.Module):
    """A parameter `(1, 1, E)` repeated for every example, `(B, 1, E)`."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def forward(self, parameter: Tensor, batch: int) -> Tensor:
        return parameter.expand(batch, -1, -1)


@final
class ExplicitAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` in eval mode, step by step. Made by `expose`, never by its constructor."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if self.training or query.is_nested or query.dim() == 2:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask, and attn_mask is None")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projected(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self._modules["repeat_k"](self.bias_k, len(k))], 1)  # type: ignore[misc]
            v = torch.cat([v, self._modules["repeat_v"](self.bias_v, len(v))], 1)  # type: ignore[misc]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, T, E / H)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if is_causal and key_padding_mask is None and not need_weights:  # as in torch the hint replaces the mask
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            mask: Tensor | None = _additive(~seen, q)
        else:
            mask = self._mask(attn_mask, key_padding_mask, q)
        if need_weights or torch.is_grad_enabled() or torch._C._functorch.is_functorch_wrapped_tensor(q):
            attended, weights = _attend(q, k, v, mask)
        else:  # the fused kernel has no batched and no forward-mode derivative; without any it saves memory
            attended, weights = F.scaled_dot_product_attention(q, k, v, mask), None
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights or weights is None:
            return output, None
        return output, weights.mean(1) if average_attn_weights else weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = zip(PROJECTIONS, (query, key, value), weights, biases, strict=True)
        return [self._modules[name](x, w, b) for name, x, w, b in inputs]  # type: ignore[misc]

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, `(1 or B, 1 or H, 1 or L, S)`; S counts the keys that the layer adds itself."""
        added = int(self.bias_k is not None) + int(self.add_zero_attn)  # seen by every query
        if mask is not None:
            mask = F.pad(_additive(mask, q), (0, added))
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            padding = F.pad(_additive(padding, q), (0, added))[:, None, None]
            return padding if mask is None else mask + padding
        return mask


@final
class ExplicitEncoder(nn.TransformerEncoder):
    """`nn.TransformerEncoder` without nested tensors, and with the zeros that they leave at padded positions."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if self.training or not self._nests(src, mask, src_key_padding_mask):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        hidden = _hidden(cast(Tensor, src_key_padding_mask))
        output = src
        for layer in self.layers:
            output = layer(output, src_key_padding_mask=hidden)
        output = output.masked_fill(hidden.unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _nests(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> bool:
        if not self.__dict__["nests_padding"] or padding is None or mask is not None or src.dim() != 3:
            return False
        if not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled():
            return False
        hidden = _hidden(padding)
        return bool((hidden[:, 1:] >= hidden[:, :-1]).all())  # padding on the right only


def expose(layer: nn.Module) -> None:
    """Replace a composite attention layer of a private clone by its explicit equivalent, in place; others stay."""
    if type(layer) is nn.MultiheadAttention:
        layer.__class__ = ExplicitAttention
        for part, name in enumerate(PROJECTIONS):
            layer._modules[name] = Projection(part)
        if layer.bias_k is not None:
            layer._modules["repeat_k"], layer._modules["repeat_v"] = Repeated(), Repeated()
    elif type(layer) is nn.TransformerEncoder:
        layer.__class__ = ExplicitEncoder
        layer.__dict__["nests_padding"], layer.__dict__["use_nested_tensor"] = layer.use_nested_tensor, False
    elif type(layer) is nn.TransformerEncoderLayer:
        layer.__dict__["activation_relu_or_gelu"] = 0  # the switch of the fused path, and nothing else


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A boolean mask (True: hidden) as numbers to add to the scores."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
    return mask.to(like.dtype)


def _hidden(padding: Tensor) -> Tensor:
    """What torch cuts out when it packs a batch: every entry of a numeric mask but zero."""
    return padding if padding.dtype is torch.bool else padding != 0


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values `(B, H, L, E / H)` and weights `(B, H, L, S)`; a query that sees no key gets zeros, not NaN."""
    scores = q * (1.0 / math.sqrt(q.shape[-1])) @ k.mT
    if mask is None:
        weights = scores.softmax(-1)
    else:
        scores = scores + mask
        blind = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return weights @ v, weights
