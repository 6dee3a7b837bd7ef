"""Layer types whose factors have a closed form. One function a type: captured inputs, then gradients -> a factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdl.attention import PROJECTIONS, Projection
from bayesdl.curvature.factor import Factor, LinearFactor, RowFactor, dense_factor
from bayesdl.curvature.layout import REPEATED, Block
from bayesdl.curvature.patches import patches, transposed_patches

# scalars of a temporary that should not leave the innermost caches: 1 MiB in float32
CACHED = 1 << 18


@dataclass(frozen=True)
class Use:
    """One call of a layer: its input."""

    module: Any  # an nn.Module; its attributes are the layer type's own
    value: Tensor


Builder = Callable[[Sequence[Tensor]], Factor]

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS: tuple[type[nn.Module], ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *BATCH_NORMS, *INSTANCE_NORMS)
# weights that multiply, entry by entry, a function of the input
SCALES: tuple[type[nn.Module], ...] = (*NORMS, nn.PReLU)
# these fix the place of the batch (first) and of the channels (second); all others take the batch on any leading axis
CHANNEL_WISE: tuple[type[nn.Module], ...] = (
    *CONVOLUTIONS,
    *TRANSPOSED,
    nn.GroupNorm,
    nn.PReLU,
    *BATCH_NORMS,
    *INSTANCE_NORMS,
)


def block_of(module: nn.Module, weight: str | None, bias: str | None, modules: tuple[str, ...]) -> Block | None:
    """The block for the selected parameters of a layer; None where no closed form exists.

    Args:
        module: the layer.
        weight, bias: full names of its parameters, None where absent or not selected.
        modules: full names of all layers that share exactly these parameters.
    """
    names = tuple(n for n in (weight, bias) if n is not None)
    shapes = tuple(tuple(getattr(module, n.rsplit(".", 1)[-1]).shape) for n in names)
    name = modules[0] or names[0]
    stored = _stores_inputs_first(module)
    if stored or isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        if weight is None:
            return Block(name, "shift", names, shapes, modules, 1, shapes[0][0], 1)
        groups = int(getattr(module, "groups", 1))
        out = shapes[0][0] // groups
        if stored:
            rows, columns = int(torch.Size(shapes[0][1:]).numel()), out + (bias is not None)
            return Block(name, "linear", names, shapes, modules, groups, rows, columns, transposed=True)
        columns = int(torch.Size(shapes[0][1:]).numel()) + (bias is not None)
        return Block(name, "linear", names, shapes, modules, groups, out, columns)
    if isinstance(module, nn.Embedding):
        padding = -1 if module.padding_idx is None else module.padding_idx
        return Block(name, "rows", names, shapes, modules, 1, shapes[0][1], shapes[0][0], padding=padding)
    if isinstance(module, SCALES):
        total = sum(torch.Size(shape).numel() for shape in shapes)
        return Block(name, "scale", names, shapes, modules, 1, total, 1)
    return None


def joins_bias(module: nn.Module) -> bool:
    """Whether a layer's bias can be a column of its weight: in a transposed convolution they act on different axes."""
    return not isinstance(module, TRANSPOSED)


def _stores_inputs_first(module: Any) -> bool:
    # GPT-2 and its kin come with a linear layer of their own, known by name because transformers is not imported here
    named = type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2
    return named or isinstance(module, TRANSPOSED)


def builder_of(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> Builder:
    """What makes the factor of a block from the gradients `(K, ...)` at all calls of its layers, in their order.

    All that depends on the inputs alone is computed here, once for however many parts the cotangents come in.

    Args:
        block: kind "linear", "rows", "scale" or "shift".
        uses: at least one; positions of all of them are concatenated, which is exact for shared weights.
        batch: B.
        dtype: of the factors, at least float32.
    """
    return _BUILDERS[block.kind](block, uses, batch, dtype)


def empty_factor(block: Block, like: Tensor, dtype: torch.dtype) -> Factor:
    """The factor of a layer that took no part in a batch: no positions, so nothing is counted.

    Args:
        block: any kind but "dense".
        like: cotangents `(K, B, C)`.
        dtype: of the factor.
    """
    count, batch = like.shape[:2]
    if block.kind == "linear":
        a = like.new_zeros(block.groups, batch, 0, block.columns, dtype=dtype)
        return LinearFactor(a, like.new_zeros(block.groups, count, batch, 0, block.rows, dtype=dtype))
    if block.kind == "rows":
        index = torch.zeros(batch, 0, dtype=torch.long, device=like.device)
        return RowFactor(index, like.new_zeros(1, count, batch, 0, block.rows, dtype=dtype), block.columns)
    return dense_factor(like.new_zeros(count, batch, block.numel, dtype=dtype))


def _linear(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> Builder:
    if block.groups > 1 and isinstance(uses[0].module, Projection):
        return _packed(block, uses, batch, dtype)
    a = _joined([_inputs(block, use, batch, dtype) for use in uses], 2)
    return lambda gradients: LinearFactor(a, _cotangents(block, uses, gradients, batch, dtype))


def _inputs(block: Block, use: Use, batch: int, dtype: torch.dtype) -> Tensor:
    """`(G, B, T, in)`, with a last column of ones where there is a bias."""
    value, groups = use.value.to(dtype), block.groups
    if isinstance(use.module, CONVOLUTIONS):
        a = patches(use.module, value, groups, block.has_bias)
        return a.reshape(groups, batch, -1, a.shape[-1])  # frames of one example may share the first axis
    a = value.flatten(2).mT if isinstance(use.module, TRANSPOSED) else _batch_first(value, block.axis, batch, 0)
    a = a.reshape(batch, -1, a.shape[-1]).unflatten(-1, (groups, -1)).permute(2, 0, 1, 3)
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1) if block.has_bias else a


def _cotangents(
    block: Block, uses: Sequence[Use], gradients: Sequence[Tensor], batch: int, dtype: torch.dtype
) -> Tensor:
    """`(G, K, B, T, out)`."""
    parts = []
    for use, gradient in zip(uses, gradients, strict=True):
        gradient = gradient.to(dtype)
        if isinstance(use.module, TRANSPOSED):
            # y = x scattered by the kernel: the cotangent's patch under an input position meets that input
            g = transposed_patches(use.module, gradient.flatten(0, 1), use.value.shape[2:]).unflatten(0, (-1, batch))
        elif isinstance(use.module, CONVOLUTIONS):
            g = gradient.flatten(3).transpose(2, 3)
        else:
            g = _batch_first(gradient, block.axis, batch, 1)
        g = g.reshape(len(g), batch, -1, g.shape[-1])
        parts.append(g.unflatten(-1, (block.groups, -1)).permute(3, 0, 1, 2, 4))
    return _joined(parts, 3)


def _packed(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> Builder:
    """Three projections by one matrix, each a group; those of another sequence may have fewer positions."""
    single = replace(block, groups=1)
    members = [[i for i, use in enumerate(uses) if use.module.part == part] for part in range(len(PROJECTIONS))]
    # whoever reads only the attention weights never meets the values
    none = uses[0].value.new_zeros(1, batch, 0, block.columns, dtype=dtype)
    inputs = [_joined([_inputs(single, uses[i], batch, dtype) for i in mine], 2) if mine else none for mine in members]
    lengths = tuple(int(a.shape[2]) for a in inputs)
    longest = max(lengths)
    a = torch.cat([F.pad(part, (0, 0, 0, longest - n)) for part, n in zip(inputs, lengths, strict=True)])

    def build(gradients: Sequence[Tensor]) -> LinearFactor:
        absent = gradients[0].new_zeros(1, len(gradients[0]), batch, 0, block.rows, dtype=dtype)
        parts = [
            _cotangents(single, [uses[i] for i in mine], [gradients[i] for i in mine], batch, dtype) if mine else absent
            for mine in members
        ]
        g = torch.cat([F.pad(part, (0, 0, 0, longest - n)) for part, n in zip(parts, lengths, strict=True)])
        return LinearFactor(a, g, lengths=lengths if len(set(lengths)) > 1 else ())

    return build


def _rows(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> Builder:
    indices = []
    for use in uses:
        index = _batch_first(use.value, block.axis, batch, 0).reshape(batch, -1)
        padding = use.module.padding_idx
        indices.append(index if padding is None else torch.where(index == padding, -1, index))
    joined = _joined(indices, 1)

    def build(gradients: Sequence[Tensor]) -> RowFactor:
        cotangents = []
        for use, index, gradient in zip(uses, indices, gradients, strict=True):
            g = _batch_first(gradient, block.axis, batch, 1).to(dtype)
            g = g.reshape(len(g), batch, -1, block.rows)
            if use.module.padding_idx is not None:
                g = g.masked_fill((index == -1)[None, :, :, None], 0.0)
            cotangents.append(g)
        return RowFactor(joined, _joined(cotangents, 2).unsqueeze(0), block.columns)

    return build


def _shift(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> Builder:
    def build(gradients: Sequence[Tensor]) -> LinearFactor:
        first = gradients[0]
        rows = torch.zeros(len(first), batch, block.rows, dtype=dtype, device=first.device)
        for use, gradient in zip(uses, gradients, strict=True):
            if isinstance(use.module, CHANNEL_WISE):
                gradient = gradient.to(dtype).flatten(3).sum(-1)
            else:
                gradient = _batch_first(gradient, block.axis, batch, 1).to(dtype)
            mine = rows
            if isinstance(use.module, Projection):  # the three share one vector, a third each
                mine = rows.chunk(len(PROJECTIONS), -1)[use.module.part]
            mine += gradient.reshape(len(gradient), batch, -1, mine.shape[-1]).sum(2)
        return dense_factor(rows)

    return build


def _scale(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> Builder:
    sizes = [torch.Size(shape).numel() for shape in block.shapes]
    weighted = not block.parameters[0].endswith("bias")

    def normalised(use: Use) -> Tensor | None:
        if not weighted:
            return None
        value = use.value.to(dtype)
        if not isinstance(use.module, CHANNEL_WISE):
            value = _batch_first(value, block.axis, batch, 0)
        return _normalised(use.module, value)

    values = [normalised(use) for use in uses]

    def build(gradients: Sequence[Tensor]) -> LinearFactor:
        total: list[Tensor] = []
        for use, value, gradient in zip(uses, values, gradients, strict=True):
            channels, gradient = isinstance(use.module, CHANNEL_WISE), gradient.to(dtype)
            if not channels:
                gradient = _batch_first(gradient, block.axis, batch, 1)
            parts = []
            for name, size in zip(block.parameters, sizes, strict=True):
                other = None if name.endswith("bias") else value
                parts.append(_summed(gradient, other, channels, batch, size))
            total.append(torch.cat(parts, -1))
        return dense_factor(torch.stack(total).sum(0))

    return build


def _summed(gradient: Tensor, other: Tensor | None, channels: bool, batch: int, size: int) -> Tensor:
    """Gradients `(K, B, ...)`, times `other` `(B, ...)` where given, summed over positions: `(K, B, size)`."""
    if other is None and channels and gradient.dim() > 3:
        return gradient.flatten(3).sum(-1).reshape(len(gradient), batch, -1, size).sum(2)
    rows = []
    # a few cotangents at a time: their product with `other` is then gone before it has left the cache
    for part in gradient.split(max(1, CACHED // max(1, gradient[0].numel()))):
        product = part if other is None else part * other
        if channels and product.dim() > 3:
            product = product.flatten(3).sum(-1)
        rows.append(product.reshape(len(part), batch, -1, size).sum(2))
    return torch.cat(rows)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    # nearly every layer is used once, and cat would copy the largest tensors of the pass
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _normalised(module: Any, value: Tensor) -> Tensor:
    """What the weight of a norm, or of a PReLU, multiplies."""
    if isinstance(module, nn.PReLU):
        return value.clamp(max=0.0)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(value, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(value, list(module.normalized_shape), None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(value, module.num_groups, None, None, module.eps)
    mean, variance, eps = module.running_mean, module.running_var, module.eps
    if isinstance(module, INSTANCE_NORMS):
        return F.instance_norm(value, mean, variance, None, None, mean is None, 0.0, eps)
    # without running statistics a batch norm mixes examples; the probe then falls back and reports it
    if mean is None or variance is None:
        return F.batch_norm(value, None, None, training=True, eps=eps)
    return F.batch_norm(value, mean.to(value), variance.to(value), eps=eps)


def _batch_first(value: Tensor, axis: int, batch: int, skip: int) -> Tensor:
    """Batch axis right behind the first `skip` axes."""
    if axis == 0 or axis <= REPEATED:  # the tap repeats what has no batch axis
        return value
    if axis > 0:
        return value.movedim(axis + skip, skip)
    return value.reshape(*value.shape[:skip], batch, -1, *value.shape[skip + 1 :])


_BUILDERS: dict[str, Callable[[Block, Sequence[Use], int, torch.dtype], Builder]] = {
    "linear": _linear,
    "rows": _rows,
    "scale": _scale,
    "shift": _shift,
}
