"""Selective prediction: the risk that remains when the least confident examples are refused.

Examples are taken in order of falling confidence; inside a group of tied confidences the expectation over random order
is taken, so no curve depends on the order of the input. All risks are empirical: they guarantee nothing about new data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.evaluation import sorted_sets, validation, weighting
from bayesdl.evaluation.binning import tie_groups
from bayesdl.evaluation.ranking import shifted

ROUNDING = 1e-9


@final
@dataclass(frozen=True)
class Accepted:
    """Weight and summed loss of everything at or above each distinct confidence, descending, both (R, G) float64."""

    mass: Tensor
    loss: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Before each tie group: mass M, loss S; of each group: mass m, mean loss l."""
        before, lost = shifted(self.mass), shifted(self.loss)
        mass = self.mass - before
        level = (self.loss - lost) / mass.clamp_min(torch.finfo(torch.float64).tiny)
        return before, lost, mass, level

    def aurc(self) -> Tensor:
        """(R,), mean over i of R_i; inside a group R_i = (S + j l) / (M + j), summed with harmonic numbers."""
        before, lost, mass, level = self.parts()
        tails = mass * level + (lost - before * level) * _harmonic_steps(self.mass)
        return tails.sum(1) / self.mass[:, -1]

    def augrc(self) -> Tensor:
        """(R,), mean over i of (i / N) R_i."""
        _, lost, mass, level = self.parts()
        return (mass * lost + level * mass * (mass + 1) / 2).sum(1) / self.mass[:, -1].square()

    def at_coverage(self, coverage: float) -> Tensor:
        """(R,), R_i at i = ceil(coverage N)."""
        whole = self.mass[:, -1:]
        count = torch.minimum((coverage * whole - ROUNDING).ceil().clamp_min(1.0), whole)
        before, lost, _, level = self.parts()
        place = torch.searchsorted(self.mass.contiguous(), (count - ROUNDING).contiguous()).clamp_max(
            self.mass.shape[1] - 1
        )
        inside = count - before.gather(1, place)
        return ((lost.gather(1, place) + inside * level.gather(1, place)) / count)[:, 0]

    def at_risk(self, risk: float) -> Tensor:
        """(R,), largest coverage at the end of a tie group whose risk is at most `risk`; 0 if none."""
        fine = (self.loss <= risk * self.mass + ROUNDING) & (self.mass > 0)
        return (self.mass * fine).amax(1) / self.mass[:, -1]


@final
@dataclass(frozen=True)
class RiskCoverage:
    """Risk of the most confident share of the examples: `coverage` and `risk` (G,), one point a distinct confidence."""

    coverage: Tensor
    risk: Tensor
    threshold: Tensor


def accepted(confidence: Tensor, loss: Tensor, weights: Tensor | None) -> Accepted:
    """`Accepted` of confidences (N,) and losses (N,) under validated weights."""
    order, _, ends = tie_groups(-validation.wide(confidence))
    table = weighting.rows(weights, len(confidence), confidence.device)[:, order]
    lost = (table * validation.wide(loss)[order]).cumsum(1)[:, ends]
    return Accepted(table.cumsum(1)[:, ends], lost)


def aurc(confidence: Any, loss: Any, *, weights: Any = None) -> float | Tensor:
    """Area under the risk-coverage curve, mean_i R_i (Geifman and El-Yaniv 2017).

    Args:
        confidence: (N,) finite, higher is more certain. loss: (N,) finite, 0/1 errors or any bounded loss.
        weights: (N,), or (R, N) for R resamples, which gives (R,).

    Raises:
        ShapeError, NonFiniteError, ArgumentError: bad input.
    """
    values, weights = _checked(confidence, loss, weights)
    if weights is None:
        return _plain_aurc(*values)
    return weighting.finish(accepted(*values, weights).aurc(), weights)


def eaurc(confidence: Any, loss: Any, *, weights: Any = None) -> float | Tensor:
    """Excess of `aurc` over that of the best order of the same losses (the discrete optimum), at least 0."""
    (confidence, loss), weights = _checked(confidence, loss, weights)
    excess = accepted(confidence, loss, weights).aurc() - accepted(-validation.wide(loss), loss, weights).aurc()
    return weighting.finish(excess.clamp_min(0.0), weights)


def augrc(confidence: Any, loss: Any, *, weights: Any = None) -> float | Tensor:
    """Area under the generalised risk-coverage curve, mean_i (i/N) R_i (Traub et al. 2024)."""
    values, weights = _checked(confidence, loss, weights)
    return weighting.finish(accepted(*values, weights).augrc(), weights)


def risk_at_coverage(confidence: Any, loss: Any, *, coverage: float, weights: Any = None) -> float | Tensor:
    """Mean loss of the ceil(coverage N) most confident examples; empirical, no guarantee."""
    coverage = validation.fraction(coverage, "coverage", closed=True)
    values, weights = _checked(confidence, loss, weights)
    return weighting.finish(accepted(*values, weights).at_coverage(coverage), weights)


def coverage_at_risk(confidence: Any, loss: Any, *, risk: float, weights: Any = None) -> float | Tensor:
    """Largest coverage, at a distinct confidence, whose mean loss is at most `risk`; 0 if none; no guarantee."""
    values, weights = _checked(confidence, loss, weights)
    return weighting.finish(accepted(*values, weights).at_risk(float(risk)), weights)


def risk_coverage(confidence: Any, loss: Any, *, weights: Any = None) -> RiskCoverage:
    """The curve itself, at the distinct confidences; `weights` (N,) at most."""
    (confidence, loss), weights = _checked(confidence, loss, weights)
    order, _, ends = tie_groups(-validation.wide(confidence))
    table = accepted(confidence, loss, weights)
    held = table.mass[0] > 0
    mass, lost, level = table.mass[0][held], table.loss[0][held], validation.wide(confidence)[order][ends][held]
    return RiskCoverage(mass / mass[-1], lost / mass, level)


def _plain_aurc(confidence: Tensor, loss: Tensor) -> float:
    """`aurc` without weights."""
    wrong = loss == 1
    if bool((wrong | (loss == 0)).all()):
        return _aurc_of_errors(confidence, wrong)
    return _aurc_of_losses(confidence, loss)


def _aurc_of_errors(confidence: Tensor, wrong: Tensor) -> float:
    """`aurc` of 0/1 losses: an error at place r is among the first i for every i >= r, which adds H_N - H_{r-1}.

    Ties: r is any place of the tie group with equal chance. Of all examples these numbers sum to N, so that the rarer
    of errors and hits tells.
    """
    order = -confidence if confidence.is_floating_point() else -validation.wide(confidence)
    few, many = sorted_sets.ascending(order[wrong]), sorted_sets.ascending(order[~wrong])
    swapped = len(few) > len(many)
    few, many = (many, few) if swapped else (few, many)
    if not len(few):
        return float(swapped)
    (below, upto), (own_below, own_upto) = sorted_sets.places(few, many), sorted_sets.places(few, few)
    start = below + own_below
    total = sorted_sets.mean_harmonic(start, upto + own_upto - start).neg_()
    total += sorted_sets.harmonic(torch.tensor(len(confidence), device=total.device))
    mean = float(total.sum()) / len(confidence)
    return 1 - mean if swapped else mean


def _aurc_of_losses(confidence: Tensor, loss: Tensor) -> float:
    """`aurc` of any losses, at little more than the cost of the sort: running means, put right inside tie groups."""
    ordered, order = (-confidence if confidence.is_floating_point() else -validation.wide(confidence)).sort()
    # Gathered as they are and widened afterwards, which moves a quarter of the memory or less.
    summed = validation.wide(loss[order]).cumsum(0)
    total = (summed / torch.arange(1, len(summed) + 1, dtype=summed.dtype, device=summed.device)).sum()
    last = torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)])
    if not bool(last.all()):
        inside, ends = (~last).nonzero()[:, 0], last.nonzero()[:, 0]
        group = last.cumsum(0)[inside]
        start = torch.where(group > 0, ends[group - 1] + 1, 0)
        before = torch.where(start > 0, summed[start - 1], 0.0)
        # Under random order the expected sum grows evenly from one end of a tie group to the other.
        share = (inside - start + 1).to(summed) / (ends[group] - start + 1)
        even = before + share * (summed[ends[group]] - before)
        total = total + ((even - summed[inside]) / (inside + 1)).sum()
    return float(total) / len(summed)


def _checked(confidence: Any, loss: Any, weights: Any) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    confidence = validation.vector(confidence, "confidence")
    loss = validation.vector(loss, "loss", length=len(confidence)).to(confidence.device)
    return (confidence, loss), validation.example_weights(weights, len(confidence))


def _harmonic_steps(mass: Tensor) -> Tensor:
    # sum_{j=1}^{m} 1 / (M + j) for every tie group; for whole numbers from a table, else through its smooth extension.
    whole = int(mass[:, -1].max().ceil())
    if whole <= 4 * mass.numel() + 1024 and bool((mass == mass.round()).all()):
        steps = torch.arange(1, whole + 1, dtype=mass.dtype, device=mass.device).reciprocal()
        table = torch.cat([steps.new_zeros(1), steps.cumsum(0)])[mass.to(torch.int64)]
        result = table - shifted(table)
    else:
        table = torch.digamma(mass + 1)
        result = table - torch.cat([torch.digamma(mass.new_ones(len(mass), 1)), table[:, :-1]], 1)
    # One example a group is the common case, and there the quotient is exact where a difference of sums is not.
    size = mass - shifted(mass)
    return torch.where(size == 1, mass.reciprocal(), result)
