"""Paired tests between rows of a report from its resamples, adjusted by Holm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesdl.evaluation import bootstrap
from bayesdl.evaluation.cells import Column, Difference

if TYPE_CHECKING:
    from bayesdl.evaluation.report import Report

SIGNIFICANCE = 0.05


def enough_resamples(count: int, rows: int) -> bool:
    """Whether the smallest p-value that `count` resamples can give survives Holm over `rows` methods at 5 %."""
    return 2 * max(rows - 1, 1) / (count + 1) <= SIGNIFICANCE


def tests(column: Column, samples: Mapping[str, Tensor], reference: str) -> dict[str, float]:
    """Holm-adjusted p-value of the paired difference of every other row to `reference`.

    Against a reference chosen beforehand the family-wise error is held. Against the best of the same data it is not
    quite: simulated with two, three, five and eight equal methods, 6, 7, 9 and 8 % of data sets instead of 5 %.
    """
    if reference not in samples:
        return {}
    base = _losses(column, samples[reference])
    raw = {
        row: bootstrap.bootstrap_p(_minus(_losses(column, s), base)) for row, s in samples.items() if row != reference
    }
    return holm(raw)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Step-down adjustment of Holm (1979): controls the chance of any false finding among the given tests."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, row in enumerate(sorted(p, key=lambda row: p[row])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[row]))
        adjusted[row] = highest
    return {row: adjusted[row] for row in p}


def paired_difference(report: Report, row: str, reference: str, key: str) -> Difference:
    """`row` minus `reference` in one column, with an interval and p-values from the report's resamples."""
    column = report.column(key)
    samples = {
        name: torch.from_numpy(report.replicates[key][i])
        for i, name in enumerate(report.rows)
        if name not in report.failures
    }
    differences = _minus(samples[row], samples[reference])
    span = bootstrap.percentile_interval(differences, level=float(report.details["level"]))
    ranked = column if is_ranked(column) else replace(column, direction="min")
    p = bootstrap.bootstrap_p(_minus(_losses(ranked, samples[row]), _losses(ranked, samples[reference])))
    adjusted = 1.0 if row == reference else tests(ranked, samples, reference)[row]
    value = report[row][key] - report[reference][key]
    return Difference(0.0 if row == reference else value, span.low, span.high, p, adjusted)


def is_ranked(column: Column) -> bool:
    """Whether its values have a best one."""
    return column.direction in ("min", "max") or (column.direction == "target" and column.target is not None)


def _losses(column: Column, values: Tensor) -> Tensor:
    turn: dict[str, Callable[[Tensor], Tensor]] = {
        "min": lambda v: v,
        "max": lambda v: -v,
        "target": lambda v: (v - (column.target or 0.0)).abs(),
    }
    return turn[column.direction](values)


def _minus(left: Tensor, right: Tensor) -> Tensor:
    """Difference in which two equal infinities cancel."""
    return torch.where(left == right, torch.zeros_like(left), left - right)
