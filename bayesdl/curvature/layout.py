"""How the selected parameters are cut into blocks, and how a flat vector maps to them and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError

KINDS = ("linear", "rows", "scale", "shift", "dense")
# values of `Block.axis` of what is the same for all examples, such as position embeddings
REPEATED, MISSING = -2, -3


def cast(value: Tensor | float, like: Tensor) -> Tensor:
    """A number or tensor in the dtype and on the device of `like`; a number keeps all digits of that dtype."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Block:
    """Parameters that curvature treats together.

    Attributes:
        name: what reports call it: the layer's name, or the parameter's.
        kind: "linear" (weight acts linearly on the input, bias joined as a last column), "rows" (embedding),
            "scale" (weight and bias of a norm), "shift" (bias alone), "dense" (anything else, by per-example
            gradients).
        parameters: names, in the order in which the block holds them.
        shapes: their shapes.
        modules: names of the modules that use them; several where weights are tied.
        groups, rows, columns: the block as G matrices of rows x columns (out x in, bias column included).
        axis: batch axis of the layer's input and output; -1 where batch and positions share the first axis;
            `REPEATED` where there is a first axis of one entry, `MISSING` where there is none. The same for a
            "dense" parameter that may be repeated for every example, `MISSING - n` with n axes of one behind the
            batch axis; 0 where it needs a pass of its own.
        padding: row of an embedding that is a constant by convention; -1 for none.
        transposed: whether the weight's memory holds columns x rows (in x out).
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    modules: tuple[str, ...]
    groups: int
    rows: int
    columns: int
    axis: int = 0
    padding: int = -1
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Number of scalars."""
        return self.groups * self.rows * self.columns

    @property
    def has_bias(self) -> bool:
        """Whether a bias column is joined to a linear weight."""
        return self.kind == "linear" and len(self.parameters) == 2

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Tensors by name, each `(..., *shape)` -> `(..., G, rows, columns)`."""
        parts = [values[name] for name in self.parameters]
        lead = parts[0].shape[: parts[0].dim() - len(self.shapes[0])]
        if self.kind == "linear":
            weight = parts[0]
            if self.transposed:
                weight = weight.reshape(*lead, self.groups, self.columns - self.has_bias, self.rows).mT
            flat = [part.reshape(*lead, self.groups, self.rows, -1) for part in (weight, *parts[1:])]
            return torch.cat(flat, -1) if len(flat) > 1 else flat[0]
        if self.kind == "rows":
            return parts[0].mT.unsqueeze(-3)
        flat = [part.reshape(*lead, -1) for part in parts]
        return torch.cat(flat, -1).reshape(*lead, 1, self.rows, 1)

    def unpack(self, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of `pack`."""
        lead = matrix.shape[:-3]
        if self.kind == "linear":
            weight = matrix[..., :-1] if self.has_bias else matrix
            weight = weight.mT if self.transposed else weight
            values = {self.parameters[0]: weight.reshape(*lead, *self.shapes[0])}
            if self.has_bias:
                values[self.parameters[1]] = matrix[..., -1].reshape(*lead, *self.shapes[1])
            return values
        if self.kind == "rows":
            return {self.parameters[0]: matrix.squeeze(-3).mT.contiguous()}
        flat = matrix.reshape(*lead, -1)
        sizes = [math.prod(shape) for shape in self.shapes]
        pieces = flat.split(sizes, -1)
        return {
            name: piece.reshape((*lead, *shape))
            for name, piece, shape in zip(self.parameters, pieces, self.shapes, strict=True)
        }


@dataclass(frozen=True)
class Layout:
    """All blocks, and the order of the parameters in a flat vector `(P,)` (the network's own order).

    Attributes:
        blocks: in the order of their first parameter.
        names, shapes: the flat order.
        activations: scalars per example held by the taps of one backward pass, for memory planning.
        outputs: C of the network, for memory planning.
    """

    blocks: tuple[Block, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    activations: int = 0
    outputs: int = 1

    @cached_property
    def sizes(self) -> list[int]:
        """Scalars per parameter in flat order."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def numel(self) -> int:
        """P."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> list[Tensor]:
        """`(..., P)` -> one `(..., G, rows, columns)` per block."""
        values = self.to_dict(flat)
        return [block.pack(values) for block in self.blocks]

    def join(self, matrices: Sequence[Tensor]) -> Tensor:
        """Inverse of `split`."""
        values: dict[str, Tensor] = {}
        for block, matrix in zip(self.blocks, matrices, strict=True):
            values.update(block.unpack(matrix))
        lead = matrices[0].shape[:-3]
        return torch.cat([values[name].reshape(*lead, -1) for name in self.names], -1)

    def to_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """`(..., P)` -> tensors `(..., *shape)` by parameter name."""
        if flat.shape[-1] != self.numel:
            raise ShapeError(f"a flat vector of {flat.shape[-1]} entries was given; the selection has {self.numel}")
        lead = flat.shape[:-1]
        pieces = flat.split(self.sizes, -1)
        return {n: piece.reshape((*lead, *s)) for n, piece, s in zip(self.names, pieces, self.shapes, strict=True)}

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Tensors by name -> `(P,)`."""
        return torch.cat([values[name].reshape(-1) for name in self.names])

    def without_padding(self, flat: Tensor) -> Tensor:
        """Offsets of the weights `(..., P)` with the padding rows of embeddings at zero, as in training."""
        rows = {block.parameters[0]: block.padding for block in self.blocks if block.padding >= 0}
        if not rows:
            return flat
        values = self.to_dict(flat.clone())  # views
        for name, row in rows.items():
            values[name][..., row, :] = 0.0
        return torch.cat([values[name].flatten(flat.dim() - 1) for name in self.names], -1)

    def shifts(self, shift: Tensor | float, like: Tensor) -> list[Tensor]:
        """A prior precision per block, broadcastable to `(G, rows, columns)`.

        Args:
            shift: a scalar; one per block `(L,)`; or one per parameter `(P,)`.
            like: gives dtype and device.

        Raises:
            ArgumentError: another size, or a value that is not positive.
        """
        value = cast(shift, like)
        if not bool((value > 0).all()):
            raise ArgumentError(f"the prior precision must be positive; the smallest given is {float(value.min()):g}")
        if value.numel() == 1:
            return [value.reshape(())] * len(self.blocks)
        if value.shape == (len(self.blocks),):
            return list(value.unbind())
        if value.shape == (self.numel,):
            return self.split(value)
        raise ArgumentError(
            f"a prior precision of shape {tuple(value.shape)} was given; expected a scalar, one per block "
            f"({len(self.blocks)},) or one per parameter ({self.numel},)"
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "blocks": [asdict(block) for block in self.blocks],
            "names": list(self.names),
            "shapes": [list(shape) for shape in self.shapes],
            "activations": self.activations,
            "outputs": self.outputs,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        """Inverse of `to_json`."""
        blocks = tuple(
            Block(
                name=str(b["name"]),
                kind=str(b["kind"]),
                parameters=tuple(b["parameters"]),
                shapes=tuple(tuple(s) for s in b["shapes"]),
                modules=tuple(b["modules"]),
                groups=int(b["groups"]),
                rows=int(b["rows"]),
                columns=int(b["columns"]),
                axis=int(b["axis"]),
                padding=int(b["padding"]),
                transposed=bool(b.get("transposed", False)),  # absent from older files
            )
            for b in data["blocks"]
        )
        shapes = tuple(tuple(int(i) for i in s) for s in data["shapes"])
        return Layout(blocks, tuple(data["names"]), shapes, int(data["activations"]), int(data["outputs"]))
