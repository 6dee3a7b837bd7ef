"""What a network returns, as one tensor with the numbers of one observation on its last axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from bayesdl.batch import Call, flatten_tensors
from bayesdl.errors import ShapeError

OutputAxis = int | Literal["auto"] | None
# of an option that a question does not have: probability 0, and still a number in entropies and derivatives
ABSENT = -1e3


def extract_output(raw: Any) -> Tensor:
    """The output tensor of a call: the tensor itself, its `.logits`, or the entry "logits"."""
    if isinstance(raw, Tensor):
        return raw
    logits = getattr(raw, "logits", None)
    if logits is None and isinstance(raw, Mapping):
        logits = raw.get("logits")
    if isinstance(logits, Tensor):
        return logits
    if isinstance(raw, (tuple, list)) and len(raw) == 1 and isinstance(raw[0], Tensor):
        return raw[0]
    advice = ""
    if isinstance(raw, (tuple, list)) and len(raw) == 2 and all(isinstance(part, Tensor) for part in raw):
        advice = (
            " For a pair of mean and variance: return torch.cat([mean, variance.log()], -1), with "
            'likelihood="heteroscedastic"'
        )
    raise ShapeError(
        f"the network returned {type(raw).__name__}; expected a tensor or an object with .logits. Wrap it in a module "
        f"that returns the outputs alone.{advice}"
    )


def without_absent_options(output: Tensor, call: Any) -> Tensor:
    """Scores `(B, C)` of multiple choice, in which options that a question does not have are as good as impossible.

    Where questions differ in their number of options, batches of tokens `(B, C, T)` are filled up: an option without
    any attended token is such a filling, and its score is replaced by `ABSENT`.
    """
    kwargs = (call.kwargs or {}) if isinstance(call, Call) else {}
    tokens, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if not isinstance(tokens, Tensor) or not isinstance(mask, Tensor) or tokens.dim() != 3:
        return output
    if mask.shape != tokens.shape or output.shape != tokens.shape[:2]:
        return output
    return torch.where((mask != 0).any(-1).to(output.device), output, ABSENT)


def two_dimensional(output: Tensor, size: int | None = None) -> Tensor:
    """`(B,)` becomes `(B, 1)`; `(B, C)` stays; anything else raises `ShapeError`.

    `size` is B where it is known: a network that squeezes drops the batch axis of a single example too.
    """
    if size == 1 and output.dim() < 2:
        return output.reshape(1, -1)
    if output.dim() == 1:
        return output.unsqueeze(1)
    if output.dim() != 2:
        raise ShapeError(
            f"the network's output has shape {tuple(output.shape)}; expected (batch, outputs). The categorical "
            "likelihood takes positions, (B, T, C); for others pool them in a module around the network"
        )
    return output


def outputs_last(output: Tensor, size: int | None, axis: OutputAxis) -> Tensor:
    """Raw outputs with the numbers of one observation on the last axis: `(B, C)`, or `(B, positions..., C)`.

    Args:
        output: raw outputs.
        size: B where it is known.
        axis: `Likelihood.output_axis`; "auto" is the last of three axes `(B, T, C)`, the second of more `(B, C, H, W)`.
    """
    if axis is None or output.dim() < 3:
        return two_dimensional(output, size)
    place = (-1 if output.dim() == 3 else 1) if axis == "auto" else axis
    if not -output.dim() < place < output.dim():
        raise ShapeError(f"the network's output has shape {tuple(output.shape)}, and class_axis={place} is none of it")
    return output.movedim(place, -1)


def picks_positions(output: Tensor, scores: Tensor) -> bool:
    """Whether outputs `(B, C)` are scores `(B, T, C)` at one position of each input."""
    if scores.dim() < 3 or output.dim() != 2 or (len(scores), scores.shape[-1]) != tuple(output.shape):
        return False
    return bool((scores.flatten(1, -2) == output.unsqueeze(1)).all(-1).any(1).all())


def known_batch_size(call: Any) -> int | None:
    """Leading dimension that all tensors of a call share; None where they differ (graphs, shared masks)."""
    sizes = {tensor.shape[0] for tensor in flatten_tensors(call)[0]}
    return int(sizes.pop()) if len(sizes) == 1 else None
