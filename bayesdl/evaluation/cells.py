"""What a report is made of: columns, cells, differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bayesdl.errors import UnsupportedError

GROUPS = {
    "proper": "Proper scores",
    "accuracy": "Accuracy",
    "calibration": "Calibration",
    "ood": "Out-of-distribution detection",
    "selective": "Selective prediction",
    "shift": "Under shift",
    "group": "Subgroups",
    "cost": "Cost",
}


@dataclass(frozen=True)
class Column:
    """What one column of a report means.

    Attributes:
        key: the name by which values are looked up, such as `nll` or `ood/noise/auroc`.
        label: the short name that tables print.
        group: one of `GROUPS`.
        direction: `min`, `max`, `target` (closest to `target` is best) or `none` (never ranked).
        unit: unit of the values; `fraction` is printed as a percentage.
        definition: one sentence, printed as a note.
        target: the value aimed at, where the direction is `target`.
        n: number of examples behind each value; 0 for costs.
        dataset: the data the column was computed on.
        headline: whether tables show it; other columns are still in `rep[row]`, pandas, CSV and JSON.
    """

    key: str
    label: str
    group: str
    direction: str = "none"
    unit: str = ""
    definition: str = ""
    target: float | None = None
    n: int = 0
    dataset: str = "test"
    headline: bool = True

    @property
    def place(self) -> str:
        """The data set in words, such as `noise` or `rotation 15`; empty for the test data."""
        return place(self.dataset)

    @property
    def short(self) -> str:
        """The label without the data set, for a table that names it elsewhere."""
        return self.label.removesuffix(f", {self.place}") if self.place else self.label


COSTS = (
    Column("fit_seconds", "Fit time", "cost", "min", "s", "Seconds to fit the method on top of the trained network."),
    Column("ms_per_example", "Time", "cost", "min", "ms / example", "Milliseconds to predict one example."),
    Column("peak_mib", "Peak memory", "cost", "min", "MiB", "Memory a prediction needs above what was held before it."),
    Column(
        "forward_passes", "Forward passes", "cost", "min", "", "Cost of a prediction in passes through the network."
    ),
    Column("parameters", "Parameters", "cost", "none", "", "Parameters that the method treats as uncertain."),
)


@dataclass(frozen=True)
class Cell:
    """One value of a report; None stands for "there is none".

    Attributes:
        value: the value, None where it is undefined; `note` then says why.
        low, high: the interval's ends.
        best: printed bold: the best of its column, or not separable from the best at 5 % after Holm.
        p: Holm-adjusted p-value of the paired difference to the column's best; None for the best itself.
        note: why there is no value.
        expected, expected_high: mean and upper quantile under perfect calibration at this n (calibration errors only).
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    best: bool = False
    p: float | None = None
    note: str = ""
    expected: float | None = None
    expected_high: float | None = None


@dataclass(frozen=True)
class Difference:
    """`row` minus `reference` in one column, from paired resamples.

    Attributes:
        value: difference of the two values.
        low, high: percentile interval of the paired differences at the report's level.
        p: two-sided bootstrap p-value.
        adjusted: the same after Holm over all rows compared with this reference.
    """

    value: float
    low: float
    high: float
    p: float
    adjusted: float


def place(dataset: str) -> str:
    """`ood/noise`, `shift/rotation/15`, `group/a` in words: `noise`, `rotation 15`, `a`; empty for the test data."""
    return dataset.split("/", 1)[1].replace("/", " ") if "/" in dataset else ""


def loss_of(column: Column, value: float | None) -> float:
    """`value` turned so that lower is better in any ranked column.

    Raises:
        UnsupportedError: the column is never ranked.
    """
    number = math.nan if value is None else value
    if column.direction == "min":
        return number
    if column.direction == "max":
        return -number
    if column.direction == "target" and column.target is not None:
        return abs(number - column.target)
    raise UnsupportedError(f"column {column.key!r} has direction {column.direction!r} and is never ranked")
