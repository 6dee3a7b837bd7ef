"""Layer factors: the rows of J^T V of one block, kept as (input, cotangent) pairs and never multiplied out.

For a layer with input a and back-propagated cotangents g the block of J^T v is sum_t g_t a_t^T, the sum running
over positions (one for a plain linear layer). Six questions are all that anybody asks:

- `square()`: sum of the squared entries over examples and cotangents (diagonal curvature);
- `moments()`: second moments of inputs and cotangents (Kronecker factors);
- `rotate(u_in, u_out)`: the same factor in other coordinates;
- `quad(weight)`: J diag(weight) J^T for every example (predictive covariance), `marginal` its diagonal, `quads` and
  `marginals` for many weights;
- `dot(matrix)`: J times a direction;
- `jacobian()`: the rows themselves, for blocks small enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# scalars of per-example block gradients held at once: 8 MiB in float32 stay in the caches, and below the size from
# which the C library asks the system for fresh pages at every call; a GPU wants larger pieces
CHUNK = 1 << 21
DEVICE_CHUNK = 1 << 25


@dataclass(frozen=True)
class LinearFactor:
    """J^T V = sum_t g_t a_t^T for G groups, turned by bases that are applied once the sum is formed.

    Attributes:
        a: inputs `(G, B, T, in)`.
        g: cotangents `(G, K, B, T, out)`.
        u_in, u_out: orthonormal `(G, in, in)` and `(G, out, out)`: the block is U_out^T (sum_t g_t a_t^T) U_in.
            None stands for the identity.
        lengths: positions of each group where they differ (attention over another sequence); the rest are zeros.
        again: whether these are further cotangents of examples whose inputs were counted with the first ones.
        unit: the cotangents are the outputs themselves, V = I, and never formed: `g` is a row of ones that stands for
            them. For questions about single outputs (`marginal`, `marginals`, `dot`) at one position.
    """

    a: Tensor
    g: Tensor
    u_in: Tensor | None = None
    u_out: Tensor | None = None
    lengths: tuple[int, ...] = ()
    again: bool = False
    unit: bool = False

    @property
    def positions(self) -> int:
        """T."""
        return int(self.a.shape[2])

    @property
    def shared(self) -> bool:
        """Whether all examples have the same cotangents, held once: the outputs themselves, at the last layer."""
        return self.positions == 1 and self.g.shape[2] > 1 and self.g.stride(2) == 0

    def square(self) -> Tensor:
        """sum over b, k of the squared block gradients, `(G, out, in)`."""
        if self.positions == 1:
            return self.g.squeeze(3).square().sum(1).mT @ self.a.squeeze(2).square()
        total = self.a.new_zeros(self.a.shape[0], self.g.shape[-1], self.a.shape[-1])
        for part in self._gradients():
            total += part.square_().sum((1, 2))
        return total

    def moments(self) -> tuple[Tensor, Tensor, int]:
        """`(G, in, in)` sum of a a^T, `(G, out, out)` sum of g g^T over all positions, and the number of rows B T.

        The first is a zero `(G, 1, 1)` for further cotangents of inputs that were counted.
        Groups of fewer positions count as if repeated up to T, so that the first divided by B T is their own mean.
        """
        outer = second_moment(self.g.transpose(1, 2).flatten(1, 2))
        if self.again:
            return self.a.new_zeros(len(self.a), 1, 1), outer, 0
        count = int(self.a.shape[1] * self.a.shape[2])
        inner = second_moment(self.a)
        if self.lengths:
            inner = inner * inner.new_tensor([self.positions / max(1, n) for n in self.lengths])[:, None, None]
        return inner, outer, count

    def rotate(self, u_in: Tensor | None, u_out: Tensor) -> LinearFactor:
        """a U_in and g U_out; `u_in` `(G, in, in)` (None: identity), `u_out` `(G, out, out)`.

        Before or after the sum over positions, whichever multiplies less: T vectors a against K out rows, and K T
        vectors g against K in columns.
        """
        positions, (count, out), columns = self.positions, (self.g.shape[1], self.g.shape[-1]), self.a.shape[-1]
        a, g, after_in, after_out = self.a, self.g[:, :, :1] if self.shared else self.g, None, None
        if u_in is not None and (positions == 1 or positions < count * out):
            a = _turned(a, u_in)
        else:
            after_in = u_in
        if self.shared and _is_identity(g[:, :, 0, 0]):
            g = u_out[:, :, None, None]
        elif positions == 1 or positions < columns:
            g = _turned(g.transpose(1, 2).flatten(1, 2), u_out).unflatten(1, (-1, count)).transpose(1, 2)
        else:
            after_out = u_out
        return LinearFactor(a, g.expand(self.g.shape), after_in, after_out, self.lengths)

    def quad(self, weight: Tensor) -> Tensor:
        """J diag(weight) J^T, `(B, K, K)`, for weights `(G, out, in)`."""
        if self.positions == 1:
            spread = self.a.squeeze(2).square() @ weight.mT  # (G, B, out)
            g = self.g.squeeze(3)
            return torch.einsum("gkbo,gbo,glbo->bkl", g, spread, g) if len(g) > 1 else _one_group(g[0], spread[0])
        root = weight.sqrt()[:, None, None]
        parts = []
        for part in self._gradients():  # (G, b, K, out, in)
            # in place unless a gradient towards the weight is wanted
            rows = _rows(part * root if root.requires_grad else part.mul_(root))
            parts.append(rows @ rows.mT)
        return torch.cat(parts)

    def quads(self, values: Tensor, shifts: Tensor) -> Tensor:
        """`quad(1 / (values + shift))` for every one of R shifts, `(R, B, K, K)`; each gradient is formed once.

        Products of the rows of every pair of cotangents meet all R weights in one matrix product.
        """
        if self.positions == 1:
            square = self.a.squeeze(2).square()
            spread = torch.stack([square @ (1.0 / (values + s)).mT for s in shifts], -1)  # (G, B, out, R)
            g = self.g[:, :, :1] if self.shared else self.g
            pairs = _pairs(g.squeeze(3).transpose(1, 2))  # (G, B, pairs, out)
            return _unpaired((pairs @ spread).sum(0), self.g.shape[1])
        weights = torch.stack([1.0 / (values + s).flatten() for s in shifts], -1)  # (G out in, R)
        step = max(1, 2 * CHUNK // max(1, self.g.shape[1] ** 2 * len(weights)))
        parts = []
        for part in self._gradients():
            parts += [_pairs(rows) @ weights for rows in _rows(part).split(step)]
        return _unpaired(torch.cat(parts), self.g.shape[1])

    def marginal(self, weight: Tensor) -> Tensor:
        """The diagonal of `quad`, `(B, K)`."""
        if self.positions == 1:
            spread = self.a.squeeze(2).square() @ weight.mT
            if self.unit:
                return spread.sum(0)
            if self.shared:
                return (spread @ self.g[:, :, 0, 0].square().mT).sum(0)
            return torch.einsum("gkbo,gbo->bk", self.g.squeeze(3).square(), spread)
        return torch.cat([torch.einsum("gbkoi,goi->bk", part.square(), weight) for part in self._gradients()])

    def marginals(self, values: Tensor, shifts: Tensor) -> Tensor:
        """`marginal(1 / (values + shift))` for every one of R shifts, `(R, B, K)`; each gradient is formed once."""
        if self.positions == 1:
            square = self.a.squeeze(2).square()
            spread = torch.stack([square @ (1.0 / (values + s)).mT for s in shifts])  # (R, G, B, out)
            if self.unit:
                return spread.sum(1)
            if self.shared:
                return (spread @ self.g[:, :, 0, 0].square().mT).sum(1)
            rows = self.g.squeeze(3).square().permute(0, 2, 1, 3)  # (G, B, K, out)
            return (rows @ spread.permute(1, 2, 3, 0)).sum(0).permute(2, 0, 1)
        weights = torch.stack([1.0 / (values + s).flatten() for s in shifts], -1)  # (G out in, R)
        return torch.cat([_rows(part).square_() @ weights for part in self._gradients()]).permute(2, 0, 1)

    def dot(self, matrix: Tensor) -> Tensor:
        """J vec(matrix), `(B, K)`, for a block direction `(G, out, in)`."""
        matrix = matrix if self.u_in is None else matrix @ self.u_in.mT
        matrix = matrix if self.u_out is None else self.u_out @ matrix
        moved = (self.a.flatten(1, 2) @ matrix.mT).view(*self.a.shape[:3], -1)
        if self.unit:
            return moved.sum((0, 2))
        return torch.einsum("gkbto,gbto->bk", self.g, moved)

    def jacobian(self) -> Tensor:
        """The block's rows `(B, K, G out in)`."""
        return torch.cat([_rows(part) for part in self._gradients()])

    def _gradients(self) -> Iterator[Tensor]:
        """Per-example block gradients `(G, b, K, out, in)`, a few examples at a time."""
        groups, count, batch, _, out = self.g.shape
        columns = self.a.shape[-1]
        limit = CHUNK if self.g.device.type == "cpu" else DEVICE_CHUNK
        step = max(1, min(batch, limit // max(1, groups * count * out * columns)))
        for start in range(0, batch, step):
            a = self.a[:, start : start + step]
            g = self.g[:, :, start : start + step].permute(0, 2, 1, 4, 3)  # (G, b, K, out, T)
            part = g.flatten(2, 3) @ a  # (G, b, K out, in)
            if self.u_in is not None:
                part = (part.flatten(1, 2) @ self.u_in).view(part.shape)
            part = part.unflatten(2, (count, out))
            yield part if self.u_out is None else self.u_out.mT[:, None, None] @ part


def second_moment(rows: Tensor) -> Tensor:
    """sum over B and T of r r^T, `(G, D, D)`, for rows `(G, B, T, D)`; sums of positions in memory are not moved."""
    groups, batch, positions, width = rows.shape
    if positions == 1 or rows.stride(-1) == 1:
        flat = rows.flatten(1, 2)
        return flat.mT @ flat
    if width <= positions:  # the products of all examples take no more memory than the rows
        flat = rows.flatten(0, 1)
        return (flat.mT @ flat).view(groups, batch, width, width).sum(1)
    if groups == 1:
        return torch.addbmm(rows.new_zeros(width, width), rows[0].mT, rows[0]).unsqueeze(0)
    flat = rows.flatten(1, 2)
    return flat.mT @ flat


def _turned(rows: Tensor, basis: Tensor) -> Tensor:
    """`(G, B, T, D)` times `(G, D, D)`, in the memory layout that the rows have."""
    if rows.shape[2] > 1 and rows.stride(-1) != 1:
        return (basis.mT.unsqueeze(1) @ rows.mT).mT
    return (rows.flatten(1, 2) @ basis).view(rows.shape)


def _is_identity(matrices: Tensor) -> bool:
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return matrices.shape[-2] == matrices.shape[-1] and bool((matrices == eye).all())


def _rows(part: Tensor) -> Tensor:
    """`(G, b, K, out, in)` -> `(b, K, G out in)`; a view for one group."""
    return part[0].flatten(2) if len(part) == 1 else part.permute(1, 2, 0, 3, 4).flatten(2)


def _pairs(rows: Tensor) -> Tensor:
    """Products of every two of K rows `(..., K, P)`, k <= l: `(..., K (K + 1) / 2, P)`."""
    count, start = rows.shape[-2], 0
    out = rows.new_empty(*rows.shape[:-2], count * (count + 1) // 2, rows.shape[-1])
    for k in range(count):  # each product is written once, where it belongs
        torch.mul(rows[..., k : k + 1, :], rows[..., k:, :], out=out[..., start : start + count - k, :])
        start += count - k
    return out


def _unpaired(values: Tensor, count: int) -> Tensor:
    """`(B, K (K + 1) / 2, R)` in the order of `_pairs` -> symmetric `(R, B, K, K)`."""
    first, second = torch.triu_indices(count, count, device=values.device)
    where = torch.empty(count, count, dtype=torch.long, device=values.device)
    order = torch.arange(len(first), device=values.device)
    where[first, second] = order
    where[second, first] = order
    return values.permute(2, 0, 1)[..., where.flatten()].unflatten(-1, (count, count))


@dataclass(frozen=True)
class RowFactor:
    """An embedding: the input is a row index, so J^T V touches few of the V rows.

    Attributes:
        index: `(B, T)` rows looked up; entries of -1 (padding) carry no gradient.
        g: cotangents `(1, K, B, T, D)`.
        size: number of rows V.
        again: whether these are further cotangents of examples whose rows were counted with the first ones.
    """

    index: Tensor
    g: Tensor
    size: int
    again: bool = False

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
        g, used = self.g.flatten(1, 3), (self.index >= 0) & (not self.again)
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

    def quads(self, values: Tensor, shifts: Tensor) -> Tensor:
        """`quad(1 / (values + shift))` for every one of R shifts, `(R, B, K, K)`."""
        return torch.stack([self.quad(1.0 / (values + s)) for s in shifts])

    def marginal(self, weight: Tensor) -> Tensor:
        """The diagonal of `quad`, `(B, K)`."""
        return torch.einsum("kbtd,btd->bk", self._merged.square(), weight[0].T[self._safe])

    def marginals(self, values: Tensor, shifts: Tensor) -> Tensor:
        """`marginal(1 / (values + shift))` for every one of R shifts, `(R, B, K)`."""
        return torch.stack([self.marginal(1.0 / (values + s)) for s in shifts])

    def dot(self, matrix: Tensor) -> Tensor:
        """J vec(matrix), `(B, K)`, for a block direction `(1, D, V)`."""
        return torch.einsum("kbtd,btd->bk", self.g[0], matrix[0].T[self._safe])

    def pull(self, vectors: Tensor) -> Tensor:
        """The transpose of `dot`: J^T u for vectors `(q, B, K)`, `(q, 1, D, V)`."""
        moved = torch.einsum("qbk,kbtd->btqd", vectors, self.g[0])
        rows = moved.new_zeros(self.size, *moved.shape[2:]).index_add_(0, self._safe.flatten(), moved.flatten(0, 1))
        return rows.permute(1, 2, 0).unsqueeze(1)

    def jacobian(self) -> Tensor:
        """The block's rows `(B, K, D V)`."""
        _, count, batch, positions, width = self.g.shape
        dense = self.g.new_zeros(batch, count, self.size, width)
        where = self._safe[:, None, :, None].expand(batch, count, positions, width)
        dense.scatter_add_(2, where, self.g[0].transpose(0, 1))
        return dense.mT.flatten(2)


Factor = LinearFactor | RowFactor


def add_quads(factors: Sequence[Factor], values: Sequence[Tensor], shifts: Tensor) -> Tensor:
    """sum over blocks of J diag(1 / (values + shift)) J^T for R shifts, `(R, B, K, K)`."""
    first, *rest = zip(factors, values, strict=True)
    total = first[0].quads(first[1], shifts.to(first[1]))
    for factor, value in rest:
        total += factor.quads(value, shifts.to(value))
    return total


def add_marginals(factors: Sequence[Factor], values: Sequence[Tensor], shifts: Tensor) -> Tensor:
    """The diagonals of `add_quads`, `(R, B, K)`."""
    first, *rest = zip(factors, values, strict=True)
    total = first[0].marginals(first[1], shifts.to(first[1]))
    for factor, value in rest:
        total += factor.marginals(value, shifts.to(value))
    return total


def dense_factor(rows: Tensor) -> LinearFactor:
    """A small dense Jacobian `(K, B, P)` as a factor: P outputs of the constant input one."""
    return LinearFactor(rows.new_ones(1, rows.shape[1], 1, 1), rows[None, :, :, None, :])


def _one_group(g: Tensor, spread: Tensor) -> Tensor:
    rows = g.transpose(0, 1)  # (B, K, out)
    return (rows * spread.unsqueeze(1)) @ rows.mT
