"""Error bars over test points: paired resamples for every method and column, intervals that know their bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError, UnknownNameError
from bayesdl.evaluation import binning, validation, weighting
from bayesdl.evaluation.metrics import METRICS, Metric
from bayesdl.evaluation.ood import OOD_METRICS, ood_score, score_metrics
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.readers import BINS

# Weights held at once, in elements: bounds the memory of sorted copies and cumulative sums.
CHUNK = 1 << 22


@final
@dataclass(frozen=True, eq=False)
class Resamples:
    """R multinomial resamples of N examples, as weights; the same ones at every reading, so comparisons are paired.

    Attributes:
        num_examples: N. count: R. seed: from which row r is drawn, whatever the chunk it is asked for in.
        group: (N,) cluster ids; whole clusters are then resampled.
    """

    num_examples: int
    count: int
    seed: int
    group: Tensor | None = None

    @classmethod
    def draw(
        cls, num_examples: int, count: int = 1000, *, generator: torch.Generator | None = None, group: Any = None
    ) -> Resamples:
        """Take a fresh seed from `generator` (None: seed 0).

        Raises:
            ArgumentError: a count below 1. ShapeError: `group` is not (N,).
        """
        if group is not None:
            group = validation.vector(group, "group", length=num_examples).unique(return_inverse=True)[1].cpu()
        for name, value in (("num_examples", num_examples), ("count", count)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}={value!r}: expected an integer of at least 1")
        seed = 0
        if generator is not None:
            seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
        return cls(num_examples, count, seed, group)

    def __len__(self) -> int:
        return self.count

    def chunks(self, step: int | None = None) -> Iterator[Tensor]:
        """Weights (r, N) float64, at most `step` rows at once; every row sums to N, or to whole clusters."""
        step = max(1, CHUNK // self.num_examples) if step is None else step
        generator = torch.Generator().manual_seed(self.seed)
        units = self.num_examples if self.group is None else int(self.group.max()) + 1
        for start in range(0, self.count, step):
            weights = torch.empty(min(step, self.count - start), units, dtype=torch.float64)
            for row in weights:
                # Whole draws of one row at a time: its counts stay in the cache.
                draws = torch.randint(units, (units,), generator=generator, dtype=torch.int32)
                row.copy_(torch.bincount(draws, minlength=units))
            yield weights if self.group is None else weights[:, self.group]

    def matrix(self) -> Tensor:
        """All weights (R, N) at once: 8 R N bytes."""
        return torch.cat(list(self.chunks()))


@final
@dataclass(frozen=True)
class Interval:
    """An interval and how it was made: "bca", "percentile", "reflected" or "none".

    `null_mean` and `null_quantile`: of a calibration error, its mean and `level` quantile under perfect calibration.
    """

    low: float
    high: float
    method: str
    null_mean: float | None = None
    null_quantile: float | None = None


def resample(predictions: Predictions, names: Sequence[str], resamples: Resamples) -> dict[str, Tensor]:
    """Values (R,) float64 of the named metrics on every resample; NaN where a resample leaves one undefined.

    Metrics with per-example losses cost one matrix product together; the others run on sorted or binned data.

    Raises:
        UnknownNameError: not in `METRICS`. UndefinedError: a metric is undefined on the data themselves.
        ShapeError: the resamples are of another number of examples.
    """
    if resamples.num_examples != len(predictions):
        raise ShapeError(f"resamples of {resamples.num_examples} examples do not fit predictions of {len(predictions)}")
    entries = [_entry(name) for name in names]
    found: dict[str, list[Tensor]] = {metric.name: [] for metric in entries}
    columns, readers = _columns(predictions, entries)
    for chunk in resamples.chunks():
        weights = chunk.to(predictions.device)
        sums = None if columns is None else weights @ columns
        for metric in entries:
            value: float | Tensor
            if sums is not None and metric.name in readers:
                value = readers[metric.name](sums)
            elif metric.losses is not None:
                value = _linked(metric, weighting.mean(metric.losses(predictions), weights))
            else:
                value = metric.fn(predictions, weights)
            found[metric.name].append(torch.as_tensor(value).cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def _columns(
    predictions: Predictions, entries: Sequence[Metric]
) -> tuple[Tensor | None, dict[str, Callable[[Tensor], Tensor]]]:
    """Columns (N, k) of whose weighted sums (R, k) metrics are functions, and those functions: one product for all.

    Means of finite losses and statistics of equal-width bins are; the first column, of ones, is the total weight.
    """
    parts = [torch.ones(len(predictions), 1, dtype=torch.float64, device=predictions.device)]
    readers: dict[str, Callable[[Tensor], Tensor]] = {}
    width, bins = 1, None
    for metric in entries:
        if metric.losses is not None:
            losses = metric.losses(predictions)
            if bool(torch.isfinite(losses).all()):
                parts.append(losses[:, None])
                readers[metric.name] = _mean_reader(metric, width)
                width += 1
        elif metric.binned is not None and len(predictions) * 3 * BINS <= CHUNK * 4:
            if bins is None:
                bins, width = width, width + 3 * BINS
                parts.append(binning.indicator(predictions.confidence, predictions.correct, BINS))
            readers[metric.name] = _bin_reader(metric.binned, bins)
    return (torch.cat(parts, 1), readers) if readers else (None, {})


def _mean_reader(metric: Metric, place: int) -> Callable[[Tensor], Tensor]:
    def read(sums: Tensor) -> Tensor:
        mean = sums[:, place] / sums[:, 0]
        return mean if metric.link == "identity" else mean**0.5

    return read


def _bin_reader(statistic: Callable[[binning.BinSums], Tensor], place: int) -> Callable[[Tensor], Tensor]:
    return lambda sums: statistic(binning.BinSums(*sums[:, place : place + 3 * BINS].unflatten(1, (3, BINS)).unbind(1)))


def resample_ood(
    id_predictions: Predictions,
    ood_predictions: Predictions,
    id_resamples: Resamples,
    ood_resamples: Resamples,
    *,
    score: str | None = None,
) -> dict[str, Tensor]:
    """Values (R,) of every OOD metric, both sets resampled, each by its own weights."""
    if len(id_resamples) != len(ood_resamples):
        raise ShapeError(
            f"{len(id_resamples)} resamples of the ID set and {len(ood_resamples)} of the OOD set must agree"
        )
    inside, outside = ood_score(id_predictions, score), ood_score(ood_predictions, score)
    step = max(1, CHUNK // (len(inside) + len(outside)))
    found: dict[str, list[Tensor]] = {name: [] for name in OOD_METRICS}
    for left, right in zip(id_resamples.chunks(step), ood_resamples.chunks(step), strict=True):
        values = score_metrics(inside, outside, id_weights=left.to(inside.device), ood_weights=right.to(outside.device))
        for name, value in values.items():
            found[name].append(torch.as_tensor(value).cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def interval(
    name: str,
    predictions: Predictions,
    values: Tensor,
    *,
    level: float = 0.95,
    group: Any = None,
    generator: torch.Generator | None = None,
    draws: int = 1000,
) -> Interval:
    """Interval of one metric from its resampled `values` (R,), by the rule of its entry in `METRICS`.

    BCa (Efron 1987) for means of losses. Binned calibration errors are biased upwards, and so is their bootstrap:
    theirs is the reflected interval, its lower end 0 unless the error exceeds what perfect calibration gives.

    Args:
        group: cluster ids (N,), where clusters were resampled.
        generator, draws: for the labels redrawn under perfect calibration.
    """
    metric, level = _entry(name), validation.fraction(level, "level")
    estimate = float(metric.fn(predictions))
    if metric.interval == "calibration" and metric.null is not None:
        null = metric.null(predictions, draws, generator)
        return reflected_interval(estimate, values, null, level=level)
    if metric.losses is not None and math.isfinite(estimate):
        return bca_interval(estimate, values, metric.losses(predictions), level=level, group=group)
    return percentile_interval(values, level=level)


def percentile_interval(values: Tensor, *, level: float = 0.95) -> Interval:
    """Central share `level` of the resampled values; order statistics, so infinite values do no harm."""
    return Interval(*_ends(values, (1 - level) / 2, (1 + level) / 2), "percentile")


def bca_interval(
    estimate: float, values: Tensor, losses: Tensor, *, level: float = 0.95, group: Any = None
) -> Interval:
    """Bias-corrected and accelerated interval of a mean of `losses` (N,), or of a monotone function of it.

    The acceleration comes from the jackknife: for a mean the skewness of the losses, or of their cluster sums.
    """
    values = values[~values.isnan()]
    if len(values) == 0:
        return Interval(math.nan, math.nan, "none")
    deviations = validation.wide(losses).cpu()
    deviations = deviations - deviations.mean()
    if group is not None:
        clusters = validation.vector(group, "group", length=len(deviations)).unique(return_inverse=True)[1].cpu()
        deviations = torch.bincount(clusters, deviations)
    spread = float(deviations.square().sum())
    if spread == 0 or not math.isfinite(spread):
        return Interval(estimate, estimate, "bca") if spread == 0 else percentile_interval(values, level=level)
    acceleration = float(deviations.pow(3).sum()) / (6 * spread**1.5)
    share = float((values < estimate).double().mean() + (values == estimate).double().mean() / 2)
    # All resamples on one side would put the interval at infinity: half a resample is the least that can be known.
    share = min(max(share, 0.5 / len(values)), 1 - 0.5 / len(values))
    bias = _normal_quantile(share)

    def corrected(q: float) -> float:
        z = bias + _normal_quantile(q)
        return 0.5 * math.erfc(-(bias + z / (1 - acceleration * z)) / math.sqrt(2))

    return Interval(*_ends(values, corrected((1 - level) / 2), corrected((1 + level) / 2)), "bca")


def reflected_interval(estimate: float, values: Tensor, null: Tensor, *, level: float = 0.95) -> Interval:
    """Interval of a calibration error in [0, 1] that is biased upwards.

    Args:
        estimate: on the data. values: (R,), on resamples. null: (K,), on labels redrawn from the forecasts.
    """
    low, high = _ends(values, (1 - level) / 2, (1 + level) / 2)
    mean, quantile = float(null.mean()), _ends(null, level, level)[1]
    ends = sorted(min(max(2 * estimate - end, 0.0), 1.0) for end in (low, high))
    return Interval(0.0 if estimate <= quantile else ends[0], ends[1], "reflected", mean, quantile)


def bootstrap_p(differences: Tensor) -> float:
    """Two-sided p-value of a resampled difference (R,): 2 min(1 + #{d <= 0}, 1 + #{d >= 0}) / (R + 1), at most 1."""
    differences = differences[~differences.isnan()]
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (len(differences) + 1))


def _entry(name: str) -> Metric:
    if name not in METRICS:
        raise UnknownNameError(f"metric {name!r} is unknown; available: {', '.join(METRICS)}")
    return METRICS[name]


def _linked(metric: Metric, value: float | Tensor) -> float | Tensor:
    return value if metric.link == "identity" else value**0.5


def _ends(values: Tensor, low: float, high: float) -> tuple[float, float]:
    values = values[~values.isnan()].sort().values
    if len(values) == 0:
        return math.nan, math.nan
    last = len(values) - 1
    first = min(max(math.floor(low * last + 1e-9), 0), last)
    return float(values[first]), float(values[min(max(math.ceil(high * last - 1e-9), 0), last)])


def _normal_quantile(q: float) -> float:
    return float(torch.special.ndtri(torch.tensor(q, dtype=torch.float64)))
