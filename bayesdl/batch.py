"""Batch adapters: what a data loader yields -> (network inputs, target)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bayesdl.errors import ArgumentError, ShapeError

BatchAdapter = Callable[[Any], tuple[Any, Any]]

TARGET_KEYS = ("labels", "label", "target", "targets", "y")


@dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of one network call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None


def pair_adapter(batch: Any) -> tuple[Any, Any]:
    """`(inputs, target)`, a mapping with a target key, or inputs alone (target None)."""
    if isinstance(batch, Mapping):
        return _split_mapping(batch, TARGET_KEYS)
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        raise ArgumentError(
            f"a batch of {len(batch)} elements was given; expected (inputs, target), inputs alone, or a mapping. "
            "Nest several inputs as ((x1, x2), y), or pass batch=lambda b: (inputs, target)"
        )
    return batch, None


def huggingface_adapter(batch: Any) -> tuple[Any, Any]:
    """A mapping of keyword arguments in which `labels` is the target."""
    if not isinstance(batch, Mapping):
        raise ArgumentError(f'batch="huggingface" expects mappings from the loader, got {type(batch).__name__}')
    return _split_mapping(batch, ("labels", "label"))


@dataclass(frozen=True)
class HuggingFace:
    """Batches of transformers: mappings of keyword arguments; which output of the model is read, and where.

    Args:
        target: key of the labels; "label" stands for "labels".
        output: attribute of the model's output.
        position: "last": the output at each sequence's last attended token, by the mask (padding on either side); None
            keeps all positions.
        classes: columns of the output, such as the token ids of the answers "A" to "D"; targets count among them.
    """

    target: str = "labels"
    output: str = "logits"
    position: str | None = None
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.position not in (None, "last"):
            raise ArgumentError(f'position={self.position!r}; expected "last" or None')
        if self.classes is not None and len(self.classes) < 2:
            raise ArgumentError(f"classes={self.classes}; expected at least two columns of the output")

    def __call__(self, batch: Any) -> tuple[Any, Any]:
        """A batch of the loader -> inputs and target."""
        if not isinstance(batch, Mapping):
            raise ArgumentError(f'batch="huggingface" expects mappings from the loader, got {type(batch).__name__}')
        return _split_mapping(batch, ("labels", "label") if self.target == "labels" else (self.target,))

    def read(self, raw: Any, call: Call) -> Tensor:
        """The outputs in what the model returned for a call."""
        found = getattr(raw, self.output, None)
        if not isinstance(found, Tensor):
            raise ShapeError(f"the network returned {type(raw).__name__} without a tensor {self.output!r}")
        if self.position == "last":
            if found.dim() != 3:
                raise ShapeError(f'{self.output} has shape {tuple(found.shape)}; position="last" needs (B, T, C)')
            mask = (call.kwargs or {}).get("attention_mask")
            if mask is None:
                found = found[:, -1]
            else:
                steps = torch.arange(1, mask.shape[1] + 1, device=found.device)
                last = (steps * (mask.to(found.device) != 0)).argmax(1)
                found = found[torch.arange(len(found), device=found.device), last]
        return found if self.classes is None else found[..., list(self.classes)]


def huggingface(
    target: str = "labels", output: str = "logits", position: str | None = None, classes: Iterable[int] | None = None
) -> HuggingFace:
    """`batch="huggingface"` with a choice of what is read; see `HuggingFace` for the arguments.

    A multiple-choice question for a causal model: `batch=bdl.batch.huggingface(position="last", classes=answer_ids)`.
    For a model that scores options, such as `BertForMultipleChoice`, `batch="huggingface"` is enough: tokens
    `(B, C, T)` give logits `(B, C)`, and an option without any attended token, where questions differ in how many they
    have, gets probability zero.
    """
    return HuggingFace(target, output, position, None if classes is None else tuple(map(int, classes)))


ADAPTERS: dict[str, BatchAdapter] = {"auto": pair_adapter, "huggingface": huggingface_adapter}


def resolve_adapter(batch: str | BatchAdapter | None) -> BatchAdapter:
    """Name or callable -> adapter. Raises `ArgumentError` on an unknown name."""
    if batch is None:
        return pair_adapter
    if callable(batch):
        return batch
    if batch not in ADAPTERS:
        raise ArgumentError(f"batch={batch!r} is not known; choose one of {sorted(ADAPTERS)} or pass a callable")
    return ADAPTERS[batch]


def as_call(module: nn.Module, inputs: Any) -> Call:
    """Decide how `inputs` reach `module.forward`: as one argument, unpacked, or as keywords.

    A mapping whose keys are parameters of `forward` becomes keywords; a tuple or list is unpacked when
    `forward` has at least two positional parameters; anything else is the single argument.

    Raises:
        ArgumentError: a numpy array instead of a tensor.
    """
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, np.ndarray):
        raise ArgumentError(
            f"the inputs are a numpy array {inputs.shape} of {inputs.dtype}; expected tensors: "
            "torch.as_tensor(x, dtype=torch.float32)"
        )
    if not isinstance(inputs, (Mapping, tuple, list)):
        return Call((inputs,))
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(inputs, Mapping):
        names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if inputs and (open_ended or set(inputs) <= names):
            return Call((), dict(inputs))
        return Call((inputs,))
    if len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return Call(tuple(inputs))
    return Call((inputs,))


def to_device(inputs: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Move every tensor of a nested input; floating tensors also take `dtype` when one is given."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        cast = dtype if dtype is not None and value.dtype.is_floating_point else value.dtype
        # asynchronous towards an accelerator alone: a copy to the host would be read before it is complete
        return value.to(device=device, dtype=cast, non_blocking=device.type == "cuda")

    return _map(inputs, move)


def batch_size(inputs: Any) -> int:
    """Leading dimension shared by the tensors of a nested input.

    Raises:
        ShapeError: no tensor with a batch axis was found, or the leading dimensions differ.
    """
    sizes = {leaf.shape[0] for leaf in _leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0}
    if len(sizes) != 1:
        found = "no tensor" if not sizes else f"leading dimensions {sorted(sizes)}"
        raise ShapeError(f"the inputs hold {found}; expected tensors that share one leading batch dimension")
    return int(sizes.pop())


def index_batch(inputs: Any, index: slice | Tensor) -> Any:
    """Rows of every tensor of a nested input."""
    return _map(inputs, lambda v: v[index] if isinstance(v, Tensor) and v.dim() > 0 else v)


def count_batches(loader: Iterable[Any]) -> int | None:
    """Number of batches where the loader knows it."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _split_mapping(batch: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[Any, Any]:
    found = [key for key in keys if key in batch]
    if len(found) > 1:
        raise ArgumentError(f"the batch has several target keys {found}; pass batch=lambda b: (inputs, target)")
    inputs = {key: value for key, value in batch.items() if key not in found}
    return inputs, batch[found[0]] if found else None


def _plain(inputs: Any) -> Any:
    # subclasses of dict such as transformers.BatchEncoding are leaves to pytree: make them plain containers
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Mapping):
        return {key: _plain(value) for key, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(_plain(value) for value in inputs)
    return inputs


def _map(inputs: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(inputs, Call):
        kwargs = None if inputs.kwargs is None else tree_map(function, _plain(inputs.kwargs))
        return Call(tree_map(function, _plain(inputs.args)), kwargs)
    return tree_map(function, _plain(inputs))


def _leaves(inputs: Any) -> list[Any]:
    if isinstance(inputs, Call):
        return tree_flatten(_plain((inputs.args, inputs.kwargs or {})))[0]
    return tree_flatten(_plain(inputs))[0]


def flatten_tensors(inputs: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """Batched tensors of a nested input, and a function that puts replacements back."""
    tree = _plain(inputs)
    packed = _plain((tree.args, tree.kwargs or {})) if isinstance(tree, Call) else tree
    leaves, spec = tree_flatten(packed)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0]

    def rebuild(tensors: list[Tensor]) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        result = tree_unflatten(filled, spec)
        return Call(result[0], result[1] or None) if isinstance(tree, Call) else result

    return [leaves[i] for i in places], rebuild
