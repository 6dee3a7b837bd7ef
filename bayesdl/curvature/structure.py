"""Structure: what is kept of sum_n J_n^T V_n V_n^T J_n, and the questions that a Gaussian posterior asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayesdl.curvature.cross import through_solve
from bayesdl.curvature.factor import Factor
from bayesdl.curvature.layout import Layout
from bayesdl.errors import ArgumentError, NonFiniteError, NumericalError

Shift = Tensor | float


@dataclass(frozen=True, eq=False)
class Structure(ABC):
    """Curvature H of a selection. Every query is about P = scale * H + diag(shift).

    `scale` is a positive scalar (1 / temperature, over the noise variance for Gaussian likelihoods), `shift` the
    prior precision: a scalar, one per block, or one per parameter. Nothing is refitted when they change, and all
    queries are differentiable in both.
    """

    layout: Layout

    name: ClassVar[str]
    # whether nothing is kept between the outputs of a last layer, so that the diagonal of Lambda says all
    separates_outputs: ClassVar[bool] = False
    # whether cotangents may come one after another: nothing is formed that would rather meet all of them
    takes_turns: ClassVar[bool] = False

    @property
    def recipe(self) -> str | dict[str, str]:
        """What `structure=` is given to fit this: a name, or names by layer pattern."""
        return self.name

    @property
    def options(self) -> dict[str, Any]:
        """What `recipe` leaves open about the tensors, JSON-ready; without what is the default."""
        return {}

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The same structure under the options of another; those that it does not have are left out."""
        own = {field.name for field in fields(self)}
        return replace(self, **{name: value for name, value in options.items() if name in own})

    @abstractmethod
    def update(self, factors: Sequence[Factor]) -> None:
        """Add the outer products of one batch, in place; only the estimator that owns this object calls it."""

    @abstractmethod
    def per_block(self) -> Sequence[Tensor]:
        """One stored tensor per block that is finite exactly when everything added to the block was."""

    def is_zero(self) -> bool:
        """Whether H is exactly zero."""
        return not any(bool(value.any()) for value in self.per_block())

    def check_finite(self) -> None:
        """Raise `NonFiniteError` that names the first layer whose curvature holds NaN or infinity."""
        # one reduction per block instead of a mask over every entry
        sums = torch.stack([value.sum() for value in self.per_block()])
        if not bool(torch.isfinite(sums).all()):
            first = self.layout.blocks[int((~torch.isfinite(sums)).nonzero()[0])].name
            raise NonFiniteError(
                f"the curvature of layer {first!r} became NaN or infinite; look for extreme inputs or weights, or fit "
                "with dtype=torch.float64"
            )

    def __add__(self, other: Self) -> Self:
        """Curvature of both data sets together.

        Raises:
            ArgumentError: another structure, or curvature of other parameters.
        """
        if type(other) is not type(self) or other.recipe != self.recipe:
            given = repr(other.recipe) if isinstance(other, Structure) else type(other).__name__
            raise ArgumentError(f"curvature of structure {self.recipe!r} and {given} was added; fit both alike")
        mine, theirs = (
            [(block.kind, block.parameters, block.shapes) for block in part.layout.blocks] for part in (self, other)
        )
        if mine != theirs:
            raise ArgumentError("curvatures of different parameters were added; fit both with equal select= and bias=")
        return self._plus(other)

    @abstractmethod
    def _plus(self, other: Self) -> Self:
        """`+` for curvature of the same structure over the same parameters."""

    @abstractmethod
    def scaled(self, weight: Tensor) -> Self:
        """weight * H."""

    @abstractmethod
    def logdet(self, scale: Shift, shift: Shift) -> Tensor:
        """log |P|, a scalar."""

    @abstractmethod
    def product(self, vectors: Tensor) -> Tensor:
        """H v for flat vectors `(..., P)`."""

    @abstractmethod
    def solve(self, vectors: Tensor, scale: Shift, shift: Shift) -> Tensor:
        """P^-1 v for flat vectors `(..., P)`."""

    @abstractmethod
    def quad(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        """V^T J P^-1 J^T V, `(B, K, K)`, for the factors of one batch."""

    @abstractmethod
    def marginal(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        """The diagonal of `quad`, `(B, K)`."""

    def cross(self, first: Sequence[Factor], second: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        """J P^-1 J'^T between the examples of two batches, `(B, K, B', K')`."""
        return through_solve(self.layout, lambda rows: self.solve(rows, scale, shift), first, second)

    @abstractmethod
    def sample(self, noise: Tensor, scale: Shift, shift: Shift) -> Tensor:
        """P^-1/2 noise for base noise `(S, P)`: draws of N(0, P^-1).

        The symmetric root is used, but by `LowRank` and `Dual` with a shift that is no scalar, whose root is another.
        """

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """All P eigenvalues of H, in no particular order."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """H as a `(P, P)` matrix in flat order; for tests and small models."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""

    @abstractmethod
    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The same structure over other tensors (moves, files)."""

    def sums(self) -> dict[str, Tensor]:
        """Those of `tensors` that add up over the data; whatever else there is was settled before the pass."""
        return self.tensors()

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply `function` to every tensor."""
        return self.with_tensors({name: function(value) for name, value in self.tensors().items()})

    def fresh(self) -> Self:
        """Zero curvature, ready for another pass over data."""
        return self.map(torch.zeros_like)

    def whole_blocks(self) -> frozenset[str]:
        """Names of the blocks whose Jacobian rows `update` and `prepared` form; for memory planning."""
        return frozenset()

    @property
    def num_prepared(self) -> int:
        """How many factors `prepared` returns."""
        return len(self.layout.blocks)

    def prepared(self, factors: Sequence[Factor]) -> Sequence[Factor]:
        """Factors in the coordinates of `quad_prepared`: the part of `quad` that no prior changes."""
        return factors

    def quad_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        """`quad` from `prepared` factors."""
        return self.quad(factors, scale, shift)

    def quads_prepared(self, factors: Sequence[Factor], scale: Shift, shifts: Tensor) -> Tensor:
        """`quad_prepared` for every one of R scalar shifts `(R,)`: `(R, B, K, K)`."""
        return torch.stack([self.quad_prepared(factors, scale, shift) for shift in shifts])

    def marginal_prepared(self, factors: Sequence[Factor], scale: Shift, shift: Shift) -> Tensor:
        """`marginal` from `prepared` factors."""
        return self.marginal(factors, scale, shift)

    def marginals_prepared(self, factors: Sequence[Factor], scale: Shift, shifts: Tensor) -> Tensor:
        """`marginal_prepared` for every one of R scalar shifts `(R,)`: `(R, B, K)`."""
        return torch.stack([self.marginal_prepared(factors, scale, shift) for shift in shifts])


@dataclass(frozen=True, eq=False)
class Uniform(Structure):
    """A structure of one kind over all blocks: its name alone says how to fit it."""

    num_passes: ClassVar[int] = 1

    @classmethod
    @abstractmethod
    def empty(cls, layout: Layout, dtype: torch.dtype, device: torch.device) -> Self:
        """Zero curvature, ready for `update`."""

    @classmethod
    def first(cls, layout: Layout, dtype: torch.dtype, device: torch.device, rank: int | None = None) -> Structure:
        """What the first pass over the data fills; another kind where that pass only prepares a second one.

        Structures that are not truncated ignore `rank`.
        """
        del rank
        return cls.empty(layout, dtype, device)

    @classmethod
    def following(cls, fitted: Structure) -> Structure | None:
        """What another pass over the same data fills, given what the last one did; None once the fit is complete."""
        del fitted
        return None


def weighted_curvature(parts: Sequence[Structure], weights: Tensor) -> Structure:
    """sum_c w_c H_c for structures of one kind."""
    if not parts or len(parts) != len(weights):
        raise ArgumentError(f"{len(parts)} structures and {len(weights)} weights were given; they must agree")
    total = parts[0].scaled(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + part.scaled(weight)
    return total


def check_positive(values: Tensor, what: str = "its smallest eigenvalue") -> None:
    """Raise `NumericalError` unless all eigenvalues of scale * H + diag(shift) are positive.

    Only the exact Hessian can have others: at weights that are no minimum, or by the network's own curvature.
    """
    least = values.min()
    if not bool(least > 0):
        raise NumericalError(
            f"scale * H + diag(shift) is not positive definite: {what} is about {float(least):.4g}. Use a larger shift "
            '(prior precision), or kind="ggn", which is positive semi-definite'
        )


def check_noise(noise: Tensor, numel: int) -> None:
    """Raise unless base noise is `(S, P)`."""
    if noise.dim() != 2 or noise.shape[1] != numel:
        raise ArgumentError(f"base noise of shape {tuple(noise.shape)} was given; expected (samples, {numel})")
