"""The outputs' Jacobian in the selected weights, positions as examples of their own, a part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesdl.curvature.backward import muted
from bayesdl.curvature.chunking import cotangent_width
from bayesdl.curvature.factor import Factor, LinearFactor
from bayesdl.curvature.factors import Cotangents, identity_cotangents, layer_factors
from bayesdl.curvature.head import Head, head_of, is_one_layer
from bayesdl.curvature.structure import Structure
from bayesdl.network import Network
from bayesdl.outputs import known_batch_size


@dataclass(frozen=True)
class Part:
    """Some positions of the outputs with their Jacobian.

    Attributes:
        mean: outputs `(n, C)`.
        factors: of J, n examples.
        index: which of the N = B T positions of the batch; None: `(B, C)` outputs as they are.
        columns: which outputs the factors' cotangents are; None: all of them.
        shape: `(B, positions...)` of the batch, where there is an index.
    """

    mean: Tensor
    factors: list[Factor]
    index: Tensor | None = None
    columns: slice | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Jacobians:
    """How the Jacobians of a posterior are had.

    Attributes:
        network: the network.
        curvature: what they will meet.
        dtype: of factors and outputs.
        joint: beyond so many outputs only their variances are wanted.
        memory: bytes that may live at once.
        graph: whether they are to be differentiated towards the inputs.
    """

    network: Network
    curvature: Structure
    dtype: torch.dtype
    joint: int
    memory: int | None = None
    graph: bool = False

    def parts(self, inputs: Any) -> Iterator[Part]:
        """Parts of a few examples that go through the network together; `columns` is always None."""
        layout = self.curvature.layout
        if layout.positions or self._one_by_one():
            head = None if self.graph else head_of(self.network, layout, inputs, self.dtype)
            if head is not None:
                yield self._of_head(head)
                return
        if layout.positions:
            yield from self._of_positions(inputs)
            return
        output, factors = self._factors(inputs)
        yield Part(output, factors)

    def narrow_parts(self, inputs: Any) -> Iterator[Part]:
        """`parts` for questions about single outputs: a few columns at a time where all of them would not fit."""
        layout, examples = self.curvature.layout, known_batch_size(self.network.prepare(inputs)) or 1
        size = torch.Size((examples, layout.outputs))
        room = cotangent_width(layout, self.curvature, self.dtype, size, self.memory)
        # a last layer holds its cotangents once for all examples
        if layout.positions or is_one_layer(layout) or room >= layout.outputs or layout.outputs <= self.joint:
            yield from self.parts(inputs)
            return
        for start in range(0, layout.outputs, room):
            columns = slice(start, min(start + room, layout.outputs))
            output, factors = self._factors(inputs, lambda f, c=columns: identity_cotangents(f)[c])  # type: ignore[misc]
            yield Part(output, factors, columns=columns)

    def _one_by_one(self) -> bool:
        """Whether variances of a last layer's many outputs are had without a matrix of C rows and columns."""
        layout = self.curvature.layout
        return self.curvature.separates_outputs and layout.outputs > self.joint and is_one_layer(layout)

    def _factors(self, inputs: Any, cotangents: Cotangents = identity_cotangents) -> tuple[Tensor, list[Factor]]:
        found = layer_factors(self.network, self.curvature.layout, inputs, cotangents, self.dtype, self.graph)
        return found[0].to(self.dtype), found[1]

    def _of_head(self, head: Head) -> Part:
        mean = head.output.to(self.dtype).flatten(0, -2)
        index = None if head.output.dim() == 2 else torch.arange(len(mean), device=mean.device)
        if self._one_by_one():
            ones = mean.new_ones(1, 1, mean.shape[-1]).expand(1, len(mean), -1)
            factors = [replace(f, unit=True) for f in head.factors(ones) if isinstance(f, LinearFactor)]
            return Part(mean, list(factors), index, shape=head.output.shape[:-1])
        return Part(mean, head.factors(identity_cotangents(mean)), index, shape=head.output.shape[:-1])

    def _of_positions(self, inputs: Any) -> Iterator[Part]:
        """A few positions of all examples at a time; they share one backward pass."""
        first, total = 0, 1
        while first < total:
            shape = torch.Size()
            step = 1

            def some(f: Tensor, first: int = first) -> Tensor:
                nonlocal shape, total, step
                shape = f.shape
                count, total = f.shape[-1], f.shape[1:-1].numel()
                layout = self.curvature.layout
                room = cotangent_width(layout, self.curvature, self.dtype, f.shape, self.memory)
                step = max(1, min(room // count, total - first))
                vectors = f.new_zeros(step, count, len(f), total, count)
                eye = torch.eye(count, dtype=f.dtype, device=f.device).unsqueeze(1)
                for i in range(step):
                    vectors[i, :, :, first + i] = eye
                return vectors.view(step * count, *f.shape)

            output, factors = self._factors(inputs, some)
            flat, count = output.flatten(1, -2), shape[-1]
            for i in range(step):
                mine = [replace(factor, g=factor.g[:, i * count : (i + 1) * count]) for factor in factors]
                index = torch.arange(len(flat), device=flat.device) * total + first + i
                yield Part(flat[:, first + i], mine, index, shape=shape[:-1])
            first += step


def restored(values: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """Tensors `(n, ...)` of all parts of a batch in its own order: `(B, positions..., ...)`, or `(B, ...)`."""
    if parts[0].index is None:
        return torch.cat(list(values), 1) if parts[0].columns is not None else values[0]
    order = torch.cat([part.index for part in parts if part.index is not None]).argsort()
    return torch.cat(list(values))[order].unflatten(0, parts[0].shape)


def tangent(network: Network, delta: Mapping[str, Tensor], inputs: Any) -> Tensor:
    """f(x) + J(x) delta in forward mode, for a direction by name. Raises `RuntimeError` where an operation has none."""
    network.check_fresh()
    call, module, origin = network.prepare(inputs), network.module(), network.parameters
    direction = {name: delta[name].to(value) for name, value in origin.items()}
    plain = {name: value.detach() for name, value in origin.items()}
    # torch's first use of forward mode warns about torch's own use of torch.jit.script
    with muted(".*torch.jit.script.*", DeprecationWarning):
        pair = torch.func.jvp(lambda p: network.forward(module, call, p), (plain,), (direction,))
    return pair[0] + pair[1]
