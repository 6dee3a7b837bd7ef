"""Classification metrics of probabilities or logits against class indices.

Every function takes exactly one of `probs` and `logits`: (N, C); (S, N, C) for S members, whose probabilities are
averaged; `probs` (N,) is the probability of label 1 of two. Results are floats, or float64 (R,) for `weights` (R, N).
All raise `TypeError` unless exactly one forecast is given, and subclasses of `ValueError` for bad values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, ShapeError
from bayesdl.evaluation import binning, ranking, validation, weighting
from bayesdl.evaluation.binning import BinSums
from bayesdl.evaluation.validation import Backend, other_backend

Kind = Literal["top_label", "positive", "classwise"]


@final
@dataclass(frozen=True)
class Forecast:
    """Checked forecasts and labels: `log_probs` (N, C) float64 of the mean probability, `targets` (N,) int64."""

    log_probs: Tensor
    probs: Tensor
    targets: Tensor
    column: bool = False

    @classmethod
    def read(
        cls, targets: Any, probs: Any, logits: Any, *, cast: bool = False, ignore_index: int | None = None
    ) -> Forecast:
        """Check and convert; a single column (N,) becomes two and is remembered as `column`."""
        if validation.exactly_one(probs=probs, logits=logits) == "probs":
            checked = validation.wide(validation.probabilities(probs))
            column = checked.dim() == 1
            checked = torch.stack([1 - checked, checked], -1) if column else checked
            mean = checked.mean(0) if checked.dim() == 3 else checked
            log_mean = mean.log()
        else:
            # float64 costs one pass and keeps log-softmax exact for logits far apart.
            log_mean, column = validation.wide(validation.logits(logits)).log_softmax(-1), False
            if log_mean.dim() == 3:
                log_mean = log_mean.logsumexp(0) - math.log(len(log_mean))
            mean = log_mean.exp()
        keep = validation.keep_rows(targets, ignore_index)
        if keep is not None:
            if len(keep) != len(mean):
                raise ShapeError(f"targets has {len(keep)} rows, the forecasts have {len(mean)}")
            targets, mean, log_mean = validation.tensor(targets, "targets")[keep], mean[keep], log_mean[keep]
        checked_targets = validation.labels(targets, len(mean), mean.shape[1], cast=cast)
        return cls(log_mean, mean, checked_targets.to(mean.device), column)

    @property
    def confidence(self) -> Tensor:
        """(N,), maximal mean probability."""
        return self.probs.amax(-1)

    @property
    def hits(self) -> Tensor:
        """(N,) bool, the lowest index among the maximal probabilities is the label."""
        return self.probs.argmax(-1) == self.targets


def nll(
    targets: Any,
    *,
    probs: Any = None,
    logits: Any = None,
    weights: Any = None,
    floor: float | None = None,
    per_example: bool = False,
) -> float | Tensor:
    """Mean of -log p(y) in nats; `inf` when a true class has probability 0, unless `floor` bounds it from below."""
    forecast = Forecast.read(targets, probs, logits)
    losses = nll_losses(forecast.log_probs, forecast.targets)
    if floor is not None:
        losses = losses.clamp_max(-math.log(validation.fraction(floor, "floor")))
    return _reduce(losses, weights, per_example)


def nll_zero_count(targets: Any, *, probs: Any = None, logits: Any = None, weights: Any = None) -> float | Tensor:
    """How many examples (or how much weight) have a true class of probability 0, each an infinite `nll`."""
    forecast = Forecast.read(targets, probs, logits)
    zero = nll_losses(forecast.log_probs, forecast.targets).isinf().double()
    return weighting.total(zero, validation.example_weights(weights, len(zero)))


def brier(
    targets: Any, *, probs: Any = None, logits: Any = None, weights: Any = None, per_example: bool = False
) -> float | Tensor:
    """Mean of sum_c (p_c - 1[y = c])^2 over the columns given: (N, C) in [0, 2], one column (N,) in [0, 1]."""
    forecast = Forecast.read(targets, probs, logits)
    losses = brier_losses(forecast.probs, forecast.targets)
    return _reduce(losses / 2 if forecast.column else losses, weights, per_example)


def accuracy(
    targets: Any, *, probs: Any = None, logits: Any = None, weights: Any = None, per_example: bool = False
) -> float | Tensor:
    """Share of examples whose predicted class (lowest index among the maximal) is the label."""
    return _reduce(Forecast.read(targets, probs, logits).hits.double(), weights, per_example)


def ece(
    targets: Any,
    *,
    probs: Any = None,
    logits: Any = None,
    bins: int = 15,
    kind: Kind = "top_label",
    weights: Any = None,
    backend: Backend = "torch",
) -> float | Tensor:
    """Expected calibration error over equal-width bins, sum_b (n_b / N) |conf_b - acc_b| (Naeini et al. 2015).

    `kind`: "top_label" bins the maximal probability against correctness; "positive" the probability of label 1 of two
    against the label; "classwise" averages one-vs-rest errors over the classes.

    `backend="netcal"` computes the same by netcal, on inputs checked here and for the task stated here, as a second
    opinion: its bins close on the right, so that values on an edge fall one bin lower, and it takes no weights.

    Raises:
        UnsupportedError: weights with netcal. MissingDependencyError: netcal is not installed.
    """
    return _calibration(targets, probs, logits, bins, kind, weights, "ece", backend=backend)


def mce(
    targets: Any,
    *,
    probs: Any = None,
    logits: Any = None,
    bins: int = 15,
    kind: Kind = "top_label",
    weights: Any = None,
    backend: Backend = "torch",
) -> float | Tensor:
    """Largest gap |conf_b - acc_b| over non-empty equal-width bins; `kind`, `backend` as in `ece`."""
    return _calibration(targets, probs, logits, bins, kind, weights, "mce", backend=backend)


def ece_l2(
    targets: Any,
    *,
    probs: Any = None,
    logits: Any = None,
    bins: int = 15,
    kind: Kind = "top_label",
    weights: Any = None,
) -> float | Tensor:
    """sqrt(sum_b (n_b / N) gap_b^2) over equal-width bins; `kind` as in `ece`."""
    return _calibration(targets, probs, logits, bins, kind, weights, "l2")


def ece_unweighted(
    targets: Any,
    *,
    probs: Any = None,
    logits: Any = None,
    bins: int = 15,
    kind: Kind = "top_label",
    weights: Any = None,
    backend: Backend = "torch",
) -> float | Tensor:
    """Mean gap over non-empty equal-width bins, every bin alike; `kind`, `backend` as in `ece`."""
    return _calibration(targets, probs, logits, bins, kind, weights, "unweighted", backend=backend)


def ece_mass(
    targets: Any,
    *,
    probs: Any = None,
    logits: Any = None,
    bins: int = 15,
    kind: Kind = "top_label",
    weights: Any = None,
) -> float | Tensor:
    """As `ece` with equal-mass bins by mid-rank: tied scores share a bin, whatever their order."""
    return _calibration(targets, probs, logits, bins, kind, weights, "ece", mass=True)


def classwise_ece(
    targets: Any, *, probs: Any = None, logits: Any = None, bins: int = 15, weights: Any = None
) -> float | Tensor:
    """Mean over classes of the one-vs-rest `ece` (also known as SCE)."""
    return _calibration(targets, probs, logits, bins, "classwise", weights, "ece")


def error_auroc(
    targets: Any, *, probs: Any = None, logits: Any = None, score: Any = None, weights: Any = None
) -> float | Tensor:
    """AUROC of error detection: wrong predictions are positive, `score` (N,) high for them (1 - confidence by default).

    Raises:
        UndefinedError: all predictions are right, or all wrong.
    """
    forecast = Forecast.read(targets, probs, logits)
    score = 1 - forecast.confidence if score is None else validation.vector(score, "score", length=len(forecast.hits))
    return ranking.auroc(score, ~forecast.hits, weights=weights)


@final
@dataclass(frozen=True)
class Reliability:
    """A reliability diagram, one entry a bin, float64 (n,); NaN where a bin is empty.

    Attributes:
        edges: (n + 1,) of equal-width bins; for equal-mass bins the lowest confidence of each, then 1.
        count, confidence, accuracy: number of examples, mean confidence, share of hits.
        low, high: pointwise consistency band, where `accuracy` would lie under perfect calibration.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor
    low: Tensor
    high: Tensor
    level: float


def reliability(
    targets: Any,
    *,
    probs: Any = None,
    logits: Any = None,
    bins: int = 15,
    kind: Literal["top_label", "positive"] = "top_label",
    mass: bool = False,
    level: float = 0.95,
    draws: int = 1000,
    generator: torch.Generator | None = None,
) -> Reliability:
    """Reliability diagram with the band of accuracies that labels redrawn from the forecasts give, `draws` times.

    `mass`: equal-mass bins instead of equal-width ones. The band is pointwise: a share 1 - `level` of the bins of a
    calibrated forecaster lies outside it.
    """
    (confidence, hits), *_ = _scores(Forecast.read(targets, probs, logits), kind)
    return reliability_of(confidence, hits, bins=bins, mass=mass, level=level, draws=draws, generator=generator)


def reliability_of(
    confidence: Tensor,
    hits: Tensor,
    *,
    bins: int = 15,
    mass: bool = False,
    level: float = 0.95,
    draws: int = 1000,
    generator: torch.Generator | None = None,
) -> Reliability:
    """`reliability` of confidences (N,) in [0, 1] and hits (N,)."""
    bins, level, draws = validation.bin_count(bins), validation.fraction(level, "level"), validation.bin_count(draws)
    sums = binning.bin_sums(confidence, hits, bins, mass=mass)
    count, mean, rate = sums.count[0], (sums.confidence / sums.count)[0], (sums.hits / sums.count)[0]
    redrawn = torch.cat(
        [
            binning.redrawn_sums(confidence, drawn, bins, mass=mass).hits
            for drawn in redraw_hits(confidence, draws, generator)
        ]
    )
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=redrawn.device)
    low, high = torch.quantile(redrawn / count, tails, dim=0)
    edges = torch.arange(bins + 1, dtype=torch.float64, device=count.device) / bins
    if mass:
        index = binning.equal_mass(validation.wide(confidence), bins)
        lowest = edges.new_full((bins,), torch.inf).scatter_reduce_(0, index, validation.wide(confidence), "amin")
        edges = torch.cat([lowest.masked_fill(lowest.isinf(), torch.nan), edges[-1:]])
    return Reliability(edges, count, mean, rate, low, high, level)


def redraw_hits(confidence: Tensor, draws: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Hits redrawn as Bernoulli(confidence): boolean chunks (r, N), `draws` rows in all."""
    confidence = validation.wide(confidence)
    for uniform in _uniforms(len(confidence), draws, generator):
        yield uniform.to(confidence.device) < confidence


def redraw_labels(probs: Tensor, draws: int, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Labels redrawn from probabilities (N, C): int64 chunks (r, N), `draws` rows in all."""
    upto = validation.wide(probs).cumsum(1)
    upto = (upto / upto[:, -1:]).contiguous()
    for uniform in _uniforms(len(probs), draws, generator):
        yield torch.searchsorted(upto, uniform.to(upto.device).T.contiguous(), right=True).T.clamp_max(
            probs.shape[1] - 1
        )


def _uniforms(length: int, draws: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    step = max(1, (1 << 22) // length)
    device = "cpu" if generator is None else generator.device
    for start in range(0, draws, step):
        shape = (min(step, draws - start), length)
        yield torch.rand(shape, dtype=torch.float64, device=device, generator=generator)


def nll_losses(log_probs: Tensor, targets: Tensor) -> Tensor:
    """(N,), -log p(y) from log-probabilities (N, C)."""
    return -log_probs.gather(1, targets[:, None])[:, 0].clamp_max(0.0)


def brier_losses(probs: Tensor, targets: Tensor) -> Tensor:
    """(N,), sum_c (p_c - 1[y = c])^2 of probabilities (N, C)."""
    return (probs - torch.nn.functional.one_hot(targets, probs.shape[1])).square().sum(1)


def class_sums(probs: Tensor, targets: Tensor, bins: int, *, mass: bool, weights: Tensor | None) -> list[BinSums]:
    """One-vs-rest `BinSums` of every class."""
    return [
        binning.bin_sums(probs[:, c], targets == c, bins, mass=mass, weights=weights) for c in range(probs.shape[1])
    ]


def _scores(forecast: Forecast, kind: Kind) -> list[tuple[Tensor, Tensor]]:
    if kind == "top_label":
        return [(forecast.confidence, forecast.hits)]
    if kind == "classwise":
        return [(forecast.probs[:, c], forecast.targets == c) for c in range(forecast.probs.shape[1])]
    if kind != "positive":
        raise ArgumentError(f"kind={kind!r}: expected 'top_label', 'positive' or 'classwise'")
    if forecast.probs.shape[1] != 2:
        raise ArgumentError(f"kind='positive' needs two classes, the forecasts have {forecast.probs.shape[1]}")
    return [(forecast.probs[:, 1], forecast.targets == 1)]


def _calibration(
    targets: Any, probs: Any, logits: Any, bins: Any, kind: Kind, weights: Any, statistic: str, *, mass: bool = False,
    backend: Backend = "torch",
) -> float | Tensor:  # fmt: skip
    bins = validation.bin_count(bins)
    forecast = Forecast.read(targets, probs, logits)
    if other_backend(backend, weights):
        from bayesdl.evaluation.netcal import confidence_error

        found = [confidence_error(statistic, p, y, bins) for p, y in _scores(forecast, kind)]
        return sum(found) / len(found)
    weights = validation.example_weights(weights, len(forecast.targets))
    read = binning.STATISTICS[statistic]
    parts = [read(binning.bin_sums(p, y, bins, mass=mass, weights=weights)) for p, y in _scores(forecast, kind)]
    return weighting.finish(torch.stack(parts).mean(0), weights)


def _reduce(losses: Tensor, weights: Any, per_example: bool) -> float | Tensor:
    if per_example:
        return losses
    return weighting.mean(losses, validation.example_weights(weights, len(losses)))
