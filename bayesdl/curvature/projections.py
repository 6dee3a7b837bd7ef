"""Blocks of the parameters that composite layers hold themselves: attention, recurrent cells, bags, bilinear forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from bayesdl.attention import PROJECTIONS, ExplicitAttention
from bayesdl.curvature.layout import Block
from bayesdl.maps import Lookup, Part, parts_of

WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def is_composite(layer: nn.Module) -> bool:
    """Whether `composite_blocks` knows a layer."""
    return isinstance(layer, ExplicitAttention) or bool(parts_of(layer))


def composite_blocks(layer: nn.Module, own: Mapping[str, str | None], paths: tuple[str, ...], bias: str) -> list[Block]:
    """Blocks of the selected parameters that a composite layer holds itself: one for each of its products.

    Args:
        layer: from a private clone.
        own: full names by the layer's own parameter names; None where not selected.
        paths: of all layers over the same parameters.
        bias: "joint" or "separate".
    """
    if isinstance(layer, ExplicitAttention):
        return attention_blocks(layer, own, paths, bias)
    return [block for part in parts_of(layer) for block in _part_blocks(layer, part, own, paths, bias)]


def _part_blocks(
    layer: Any, part: Part, own: Mapping[str, str | None], paths: tuple[str, ...], bias: str
) -> list[Block]:
    weight, shift = own.get(part.weight), None if part.bias is None else own.get(part.bias)
    modules = tuple(_under(path, part.module) for path in paths)
    shape = tuple(layer._parameters[part.weight].shape)
    out, inputs = shape[0], math.prod(shape[1:])
    label = modules[0] if len(parts_of(layer)) > 1 else paths[0] or "network"
    if weight is not None and isinstance(lookup := layer._modules[part.module], Lookup):
        padding = -1 if lookup.padding_idx is None else lookup.padding_idx
        return [Block(label, "rows", (weight,), (shape,), modules, 1, inputs, out, padding=padding)]
    if weight is not None and shift is not None and bias == "joint":
        return [Block(label, "linear", (weight, shift), (shape, (out,)), modules, 1, out, inputs + 1)]
    blocks = []
    if weight is not None:
        name = weight if part.bias is not None and bias == "separate" else label
        blocks.append(Block(name, "linear", (weight,), (shape,), modules, 1, out, inputs))
    if shift is not None:
        blocks.append(Block(shift, "shift", (shift,), ((out,),), modules, 1, out, 1))
    return blocks


def attention_blocks(
    layer: ExplicitAttention, own: Mapping[str, str | None], paths: tuple[str, ...], bias: str
) -> list[Block]:
    """Blocks of the selected parameters that an attention layer holds itself (its out-projection is a linear layer).

    A packed weight `(3 E, E)` is a block of three groups, its bias the last column of each. Weights of their own
    widths are three blocks, and the bias `(3 E,)` one of kind "shift". So are the key and value that a layer adds.

    Args:
        layer: from a private clone.
        own: full names by the layer's own parameter names; None where not selected.
        paths: of all layers over the same parameters.
        bias: "joint" or "separate".
    """
    parts = {name: tuple(_under(path, name) for path in paths) for name in (*PROJECTIONS, "repeat_k", "repeat_v")}
    every = tuple(module for name in PROJECTIONS for module in parts[name])
    width = layer.embed_dim
    blocks = []

    def linear(name: str, names: tuple[str, ...], modules: tuple[str, ...], groups: int, inputs: int) -> Block:
        shapes = ((groups * width, inputs), (groups * width,))[: len(names)]
        return Block(name, "linear", names, shapes, modules, groups, width, inputs + len(names) - 1)

    packed, shift = own.get("in_proj_weight"), own.get("in_proj_bias")
    if packed is not None and shift is not None and bias == "joint":
        blocks.append(linear(_under(paths[0], "in_proj"), (packed, shift), every, 3, width))
        shift = None
    elif packed is not None:
        blocks.append(linear(packed, (packed,), every, 3, width))
    for weight, part, inputs in zip(WEIGHTS, PROJECTIONS, (width, layer.kdim, layer.vdim), strict=True):
        name = own.get(weight)
        if name is not None:
            blocks.append(linear(name, (name,), parts[part], 1, inputs))
    if shift is not None:
        blocks.append(Block(shift, "shift", (shift,), ((3 * width,),), every, 1, 3 * width, 1))
    for added, part in (("bias_k", "repeat_k"), ("bias_v", "repeat_v")):
        name = own.get(added)
        if name is not None:
            blocks.append(Block(name, "shift", (name,), ((1, 1, width),), parts[part], 1, width, 1))
    return blocks


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
