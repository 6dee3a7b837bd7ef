"""Metrics of a stream of batches: sums that merge across processes, constant memory where the metric allows it.

`ClassificationStream` scores arrays in one pass (classes, pixels, tokens), in constant memory and without waiting for
the device; `MetricStream` takes `Predictions` and any entry of `METRICS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from bayesdl.errors import ArgumentError, LabelError, NonFiniteError, ShapeError, UnknownNameError
from bayesdl.evaluation import binning, validation
from bayesdl.evaluation.binning import BinSums
from bayesdl.evaluation.metrics import BINS, METRICS
from bayesdl.evaluation.mixing import cat_predictions
from bayesdl.evaluation.predictions import Predictions

# Rows scored at once: their temporaries fit a cache, which is what a pass over many rows costs.
CHUNK = 1 << 16
_SHARED = "bins"  # state of all calibration errors that read the same bins
_INT, _FLOAT = torch.int64, torch.float64


@final
class ClassificationStream:
    """NLL, Brier, accuracy and the equal-width calibration errors of a stream of forecasts, in one pass.

    Outputs at positions (pixels, tokens) are pooled, and averaged per image too, under names of their own.

    Args:
        bins: equal-width bins of the top-label confidence.
        ignore_index: label of positions that do not count.
        class_axis: axis of the classes in a batch: -1 for (B, C) and (B, T, C), 1 for images (B, C, H, W).

    Values are checked on the device and reported at `compute`, so that `update` never waits for it.
    """

    def __init__(self, *, bins: int = BINS, ignore_index: int | None = None, class_axis: int = -1) -> None:
        self.bins = validation.bin_count(bins)
        self.ignore_index = ignore_index
        self.class_axis = class_axis
        self._sums: dict[str, Tensor] = {}
        self._first: Tensor | None = None
        self._updates = 0

    def update(self, targets: Any, *, probs: Any = None, logits: Any = None) -> None:
        """Add a batch: forecasts (B, C), or (B, ..., C) with the classes at `class_axis`; targets (B, ...) integers.

        Raises:
            TypeError: both or neither of `probs` and `logits`. ShapeError: shapes that do not fit.
        """
        kind = validation.exactly_one(probs=probs, logits=logits)
        values = validation.tensor(probs if kind == "probs" else logits, kind)
        tolerance = validation.row_tolerance(probs.dtype if isinstance(probs, Tensor) else values.dtype)
        if values.dim() < 2:
            raise ShapeError(f"{kind} has shape {tuple(values.shape)}, expected (B, C) or (B, ..., C)")
        values = values.movedim(self.class_axis, -1)
        labels = validation.tensor(targets, "targets").to(values.device)
        if labels.shape != values.shape[:-1]:
            raise ShapeError(f"targets has shape {tuple(labels.shape)}, the forecasts need {tuple(values.shape[:-1])}")
        if labels.is_floating_point():
            raise LabelError(f"targets has dtype {labels.dtype}; class indices are integers")
        if values.shape[-1] < 2 or values.numel() == 0:
            raise ShapeError(f"{kind} has shape {tuple(values.shape)}: expected examples and two classes or more")
        images = len(values) if labels.dim() > 1 else 0
        found = self._empty(values.device)
        rows, flat = values.reshape(-1, values.shape[-1]), labels.reshape(-1).to(_INT)
        each = [
            self._rows(rows[start : start + CHUNK], flat[start : start + CHUNK], kind, tolerance, found)
            for start in range(0, len(rows), CHUNK)
        ]
        if images:
            losses, counts = (torch.cat([part[i] for part in each], -1) for i in (0, 1))
            mass = counts.view(images, -1).sum(1)
            means = losses.view(3, images, -1).sum(-1) / mass.clamp_min(1)
            found["images"] += (mass > 0).sum()
            found["image_sums"] += (means * (mass > 0)).sum(1)
        if not self._sums:
            self._sums = self._empty(values.device)
        bad = found["bad"].sum() > 0
        self._sums = {name: value + found[name].to(value.device) for name, value in self._sums.items()}
        first = torch.full_like(bad, -1, dtype=_INT) if self._first is None else self._first.to(bad.device)
        self._first = torch.where((first < 0) & bad, self._updates, first)
        self._updates += 1

    def merge(self, other: ClassificationStream) -> ClassificationStream:
        """Both streams together, as a new one: integers exactly, sums to rounding, in any order.

        Raises:
            ArgumentError: other bins.
        """
        joined = ClassificationStream(bins=self.bins, ignore_index=self.ignore_index, class_axis=self.class_axis)
        joined.load(self.state())
        theirs = other.state()
        if other.bins != self.bins:
            raise ArgumentError(f"streams with {self.bins} and {other.bins} bins cannot be merged")
        joined._sums = {name: value + theirs[name].to(value.device) for name, value in joined._sums.items()}
        joined._first = self._first
        joined._updates = self._updates + other._updates
        return joined

    def state(self) -> dict[str, Tensor]:
        """Tensors of int64 and float64 that add up over processes: one all-reduce, then `load`."""
        sums = self._sums or self._empty(torch.device("cpu"))
        return {name: value.clone() for name, value in sums.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a (summed) `state` in place of what was seen.

        Raises:
            ArgumentError: it is the state of other bins.
        """
        expected = self._empty(torch.device("cpu"))
        if set(state) != set(expected) or any(state[name].shape != expected[name].shape for name in expected):
            raise ArgumentError(f"this is no state of a ClassificationStream with {self.bins} bins")
        self._sums = {name: state[name].to(value.dtype).clone() for name, value in expected.items()}
        self._first = None

    def compute(self) -> dict[str, float]:
        """Values by name: `nll`, `brier`, `accuracy`, `ece`, `mce`, `ece_l2`, `ece_unweighted`, `nll_zero_count`.

        Outputs at positions have `image_nll`, `image_brier`, `image_accuracy` too: the mean over images of their means.

        Raises:
            NonFiniteError, ArgumentError, LabelError: some batch was bad; the message says how much and which first.
            UndefinedError: nothing was seen, or everything was ignored.
        """
        sums = self._checked()
        count = int(sums["count"])
        bins = self.bin_sums()
        values = {
            "nll": float(sums["sums"][0]) / count,
            "brier": float(sums["sums"][1]) / count,
            "accuracy": int(sums["hits"]) / count,
            "ece": float(bins.ece()),
            "mce": float(bins.mce()),
            "ece_l2": float(bins.l2()),
            "ece_unweighted": float(bins.unweighted()),
            "nll_zero_count": float(sums["zero"]),
        }
        if images := int(sums["images"]):
            nll, brier, hits = (sums["image_sums"] / images).tolist()
            values |= {"image_nll": nll, "image_brier": brier, "image_accuracy": hits}
        return values

    def as_torchmetric(self) -> Any:
        """A fresh `torchmetrics.Metric` with these settings; `update` takes the same arguments."""
        from bayesdl.evaluation.torchmetric import summed

        settings: dict[str, Any] = {
            "bins": self.bins,
            "ignore_index": self.ignore_index,
            "class_axis": self.class_axis,
        }
        return summed(lambda: ClassificationStream(**settings))

    def bin_sums(self) -> BinSums:
        """Count, confidence and hits of every bin: a reliability diagram."""
        sums = self._checked()
        return BinSums(
            sums["bin_count"][None].to(_FLOAT), sums["bin_confidence"][None], sums["bin_hits"][None].to(_FLOAT)
        )

    def _empty(self, device: torch.device) -> dict[str, Tensor]:
        where = torch.device("cpu") if device.type == "mps" else device
        shapes = {
            "count": (),
            "hits": (),
            "zero": (),
            "images": (),
            "bin_count": (self.bins,),
            "bin_hits": (self.bins,),
        }
        state = {name: torch.zeros(shape, dtype=_INT, device=where) for name, shape in shapes.items()}
        state["bad"] = torch.zeros(3, dtype=_INT, device=where)
        for name, size in (("sums", 2), ("image_sums", 3), ("bin_confidence", self.bins)):
            state[name] = torch.zeros(size, dtype=_FLOAT, device=where)
        return state

    def _rows(
        self, rows: Tensor, labels: Tensor, kind: str, tolerance: float, found: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Add rows (n, C) to `found`; their losses (3, n) and whether they count (n,)."""
        counts = torch.ones_like(labels, dtype=torch.bool) if self.ignore_index is None else labels != self.ignore_index
        wrong = ((labels < 0) | (labels >= rows.shape[1])) & counts
        place = labels.clamp(0, rows.shape[1] - 1)[:, None]
        top, predicted = rows.max(1)
        if kind == "logits":
            # Shifted by the maximum, exponentials neither overflow nor lose the top one.
            scaled = (rows - top[:, None]).exp_()
            mass = scaled.sum(1)
            confidence = mass.reciprocal()
            squares = torch.linalg.vector_norm(scaled, dim=1).square() / mass.square()
            gap = (top - rows.gather(1, place)[:, 0]).to(found["sums"])
            nll = gap + mass.to(gap).log()
            own = torch.exp(-nll)
            broken = ~torch.isfinite(mass) & counts
            unnormalised = torch.zeros_like(broken)
        else:
            confidence, total = top, rows.sum(1)
            squares = torch.linalg.vector_norm(rows, dim=1).square()
            own = rows.gather(1, place)[:, 0].to(found["sums"])
            nll = -own.log().clamp_max(0.0)
            broken = ~torch.isfinite(total) & counts
            unnormalised = ~broken & counts & (((total - 1).abs() > tolerance) | (rows.amin(1) < 0))
        found["bad"] += torch.stack([broken.sum(), unnormalised.sum(), wrong.sum()]).to(found["bad"])
        counts = counts & ~(broken | unnormalised | wrong)
        counts_wide, confidence = counts.to(found["sums"]), confidence.to(found["sums"])
        hits = (predicted == place[:, 0]) & counts
        brier = 1 + squares.to(found["sums"]) - 2 * own
        losses = torch.stack([nll, brier, hits.to(found["sums"])]).masked_fill(~counts.to(nll.device), 0.0)
        # Rows that do not count fall into a bin of their own, behind the others.
        index = torch.where(
            counts.to(nll.device), binning.equal_width(confidence.nan_to_num(0.0), self.bins), self.bins
        )
        found["count"] += counts.sum().to(found["count"].device)
        found["hits"] += hits.sum().to(found["hits"].device)
        found["zero"] += (losses[0] == torch.inf).sum()
        found["sums"] += losses[:2].sum(1)
        found["bin_count"] += torch.bincount(index, minlength=self.bins + 1)[:-1]
        found["bin_hits"] += torch.bincount(index, losses[2], self.bins + 1)[:-1].round().to(_INT)
        found["bin_confidence"] += torch.bincount(
            index, confidence.masked_fill(~counts.to(nll.device), 0.0), self.bins + 1
        )[:-1]
        return losses, counts_wide

    def _checked(self) -> dict[str, Tensor]:
        sums = {name: value.cpu() for name, value in (self._sums or self._empty(torch.device("cpu"))).items()}
        broken, unnormalised, wrong = sums["bad"].tolist()
        number = -1 if self._first is None else int(self._first)
        first = f"; the first bad batch is number {number}" if number >= 0 else ""
        if broken:
            raise NonFiniteError(f"{broken} rows of the forecasts hold NaN or infinity{first}")
        if unnormalised:
            raise ArgumentError(
                f"{unnormalised} rows of probs are negative or do not sum to 1{first}; did you pass logits? use logits="
            )
        if wrong:
            raise LabelError(
                f"{wrong} labels lie outside the classes{first}; positions to leave out need ignore_index="
            )
        if int(sums["count"]) == 0:
            raise validation.UndefinedError("nothing was seen, or every label carries ignore_index", "0 samples")
        return sums


@final
class MetricStream:
    """Entries of `METRICS` over batches of `Predictions`: sums where `Metric.streaming` is "constant", else all kept.

    Means of losses are sums of them; calibration errors with equal-width bins share the count, confidence and hits of
    each bin.

    Args:
        names: keys of `METRICS`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in METRICS]
        if unknown or not names:
            raise UnknownNameError(f"metrics {', '.join(unknown) or 'none'} unknown; available: {', '.join(METRICS)}")
        self.names = tuple(names)
        self.constant = tuple(name for name in self.names if METRICS[name].streaming == "constant")
        self._sums = {name: torch.zeros((), dtype=_FLOAT) for name in self.constant if METRICS[name].additive}
        if len(self._sums) < len(self.constant):
            self._sums[_SHARED] = torch.zeros(3, BINS, dtype=_FLOAT)
        self._count = torch.zeros((), dtype=_INT)
        self._kept: list[Predictions] = []

    def update(self, predictions: Predictions) -> None:
        """Add a batch; batches are never changed and, for metrics that need all scores together, kept on the CPU."""
        self._count = self._count + len(predictions)
        for name in self._sums:
            losses = METRICS[name].losses if name in METRICS else None
            if losses is not None:
                self._sums[name] = self._sums[name] + losses(predictions).sum().cpu()
            else:
                sums = binning.bin_sums(predictions.confidence, predictions.correct, BINS)
                parts = torch.cat([sums.count, sums.confidence, sums.hits])
                self._sums[name] = self._sums[name] + parts.cpu()
        if len(self.constant) < len(self.names):
            self._kept.append(predictions.map(Tensor.cpu))

    def merge(self, other: MetricStream) -> MetricStream:
        """Both streams together, as a new one. Raises `ArgumentError` where they measure different things."""
        if other.names != self.names:
            raise ArgumentError(f"streams of {', '.join(self.names)} and {', '.join(other.names)} cannot be merged")
        joined = MetricStream(self.names)
        joined._sums = {name: value + other._sums[name] for name, value in self._sums.items()}
        joined._count = self._count + other._count
        joined._kept = self._kept + other._kept
        return joined

    def state(self) -> dict[str, Tensor]:
        """Sums and count, which add up over processes.

        Raises:
            ArgumentError: a metric needs all scores together; gather the predictions with `in_order` instead.
        """
        if stored := [name for name in self.names if name not in self.constant]:
            raise ArgumentError(f"{', '.join(stored)}: not a sum over examples; gather predictions and use `in_order`")
        return {"count": self._count.clone(), **{name: value.clone() for name, value in self._sums.items()}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a (summed) `state` in place of what was seen."""
        if set(state) != {"count", *self._sums}:
            raise ArgumentError(f"this is no state of a stream of {', '.join(self.names)}")
        self._count = state["count"].to(_INT)
        self._sums = {name: state[name].to(_FLOAT) for name in self._sums}

    def as_torchmetric(self) -> Any:
        """A fresh `torchmetrics.Metric` of these metrics; `update` takes `Predictions`."""
        from bayesdl.evaluation.torchmetric import stored, summed

        names = self.names
        made = summed if len(self.constant) == len(names) else stored
        return made(lambda: MetricStream(names))

    def compute(self) -> dict[str, float]:
        """Values by name.

        Raises:
            UndefinedError: nothing was seen, or a metric is undefined on it.
        """
        if int(self._count) == 0:
            raise validation.UndefinedError("nothing was seen", "0 samples")
        whole = cat_predictions(self._kept) if self._kept else None
        values: dict[str, float] = {}
        for name in self.names:
            metric = METRICS[name]
            if name in self._sums:
                mean = float(self._sums[name]) / int(self._count)
                values[name] = mean if metric.link == "identity" else mean**0.5
            elif metric.binned is not None:
                values[name] = float(metric.binned(BinSums(*self._sums[_SHARED].unsqueeze(1))))
            elif whole is not None:
                values[name] = float(metric.fn(whole))
        return values


def in_order(parts: Sequence[Predictions], indices: Sequence[Any], num_examples: int) -> Predictions:
    """Predictions of several processes in the order of the data, each example once.

    Args:
        parts: one per process. indices: the examples (n,) that each part holds, as the sampler drew them.
        num_examples: N of the data set. Samplers pad by repeating examples; repetitions count once.

    Raises:
        ArgumentError: some example is missing. ShapeError: a part and its indices differ in length.
    """
    for part, index in zip(parts, indices, strict=True):
        if len(part) != len(index):
            raise ShapeError(f"{len(part)} predictions came with {len(index)} indices")
    where = torch.cat([validation.tensor(index, "indices").to(_INT).cpu() for index in indices])
    if len(where) and (int(where.min()) < 0 or int(where.max()) >= num_examples):
        raise ArgumentError(
            f"indices lie between {int(where.min())} and {int(where.max())}, of {num_examples} examples"
        )
    first = torch.full((num_examples,), len(where)).scatter_reduce(0, where, torch.arange(len(where)), "amin")
    missing = (first == len(where)).nonzero()[:, 0]
    if len(missing):
        raise ArgumentError(f"{len(missing)} of {num_examples} examples are missing, the first is {int(missing[0])}")
    return cat_predictions([part.map(Tensor.cpu) for part in parts]).subset(first)
