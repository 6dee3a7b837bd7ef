"""What a Brier score is made of: reliability, resolution and uncertainty, as identities that hold exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError
from bayesdl.evaluation import binning, isotonic, validation
from bayesdl.evaluation.classification import Forecast

Groups = Literal["value", "bins", "isotonic"]


@final
@dataclass(frozen=True)
class BrierTerms:
    """brier = reliability - resolution + uncertainty + within_variance - within_covariance, summed over the events.

    Attributes:
        reliability: squared distance of forecasts and frequencies (small is calibrated); "isotonic": miscalibration.
        resolution: squared distance of frequencies and base rate (large is informative); "isotonic": discrimination.
        uncertainty: base rate (1 - base rate), the score of always forecasting the base rate.
        within_variance, within_covariance: what bins hide (Stephenson et al. 2008); 0 but for "bins".
    """

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within_variance: float = 0.0
    within_covariance: float = 0.0


def brier_decomposition(
    targets: Any, *, probs: Any = None, logits: Any = None, groups: Groups = "value", bins: int = 15
) -> BrierTerms:
    """Murphy's (1973) decomposition; one event for `probs` (N,), one against the rest summed over classes for (N, C).

    Args:
        groups: "value": distinct forecast values, exact. "bins": `bins` equal-width bins, with the terms within them.
            "isotonic": forecasts recalibrated by isotonic regression (Dimitriadis et al. 2021); no choice of bins.
    """
    if groups not in ("value", "bins", "isotonic"):
        raise ArgumentError(f"groups={groups!r}: expected 'value', 'bins' or 'isotonic'")
    forecast = Forecast.read(targets, probs, logits)
    classes = [1] if forecast.column else list(range(forecast.probs.shape[1]))
    parts = [
        _terms(forecast.probs[:, c], (forecast.targets == c).double(), groups, validation.bin_count(bins))
        for c in classes
    ]
    return BrierTerms(*(sum(column) for column in zip(*parts, strict=True)))


def _terms(p: Tensor, o: Tensor, groups: Groups, bins: int) -> tuple[float, ...]:
    score, base = (p - o).square().mean(), o.mean()
    uncertainty = base * (1 - base)
    if groups == "isotonic":
        knots, fitted = isotonic.fit(p, o)
        best = (fitted[torch.searchsorted(knots, p.contiguous())] - o).square().mean()
        return tuple(float(v) for v in (score, score - best, uncertainty - best, uncertainty, 0.0, 0.0))
    if groups == "value":
        order, group, _ = binning.tie_groups(p)
        index = torch.empty_like(group)
        index[order] = group
    else:
        index = binning.equal_width(p, bins)
    count, forecast, rate = (torch.bincount(index, column) for column in (torch.ones_like(p), p, o))
    forecast, rate = forecast / count.clamp_min(1), rate / count.clamp_min(1)
    share = count / len(p)
    reliability = (share * (forecast - rate).square()).sum()
    resolution = (share * (rate - base).square()).sum()
    off = p - forecast[index] if groups == "bins" else torch.zeros_like(p)
    variance, covariance = off.square().mean(), 2 * (off * (o - rate[index])).mean()
    return tuple(float(v) for v in (score, reliability, resolution, uncertainty, variance, covariance))
