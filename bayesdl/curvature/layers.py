"""Layer types whose factors have a closed form. One function a type: captured inputs and gradients -> a factor."""

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

# scalars of a temporary that should not leave the innermost caches: 1 MiB in float32
CACHED = 1 << 18


@dataclass(frozen=True)
class Use:
    """One call of a layer: its input, and the gradients `(K, ...)` at its output."""

    module: Any  # an nn.Module; its attributes are the layer type's own
    value: Tensor
    gradient: Tensor


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


def factor_of(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> Factor:
    """The factor of a block from all calls of its layers in one pass.

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
        return _no_positions(block, like, dtype)
    if block.kind == "rows":
        index = torch.zeros(batch, 0, dtype=torch.long, device=like.device)
        return RowFactor(index, like.new_zeros(1, count, batch, 0, block.rows, dtype=dtype), block.columns)
    return dense_factor(like.new_zeros(count, batch, block.numel, dtype=dtype))


def _no_positions(block: Block, like: Tensor, dtype: torch.dtype) -> LinearFactor:
    count, batch = like.shape[:2]
    a = like.new_zeros(block.groups, batch, 0, block.columns, dtype=dtype)
    return LinearFactor(a, like.new_zeros(block.groups, count, batch, 0, block.rows, dtype=dtype))


def _linear(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> LinearFactor:
    if block.groups > 1 and isinstance(uses[0].module, Projection):
        return _packed(block, uses, batch, dtype)
    inputs, cotangents = [], []
    for use in uses:
        if isinstance(use.module, TRANSPOSED):
            # y = x scattered by the kernel: the cotangent's patch under an input position meets that input
            a, count = use.value.to(dtype).flatten(2).mT, len(use.gradient)
            g = _windows(use.module, use.gradient.to(dtype).flatten(0, 1), use.value.shape[2:])
            g = g.unflatten(0, (count, -1))
        elif isinstance(use.module, CONVOLUTIONS):
            a, g = _unfold(use.module, use.value.to(dtype)), use.gradient.to(dtype).flatten(3).transpose(2, 3)
        else:
            a = _batch_first(use.value, block.axis, batch, 0).to(dtype)
            g = _batch_first(use.gradient, block.axis, batch, 1).to(dtype)
        a, g = a.reshape(batch, -1, a.shape[-1]), g.reshape(len(g), batch, -1, g.shape[-1])
        groups = block.groups
        inputs.append(a.unflatten(-1, (groups, -1)).permute(2, 0, 1, 3))
        cotangents.append(g.unflatten(-1, (groups, -1)).permute(3, 0, 1, 2, 4))
    a, g = _joined(inputs, 2), _joined(cotangents, 3)
    return LinearFactor(_with_ones(a) if block.has_bias else a, g)


def _packed(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> LinearFactor:
    """Three projections by one matrix, each a group; those of another sequence may have fewer positions."""
    single = replace(block, groups=1)
    thirds = [[use for use in uses if use.module.part == part] for part in range(len(PROJECTIONS))]
    # whoever reads only the attention weights never meets the values
    absent = _no_positions(single, uses[0].gradient, dtype)
    parts = [_linear(single, mine, batch, dtype) if mine else absent for mine in thirds]
    lengths = tuple(int(part.a.shape[2]) for part in parts)
    longest = max(lengths)
    a = torch.cat([F.pad(p.a, (0, 0, 0, longest - n)) for p, n in zip(parts, lengths, strict=True)])
    g = torch.cat([F.pad(p.g, (0, 0, 0, longest - n)) for p, n in zip(parts, lengths, strict=True)])
    return LinearFactor(a, g, lengths=lengths if len(set(lengths)) > 1 else ())


def _rows(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> Factor:
    indices, cotangents = [], []
    for use in uses:
        index = _batch_first(use.value, block.axis, batch, 0).reshape(batch, -1)
        gradient = _batch_first(use.gradient, block.axis, batch, 1).to(dtype)
        gradient = gradient.reshape(len(gradient), batch, -1, block.rows)
        padding = use.module.padding_idx
        if padding is not None:
            ignored: Tensor = index == padding
            index = torch.where(ignored, -1, index)
            gradient = gradient.masked_fill(ignored[None, :, :, None], 0.0)
        indices.append(index)
        cotangents.append(gradient)
    return RowFactor(_joined(indices, 1), _joined(cotangents, 2).unsqueeze(0), block.columns)


def _shift(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> Factor:
    first = uses[0].gradient
    rows = torch.zeros(len(first), batch, block.rows, dtype=dtype, device=first.device)
    for use in uses:
        if isinstance(use.module, CHANNEL_WISE):
            gradient = use.gradient.to(dtype).flatten(3).sum(-1)
        else:
            gradient = _batch_first(use.gradient, block.axis, batch, 1).to(dtype)
        mine = rows
        if isinstance(use.module, Projection):  # the three share one vector, a third each
            mine = rows.chunk(len(PROJECTIONS), -1)[use.module.part]
        mine += gradient.reshape(len(gradient), batch, -1, mine.shape[-1]).sum(2)
    return dense_factor(rows)


def _scale(block: Block, uses: Sequence[Use], batch: int, dtype: torch.dtype) -> Factor:
    total: list[Tensor] = []
    for use in uses:
        value, gradient = use.value.to(dtype), use.gradient.to(dtype)
        channels = isinstance(use.module, CHANNEL_WISE)
        if not channels:
            value, gradient = _batch_first(value, block.axis, batch, 0), _batch_first(gradient, block.axis, batch, 1)
        parts = []
        for name, shape in zip(block.parameters, block.shapes, strict=True):
            other = None if name.endswith("bias") else _normalised(use.module, value)
            parts.append(_summed(gradient, other, channels, batch, torch.Size(shape).numel()))
        total.append(torch.cat(parts, -1))
    return dense_factor(torch.stack(total).sum(0))


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


def _with_ones(a: Tensor) -> Tensor:
    """A last column of ones, in the memory layout that `a` has: patches of a convolution lie column by column."""
    if a.shape[-2] > 1 and a.stride(-1) != 1 and a.stride(-2) == 1:
        return torch.cat([a.mT, a.new_ones(*a.shape[:-2], 1, a.shape[-2])], -2).mT
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)


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


def _unfold(module: Any, value: Tensor) -> Tensor:
    """Patches `(B, T, C k)` of a convolution's input, channels grouped as its weight has them."""
    dims = len(module.kernel_size)
    if dims == 2 and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        patches = F.unfold(value, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.mT
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return _windows(module, F.pad(value, padding, mode=mode), None)


def _windows(module: Any, value: Tensor, positions: torch.Size | None) -> Tensor:
    """Patches `(B, T, C k)` of a padded input; of a transposed convolution's cotangent at its input's positions."""
    dims = len(module.kernel_size)
    if positions is not None:
        value = F.pad(value, module._reversed_padding_repeated_twice)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        windows = value.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)
        value = windows[..., ::dilation]
        if positions is not None:  # output padding adds places that no input reaches
            value = value.narrow(2 + axis, 0, positions[axis])
    # (B, C, o1.., k1..) -> (B, o1.., C, k1..)
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    value = value.permute(order)
    return value.reshape(value.shape[0], int(torch.Size(value.shape[1 : 1 + dims]).numel()), -1)


_BUILDERS: dict[str, Callable[[Block, Sequence[Use], int, torch.dtype], Factor]] = {
    "linear": _linear,
    "rows": _rows,
    "scale": _scale,
    "shift": _shift,
}
