"""What one chunk of examples adds to a curvature: which cotangents go back, and how many of them at once.

Outputs at T positions make T C outputs of one example. Lambda is block diagonal over the positions, so the exact GGN
takes T C cotangents, each zero at all positions but one; they go back a few at a time. A Monte-Carlo or empirical
score covers all positions with one cotangent per draw. The last layer alone needs none of this: each of its outputs
depends on the features of its own position, which then is an example of its own (`Head`).

Where a target is ignored every cotangent is exactly zero, and the positions of a last layer are left out altogether. In
front of it the input factors of kron average over all positions of an example with any target that counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesdl.curvature.chunking import DEFAULT_MEMORY, cotangent_width
from bayesdl.curvature.cotangents import cotangent_rule
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.factors import Cotangents, factors_in_turn, layer_factors
from bayesdl.curvature.head import Head, head_of, is_one_layer
from bayesdl.curvature.layout import Layout
from bayesdl.curvature.products import selected
from bayesdl.curvature.structure import Structure
from bayesdl.errors import ArgumentError
from bayesdl.likelihoods import Likelihood
from bayesdl.network import Network

__all__ = ["Contribution", "Seeds"]


@dataclass(frozen=True)
class Contribution:
    """Outputs and checked targets of some examples, `counted` the mask of those that count (None: all).

    Attributes:
        f: `(B, C)` or `(B, positions..., C)`.
        y: as `Likelihood.check_targets` returns them.
        counted: `(B,)` or `(B, positions...)`.
        parts: factors of their cotangents, a part at a time.
    """

    f: Tensor
    y: Tensor
    counted: Tensor | None
    parts: Iterator[Sequence[Factor]]

    @property
    def number(self) -> int:
        """How many observations count."""
        return int(self.f[..., 0].numel() if self.counted is None else self.counted.sum())


class Seeds:
    """Cotangents of one kind for one pass over the data.

    Args:
        likelihood: p(y | f).
        kind: see `cotangent_rule`.
        samples: draws of y per observation for kind "mc".
        generator: for kind "mc".
        whole: whether the cotangents of an example must come in one part.
        classes: for kind "ggn", see `Likelihood.subset_root`; None takes all classes.
        in_turn: whether the cotangents of an example may come one after another.

    Raises:
        ArgumentError: classes with another kind, or no class.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        kind: str,
        samples: int,
        generator: torch.Generator | None,
        whole: bool = False,
        classes: int | None = None,
        in_turn: bool = False,
    ) -> None:
        self.likelihood, self.kind, self.whole, self.classes = likelihood, kind, whole, classes
        self.in_turn = in_turn
        self.rule = cotangent_rule(likelihood, kind, samples, generator)
        if classes is None:
            return
        if kind != "ggn" or isinstance(classes, bool) or classes < 1:
            raise ArgumentError(f'classes={classes} with kind={kind!r}; expected a positive number, with kind="ggn"')
        self.rule = lambda f, y: likelihood.subset_root(f, classes, generator)

    def contribution(
        self, network: Network, curvature: Structure, rows: Any, labels: Any, dtype: torch.dtype, memory: int | None
    ) -> Contribution:
        """Outputs and factors of some examples.

        Args:
            network: the network.
            curvature: what the factors are for.
            rows: inputs.
            labels: targets.
            dtype: of the factors.
            memory: bytes that may live at once.
        """
        layout = curvature.layout
        if (layout.positions and self.kind != "empirical") or self._alone(curvature):
            head = head_of(network, layout, rows, dtype)
            if head is not None:
                f, y = self._checked(head.output, labels)
                parts = self._of_head(head, f, y, curvature, dtype, memory)
                return Contribution(f, y, self.likelihood.counted(y), parts)
        stream: Iterator[Tensor] = iter(())
        seen: list[Tensor] = []

        def first(output: Tensor) -> Tensor:
            nonlocal stream
            seen.extend(self._checked(output, labels))
            if self.in_turn:  # all that lives at once of many are the cotangents themselves
                room = max(1, (memory or DEFAULT_MEMORY) // (seen[0].numel() * seen[0].element_size()))
            else:
                room = cotangent_width(layout, curvature, dtype, seen[0].shape, memory)
            stream = self._vectors(seen[0], seen[1], room)
            return next(stream)

        _, parts = self._factors(network, layout, rows, first, dtype)
        f, y = seen
        counted = self.likelihood.counted(y)

        def all_parts() -> Iterator[Sequence[Factor]]:
            keep = None if counted is None else counted.reshape(len(f), -1).any(1)
            if keep is not None and bool(keep.all()):
                keep = None
            if keep is not None and not bool(keep.any()):
                return

            def kept(factors: Sequence[Factor]) -> Sequence[Factor]:
                return factors if keep is None else [selected(p, keep) if p.g.numel() else p for p in factors]

            for factors in parts:
                yield kept(factors)
            for vectors in stream:
                _, more = self._factors(network, layout, rows, lambda _, v=vectors: v, dtype)  # type: ignore[misc]
                for factors in more:
                    yield kept([replace(factor, again=True) for factor in factors])

        return Contribution(f, y, counted, all_parts())

    def width(self, curvature: Structure, samples: int) -> int | None:
        """Cotangents per example that one chunk of examples is planned for; None: one per output."""
        if self.kind != "ggn":
            return samples if self.kind == "mc" else 1
        if self.classes is not None and not self._alone(curvature):
            return min(self.classes + 1, curvature.layout.outputs)
        return 1 if self._alone(curvature) and is_one_layer(curvature.layout) else None

    def _alone(self, curvature: Structure) -> bool:
        """Whether the diagonal of Lambda is all that counts at a last layer."""
        return curvature.separates_outputs and self.kind == "ggn" and not self.whole

    def _factors(
        self, network: Network, layout: Layout, rows: Any, cotangents: Cotangents, dtype: torch.dtype
    ) -> tuple[Tensor, Iterator[Sequence[Factor]]]:
        if self.in_turn:
            return factors_in_turn(network, layout, rows, cotangents, dtype)
        output, factors = layer_factors(network, layout, rows, cotangents, dtype)
        return output, iter([factors])

    def _checked(self, output: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
        f = self.likelihood.check_outputs(output)
        return f, self.likelihood.check_targets(f, labels)

    def _of_head(
        self, head: Head, f: Tensor, y: Tensor, curvature: Structure, dtype: torch.dtype, memory: int | None
    ) -> Iterator[Sequence[Factor]]:
        """A few positions of all examples at a time; those that do not count are left out."""
        flat, goal, alone = f.flatten(0, -2), y.flatten(0, f.dim() - 2), self._alone(curvature)
        mask = self.likelihood.counted(goal)
        every = torch.arange(len(flat), device=flat.device) if mask is None else mask.nonzero().squeeze(1)
        count = self._num_roots(flat) if self.kind == "ggn" and not alone else 1
        step = cotangent_width(curvature.layout, curvature, dtype, torch.Size((count, flat.shape[-1])), memory)
        for index in every.split(step) if len(every) else ():
            some, labels = flat[index], goal[index]
            vectors = self.likelihood.hessian_diagonal(some).sqrt()[None] if alone else self.rule(some, labels)
            yield head.factors(vectors.to(dtype), index)

    def _num_roots(self, f: Tensor) -> int:
        if self.classes is None:
            return self.likelihood.num_roots(f)
        return min(self.classes + 1, int(f.shape[-1]))

    def _vectors(self, f: Tensor, y: Tensor, room: int) -> Iterator[Tensor]:
        """V `(k, *f.shape)`, at most `room` cotangents at once, zero wherever a target does not count."""
        counted = self.likelihood.counted(y)
        weight = None if counted is None or bool(counted.all()) else counted.unsqueeze(-1).to(f.dtype)

        def masked(vectors: Tensor) -> Tensor:
            return vectors if weight is None else vectors * weight

        few = self.whole or self.classes is not None or f.shape[-1] <= room
        if self.kind != "ggn" or (f.dim() == 2 and few):
            vectors = masked(self.rule(f, y))
            yield from [vectors] if self.whole else vectors.split(room)
            return
        count = self._num_roots(f)
        flat = f.unsqueeze(1) if f.dim() == 2 else f.flatten(1, -2)  # (B, T, C)
        drawn: dict[int, Tensor] = {}

        def columns(t: int, low: int, high: int) -> Tensor:
            if self.classes is None:
                return self.likelihood.root_columns(flat[:, t], low, high)
            if t not in drawn:  # once, however many parts a position comes in
                drawn.clear()
                drawn[t] = self.rule(flat[:, t], y)
            return drawn[t][low:high]

        for start in range(0, count * flat.shape[1], room):
            stop = min(start + room, count * flat.shape[1])
            vectors = flat.new_zeros(stop - start, *flat.shape)
            for t in range(start // count, (stop - 1) // count + 1):
                low, high = max(start - t * count, 0), min(stop - t * count, count)
                place = t * count + low - start
                vectors[place : place + high - low, :, t] = columns(t, low, high)
            yield masked(vectors.view(len(vectors), *f.shape))
