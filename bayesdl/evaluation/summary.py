"""What a report shows, in sentences computed from its numbers: no adjective that a number does not carry."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bayesdl.evaluation import render
from bayesdl.evaluation.cells import Column, loss_of
from bayesdl.evaluation.report import Report


def sentences(report: Report) -> tuple[str, ...]:
    """First the method with the best NLL and whether its lead is separable, and which of its equals costs least; then
    accuracy, calibration, OOD, cost.
    """
    chosen = _choice(report)
    found = [
        _score(report),
        chosen,
        _accuracy(report),
        _calibration(report),
        _coverage(report),
        *_ood(report),
        *_shift(report),
        "" if chosen else _cost(report),
        *(f"{called(row)} {render.failed(report, row)}." for row in report.failures),
    ]
    return tuple(text for text in found if text)


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def called(row: str) -> str:
    """The name of a method, in quotes where it would run into the sentence."""
    return f"“{row}”" if "," in row or " and " in row else row


def number(report: Report, row: str, key: str) -> str:
    """The value with its unit, such as `0.312 nats` or `94.1 %`."""
    column = report.column(key)
    places = render.decimals(column, render.column_cells(report, column))
    text = render.fixed(column, report.cell(row, key).value, places)
    unit = render.unit(column)
    return f"{text}\N{NO-BREAK SPACE}{unit}" if unit else text


def _defined(report: Report, key: str) -> list[str]:
    """Rows with a finite value in column `key`."""
    if key not in report.columns:
        return []
    return [row for row in report.rows if (value := report.cell(row, key).value) is not None and math.isfinite(value)]


def _peers(report: Report, key: str, best: str) -> tuple[list[str], bool]:
    """Names of the rows that cannot be told apart from the best, and whether a test was made at all."""
    cells = {row: report.cell(row, key) for row in report.ran if row != best}
    tested = any(cell.p is not None for cell in cells.values())
    return [called(row) for row, cell in cells.items() if cell.best], tested


def _score(report: Report) -> str:
    rows = _defined(report, "nll")
    best = report.best("nll") if rows else None
    if best is None:
        return ""
    value = number(report, best, "nll")
    if len(report.ran) == 1:
        return f"{called(best)} scores a negative log-likelihood (NLL) of {value}."
    start = f"{called(best)} predicts best by negative log-likelihood (NLL): {value}"
    peers, tested = _peers(report, "nll", best)
    if not tested:
        return f"{start}. No test was made, so whether its lead is more than chance is not known."
    ranked = sorted(
        (r for r in rows if r != best), key=lambda r: loss_of(report.column("nll"), report.cell(r, "nll").value)
    )
    if peers:
        others = [called(row) for row in report.ran if row != best and called(row) not in peers]
        rest = f"; it does beat {listed(others)}" if others else ""
        return f"{start}, but these data cannot tell it apart from {listed(peers)}{rest}."
    runner = ranked[0] if ranked else None
    ahead = f" The next best, {called(runner)}, is at {number(report, runner, 'nll')}." if runner else ""
    return f"{start}, and its lead over every other method is more than chance explains (5 % level).{ahead}"


def _choice(report: Report) -> str:
    """The cheapest of the methods that the NLL cannot tell apart."""
    best = report.best("nll") if _defined(report, "nll") else None
    if best is None or not _peers(report, "nll", best)[1]:
        return ""
    equals = [row for row in report.ran if row == best or report.cell(row, "nll").best]
    times = {row: report[row]["ms_per_example"] for row in _defined(report, "ms_per_example") if row in equals}
    if len(equals) < 2 or len(times) < len(equals):
        return ""
    cheapest = min(times, key=lambda row: times[row])
    others = "" if cheapest == best else f" ({called(best)}: {_milliseconds(times[best])})"
    return f"Of these, {called(cheapest)} is the cheapest to run: {_milliseconds(times[cheapest])} an example{others}."


def _accuracy(report: Report) -> str:
    key = "accuracy" if "accuracy" in report.columns else "rmse"
    rows = _defined(report, key)
    best = report.best(key) if rows else None
    if best is None or len(report.ran) == 1:
        return f"Its {_name(report.column(key))} is {number(report, best, key)}." if best is not None else ""
    name = _name(report.column(key))
    peers, tested = _peers(report, key, best)
    if tested and len(peers) == len(report.ran) - 1:
        worst = max(rows, key=lambda r: loss_of(report.column(key), report.cell(r, key).value))
        return (
            f"By {name} the methods cannot be told apart: from {number(report, best, key)} ({called(best)}) to "
            f"{number(report, worst, key)} ({called(worst)})."
        )
    same = f", level with {listed(peers)}" if peers and tested else ""
    return f"Best by {name}: {called(best)} with {number(report, best, key)}{same}."


def _name(column: Column) -> str:
    return column.label if column.label.isupper() else column.label[0].lower() + column.label[1:]


def _calibration(report: Report) -> str:
    rows = [row for row in _defined(report, "ece") if report.cell(row, "ece").expected_high is not None]
    if not rows:
        return ""
    inside = [row for row in rows if (c := report.cell(row, "ece")).value <= c.expected_high]  # type: ignore[operator]
    beyond = [row for row in rows if row not in inside]
    parts = []
    if inside:
        words = [f"{called(row)} ({number(report, row, 'ece')})" for row in inside]
        parts.append(
            f"The calibration error (ECE) of {listed(words)} is no larger than chance gives a perfectly calibrated "
            "method on a test set of this size."
        )
    if beyond:
        words = [f"{called(row)} ({number(report, row, 'ece')}{_leaning(report, row)})" for row in beyond]
        parts.append(f"Miscalibrated beyond chance: {listed(words)}.")
    return " ".join(parts)


def _leaning(report: Report, row: str) -> str:
    gap = report.details.get("methods", {}).get(row, {}).get("confidence_gap")
    if gap is None or gap == 0:
        return ""
    return ", over-confident" if gap > 0 else ", under-confident"


def _coverage(report: Report) -> str:
    rows = _defined(report, "picp_90")
    if not rows:
        return ""
    texts = []
    for row in rows:
        low, high = report.interval(row, "picp_90")
        share = number(report, row, "picp_90")
        word = "too narrow" if high < 0.9 else "too wide" if low > 0.9 else "as claimed"
        texts.append(f"{share} for {called(row)}" + ("" if math.isnan(low) else f" ({word})"))
    return f"Intervals that claim to hold 90 % of the targets hold {listed(texts)}."


def _ood(report: Report) -> list[str]:
    found = []
    for column in report.headline("ood"):
        if not column.key.endswith("/auroc"):
            continue
        name = column.key.split("/")[1]
        best = report.best(column.key)
        if best is None:
            continue
        value = report.cell(best, column.key).value or 0.0
        peers, tested = _peers(report, column.key, best)
        level = f", level with {listed(peers)}" if peers and tested else ""
        verdict = " That is no better than tossing a coin." if value <= 0.55 else ""
        who = f"{called(best)} notices it best" if len(report.ran) > 1 else f"{called(best)} notices it"
        found.append(f"Unfamiliar data “{name}”: {who}, with AUROC {number(report, best, column.key)}{level}.{verdict}")
    return found


def _shift(report: Report) -> list[str]:
    found = []
    for name in report.details.get("shift", {}):
        key = f"shift/{name}/nll"
        best = report.best(key) if _defined(report, key) else None
        if best is None or len(report.ran) == 1:
            continue
        peers, tested = _peers(report, key, best)
        level = f", level with {listed(peers)}" if peers and tested else ""
        found.append(f"Under {name}: best by mean NLL is {called(best)} with {number(report, best, key)}{level}.")
    return found


def _cost(report: Report) -> str:
    rows = _defined(report, "ms_per_example")
    if len(rows) < 2:
        return ""
    times = {row: report[row]["ms_per_example"] for row in rows}
    fastest = min(times, key=lambda row: times[row])
    best = report.best("nll") if "nll" in report.columns else None
    text = f"Cheapest to run: {called(fastest)} with {_milliseconds(times[fastest])} an example"
    if best in times and best != fastest and times[fastest] > 0:
        text += f"; {called(best)} takes {times[best] / times[fastest]:.3g} times as long"
    return text + "."


def _milliseconds(value: float) -> str:
    return f"{value:.3g}\N{NO-BREAK SPACE}ms" if value >= 0.01 else f"{1000 * value:.3g}\N{NO-BREAK SPACE}µs"
