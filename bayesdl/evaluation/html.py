"""The report as ONE page: inline style and SVG figures, no script, no external address.

Readable at phone and desktop width, in light and dark.
"""

from __future__ import annotations

import html
import math
import os
import re
import uuid
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from bayesdl.evaluation import render, style
from bayesdl.evaluation.cells import GROUPS, Cell, Column, place
from bayesdl.evaluation.figures import Panel, panels
from bayesdl.evaluation.report import Report

# Which groups share a table: together they answer one question.
_TABLES = (
    ("quality", "Quality of the predictions", ("proper", "accuracy", "calibration", "selective")),
    ("ood", "Noticing unfamiliar data", ("ood",)),
    ("shift", "Under shift", ("shift",)),
    ("group", "Subgroups", ("group",)),
    ("cost", "Cost", ("cost",)),
)
_BAR = 96  # width in pixels of the error bar below a value


def write_page(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write the page to `path` atomically: a reader sees the old file or the whole new one.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    target = Path(path)
    text = page(report)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(draft, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def page(report: Report) -> str:
    """The whole page as text."""
    count = len(report.rows)
    title = f"Comparison of {count} method{'s' if count != 1 else ''}"
    parts = [
        *(_table(report, *table) for table in _TABLES),
        *_figures(report),
        _all_columns(report),
        _notes(report),
    ]
    body = [
        _header(report, title),
        _verdict(report),
        _contents("".join(parts)),
        *parts,
        f"<footer>{_text(render.footer(report))}</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_text(title)}</title>\n<style>{style.style_sheet()}</style></head>\n"
        '<body><a class="skip" href="#shows">Skip to what this shows</a><main>\n'
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _text(value: object) -> str:
    # A percent sign belongs to its number: no line ends between them.
    return html.escape(str(value), quote=True).replace(" %", "\N{NO-BREAK SPACE}%")


def _contents(parts: str) -> str:
    """Links to all sections, from their headings."""
    links = "".join(
        f'<li><a href="#{name}">{title}</a></li>' for name, title in re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', parts)
    )
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if links else ""


def _header(report: Report, title: str) -> str:
    sizes: dict[str, int] = report.details.get("sizes", {})
    parts = [report.task.capitalize()]
    if "test" in sizes:
        parts.append(f"{_thousands(sizes['test'])} test examples")
    outside = [f"{place(key)} ({_thousands(n)})" for key, n in sizes.items() if key.startswith("ood/")]
    parts += [f"unfamiliar data: {', '.join(outside)}"] if outside else []
    shifts: dict[str, list[str]] = report.details.get("shift", {})
    parts += [f"shift: {name} ({', '.join(severities)})" for name, severities in shifts.items()]
    return f'<header><p class="eyebrow">{_text(" · ".join(parts))}</p><h1>{_text(title)}</h1></header>'


def _thousands(n: int) -> str:
    return f"{n:,}".replace(",", "\N{NO-BREAK SPACE}")


def _verdict(report: Report) -> str:
    first, *rest = report.summary() or ("There is nothing to rank.",)
    items = "".join(f"<li>{_text(line)}</li>" for line in rest)
    return (
        '<section class="verdict" aria-labelledby="shows"><h2 id="shows">What this shows</h2>'
        f"<p>{_text(first)}</p>{f'<ul>{items}</ul>' if items else ''}</section>"
    )


def _swatch(report: Report, row: str) -> str:
    return f'<span class="dot" style="background:var(--s{report.rows.index(row) % len(style.SERIES)})"></span>'


def _table(report: Report, name: str, title: str, keys: Sequence[str]) -> str:
    columns = [c for key in keys for c in report.headline(key)]
    if not columns:
        return ""
    # Columns about a data set of their own stand under its name, the others under their group.
    spans = [(name, list(group)) for name, group in groupby(columns, key=lambda c: c.place or GROUPS[c.group])]
    head = ""
    if len(spans) > 1 or columns[0].place:
        cells = "".join(
            f'<th class="group" scope="colgroup" colspan="{len(group)}"><span>{_text(name)}</span></th>'
            for name, group in spans
        )
        head = f"<tr><td></td>{cells}</tr>"
    head += '<tr><th scope="col">Method</th>' + "".join(_column_head(c) for c in columns) + "</tr>"
    ranges = {c.key: _range(c, render.column_cells(report, c)) for c in columns}
    places = {c.key: render.decimals(c, render.column_cells(report, c)) for c in columns}
    rows = []
    for row in report.rows:
        detail = _row_detail(report, row) if name == "quality" else ""
        if row in report.failures:  # one cell says why; n/a in every column would hide it
            why = _text(render.failed(report, row)) if name == "quality" else "failed"
            span = f'<td class="na failed" colspan="{len(columns)}"><span>{why}</span></td>'
            rows.append(f'<tr><th scope="row">{_swatch(report, row)}{_text(row)}{detail}</th>{span}</tr>')
            continue
        cells = "".join(_cell(report, row, c, places[c.key], ranges[c.key]) for c in columns)
        rows.append(f'<tr><th scope="row">{_swatch(report, row)}{_text(row)}{detail}</th>{cells}</tr>')
    caption = _caption(report, columns)
    return (
        f'<section aria-labelledby="t-{name}"><h2 id="t-{name}">{_text(title)}</h2>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="t-{name}">'
        f'<table aria-describedby="c-{name}"><caption>{_text(title)}</caption>'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="under" id="c-{name}">{_text(caption)}</p></section>'
    )


def _row_detail(report: Report, row: str) -> str:
    """Temperature and further facts about a method, where they are known."""
    about = report.details.get("methods", {}).get(row, {})
    parts = [str(about["method"])] if about.get("method") and about["method"] != row else []
    if "temperature" in about:
        parts.append(f"T = {about['temperature']:.4g}")
    return f"<small>{_text(', '.join(parts))}</small>" if parts else ""


def _caption(report: Report, columns: Sequence[Column]) -> str:
    parts = []
    if any(report.cells[row][c.key].best for row in report.rows for c in columns):
        tested = any(report.cells[row][c.key].p is not None for row in report.rows for c in columns)
        parts.append(
            "Marked: the best of its column"
            + (
                ", and every method whose difference to it is not significant at 5 % (paired bootstrap, Holm)."
                if tested
                else "."
            )
        )
    if any(report.cells[row][c.key].low is not None for row in report.rows for c in columns):
        level = report.details.get("level", 0.95)
        parts.append(f"Brackets and bars: {100 * level:g} % intervals, on one scale per column.")
    if any(report.cells[row][c.key].expected is not None for row in report.rows for c in columns):
        parts.append(
            "Grey band under a calibration error: where perfectly calibrated forecasts of this size would lie; a dot "
            "inside it is no evidence of miscalibration. The printed error is inflated by chance, and its interval is "
            "corrected for that, so that it may lie below the number."
        )
    return " ".join(parts)


def _column_head(column: Column) -> str:
    small = " ".join(part for part in (render.unit(column), render.arrow(column)) if part)
    better = {"min": "lower is better", "max": "higher is better", "target": "closest to the target is best"}
    label = (
        f' aria-label="{_text(f"{column.label}, {better[column.direction]}")}"' if column.direction in better else ""
    )
    return (
        f'<th scope="col" title="{_text(column.definition)}"{label}>{_text(column.short)}'
        f"{f'<span class=unit>{_text(small)}</span>' if small else ''}</th>"
    )


def _cell(report: Report, row: str, column: Column, places: int, span: tuple[float, float]) -> str:
    cell = report.cells[row][column.key]
    if cell.value is None:
        return f'<td class="na">n/a{f"<br>{_text(cell.note)}" if cell.note else ""}</td>'
    value = f'<span class="value">{_text(render.value_text(column, cell, places))}</span>'
    interval = render.interval_text(column, cell, places)
    range_ = f'<span class="range">{_text(interval)}</span>' if interval else ""
    bar = _bar(column, cell, span, report.rows.index(row))
    if not cell.best:
        return f"<td>{value}{range_}{bar}</td>"
    said = "level with the best" if cell.p is not None else "best"
    return f'<td class="best">{value}<span class="said"> ({said})</span>{range_}{bar}</td>'


def _range(column: Column, cells: Sequence[Cell]) -> tuple[float, float]:
    """Common scale of a column's bars: all intervals, and what calibrated forecasts would give."""
    ends = [v for c in cells for v in (c.value, c.low, c.high, c.expected_high) if v is not None and math.isfinite(v)]
    ends += [column.target] if column.direction == "target" and column.target is not None else []
    if any(c.expected is not None for c in cells) or all(c.low is None for c in cells):
        ends.append(0.0)
    return (min(ends), max(ends)) if ends else (0.0, 0.0)


def _bar(column: Column, cell: Cell, span: tuple[float, float], index: int) -> str:
    """The value's error bar as a tiny picture; decoration beside the printed numbers, so hidden from screen readers."""
    low, high = span
    if cell.value is None or not math.isfinite(cell.value) or high <= low:
        return ""

    def at(value: float) -> str:
        return f"{4 + (_BAR - 8) * (min(max(value, low), high) - low) / (high - low):.1f}"

    hue = f"var(--s{index % len(style.SERIES)})"
    parts = [f'<line x1="4" x2="{_BAR - 4}" y1="6" y2="6" stroke="var(--grid)"/>']
    if cell.expected_high is not None:
        width = float(at(cell.expected_high)) - float(at(0.0))
        parts.append(
            f'<rect x="{at(0.0)}" y="1" width="{width:.1f}" height="10" rx="2" fill="var(--muted)" opacity=".28"/>'
        )
    if column.direction == "target" and column.target is not None:
        x = at(column.target)
        parts.append(f'<line x1="{x}" x2="{x}" y1="0" y2="12" stroke="var(--muted)" stroke-dasharray="2 2"/>')
    if cell.low is not None and cell.high is not None:
        parts.append(
            f'<line x1="{at(cell.low)}" x2="{at(cell.high)}" y1="6" y2="6" stroke="{hue}" stroke-width="2.5"/>'
        )
        parts.append(f'<circle cx="{at(cell.value)}" cy="6" r="3.6" fill="{hue}"/>')
    else:
        left, right = sorted((float(at(0.0)), float(at(cell.value))))
        parts.append(f'<rect x="{left:.1f}" y="3" width="{right - left:.1f}" height="6" rx="1.5" fill="{hue}"/>')
    return (
        f'<svg class="bar" width="{_BAR}" height="12" viewBox="0 0 {_BAR} 12" aria-hidden="true">{"".join(parts)}</svg>'
    )


def _figures(report: Report) -> list[str]:
    """Small multiples in sections of their own, single figures two abreast."""
    many: list[str] = []
    single: list[str] = []
    for number, section in enumerate(panels(report)):
        key = "".join(f'<li><span class="swatch" style="background:{c}"></span>{_text(t)}</li>' for t, c in section.key)
        head = f'<h2 id="f-{number}">{_text(section.title)}</h2><p class="lead">{_text(section.lead)}</p>'
        head = f"<div>{head}{f'<ul class=key>{key}</ul>' if key else ''}</div>"
        drawings = [_figure(report, panel) for panel in section.panels]
        if section.small:
            columns = section.abreast or _abreast(len(drawings))
            inner = f'<div class="multiples" style="--cols:{columns}">{"".join(drawings)}</div>'
            many.append(f'<section aria-labelledby="f-{number}">{head}{inner}</section>')
        else:
            single.append(f'<section aria-labelledby="f-{number}">{head}{"".join(drawings)}</section>')
    return [*many, f'<div class="wide">{"".join(single)}</div>' if single else ""]


def _abreast(count: int) -> int:
    """How many small figures stand side by side: three or four, whichever leaves the last line fuller."""
    return min(count, min((3, 4), key=lambda n: (-count % n, -n)))


def _figure(report: Report, panel: Panel) -> str:
    swatch = _swatch(report, panel.row) if panel.row is not None else ""
    title = f"<h3>{swatch}{_text(panel.title)}</h3>" if panel.title else ""
    caption = f"<figcaption>{_text(panel.caption)}</figcaption>" if panel.caption else ""
    return f"<figure>{title}{panel.svg}{caption}</figure>"


def _all_columns(report: Report) -> str:
    """Every column that the tables above leave out, folded away."""
    columns = [c for c in report.specs if not c.headline]
    if not columns:
        return ""
    head = "".join(f'<th scope="col">{_text(row)}</th>' for row in report.rows)
    rows = []
    for c in columns:
        places = render.decimals(c, render.column_cells(report, c))
        cells = "".join(
            f"<td>{_text(render.value_text(c, report.cells[row][c.key], places))}</td>" for row in report.rows
        )
        rows.append(f'<tr><th scope="row">{_text(render.heading(c))}<small>{_text(c.key)}</small></th>{cells}</tr>')
    return (
        '<section aria-labelledby="more"><h2 id="more">Further columns</h2><details><summary>Show '
        f"{len(columns)} columns: every score, set and severity</summary>"
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="more"><table>'
        "<caption>One line for every column, one column for every method.</caption>"
        f'<thead><tr><th scope="col">Column</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</details></section>"
    )


def _notes(report: Report) -> str:
    defined: dict[str, list[str]] = {}
    for column in report.headline():
        if column.definition:
            defined.setdefault(column.definition, []).append(render.heading(column))
    terms = "".join(
        f"<div><dt>{'<br>'.join(map(_text, names))}</dt><dd>{_text(text)}</dd></div>" for text, names in defined.items()
    )
    lines = [text for c in report.headline() if (text := render.expectation(report, c))]
    lines += [str(line) for line in report.details.get("notes", ())]
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return (
        '<section aria-labelledby="notes"><h2 id="notes">Notes and definitions</h2>'
        f"{f'<dl>{terms}</dl>' if terms else ''}{f'<ul class=plain>{items}</ul>' if items else ''}</section>"
    )
