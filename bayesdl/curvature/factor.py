"""Layer factors: the rows of J^T V of one block, kept as (input, cotangent) pairs and never multiplied out.

For a layer with input a and back-propagated cotangents g the block of J^T v is sum_t g_t a_t^T, the sum running
over positions (one for a plain linear layer). Six questions are all that anybody asks:

- `square()`: sum of the squared entries over examples and cotangents (diagonal curvature);
- `moments()`: second moments of inputs and cotangents (Kronecker factors);
- `rotate(u_in, u_out)`: the same factor in other coordinates;
- `quad(weight)`: J diag(weight) J^T for every example (predictive covariance);
- `dot(matrix)`: J times a direction;
- `jacobian()`: the rows themselves, for blocks small enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# scalars of per-example block gradients held at once: about 64 MiB in float32, which also stays near the caches
CHUNK = 1 << 24


@dataclass(frozen=True)
class LinearFactor:
    """J^T V = sum_t g_t a_t^T for G groups.

    Attributes:
        a: inputs `(G, B, T, in)`.
        g: cotangents `(G, K, B, T, out)`.
    """

    a: Tensor
    g: Tensor

    @property
    def positions(self) -> int:
        """T."""
        return int(self.a.shape[2])

    def square(self) -> Tensor:
        """sum over b, k of the squared block gradients, `(G, out, in)`."""
        if self.positions == 1:
            return self.g.squeeze(3).square().sum(1).mT @ self.a.squeeze(2).square()
        total = self.a.new_zeros(self.a.shape[0], self.g.shape[-1], self.a.shape[-1])
        for part in self._gradients():
            total += part.square_().sum((1, 2))
        return total

    def moments(self) -> tuple[Tensor, Tensor, int]:
        """`(G, in, in)` sum of a a^T, `(G, out, out)` sum of g g^T over all positions, and the number of rows B T."""
        a, g = self.a.flatten(1, 2), self.g.flatten(1, 3)
        return a.mT @ a, g.mT @ g, int(a.shape[1])

    def rotate(self, u_in: Tensor | None, u_out: Tensor) -> LinearFactor:
        """a U_in and g U_out; `u_in` `(G, in, in)` (None: identity), `u_out` `(G, out, out)`."""
        a = self.a if u_in is None else (self.a.flatten(1, 2) @ u_in).view_as(self.a)
        g = (self.g.reshape(len(self.g), -1, self.g.shape[-1]) @ u_out).view(self.g.shape)
        return LinearFactor(a, g)

    def quad(self, weight: Tensor) -> Tensor:
        """J diag(weight) J^T, `(B, K, K)`, for weights `(G, out, in)`."""
        if self.positions == 1:
            spread = self.a.squeeze(2).square() @ weight.mT  # (G, B, out)
            g = self.g.squeeze(3)
            return torch.einsum("gkbo,gbo,glbo->bkl", g, spread, g) if len(g) > 1 else _one_group(g[0], spread[0])
        root = weight.sqrt()
        parts = []
        for part in self._gradients():  # (G, b, K, out, in)
            rows = (part * root[:, None, None]).permute(1, 2, 0, 3, 4).flatten(2)
            parts.append(rows @ rows.mT)
        return torch.cat(parts)

    def marginal(self, weight: Tensor) -> Tensor:
        """The diagonal of `quad`, `(B, K)`."""
        if self.positions == 1:
            spread = self.a.squeeze(2).square() @ weight.mT
            return torch.einsum("gkbo,gbo->bk", self.g.squeeze(3).square(), spread)
        return torch.cat([torch.einsum("gbkoi,goi->bk", part.square(), weight) for part in self._gradients()])

    def dot(self, matrix: Tensor) -> Tensor:
        """J vec(matrix), `(B, K)`, for a block direction `(G, out, in)`."""
        moved = (self.a.flatten(1, 2) @ matrix.mT).view(*self.a.shape[:3], -1)
        return torch.einsum("gkbto,gbto->bk", self.g, moved)

    def jacobian(self) -> Tensor:
        """The block's rows `(B, K, G out in)`."""
        return torch.cat([part.permute(1, 2, 0, 3, 4).flatten(2) for part in self._gradients()])

    def _gradients(self) -> list[Tensor] | _Chunks:
        return _Chunks(self.a, self.g)


class _Chunks:
    """Per-example block gradients `(G, b, K, out, in)`, a few examples at a time."""

    def __init__(self, a: Tensor, g: Tensor) -> None:
        self.a, self.g = a, g
        per_example = g.shape[0] * g.shape[1] * g.shape[-1] * a.shape[-1]
        self.step = max(1, min(a.shape[1], CHUNK // max(1, per_example)))

    def __iter__(self):  # type: ignore[no-untyped-def]
        for start in range(0, self.a.shape[1], self.step):
            a = self.a[:, start : start + self.step]
            g = self.g[:, :, start : start + self.step].permute(0, 2, 1, 4, 3)  # (G, b, K, out, T)
            shape = (*g.shape[:4], a.shape[-1])
            yield (g.flatten(2, 3) @ a).view(shape)


@dataclass(frozen=True)
class RowFactor:
    """An embedding: the input is a row index, so J^T V touches few of the V rows.

    Attributes:
        index: `(B, T)` rows looked up; entries of -1 (padding) carry no gradient.
        g: cotangents `(1, K, B, T, D)`.
        size: number of rows V.
    """

    index: Tensor
    g: Tensor
    size: int

    @cached_property
    def _merged(self) -> Tensor:
        # positions of one example that look up the same row add up before squaring; dividing by the root of
        # their number lets a plain sum over positions count each row once
        same = (self.index.unsqueeze(1) == self.index.unsqueeze(2)).to(self.g)  # (B, T, T)
        total = torch.einsum("bts,kbsd->kbtd", same, self.g[0])
        return total / same.sum(-1).sqrt().unsqueeze(-1)

    @cached_property
    def _safe(self) -> Tensor:
        return self.index.clamp(min=0)

    def square(self) -> Tensor:
        """`(1, D, V)`."""
        squares = self._merged.square().sum(0).flatten(0, 1)  # (B T, D)
        total = squares.new_zeros(self.size, squares.shape[-1])
        return total.index_add_(0, self._safe.flatten(), squares).T.unsqueeze(0)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row counts `(1, V)` (the diagonal of sum a a^T), `(1, D, D)` sum of g g^T, and the number of look-ups.

        Padding meets no row of the table, so it is not counted.
        """
        g, used = self.g.flatten(1, 3), self.index >= 0
        counts = g.new_zeros(self.size).index_add_(0, self._safe.flatten(), used.to(g).flatten())
        return counts.unsqueeze(0), g.mT @ g, used.sum()

    def rotate(self, u_in: Tensor | None, u_out: Tensor) -> RowFactor:
        """g U_out; the input side is diagonal already, so `u_in` is None."""
        del u_in
        return RowFactor(self.index, self.g @ u_out[0], self.size)

    def quad(self, weight: Tensor) -> Tensor:
        """J diag(weight) J^T, `(B, K, K)`, for weights `(1, D, V)`."""
        spread = weight[0].T[self._safe]  # (B, T, D)
        return torch.einsum("kbtd,btd,lbtd->bkl", self._merged, spread, self._merged)

    def marginal(self, weight: Tensor) -> Tensor:
        """The diagonal of `quad`, `(B, K)`."""
        return torch.einsum("kbtd,btd->bk", self._merged.square(), weight[0].T[self._safe])

    def dot(self, matrix: Tensor) -> Tensor:
        """J vec(matrix), `(B, K)`, for a block direction `(1, D, V)`."""
        return torch.einsum("kbtd,btd->bk", self.g[0], matrix[0].T[self._safe])

    def jacobian(self) -> Tensor:
        """The block's rows `(B, K, D V)`."""
        _, count, batch, positions, width = self.g.shape
        dense = self.g.new_zeros(batch, count, self.size, width)
        where = self._safe[:, None, :, None].expand(batch, count, positions, width)
        dense.scatter_add_(2, where, self.g[0].transpose(0, 1))
        return dense.mT.flatten(2)


Factor = LinearFactor | RowFactor


def dense_factor(rows: Tensor) -> LinearFactor:
    """A small dense Jacobian `(K, B, P)` as a factor: P outputs of the constant input one."""
    return LinearFactor(rows.new_ones(1, rows.shape[1], 1, 1), rows[None, :, :, None, :])


def _one_group(g: Tensor, spread: Tensor) -> Tensor:
    rows = g.transpose(0, 1)  # (B, K, out)
    return (rows * spread.unsqueeze(1)) @ rows.mT
