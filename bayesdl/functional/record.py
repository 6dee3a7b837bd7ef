"""Reports of matches as JSON, for files of priors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from bayesdl.functional.report import Fit, MatchReport


def to_json(report: MatchReport) -> dict[str, Any]:
    """Everything in the report, as dictionaries, lists, numbers and text."""
    return asdict(report)


def from_json(found: Mapping[str, Any]) -> MatchReport:
    """What `to_json` made.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not that.
    """
    if set(found) != {entry.name for entry in fields(MatchReport)}:
        raise KeyError(f"entries {sorted(found)}")
    before = found["before"]
    return MatchReport(
        _fit(found["fit"]),
        None if before is None else _fit(before),
        _text(found["distance"]),
        tuple(_numbers(found["trace"])),
        {_text(name): {_text(k): _number(v) for k, v in row.items()} for name, row in found["parameters"].items()},
        _number(found["seconds"]),
        tuple(_text(note) for note in _listed(found["notes"])),
        {_text(key): _text(value) for key, value in found["setting"].items()},
        None if found["resolution"] is None else _number(found["resolution"]),
    )


def _fit(found: Mapping[str, Any]) -> Fit:
    return Fit(
        _three(found["std"]),
        _three(found["target_std"]),
        _number(found["mean"]),
        _number(found["covariance_error"]),
        _number(found["floor"]),
        _two(found["kurtosis"]),
        tuple(_three(row) for row in _listed(found["correlation"])),
    )


def _three(found: Any) -> tuple[float, float, float]:
    first, second, third = _numbers(found)
    return first, second, third


def _two(found: Any) -> tuple[float, float]:
    first, second = _numbers(found)
    return first, second


def _numbers(found: Any) -> list[float]:
    return [_number(value) for value in _listed(found)]


def _listed(found: Any) -> Sequence[Any]:
    if not isinstance(found, list | tuple):
        raise TypeError(f"{found!r} is no list")
    return found


def _number(found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise TypeError(f"{found!r} is no number")
    return float(found)


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(f"{found!r} is no text")
    return found
