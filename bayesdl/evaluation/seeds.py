"""Spread over training seeds: one report per seed, then means, standard errors and paired t-tests over the seeds."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bayesdl.errors import ArgumentError
from bayesdl.evaluation.cells import Cell, Column, Difference, loss_of
from bayesdl.evaluation.predictions import Predictions
from bayesdl.evaluation.report import Report
from bayesdl.evaluation.significance import SIGNIFICANCE, holm

SEEDS = "seeds"


def split_seeds(methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Methods of each seed, from lists of equal length. Raises `ArgumentError` where they are not."""
    lengths = {str(row): len(v) if isinstance(v, (list, tuple)) else 0 for row, v in methods.items()}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < 2:
        told = ", ".join(f"{row}: {n or 'no list'}" for row, n in lengths.items())
        raise ArgumentError(f"seeds are compared in pairs, so every method needs the same two or more; got {told}")
    return [{row: value[i] for row, value in methods.items()} for i in range(next(iter(lengths.values())))]


def of_seed(source: Any, index: int, count: int, where: str) -> Any:
    """What one seed's models are scored on: loaders serve all seeds, predictions by method come as a list a method.

    Args:
        source: a loader, {method: [Predictions of each seed]}, or severities of either; `where` names it in an error.
        index, count: of the seed.

    Raises:
        ArgumentError: predictions that are no list of `count`.
    """
    if isinstance(source, Mapping):
        return {key: _member(value, index, count, f"{where}[{key!r}]") for key, value in source.items()}
    return source


def _member(value: Any, index: int, count: int, where: str) -> Any:
    if _holds(value):
        if len(value) != count:
            raise ArgumentError(f"{where}: {len(value)} predictions were given, expected {count}, one for each seed")
        return value[index]
    if _is_given(value):
        raise ArgumentError(f"{where}: expected a list of {count} predictions, one for each seed, got one alone")
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Mapping) for part in value):
        # Severities of a shift as a list; a loader that is a list of batches holds no predictions and stays as it is.
        if any(_is_given(one) or _holds(one) for part in value for one in part.values()):
            return [of_seed(part, index, count, f"{where}[{place}]") for place, part in enumerate(value)]
        return value
    return of_seed(value, index, count, where)


def _holds(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_given(one) for one in value)


def _is_given(value: Any) -> bool:
    return isinstance(value, (Predictions, str, os.PathLike))


def join_seeds(reports: Sequence[Report], level: float) -> Report:
    """Mean over seeds in every cell, with mean -+ standard error; the best and what no paired t-test separates bold."""
    first = reports[0]
    # A column that only a failed method would have had is not in every report.
    specs = tuple(c for c in first.specs if all(c.key in report.columns for report in reports))
    cells: dict[str, dict[str, Cell]] = {row: {} for row in first.rows}
    replicates: dict[str, np.ndarray] = {}
    for column in specs:
        values = np.array([[_number(r, row, column.key) for r in reports] for row in first.rows])
        for row, seen in zip(first.rows, values, strict=True):
            if np.isnan(seen).any():
                note = next(n for r in reports if (n := r.cell(row, column.key).note) or r is reports[-1])
                cells[row][column.key] = Cell(None, note=note or "undefined for a seed")
                continue
            mean = float(seen.mean())
            finite = bool(np.isfinite(seen).all())
            error = float(seen.std(ddof=1)) / math.sqrt(len(seen)) if finite else math.nan
            expected = [c.expected for r in reports if (c := r.cell(row, column.key)).expected is not None]
            cells[row][column.key] = Cell(
                mean,
                mean - error if finite else None,
                mean + error if finite else None,
                expected=float(np.mean(expected)) if expected else None,
            )
        replicates[column.key] = values
        _mark(column, cells, values, first.rows)
    later = [(i, text) for i, r in enumerate(reports[1:], start=2) for text in r.details.get("shortfalls", ())]
    notes = [*first.details.get("notes", ()), *(f"Seed {i}: {text}" for i, text in later), _NOTE.format(len(reports))]
    details = {**first.details, "spread": SEEDS, "num_seeds": len(reports), "level": level, "notes": notes}
    predictions = first.predictions
    if failures := _failures(reports):
        details["failures"] = failures
        predictions = {row: sets for row, sets in predictions.items() if row not in failures}
    return replace(first, specs=specs, cells=cells, replicates=replicates, details=details, predictions=predictions)


def _failures(reports: Sequence[Report]) -> dict[str, str]:
    """Rows that failed for a seed, so that there is no mean over seeds, with the first seed's reason."""
    found: dict[str, str] = {}
    for index, report in enumerate(reports, start=1):
        for row, reason in report.failures.items():
            found.setdefault(row, f"seed {index}: {reason}")
    return {row: found[row] for row in reports[0].rows if row in found}


def seed_difference(report: Report, row: str, reference: str, column: Column, *, test: str = "t") -> Difference:
    """`row` minus `reference`, paired by seed, with a t interval and p-values of the test in `TESTS`."""
    if test not in TESTS:
        raise ArgumentError(f"test={test!r} is unknown; available: {', '.join(TESTS)}")
    from scipy.stats import t

    values = report.replicates[column.key]
    base = values[report.rows.index(reference)]
    differences = values[report.rows.index(row)] - base
    mean, n = float(differences.mean()), len(differences)
    half = float(t.ppf((1 + float(report.details["level"])) / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    others = set(report.ran) - {reference}
    p = {other: TESTS[test](values[i] - base) for i, other in enumerate(report.rows) if other in others}
    if row == reference:
        return Difference(0.0, 0.0, 0.0, 1.0, 1.0)
    return Difference(mean, mean - half, mean + half, p[row], holm(p)[row])


def paired_t(differences: np.ndarray) -> float:
    """Two-sided p-value of Student's paired t-test; 1 where all differences are 0, NaN where one is not finite."""
    if not np.isfinite(differences).all():
        return math.nan
    spread = differences.std(ddof=1)
    if spread == 0:
        return 1.0 if differences[0] == 0 else 0.0
    from scipy.stats import t

    return float(2 * t.sf(abs(differences.mean()) / (spread / math.sqrt(len(differences))), len(differences) - 1))


def signed_ranks(differences: np.ndarray) -> float:
    """Two-sided exact p-value of Wilcoxon's signed-rank test (1945); NaN where a difference is not finite.

    Zeros are left out, ties share their mean rank, and the law of the rank sum under random signs is that of these
    very ranks, by convolution: exact for any number of differences, with ties as without.
    """
    if not np.isfinite(differences).all():
        return math.nan
    found = differences[differences != 0]
    sizes = np.abs(found)
    # twice the mean rank, so that it is a whole number: below + (below + equal + 1)
    ranks = (sizes < sizes[:, None]).sum(1) + (sizes <= sizes[:, None]).sum(1) + 1
    law = np.zeros(int(ranks.sum()) + 1)
    law[0] = 1.0
    for rank in ranks:
        law[rank:], law[:rank] = (law[rank:] + law[:-rank]) / 2, law[:rank] / 2
    at = int(ranks[found > 0].sum())
    return min(1.0, 2 * min(float(law[: at + 1].sum()), float(law[at:].sum())))


TESTS: dict[str, Callable[[np.ndarray], float]] = {"t": paired_t, "wilcoxon": signed_ranks}

_NOTE = (
    "Spread: mean over {} training seeds; the interval is one standard error to either side. Tests are paired by seed "
    "(Student's t), adjusted by Holm over the methods of a column."
)


def _number(report: Report, row: str, key: str) -> float:
    value = report.cell(row, key).value
    return math.nan if value is None else value


def _mark(column: Column, cells: dict[str, dict[str, Cell]], values: np.ndarray, rows: Sequence[str]) -> None:
    if column.direction == "none":
        return
    ranked = {row: loss_of(column, c.value) for row in rows if (c := cells[row][column.key]).value is not None}
    if len(ranked) < 2:
        return
    best = min(ranked, key=lambda row: ranked[row])
    turned = np.abs(values - (column.target or 0.0)) if column.direction == "target" else values
    base = turned[rows.index(best)]
    raw = {row: paired_t(turned[rows.index(row)] - base) for row in ranked if row != best}
    adjusted = holm({row: p for row, p in raw.items() if not math.isnan(p)})
    for row in ranked:
        p = adjusted.get(row)
        marked = row == best or ranked[row] == ranked[best] or (p is not None and p > SIGNIFICANCE)
        cells[row][column.key] = replace(cells[row][column.key], best=marked, p=p)
