"""Calibration beyond binned ECE: adaptive bins, debiased and smooth errors, kernel errors, tests of calibration.

Arguments and errors are those of `bayesdl.evaluation.classification`; `weights` (N,), or (R, N) for R resamples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayesdl.evaluation import binning, validation, weighting
from bayesdl.evaluation.classification import Forecast

# Points of the grid on [0, 1] on which smoothed residuals live; bandwidths of interest are above 1e-3.
GRID = 4096
# Elements of the largest temporary of the kernel error, and examples behind its median distance.
CHUNK = 1 << 22
MEDIAN_EXAMPLES = 1024


def ace(targets: Any, *, probs: Any = None, logits: Any = None, bins: int = 15, weights: Any = None) -> float | Tensor:
    """Adaptive calibration error: mean gap over all classes and their non-empty equal-mass bins (Nixon et al. 2019)."""
    return tace(targets, probs=probs, logits=logits, bins=bins, threshold=-1.0, weights=weights)


def tace(
    targets: Any,
    *,
    probs: Any = None,
    logits: Any = None,
    bins: int = 15,
    threshold: float = 0.01,
    weights: Any = None,
) -> float | Tensor:
    """`ace` over the probabilities above `threshold` alone.

    Raises:
        UndefinedError: no probability lies above the threshold.
    """
    forecast = Forecast.read(targets, probs, logits)
    return tace_of(forecast.probs, forecast.targets, validation.bin_count(bins), float(threshold), weights)


def tace_of(probs: Tensor, targets: Tensor, bins: int, threshold: float, weights: Any) -> float | Tensor:
    """`tace` of checked probabilities (N, C)."""
    checked = validation.example_weights(weights, len(targets))
    table = None if checked is None else checked.to(probs.device)
    gaps, filled = [], []
    for c in range(probs.shape[1]):
        kept = probs[:, c] > threshold
        if bool(kept.any()):
            part = None if table is None else table[..., kept]
            sums = binning.bin_sums(probs[kept, c], targets[kept] == c, bins, mass=True, weights=part)
            gaps.append(sums.gap.sum(-1))
            filled.append((sums.count > 0).sum(-1))
    if not gaps:
        raise validation.UndefinedError(f"tace: no probability lies above {threshold:g}", "nothing above threshold")
    values = torch.stack(gaps).sum(0) / torch.stack(filled).sum(0)
    return weighting.defined(values, checked, "tace: no weight above the threshold", "nothing above threshold")


def ce2_debiased(
    targets: Any, *, probs: Any = None, logits: Any = None, bins: int = 15, weights: Any = None
) -> float | Tensor:
    """Squared top-label calibration error without the bias of its bins: may be negative, mean 0 when calibrated.

    sum_b (n_b / N) (gap_b^2 - acc_b (1 - acc_b) / (n_b - 1)) over equal-mass bins (Kumar et al. 2019); bins with fewer
    than two examples contribute nothing.
    """
    forecast = Forecast.read(targets, probs, logits)
    return ce2_of(forecast.confidence, forecast.hits, validation.bin_count(bins), weights)


def ce2_of(confidence: Tensor, hits: Tensor, bins: int, weights: Any) -> float | Tensor:
    """`ce2_debiased` of confidences (N,) and hits (N,)."""
    checked = validation.example_weights(weights, len(hits))
    sums = binning.bin_sums(confidence, hits, bins, mass=True, weights=checked)
    rate = sums.hits / sums.count.clamp_min(1.0)
    chance = rate * (1 - rate) / (sums.count - 1).clamp_min(1.0)
    terms = torch.where(sums.count >= 2, sums.count * (sums.gap.square() - chance), 0.0)
    return weighting.finish(terms.sum(-1) / sums.count.sum(-1), checked)


def smece(targets: Any, *, probs: Any = None, logits: Any = None, weights: Any = None) -> float | Tensor:
    """Smooth calibration error of the top label (Blasiok and Nakkiran 2024), which is its own bandwidth.

    The bandwidth s at which the integral over t in [0, 1] of |mean_i (hit_i - conf_i) K_s(t, conf_i)| equals s, with
    the Gaussian kernel reflected at 0 and 1.
    """
    forecast = Forecast.read(targets, probs, logits)
    return smece_of(forecast.confidence, forecast.hits, weights)


def smece_of(confidence: Tensor, hits: Tensor, weights: Any) -> float | Tensor:
    """`smece` of confidences (N,) in [0, 1] and hits (N,)."""
    checked = validation.example_weights(weights, len(hits))
    confidence = validation.wide(confidence)
    residual = validation.wide(hits) - confidence
    table = weighting.rows(checked, len(residual), residual.device)
    place = (confidence * GRID).clamp(0, GRID)
    left = place.floor().clamp_max(GRID - 1).to(torch.int64)
    share = place - left
    mass = table * residual / table.sum(1, keepdim=True)
    nodes = mass.new_zeros(len(mass), GRID + 1)
    nodes.scatter_add_(1, left.expand_as(mass), mass * (1 - share)).scatter_add_(
        1, (left + 1).expand_as(mass), mass * share
    )
    # Reflection at both ends is the even extension to a circle of length 2, on which the kernel is diagonal: frequency
    # k is damped by exp(-(pi k s)^2 / 2). An end node stands for itself and its mirror image.
    nodes[:, 1:-1] /= 2
    spectrum = torch.fft.rfft(torch.cat([nodes, nodes[:, 1:-1].flip(1)], 1)).real
    squares = (torch.pi * torch.arange(GRID + 1, dtype=torch.float64, device=nodes.device)).square() / 2

    def excess(s: Tensor) -> Tensor:
        smooth = torch.fft.irfft((spectrum * torch.exp(-squares * s[:, None].square())).to(torch.complex128), 2 * GRID)
        curve = smooth[:, : GRID + 1].abs()
        return (curve.sum(1) - (curve[:, 0] + curve[:, -1]) / 2) * 2 - s

    low, high = nodes.new_zeros(len(nodes)), nodes.new_ones(len(nodes))
    for _ in range(50):
        middle = (low + high) / 2
        above = excess(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return weighting.finish((low + high) / 2, checked)


def skce(
    targets: Any, *, probs: Any = None, logits: Any = None, bandwidth: float | None = None, weights: Any = None
) -> float | Tensor:
    """Squared kernel calibration error, unbiased over all pairs (Widmann et al. 2019): mean 0 when calibrated.

    Mean over i < j of (e_i - p_i)' (e_j - p_j) exp(-|p_i - p_j| / nu), e the one-hot label; quadratic time, constant
    memory. `bandwidth` is nu; None takes the median distance, of at most 1024 evenly spaced examples.

    Raises:
        UndefinedError: fewer than two examples.
    """
    forecast = Forecast.read(targets, probs, logits)
    return skce_of(forecast.probs, forecast.targets, bandwidth, weights)


def skce_of(probs: Tensor, targets: Tensor, bandwidth: float | None, weights: Any) -> float | Tensor:
    """`skce` of checked probabilities (N, C)."""
    checked = validation.example_weights(weights, len(targets))
    table = weighting.rows(checked, len(targets), probs.device)
    residual = torch.nn.functional.one_hot(targets, probs.shape[1]) - probs
    own = residual.square().sum(1)
    step = max(1, CHUNK // len(probs))
    values = []
    for row in table:
        scale = _median_distance(probs, row) if bandwidth is None else float(bandwidth)
        total = row.new_zeros(())
        for start in range(0, len(probs), step):
            part = slice(start, start + step)
            near = torch.cdist(probs[part], probs, compute_mode="donot_use_mm_for_euclid_dist")
            kernel = torch.ones_like(near) if scale == 0 else torch.exp(-near / scale)
            total = total + row[part] @ ((residual[part] @ residual.T) * kernel) @ row
        size = row.sum()
        # Copies of one example are pairs too; an example and itself is none.
        values.append((total - row @ own) / (size * (size - 1)) if size > 1 else size * torch.nan)
    return weighting.defined(torch.stack(values), checked, "skce compares pairs; one example was given", "1 sample")


def _median_distance(probs: Tensor, weights: Tensor) -> float:
    stride = max(1, math.ceil(len(probs) / MEDIAN_EXAMPLES))
    some, mass = probs[::stride], weights[::stride]
    pairs = mass[:, None] * mass
    pairs = torch.triu(pairs, 1) + torch.diag(mass * (mass - 1).clamp_min(0) / 2)
    values, order = torch.cdist(some, some).flatten().sort()
    upto = pairs.flatten()[order].cumsum(0)
    return float(values[torch.searchsorted(upto, upto[-1:] / 2).clamp_max(len(values) - 1)])


def calibration_p(targets: Any, *, probs: Any = None, logits: Any = None, weights: Any = None) -> float | Tensor:
    """p-value of the hypothesis that the top-label confidences are right, by cumulative differences; no bins.

    The largest |cumulative (hit - conf)| in order of confidence, over sqrt(sum conf (1 - conf)), is the largest value
    of |Brownian motion| on [0, 1] for large N (Arrieta-Ibarra et al. 2022).

    Raises:
        UndefinedError: every confidence is 0 or 1, so that nothing is left to chance.
    """
    forecast = Forecast.read(targets, probs, logits)
    return calibration_p_of(forecast.confidence, forecast.hits, weights)


def calibration_p_of(confidence: Tensor, hits: Tensor, weights: Any) -> float | Tensor:
    """`calibration_p` of confidences (N,) and hits (N,)."""
    checked = validation.example_weights(weights, len(hits))
    confidence = validation.wide(confidence)
    order, _, ends = binning.tie_groups(confidence)
    table = weighting.rows(checked, len(hits), confidence.device)
    walk = (table * (validation.wide(hits) - confidence))[:, order].cumsum(1)[:, ends]
    variance = table @ (confidence * (1 - confidence))
    statistic = walk.abs().amax(1) / variance.sqrt()
    values = torch.where(variance > 0, 1 - brownian_maximum_cdf(statistic), torch.nan)
    return weighting.defined(values, checked, "calibration_p: every confidence is 0 or 1", "no chance left")


def brownian_maximum_cdf(x: Tensor) -> Tensor:
    """P(max |W(t)| <= x) over t in [0, 1]: 4/pi sum_k (-1)^k / (2k+1) exp(-pi^2 (2k+1)^2 / (8 x^2))."""
    odd = 2 * torch.arange(32, dtype=torch.float64, device=x.device) + 1
    sign = 1 - (odd - 1) % 4  # 1, -1, 1, ...
    safe = x.clamp_min(1e-3)[..., None]
    small = (4 / math.pi * sign / odd * torch.exp(-(math.pi**2) * odd.square() / (8 * safe.square()))).sum(-1)
    # The series is slow where the probability is almost 1; the reflection principle is exact there to 1e-20.
    tail = 2 * torch.special.erfc(x / math.sqrt(2)) - 2 * torch.special.erfc(3 * x / math.sqrt(2))
    return torch.where(x > 3.0, 1 - tail, small).clamp(0.0, 1.0)


def spiegelhalter_z(targets: Any, *, probs: Any = None, logits: Any = None, weights: Any = None) -> float | Tensor:
    """Spiegelhalter's (1986) statistic of the top label, standard normal when calibrated.

    sum (hit - conf)(1 - 2 conf) / sqrt(sum (1 - 2 conf)^2 conf (1 - conf)).

    Raises:
        UndefinedError: every confidence is 0, 1/2 or 1.
    """
    forecast = Forecast.read(targets, probs, logits)
    return spiegelhalter_of(forecast.confidence, forecast.hits, weights)


def spiegelhalter_of(confidence: Tensor, hits: Tensor, weights: Any) -> float | Tensor:
    """`spiegelhalter_z` of confidences (N,) and hits (N,)."""
    checked = validation.example_weights(weights, len(hits))
    confidence = validation.wide(confidence)
    table = weighting.rows(checked, len(hits), confidence.device)
    slope = 1 - 2 * confidence
    variance = table @ (slope.square() * confidence * (1 - confidence))
    top = table @ ((validation.wide(hits) - confidence) * slope)
    values = torch.where(variance > 0, top / variance.sqrt(), torch.nan)
    return weighting.defined(values, checked, "spiegelhalter_z: every confidence is 0, 1/2 or 1", "no chance left")
