"""Rank metrics of endless streams in constant memory: counts of scores on a fixed grid, with bounds that are proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, NonFiniteError
from bayesdl.evaluation import validation

_LARGEST = torch.finfo(torch.float32).max


@final
@dataclass(frozen=True)
class Bounded:
    """A value and how far the exact one lies from it at most."""

    value: float
    error: float


@final
class ScoreHistogram:
    """AUROC, average precisions and FPR95 of scores whose number does not matter; OOD (or wrong) is positive.

    Scores are counted by the leading bits of their float32 representation, an order-preserving grid of all numbers: it
    needs no range, any two histograms add up exactly, and a bin is as wide as 2^(9 - bits) of the score itself. Scores
    that crowd near one number lose to that: give -log(1 - p) or the entropy rather than -p.

    Args:
        bits: of the grid, from 10 to 26; 2^bits counts for each of the two sets (16 MiB together at 20).
    """

    def __init__(self, bits: int = 20) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 10 <= bits <= 26:
            raise ArgumentError(f"bits={bits!r}: expected an integer from 10 to 26")
        self.bits = bits
        self._counts = torch.zeros(2, 1 << bits, dtype=torch.int64)
        self._bad = torch.zeros((), dtype=torch.int64)

    def update(self, scores: Any, positive: Any) -> None:
        """Add scores (B,), higher for positives; `positive` (B,) labels 0 and 1, or one bool for all of them.

        Values are checked where they lie and reported at `compute`, so that this never waits for a device.
        """
        values = validation.tensor(scores, "scores").reshape(-1)
        values = values.float() if values.is_floating_point() else values.double().float()
        fine = ~values.isnan()
        place = self._place(values.nan_to_num(0.0, _LARGEST, -_LARGEST))
        if isinstance(positive, bool):
            side = torch.full_like(place, int(positive))
        else:
            side = validation.binary_targets(positive, tuple(values.shape), "positive").to(values.device)
        index = torch.where(fine, side * self._counts.shape[1] + place, 2 * self._counts.shape[1])
        found = torch.bincount(index, minlength=2 * self._counts.shape[1] + 1)
        self._counts = self._counts.to(found.device) + found[:-1].view(2, -1)
        self._bad = self._bad.to(found.device) + found[-1]

    def merge(self, other: ScoreHistogram) -> ScoreHistogram:
        """Both together, exactly, as a new one. Raises `ArgumentError` for another grid."""
        if other.bits != self.bits:
            raise ArgumentError(f"histograms of {self.bits} and {other.bits} bits cannot be merged")
        joined = ScoreHistogram(self.bits)
        theirs = other.state()
        joined.load({name: value + theirs[name].to(value.device) for name, value in self.state().items()})
        return joined

    def state(self) -> dict[str, Tensor]:
        """int64 tensors that add up over processes: one all-reduce, then `load`."""
        return {"counts": self._counts.clone(), "bad": self._bad.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a (summed) `state` in place of what was seen."""
        if set(state) != {"counts", "bad"} or state["counts"].shape != self._counts.shape:
            raise ArgumentError(f"this is no state of a ScoreHistogram with {self.bits} bits")
        self._counts, self._bad = state["counts"].clone(), state["bad"].clone()

    def as_torchmetric(self) -> Any:
        """A fresh `torchmetrics.Metric` on this grid, which gives the values without their bounds."""
        from bayesdl.evaluation.torchmetric import summed

        bits = self.bits
        return summed(lambda: ScoreHistogram(bits))

    def compute(self) -> dict[str, Bounded]:
        """`auroc`, `ap_out`, `ap_in`, `fpr95`, as in `OOD_METRICS`, each within `error` of the exact value.

        Raises:
            NonFiniteError: a score was NaN. UndefinedError: one of the two sets is empty.
        """
        bad = int(self._bad)
        if bad:
            raise NonFiniteError(f"{bad} scores are NaN")
        negative, positive = self._counts.double().cpu()
        validation.two_classes(int(positive.sum()), int(negative.sum()), "a rank metric")
        held = (negative + positive > 0).nonzero()[:, 0].flip(0)
        negative, positive = negative[held], positive[held]
        return {
            "auroc": _area(positive, negative),
            "ap_out": _precision(positive, negative),
            "ap_in": _precision(negative.flip(0), positive.flip(0)),
            "fpr95": _false_alarms(positive, negative, 0.95),
        }

    def _place(self, values: Tensor) -> Tensor:
        # Bits of positive floats grow with the number, those of negative ones fall; minus zero is zero.
        bits = values.contiguous().view(torch.int32).to(torch.int64)
        ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
        return (ordered + (1 << 31)) >> (32 - self.bits)


def _area(positive: Tensor, negative: Tensor) -> Bounded:
    pairs = positive.sum() * negative.sum()
    before = positive.cumsum(0) - positive
    # Pairs inside a bin may be ordered either way: half of them, give or take the half.
    mixed = positive * negative / 2
    return Bounded(float(((before * negative) + mixed).sum() / pairs), float(mixed.sum() / pairs))


def _precision(positive: Tensor, negative: Tensor) -> Bounded:
    hits, alarms = positive.cumsum(0), negative.cumsum(0)
    # The i-th positive of a bin is flagged with at least i - 1 others of it and at most all negatives of it.
    start = hits - positive + alarms
    low = positive - alarms * (torch.digamma(start + positive + 1) - torch.digamma(start + 1))
    high = positive * hits / (hits + alarms - negative).clamp_min(1.0)
    least, most = (float(part.sum() / hits[-1]) for part in (low, high))
    return Bounded((least + most) / 2, (most - least) / 2)


def _false_alarms(positive: Tensor, negative: Tensor, recall: float) -> Bounded:
    hits, alarms = positive.cumsum(0), negative.cumsum(0)
    at = int((hits >= recall * hits[-1] - 1e-9).to(torch.int8).argmax())
    share = float(negative[at] / alarms[-1])
    return Bounded(float(alarms[at] / alarms[-1]) - share / 2, share / 2)
