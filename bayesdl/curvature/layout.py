"""How the selected parameters are cut into blocks, and how a flat vector maps to them and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError

KINDS = ("linear", "rows", "scale", "shift", "dense", "elements")
# values of `Block.axis` of what is the same for all examples, such as position embeddings
REPEATED, MISSING = -2, -3


def cast(value: Tensor | float, like: Tensor) -> Tensor:
    """A number or tensor in the dtype and on the device of `like`; a number keeps all digits of that dtype."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def positive(scale: Tensor | float, like: Tensor) -> Tensor:
    """The scale of a curvature, cast as above. Raises `ArgumentError` unless it is positive."""
    value = cast(scale, like)
    if not bool((value > 0).all()):
        raise ArgumentError(f"scale={float(value.min()):g}; expected a positive number (1 / temperature)")
    return value


@dataclass(frozen=True)
class Block:
    """Parameters that curvature treats together.

    Attributes:
        name: what reports call it: the layer's name, or the parameter's.
        kind: "linear" (weight acts linearly on the input, bias joined as a last column), "rows" (embedding),
            "scale" (weight and bias of a norm), "shift" (bias alone), "dense" (anything else, by per-example
            gradients), "elements" (single entries of a block of another kind, one row each).
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
        whole: the block that "elements" belong to.
        elements: their positions in that block's matrices, flattened.
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
    whole: Block | None = None
    elements: tuple[int, ...] = ()

    @cached_property
    def index(self) -> Tensor:
        """`elements` as a tensor."""
        return torch.tensor(self.elements)

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
        if self.whole is not None:
            entries = self.whole.pack(values).flatten(-3)
            return entries[..., self.index.to(entries.device)][..., None, :, None]
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
        """Inverse of `pack`; zeros where a block holds single elements only."""
        if self.whole is not None:
            entries = matrix.new_zeros(*matrix.shape[:-3], self.whole.numel)
            entries = entries.index_copy(-1, self.index.to(matrix.device), matrix.flatten(-3))
            return self.whole.unpack(entries.unflatten(-1, (self.whole.groups, self.whole.rows, self.whole.columns)))
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

    Where blocks hold single elements of their tensors, a flat vector holds those alone, and tensors by name are zero
    elsewhere.

    Attributes:
        blocks: in the order of their first parameter.
        names, shapes: the flat order.
        activations: scalars per example held by the taps of one backward pass, for memory planning.
        outputs: C of the network, for memory planning.
        positions: T of the example that the plan was made with; 0 where the outputs are `(B, C)`.
    """

    blocks: tuple[Block, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    activations: int = 0
    outputs: int = 1
    positions: int = 0

    @cached_property
    def sizes(self) -> list[int]:
        """Scalars per parameter in flat order."""
        pairs = zip(self.names, self.shapes, strict=True)
        return [len(self.picked[n]) if n in self.picked else math.prod(shape) for n, shape in pairs]

    @cached_property
    def picked(self) -> dict[str, Tensor]:
        """Positions of the selected elements by name, for parameters of which not all belong to a block."""
        found: dict[str, Tensor] = {}
        for block in self.blocks:
            if block.whole is not None:
                marks = block.unpack(torch.ones(1, block.rows, 1))
                found |= {name: mark.flatten().nonzero().squeeze(1) for name, mark in marks.items()}
        return found

    @cached_property
    def _orders(self) -> list[Tensor]:
        """Positions in a flat vector of the entries of each block."""
        numbered = self.to_dict(torch.arange(self.numel, dtype=torch.float64))
        return [block.pack(numbered).flatten().long() for block in self.blocks]

    @cached_property
    def whole(self) -> Layout | None:
        """The layout of all elements of the same blocks; None where they are all selected."""
        if not self.picked:
            return None
        return replace(self, blocks=tuple(block.whole or block for block in self.blocks))

    @property
    def numel(self) -> int:
        """P."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> list[Tensor]:
        """`(..., P)` -> one `(..., G, rows, columns)` per block."""
        if self.picked:  # without the elements that are not selected
            self._check(flat)
            pieces = [flat.index_select(-1, order.to(flat.device)) for order in self._orders]
            return [p.unflatten(-1, (b.groups, b.rows, b.columns)) for p, b in zip(pieces, self.blocks, strict=True)]
        values = self.to_dict(flat)
        return [block.pack(values) for block in self.blocks]

    def join(self, matrices: Sequence[Tensor]) -> Tensor:
        """Inverse of `split`."""
        if self.picked:
            order = torch.cat(self._orders).argsort().to(matrices[0].device)
            return torch.cat([matrix.flatten(-3) for matrix in matrices], -1).index_select(-1, order)
        values: dict[str, Tensor] = {}
        for block, matrix in zip(self.blocks, matrices, strict=True):
            values.update(block.unpack(matrix))
        return self.flatten(values, matrices[0].dim() - 3)

    def to_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """`(..., P)` -> tensors `(..., *shape)` by parameter name."""
        self._check(flat)
        lead = flat.shape[:-1]
        pieces = dict(zip(self.names, flat.split(self.sizes, -1), strict=True))
        for name, where in self.picked.items():
            size = math.prod(self.shapes[self.names.index(name)])
            pieces[name] = flat.new_zeros(*lead, size).index_copy(-1, where.to(flat.device), pieces[name])
        return {name: pieces[name].reshape((*lead, *s)) for name, s in zip(self.names, self.shapes, strict=True)}

    def _check(self, flat: Tensor) -> None:
        if flat.shape[-1] != self.numel:
            raise ShapeError(f"a flat vector of {flat.shape[-1]} entries was given; the selection has {self.numel}")

    def flatten(self, values: Mapping[str, Tensor], lead: int = 0) -> Tensor:
        """Tensors `(..., *shape)` by name, with `lead` axes before the parameter's own -> `(..., P)`."""
        pieces = []
        for name in self.names:
            piece = values[name].reshape(*values[name].shape[:lead], -1)
            where = self.picked.get(name)
            pieces.append(piece if where is None else piece[..., where.to(piece.device)])
        return torch.cat(pieces, -1)

    def without_padding(self, flat: Tensor) -> Tensor:
        """Offsets of the weights `(..., P)` with the padding rows of embeddings at zero, as in training."""
        rows = {block.parameters[0]: block.padding for block in self.blocks if block.padding >= 0}
        if not rows:
            return flat
        values = self.to_dict(flat.clone())  # views
        for name, row in rows.items():
            values[name][..., row, :] = 0.0
        return self.flatten(values, flat.dim() - 1)

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
            "positions": self.positions,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Layout:
        """Inverse of `to_json`."""
        blocks = tuple(_block(b) for b in data["blocks"])
        shapes = tuple(tuple(int(i) for i in s) for s in data["shapes"])
        positions = int(data.get("positions", 0))  # absent from older files
        return Layout(blocks, tuple(data["names"]), shapes, int(data["activations"]), int(data["outputs"]), positions)


def _block(data: Mapping[str, Any]) -> Block:
    """A block from its JSON form."""
    return Block(
        name=str(data["name"]),
        kind=str(data["kind"]),
        parameters=tuple(data["parameters"]),
        shapes=tuple(tuple(shape) for shape in data["shapes"]),
        modules=tuple(data["modules"]),
        groups=int(data["groups"]),
        rows=int(data["rows"]),
        columns=int(data["columns"]),
        axis=int(data["axis"]),
        padding=int(data["padding"]),
        transposed=bool(data.get("transposed", False)),  # absent from older files, as what follows
        whole=_block(data["whole"]) if data.get("whole") else None,
        elements=tuple(data.get("elements", ())),
    )
