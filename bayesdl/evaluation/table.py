"""Fill the cells of a report: values, intervals, paired tests against the best, and reasons where there is no value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdl.evaluation import bootstrap, render
from bayesdl.evaluation.bootstrap import Resamples
from bayesdl.evaluation.cells import COSTS, GROUPS, Cell, Column, loss_of, place
from bayesdl.evaluation.collect import CALIBRATION, COST, TEST, Collected
from bayesdl.evaluation.metrics import METRICS, Metric, metric_values
from bayesdl.evaluation.ood import OOD_METRICS, SCORES, ood_metrics, score_metrics
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.report import Report
from bayesdl.evaluation.significance import SIGNIFICANCE, enough_resamples, is_ranked, tests
from bayesdl.evaluation.validation import UndefinedError

OVERALL = "shift/all"  # means over all shifts
_HEADLINE_OOD = ("auroc", "fpr95")
_GROUPS = {
    "accuracy": ("accuracy", "rmse", "mae"),
    "selective": ("error_auroc", "aurc", "eaurc", "augrc", "risk_at_coverage_80", "coverage_at_risk_5"),
}


@dataclass(frozen=True)
class Resampler:
    """How values are resampled: `count` paired resamples (0: none) at `level`, drawn from `generator`."""

    count: int
    level: float
    generator: torch.Generator


@dataclass
class Table:
    """Cells under construction; `report` freezes them."""

    found: Collected
    resampler: Resampler
    subgroups: Mapping[str, Tensor] = field(default_factory=dict)
    columns: list[Column] = field(default_factory=list)
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    replicates: dict[str, np.ndarray] = field(default_factory=dict)
    _drawn: dict[str, Resamples] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cells = {row: {} for row in self.found.rows}

    def add_metrics(self, dataset: str, names: Sequence[str], *, headline: bool) -> None:
        """One column for each metric on one data set."""
        prefix = "" if dataset == TEST else f"{dataset}/"
        where = "" if dataset == TEST else f", {place(dataset)}"
        columns = {
            name: Column(
                key=prefix + name,
                label=_sentence(METRICS[name].label) + where,
                group=kind if (kind := dataset.split("/")[0]) in ("shift", "group") else _group(METRICS[name]),
                direction=METRICS[name].direction,
                unit=METRICS[name].unit,
                definition=METRICS[name].definition,
                target=METRICS[name].target,
                n=self.size(dataset),
                dataset=dataset,
                headline=headline,
            )
            for name in names
        }
        samples: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for row in self.found.rows:
            predictions = self._predictions(row, dataset)
            if predictions is None:
                self.cells[row] |= {c.key: Cell(None, note=self.found.missing(row, dataset)) for c in columns.values()}
                continue
            values = metric_values(predictions, names)
            usable = [name for name in names if not math.isnan(values[name].value) and METRICS[name].resampled]
            resampled: dict[str, Tensor] = {}
            if self.resampler.count and usable:
                resampled = bootstrap.resample(predictions, usable, self._resamples(dataset, predictions))
            for name, column in columns.items():
                cell = _cell(values[name].value, values[name].reason)
                if name in resampled:
                    samples[name][row] = resampled[name]
                    cell = self._with_interval(cell, name, predictions, resampled[name])
                self.cells[row][column.key] = cell
        for name, column in columns.items():
            self._finish(column, samples[name])

    def add_ood(self, dataset: str, headline_score: str) -> None:
        """AUROC and FPR95 of the headline score with intervals, then every score and metric without."""
        samples: dict[str, dict[str, Tensor]] = {name: {} for name in OOD_METRICS}
        for row in self.found.rows:
            values, reason = self._ood_values(row, dataset, headline_score)
            for name in OOD_METRICS:
                self.cells[row][f"{dataset}/{name}"] = _cell(values.get(name, math.nan), reason)
            if values and self.resampler.count:
                inside, outside = self.found.predictions[row][TEST], self.found.predictions[row][dataset]
                resampled = bootstrap.resample_ood(
                    inside,
                    outside,
                    self._resamples(TEST, inside),
                    self._resamples(dataset, outside),
                    score=headline_score,
                )
                for name, sample in resampled.items():
                    samples[name][row] = sample
                    span = bootstrap.percentile_interval(sample, level=self.resampler.level)
                    cell = self.cells[row][f"{dataset}/{name}"]
                    self.cells[row][f"{dataset}/{name}"] = replace(cell, low=_known(span.low), high=_known(span.high))
        for name in OOD_METRICS:
            column = self._ood_column(dataset, name, headline_score, named=False)
            self._finish(column, samples[name])
        for score in SCORES:
            if self.found.task in SCORES[score].tasks:
                self._add_score(dataset, score)
        for score, rows in self.found.scores.items():
            self._add_features(dataset, score, rows)

    def _add_features(self, dataset: str, score: str, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Metrics of a score that is no function of predictions: the same for all rows that share a density."""
        found = {row: score_metrics(s[TEST], s[dataset]) for row, s in rows.items() if {TEST, dataset} <= set(s)}
        for name, metric in OOD_METRICS.items():
            column = Column(
                key=f"{dataset}/{score}/{name}",
                label=f"{metric.label}, {place(dataset)}, {score}",
                group="ood",
                direction=metric.direction,
                unit=metric.unit,
                definition=f"{metric.definition} Score: {score}, from features.",
                n=self.size(dataset),
                dataset=dataset,
                headline=name == "auroc",
            )
            for row in self.found.rows:
                value = float(found[row][name]) if row in found else math.nan
                reason = "failed" if row in rows or row not in self.found.ran else "no feature density"
                self.cells[row][column.key] = _cell(value, reason)
            self._finish(column, {})

    def _add_score(self, dataset: str, score: str) -> None:
        found = {row: self._ood_values(row, dataset, score) for row in self.found.rows}
        if not any(values for values, _ in found.values()):
            return
        for name in OOD_METRICS:
            column = self._ood_column(dataset, name, score, named=True)
            for row, (values, reason) in found.items():
                self.cells[row][column.key] = _cell(values.get(name, math.nan), reason)
            self._finish(column, {})

    def _ood_column(self, dataset: str, name: str, score: str, *, named: bool) -> Column:
        metric = OOD_METRICS[name]
        return Column(
            key=f"{dataset}/{score}/{name}" if named else f"{dataset}/{name}",
            label=f"{metric.label}, {place(dataset)}" + (f", {score.replace('_', ' ')}" if named else ""),
            group="ood",
            direction=metric.direction,
            unit=metric.unit,
            definition=f"{metric.definition} Score: {SCORES[score].definition}",
            n=self.size(dataset),
            dataset=dataset,
            headline=not named and name in _HEADLINE_OOD,
        )

    def _ood_values(self, row: str, dataset: str, score: str) -> tuple[Mapping[str, float], str]:
        sets = self.found.predictions[row]
        if dataset not in sets:
            return {}, self.found.missing(row, dataset)
        try:
            return {k: float(v) for k, v in ood_metrics(sets[TEST], sets[dataset], score).items()}, ""
        except UndefinedError as error:
            return {}, error.reason

    def add_ood_means(self, name: str, sets: Sequence[str]) -> None:
        """The plain mean over OOD sets of each metric of each score that they have."""
        first = [c for c in self.columns if c.dataset == sets[0]]
        for single in first:
            rest = single.key.removeprefix(sets[0])
            keys = [one + rest for one in sets]
            if all(any(c.key == key for c in self.columns) for key in keys):
                label = single.label.replace(f", {place(sets[0])}", f", {name}", 1)
                column = replace(single, key=f"ood/{name}{rest}", label=label, dataset=f"ood/{name}")
                self._add_mean(column, keys, f"Mean over {len(sets)} sets.", interval=True)

    def add_shift_means(self, name: str, severities: Sequence[str], metrics: Sequence[str]) -> None:
        """The plain mean of each metric over the severities of one shift."""
        for metric in metrics:
            keys = [f"shift/{name}/{severity}/{metric}" for severity in severities]
            single = next(c for c in self.columns if c.key == keys[0])
            label = f"{_sentence(METRICS[metric].label)}, {name}"
            column = replace(single, key=f"shift/{name}/{metric}", label=label, dataset=f"shift/{name}", headline=True)
            # Resampled calibration errors are biased upwards: fit for differences, not for an interval.
            unbiased = METRICS[metric].interval != "calibration"
            self._add_mean(column, keys, f"Mean over {len(keys)} severities.", interval=unbiased)

    def add_overall_means(self, shifts: Mapping[str, Sequence[str]], metrics: Sequence[str]) -> None:
        """Over several shifts: means at every severity that all have, of their means, and the mean error rate."""
        common = [severity for severity in next(iter(shifts.values())) if all(severity in s for s in shifts.values())]
        for metric in metrics:
            unbiased = METRICS[metric].interval != "calibration"
            label, key = f"{_sentence(METRICS[metric].label)}, all shifts", f"{OVERALL}/{metric}"
            single = replace(next(c for c in self.columns if c.key == metric), group="shift")
            for severity in common:
                column = replace(
                    single,
                    key=f"{OVERALL}/{severity}/{metric}",
                    label=f"{label} {severity}",
                    dataset=f"shift/all shifts/{severity}",
                    headline=False,
                )
                keys = [f"shift/{name}/{severity}/{metric}" for name in shifts]
                self._add_mean(column, keys, f"Mean over {len(shifts)} shifts.", interval=unbiased)
            column = replace(single, key=key, label=label, dataset="shift/all shifts")
            keys = [f"shift/{name}/{metric}" for name in shifts]
            self._add_mean(column, keys, f"Mean over {len(shifts)} shifts of their means.", interval=unbiased)
        if "accuracy" in metrics:
            self._add_error(f"{OVERALL}/accuracy")

    def _add_error(self, key: str) -> None:
        """One minus an accuracy, under the name that tells it from errors divided by a reference network's."""
        single = next(c for c in self.columns if c.key == key)
        column = replace(
            single,
            key=f"{OVERALL}/error",
            label="Mean corruption error (unnormalised)",
            direction="min",
            definition="Error rate, plain mean over shifts and severities, not divided by a reference network's.",
            headline=False,
        )
        samples: dict[str, Tensor] = {}
        for position, row in enumerate(self.found.rows):
            cell = self.cells[row][key]
            low, high = (None if end is None else 1 - end for end in (cell.high, cell.low))
            self.cells[row][column.key] = (
                Cell(None, note=cell.note) if cell.value is None else Cell(1 - cell.value, low, high)
            )
            if key in self.replicates and cell.value is not None:
                samples[row] = 1 - torch.from_numpy(self.replicates[key][position])
        self._finish(column, samples)

    def _add_mean(self, column: Column, keys: Sequence[str], over: str, *, interval: bool) -> None:
        """A column of the plain mean of others, whose resamples are paired."""
        column = replace(
            column,
            definition=f"{column.definition} {over}",
            n=sum(c.n for c in self.columns if c.key in keys),
        )
        tested = all(key in self.replicates for key in keys)
        samples: dict[str, Tensor] = {}
        for position, row in enumerate(self.found.rows):
            cells = [self.cells[row][key] for key in keys]
            missing = next((c.note for c in cells if c.value is None), None)
            if missing is not None:
                self.cells[row][column.key] = Cell(None, note=missing)
                continue
            cell = Cell(sum(c.value for c in cells if c.value is not None) / len(cells))
            if tested:
                values = torch.from_numpy(np.mean([self.replicates[key][position] for key in keys], axis=0))
                samples[row] = values
                if interval:
                    span = bootstrap.percentile_interval(values, level=self.resampler.level)
                    cell = replace(cell, low=_known(span.low), high=_known(span.high))
            self.cells[row][column.key] = cell
        self._finish(column, samples)

    def add_costs(self) -> None:
        """Fit time, prediction time, memory, passes, parameters: whatever at least one method knows."""
        known = {row: about.get("cost", {}) for row, about in self.found.about.items()}
        failed = {row for row in known if row not in self.found.ran or COST in self.found.failures.get(row, {})}
        reasons = {row: "failed" if row in failed else "not known" for row in known}
        for column in COSTS:
            if not any(column.key in costs for costs in known.values()):
                continue
            for row, costs in known.items():
                value = costs.get(column.key)
                self.cells[row][column.key] = (
                    Cell(None, note=reasons[row]) if value is None else _cell(value, "unreadable")
                )
            self._finish(column, {})

    def report(self, details: Mapping[str, Any]) -> Report:
        """The finished report."""
        return Report(
            rows=self.found.rows,
            specs=tuple(self.columns),
            cells={row: dict(cells) for row, cells in self.cells.items()},
            details=details,
            predictions={row: self.found.predictions[row] for row in self.found.ran},
            replicates=self.replicates,
        )

    def add_dropped(self) -> None:
        """On how many examples of each set every method was not finite, where such examples are left out."""
        for dataset in dict.fromkeys(name for sets in self.found.unusable.values() for name in sets):
            if dataset == CALIBRATION:
                continue
            prefix, where = ("", "") if dataset == TEST else (f"{dataset}/", f", {place(dataset)}")
            kind = dataset.split("/")[0]
            key, group = f"{prefix}dropped", kind if kind in GROUPS else "accuracy"
            about = "Examples without a finite forecast; they are left out for every method."
            column = Column(key, f"Not finite{where}", group, definition=about, dataset=dataset, headline=False)
            for row in self.found.rows:
                # a twin is not finite where its original is not
                count = self.found.unusable.get(row, {}).get(dataset)
                self.cells[row][key] = Cell(None, note="not counted") if count is None else Cell(float(count))
            self._finish(column, {})

    def _predictions(self, row: str, dataset: str) -> Predictions | None:
        sets = self.found.predictions[row]
        if dataset in self.subgroups:
            return sets[TEST].subset(self.subgroups[dataset]) if TEST in sets else None
        return sets.get(dataset)

    def size(self, dataset: str) -> int:
        """Number of examples of a data set, or of a subgroup of the test data."""
        if dataset in self.subgroups:
            return len(self.subgroups[dataset])
        return next((len(sets[dataset]) for sets in self.found.predictions.values() if dataset in sets), 0)

    def _resamples(self, dataset: str, predictions: Predictions) -> Resamples:
        """The data set's resamples, the same for every method; a shifted copy of the test set shares its resamples."""
        test = self._drawn.get(TEST)
        if dataset.startswith("shift/") and test is not None and test.num_examples == len(predictions):
            return test
        if dataset not in self._drawn:
            self._drawn[dataset] = Resamples.draw(
                len(predictions), self.resampler.count, generator=self.resampler.generator, group=predictions.group
            )
        return self._drawn[dataset]

    def _with_interval(self, cell: Cell, name: str, predictions: Predictions, values: Tensor) -> Cell:
        span = bootstrap.interval(
            name,
            predictions,
            values,
            level=self.resampler.level,
            group=predictions.group,
            generator=torch.Generator(predictions.device).manual_seed(
                0
            ),  # the redrawn labels of all methods come from one seed
        )
        return replace(
            cell,
            low=_known(span.low),
            high=_known(span.high),
            expected=span.null_mean,
            expected_high=span.null_quantile,
        )

    def _finish(self, column: Column, samples: Mapping[str, Tensor]) -> None:
        """Keep the column and its resamples, and mark the best and whatever is not separable from it."""
        self.columns.append(column)
        if samples and len(samples) == len(self.found.ran):
            none = torch.full_like(next(iter(samples.values())), math.nan)  # of a method that failed
            self.replicates[column.key] = torch.stack([samples.get(row, none) for row in self.found.rows]).numpy()
        cells = {row: self.cells[row][column.key] for row in self.found.rows}
        ranked = {
            row: loss_of(column, c.value) for row, c in cells.items() if c.value is not None and is_ranked(column)
        }
        if len(ranked) < 2:
            return
        best = min(ranked, key=lambda row: ranked[row])
        adjusted: dict[str, float] = {}
        if enough_resamples(self.resampler.count, len(self.found.ran)):
            adjusted = tests(column, {row: samples[row] for row in ranked if row in samples}, best)
        # Untested values are level where they print alike: nobody can see why one of two zeros should be the better.
        places = render.decimals(column, list(cells.values()))
        printed = {row: render.fixed(column, cells[row].value, places) for row in ranked}
        for row in ranked:
            p = adjusted.get(row)
            level = ranked[row] == ranked[best] or (not adjusted and printed[row] == printed[best])
            marked = level or (p is not None and p > SIGNIFICANCE)
            self.cells[row][column.key] = replace(cells[row], best=marked, p=p)


def _cell(value: float, reason: str) -> Cell:
    return Cell(None, note=reason or "undefined") if math.isnan(value) else Cell(float(value))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _group(metric: Metric) -> str:
    for group, names in _GROUPS.items():
        if metric.name in names:
            return group
    return "proper" if metric.proper else "calibration"


def _sentence(label: str) -> str:
    return label[:1].upper() + label[1:]
