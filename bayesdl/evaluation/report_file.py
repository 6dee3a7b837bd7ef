"""Reading a report's JSON: a file is data from elsewhere, and every entry of it is looked at before it is believed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from bayesdl.errors import FileFormatError
from bayesdl.evaluation.cells import GROUPS, Cell, Column

FORMAT, VERSION = "bayesdl-report", 1
DIRECTIONS = ("min", "max", "target", "none")
LONGEST = 1 << 24  # characters of a number given as text, such as "inf", are few; of any text not that many

Check = Callable[[Any], bool]


def parse(text: str) -> tuple[tuple[str, ...], tuple[Column, ...], dict[str, dict[str, Cell]], dict[str, Any]]:
    """Rows, columns, cells and details of what `Report.to_json` wrote.

    Raises:
        FileFormatError: not a report, a newer format version, or a damaged one.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"not a report: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FileFormatError(f'not a report: expected an object with "format": "{FORMAT}"')
    if content.get("version") != VERSION:
        raise FileFormatError(f"report version {content.get('version')!r}; this release reads {VERSION}")
    try:
        rows = tuple(content["rows"])
        columns = tuple(_column(entry) for entry in content["columns"])
        keys = [column.key for column in columns]
        _need(all(map(_is_text, rows)) and len(set(rows)) == len(rows), "rows")
        _need(len(set(keys)) == len(keys), "columns")
        _need(set(content["cells"]) == set(rows), "cells")
        cells = {row: {key: _cell(entry) for key, entry in content["cells"][row].items()} for row in rows}
        _need(all(set(found) == set(keys) for found in cells.values()), "cells")
        details = content["details"]
        _need(isinstance(details, dict), "details")
        for name, check in _DETAILS.items():
            _need(name not in details or check(details[name]), f"details: {name}")
        _need(set(details.get("failures", ())) <= set(rows), "details: failures")
        return rows, columns, cells, details
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"a damaged report: {error}") from error


def _column(entry: Mapping[str, Any]) -> Column:
    for name, value in entry.items():
        _need(_COLUMN[name](value), f"column {name}")
    return Column(**entry)


def _cell(entry: Mapping[str, Any]) -> Cell:
    """A cell; infinities and NaN come as text."""
    found: dict[str, Any] = {
        name: float(v) if isinstance(v, str) and name != "note" else v for name, v in entry.items()
    }
    for name, value in found.items():
        _need(_CELL[name](value), f"cell {name}")
    return Cell(**found)


def _need(fine: bool, what: str) -> None:
    if not fine:
        raise FileFormatError(f"a damaged report: {what} is not what a report holds")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < LONGEST


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 62
    return isinstance(value, float)


def _is_count(value: Any) -> bool:
    return _is_number(value) and isinstance(value, int) and value >= 0


def _mapping(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(entry) for entry in value.values())


def _sequence(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(entry) for entry in value)


def _method(value: Any) -> bool:
    numbers = ("temperature", "confidence_gap")
    return isinstance(value, dict) and all(_is_number(value[name]) for name in numbers if name in value)


_COLUMN: dict[str, Check] = {
    **dict.fromkeys((field.name for field in fields(Column)), _is_text),
    "group": lambda value: _is_text(value) and value in GROUPS,
    "direction": lambda value: _is_text(value) and value in DIRECTIONS,
    "target": lambda value: value is None or _is_number(value),
    "n": _is_count,
    "headline": lambda value: isinstance(value, bool),
}
_CELL: dict[str, Check] = {
    **dict.fromkeys((field.name for field in fields(Cell)), lambda value: value is None or _is_number(value)),
    "best": lambda value: isinstance(value, bool),
    "note": _is_text,
}
_DETAILS: dict[str, Check] = {
    **dict.fromkeys(("task", "score", "device", "spread", "data", "command"), _is_text),
    "n": _is_count,
    "bootstrap": _is_count,
    "level": lambda value: _is_number(value) and 0 < value < 1,
    "seed": lambda value: value is None or _is_number(value),
    "sizes": _mapping(_is_count),
    "shift": _mapping(_sequence(_is_text)),
    "shift_metrics": _sequence(_is_text),
    "methods": _mapping(_method),
    "versions": _mapping(_is_text),
    "notes": _sequence(_is_text),
    "shortfalls": _sequence(_is_text),
    "num_seeds": _is_count,
    "failures": _mapping(_is_text),
}
