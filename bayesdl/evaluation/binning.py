"""Bins on [0, 1] and the calibration errors that are functions of three sums a bin.

Equal-width bins are [k/n, (k+1)/n), the last one closed; a value within a tolerance of an edge lies on that edge, so
float32 and float64 of one number share a bin. Equal-mass bins go by mid-rank in integers, so tied scores share a bin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.evaluation.validation import wide
from bayesdl.evaluation.weighting import rows

EDGE_TOLERANCE = 1e-6
# Examples handled at once when a dense (examples, bins) indicator is multiplied with weights.
CHUNK = 1 << 15


@final
@dataclass(frozen=True)
class BinSums:
    """Sums a bin, each (R, n) float64: weight, weighted confidence, weighted hits."""

    count: Tensor
    confidence: Tensor
    hits: Tensor

    @property
    def gap(self) -> Tensor:
        """|mean confidence - accuracy| a bin, 0 in empty bins."""
        return (
            (self.confidence - self.hits).abs()
            / self.count.clamp_min(torch.finfo(torch.float64).tiny)
            * (self.count > 0)
        )

    def ece(self) -> Tensor:
        """(R,), sum_b (n_b / N) gap_b."""
        return (self.confidence - self.hits).abs().sum(-1) / self.count.sum(-1)

    def mce(self) -> Tensor:
        """(R,), the largest gap of a non-empty bin."""
        return self.gap.amax(-1)

    def l2(self) -> Tensor:
        """(R,), sqrt(sum_b (n_b / N) gap_b^2)."""
        return ((self.count * self.gap.square()).sum(-1) / self.count.sum(-1)).sqrt()

    def unweighted(self) -> Tensor:
        """(R,), mean gap over non-empty bins."""
        return self.gap.sum(-1) / (self.count > 0).sum(-1)


STATISTICS = {"ece": BinSums.ece, "mce": BinSums.mce, "l2": BinSums.l2, "unweighted": BinSums.unweighted}


def equal_width(values: Tensor, bins: int) -> Tensor:
    """(N,) bin index int64 of values in [0, 1]."""
    scaled = wide(values) * bins
    nearest = scaled.round()
    on_edge = (scaled - nearest).abs() <= bins * EDGE_TOLERANCE
    return torch.where(on_edge, nearest, scaled.floor()).clamp_(0, bins - 1).to(torch.int64)


def equal_mass(values: Tensor, bins: int, weights: Tensor | None = None) -> Tensor:
    """Bin index (N,), or (R, N) for weights (R, N): floor(n (2 L + c) / (2 N)), L below the value, c tied with it."""
    order, group, ends = tie_groups(values)
    table = rows(weights, len(values), values.device)
    upto = table[:, order].cumsum(1)[:, ends]
    below = torch.cat([upto.new_zeros(len(upto), 1), upto[:, :-1]], 1)
    # 2 L + c = mass below + mass up to; for integer weights all operands are exact in float64.
    whole = (2 * upto[:, -1:]).clamp_min(torch.finfo(torch.float64).tiny)  # a resample may leave no weight at all
    index = torch.div(bins * (below + upto), whole, rounding_mode="floor").clamp_(0, bins - 1).to(torch.int64)
    by_example = torch.empty_like(order)
    by_example[order] = group
    index = index[:, by_example]
    return index if weights is not None and weights.dim() == 2 else index[0]


def tie_groups(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending order (N,), the tie group of each sorted place (N,), the last place of each group (G,)."""
    ordered, order = values.sort(stable=True)
    last = torch.ones(len(values), dtype=torch.bool, device=values.device)
    last[:-1] = ordered[1:] != ordered[:-1]
    group = torch.cat([last.new_zeros(1, dtype=torch.int64), last.cumsum(0)[:-1]])
    return order, group, last.nonzero()[:, 0]


def bin_totals(index: Tensor, columns: Tensor, bins: int, weights: Tensor | None) -> Tensor:
    """Sums (R, k, n) float64 of k columns (k, N) by bin; `index` (N,), or (R, N) with weights (R, N)."""
    columns = wide(columns)
    if weights is None:
        return torch.stack([torch.bincount(index, column, bins) for column in columns])[None]
    table = rows(weights, columns.shape[1], columns.device)
    if index.dim() == 2:
        moved = [table.new_zeros(len(table), bins).scatter_add_(1, index, table * column) for column in columns]
        return torch.stack(moved, 1)
    result = table.new_zeros(len(table), len(columns) * bins)
    for start in range(0, columns.shape[1], CHUNK):
        part = columns[:, start : start + CHUNK]
        place = index[start : start + CHUNK].expand(len(columns), -1)[..., None]
        indicator = part.new_zeros(*part.shape, bins).scatter_(2, place, part[..., None])
        result += table[:, start : start + CHUNK] @ indicator.transpose(0, 1).reshape(part.shape[1], -1)
    return result.reshape(len(table), len(columns), bins)


def indicator(confidence: Tensor, hits: Tensor, bins: int) -> Tensor:
    """(N, 3 n) float64, whose weighted sums over examples are count, confidence and hits of every equal-width bin."""
    confidence = wide(confidence)
    place = equal_width(confidence, bins)[:, None]
    columns = torch.stack([torch.ones_like(confidence), confidence, wide(hits)], 1)
    table = confidence.new_zeros(len(confidence), 3, bins)
    return table.scatter_(2, place[:, None].expand(-1, 3, 1), columns[..., None]).flatten(1)


def bin_sums(
    confidence: Tensor, hits: Tensor, bins: int, *, mass: bool = False, weights: Tensor | None = None
) -> BinSums:
    """`BinSums` of confidences (N,) in [0, 1] and hits (N,) in {0, 1}; equal-mass bins move with the weights."""
    confidence = wide(confidence)
    index = equal_mass(confidence, bins, weights) if mass else equal_width(confidence, bins)
    columns = torch.stack([torch.ones_like(confidence), confidence, wide(hits)])
    count, conf, hit = bin_totals(index, columns, bins, weights).unbind(1)
    return BinSums(count, conf, hit)


def redrawn_sums(confidence: Tensor, hits: Tensor, bins: int, *, mass: bool = False) -> BinSums:
    """`BinSums` of R sets of redrawn hits (R, N) for the same confidences: the law under perfect calibration."""
    confidence = wide(confidence)
    index = equal_mass(confidence, bins) if mass else equal_width(confidence, bins)
    fixed = bin_totals(index, torch.stack([torch.ones_like(confidence), confidence]), bins, None)
    hit = bin_totals(index, torch.ones_like(confidence)[None], bins, wide(hits))[:, 0]
    return BinSums(fixed[:, 0].expand_as(hit), fixed[:, 1].expand_as(hit), hit)
