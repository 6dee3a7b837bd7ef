"""`Report`: the finished comparison as a value. It holds numbers, intervals and words; it computes no metric itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayesdl.errors import ArgumentError, UnknownNameError, UnsupportedError, require
from bayesdl.evaluation.cells import Cell, Column, Difference, loss_of
from bayesdl.evaluation.report_file import FORMAT, VERSION, parse

if TYPE_CHECKING:
    import pandas
    from rich.console import Group

    from bayesdl.evaluation.plots import Plots
    from bayesdl.evaluation.predictions import Predictions


class Row(dict[str, float]):
    """Values of one method by column; NaN where a value is undefined."""

    def __missing__(self, key: str) -> float:
        raise UnknownNameError(f"the report has no column {key!r}; its columns are {', '.join(self)}")


@dataclass(frozen=True)
class Report:
    """A table of methods (rows) against metrics (columns) with intervals. `rep["laplace"]["nll"]` is a float.

    Attributes:
        rows: method names in the order given.
        specs: one `Column` for each column.
        cells: `cells[row][key]` is a `Cell`.
        details: footer values: n, bootstrap, level, seed, versions, temperatures, what was measured how.
        predictions: raw predictions, `predictions[row][data set]`; data sets are `test`, `ood/<set>`,
            `shift/<name>/<severity>`. Not part of equality, nor of JSON.
        replicates: `replicates[key]` of shape (rows, R): every value on every paired resample. Not part of equality,
            nor of JSON.
    """

    rows: tuple[str, ...]
    specs: tuple[Column, ...]
    cells: Mapping[str, Mapping[str, Cell]]
    details: Mapping[str, Any] = field(default_factory=dict)
    predictions: Mapping[str, Mapping[str, Predictions]] = field(default_factory=dict, compare=False, repr=False)
    replicates: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys of all columns, headline and other."""
        return tuple(column.key for column in self.specs)

    @property
    def task(self) -> str:
        """`classification`, `multilabel`, `regression` or `count`."""
        return str(self.details.get("task", "classification"))

    @property
    def failures(self) -> Mapping[str, str]:
        """Why a method failed, by row; its cells hold no value. Empty unless `compare(..., on_error="row")`."""
        found: Mapping[str, str] = self.details.get("failures", {})
        return found

    @property
    def ran(self) -> tuple[str, ...]:
        """The rows whose method did not fail, in order: those that figures show and sentences rank."""
        return tuple(row for row in self.rows if row not in self.failures)

    def column(self, key: str) -> Column:
        """What column `key` means.

        Raises:
            UnknownNameError: there is no such column.
        """
        for column in self.specs:
            if column.key == key:
                return column
        raise UnknownNameError(f"the report has no column {key!r}; its columns are {', '.join(self.columns)}")

    def headline(self, group: str | None = None) -> tuple[Column, ...]:
        """The columns that tables show, of one group or of all."""
        return tuple(c for c in self.specs if c.headline and (group is None or c.group == group))

    def __getitem__(self, row: str) -> Row:
        return Row({key: math.nan if c.value is None else c.value for key, c in self._row(row).items()})

    def __contains__(self, row: object) -> bool:
        return row in self.cells

    def _row(self, row: str) -> Mapping[str, Cell]:
        if row not in self.cells:
            raise UnknownNameError(f"the report has no row {row!r}; its rows are {', '.join(self.rows)}")
        return self.cells[row]

    def cell(self, row: str, key: str) -> Cell:
        """The cell with its interval, test and notes.

        Raises:
            UnknownNameError: there is no such row or column.
        """
        cells = self._row(row)
        return cells[self.column(key).key]

    def interval(self, row: str, key: str) -> tuple[float, float]:
        """Ends of the interval at the report's level; (NaN, NaN) where the column has none.

        Raises:
            UnknownNameError: there is no such row or column.
        """
        cell = self.cell(row, key)
        if cell.low is None or cell.high is None:
            return math.nan, math.nan
        return cell.low, cell.high

    def difference(self, row: str, reference: str, key: str, *, test: str | None = None) -> Difference:
        """`row` minus `reference` in column `key`, on the same resamples or paired by training seed.

        Args:
            row, reference: methods.
            key: the column.
            test: over seeds, "t" (Student's paired t-test, the default) or "wilcoxon" (exact signed ranks, which
                assume no normal law; n seeds give no p below 2^(1 - n), so fewer than six are never significant at
                5 %). The interval is Student's either way.

        Raises:
            ArgumentError: a test that does not exist, or one over seeds where the spread is not over seeds.
            UnknownNameError: there is no such row or column.
            UnsupportedError: the column was not resampled, a method failed, or the report was read from a file.
        """
        self.cell(row, key), self.cell(reference, key)
        for name in (row, reference):
            if name in self.failures:
                raise UnsupportedError(f"{name!r} has no values to compare, since it failed: {self.failures[name]}")
        if key not in self.replicates:
            raise UnsupportedError(
                f"column {key!r} has no resamples: it is not resampled, bootstrap=0, or the report was read from JSON; "
                "run compare(..., bootstrap=1000)"
            )
        if self.details.get("spread") == "seeds":
            from bayesdl.evaluation.seeds import seed_difference

            return seed_difference(self, row, reference, self.column(key), test="t" if test is None else test)
        if test is not None:
            raise ArgumentError(
                f"test={test!r} is over training seeds, and these are resamples of test points; leave it out, or give "
                "compare a list of models, one a seed, for every method"
            )
        from bayesdl.evaluation.significance import paired_difference

        return paired_difference(self, row, reference, key)

    def best(self, key: str) -> str | None:
        """The row with the best value in column `key`; the first of equals, None where the column is not ranked."""
        column = self.column(key)
        ranked = [row for row in self.rows if (c := self.cells[row][key]).value is not None and not math.isnan(c.value)]
        if column.direction == "none" or not ranked:
            return None
        return min(ranked, key=lambda row: loss_of(column, self.cells[row][key].value))

    @property
    def plot(self) -> Plots:
        """The figures: `rep.plot.reliability(row)`, `.risk_coverage()`, ...; each returns Matplotlib Axes."""
        from bayesdl.evaluation.plots import Plots

        return Plots(self)

    def summary(self) -> tuple[str, ...]:
        """What the numbers show, in sentences."""
        from bayesdl.evaluation.summary import sentences

        return sentences(self)

    def to_pandas(self, *, intervals: bool = False) -> pandas.DataFrame:
        """Rows by columns; with `intervals` every column becomes three: value, low, high.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        frame = require("pandas")
        if not intervals:
            return frame.DataFrame([self[row] for row in self.rows], index=list(self.rows), columns=list(self.columns))
        records = [
            {
                (key, part): value
                for key in self.columns
                for part, value in zip(
                    ("value", "low", "high"), (self[row][key], *self.interval(row, key)), strict=True
                )
            }
            for row in self.rows
        ]
        table = frame.DataFrame(records, index=list(self.rows))
        table.columns = frame.MultiIndex.from_tuples(table.columns)
        return table

    def to_markdown(self, *, intervals: bool = True, notes: bool = True) -> str:
        """One pipe table of the headline columns; best values bold, definitions below."""
        from bayesdl.evaluation.render import markdown

        return markdown(self, intervals=intervals, notes=notes)

    def to_csv(self) -> str:
        """All columns, one line a row: `method`, then for every column its value, `.low` and `.high`.

        Where a method failed, a last column `failed` says why.
        """
        from bayesdl.evaluation.render import csv_text

        return csv_text(self)

    def to_latex(self) -> str:
        """One booktabs table of the headline columns; best values bold."""
        from bayesdl.evaluation.render import latex

        return latex(self)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained page (no script, no external address) atomically, and return its path."""
        from bayesdl.evaluation.html import write_page

        return write_page(self, path)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Everything but raw predictions and resamples; strict JSON, infinities as text."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "rows": list(self.rows),
            "columns": [asdict(column) for column in self.specs],
            "cells": {row: {key: _plain(asdict(c)) for key, c in cells.items()} for row, cells in self.cells.items()},
            "details": _plain(dict(self.details)),
        }
        return json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote; the result equals the report that was written.

        Raises:
            FileFormatError: not a report, a newer format version, or a damaged one.
        """
        rows, specs, cells, details = parse(text)
        return cls(rows=rows, specs=specs, cells=cells, details=details)

    def save_predictions(self, directory: str | os.PathLike[str]) -> dict[str, dict[str, Path]]:
        """Write the raw predictions as `<directory>/<row>/<data set>.npz`; returns the paths by row and data set.

        Characters that file systems do not accept everywhere become `_`.

        Raises:
            UnsupportedError: the report holds no predictions (it was read from JSON).
        """
        if not self.predictions:
            raise UnsupportedError("this report holds no raw predictions: it was read from JSON")
        paths: dict[str, dict[str, Path]] = {}
        taken: set[str] = set()
        for row, sets in self.predictions.items():
            folder = _unique(_file_name(row), taken)
            files: set[str] = set()
            for name, predictions in sets.items():
                target = Path(directory) / folder / f"{_unique(_file_name(name), files)}.npz"
                target.parent.mkdir(parents=True, exist_ok=True)
                predictions.save(target)
                paths.setdefault(row, {})[name] = target
        return paths

    def __str__(self) -> str:
        from bayesdl.evaluation.render import plain_text

        return plain_text(self)

    def __rich__(self) -> Group:
        from bayesdl.evaluation.render import rich_group

        return rich_group(self)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def _plain(value: Any) -> Any:
    """JSON-ready copy: strict JSON knows neither NaN nor infinity, tuples become lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _file_name(name: str) -> str:
    cleaned = "".join(ch if ch.isalnum() or ch in "-_.+" else "_" for ch in name).lstrip(".")
    return cleaned or "_"


def _unique(name: str, taken: set[str]) -> str:
    """`name`, numbered if another name became the same file name (case does not count: some file systems ignore it)."""
    candidate, count = name, 1
    while candidate.lower() in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate.lower())
    return candidate
