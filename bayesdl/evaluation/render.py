"""Numbers and tables as text: plain, Markdown, CSV, LaTeX and rich. The HTML page is in `html.py`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bayesdl.evaluation.cells import GROUPS, Cell, Column
from bayesdl.evaluation.report import Report

if TYPE_CHECKING:
    from rich.console import Group

_MARK = "* best of its column, or not separable from the best at 5 % (paired bootstrap, Holm)"
_ARROWS = {"min": "↓", "max": "↑", "none": ""}


def arrow(column: Column) -> str:
    """Which way is better: an arrow, or the value aimed at."""
    if column.direction == "target" and column.target is not None:
        return f"→ {100 * column.target if column.unit == 'fraction' else column.target:g}"
    return _ARROWS.get(column.direction, "")


def unit(column: Column) -> str:
    """The unit as printed: fractions are printed as percentages."""
    return "%" if column.unit == "fraction" else column.unit


def heading(column: Column) -> str:
    """Label with unit and direction, such as `NLL (nats) ↓`."""
    named = (
        f"{column.label} ({unit(column)})" if unit(column) and f"({unit(column)})" not in column.label else column.label
    )
    return f"{named} {arrow(column)}".rstrip()


def decimals(column: Column, cells: Sequence[Cell]) -> int:
    """Decimals the column deserves: to the second digit of its tightest error bar, else three significant digits."""
    scale = 100.0 if column.unit == "fraction" else 1.0
    widths = [(c.high - c.low) / 2 * scale for c in cells if c.low is not None and c.high is not None]
    widths = [w for w in widths if 0 < w < math.inf]
    if widths:
        return min(max(1 - math.floor(math.log10(min(widths))), 0), 4)
    sizes = [abs(c.value) * scale for c in cells if c.value is not None and math.isfinite(c.value) and c.value != 0]
    if not sizes:
        return 1 if column.unit == "fraction" else 3
    if column.unit == "fraction":
        return 2
    if all(size == int(size) for size in sizes):
        return 0
    return min(max(2 - math.floor(math.log10(max(sizes))), 0), 4)


def fixed(column: Column, value: float | None, places: int) -> str:
    """One number in the column's unit, without the unit."""
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    scaled = value * 100.0 if column.unit == "fraction" else value
    text = f"{scaled:,.{places}f}".replace(",", "\N{THIN SPACE}")
    return text.replace("-", "\N{MINUS SIGN}") if float(f"{scaled:.{places}f}") != 0 else f"{0:.{places}f}"


def value_text(column: Column, cell: Cell, places: int) -> str:
    """The value, or `n/a` with its reason."""
    if cell.value is None:
        return f"n/a ({cell.note})" if cell.note else "n/a"
    return fixed(column, cell.value, places)


def interval_text(column: Column, cell: Cell, places: int) -> str:
    """`[low, high]`, or an empty string where there is no interval."""
    if cell.low is None or cell.high is None:
        return ""
    return f"[{fixed(column, cell.low, places)}, {fixed(column, cell.high, places)}]"


def column_cells(report: Report, column: Column) -> list[Cell]:
    """The column's cells in row order."""
    return [report.cells[row][column.key] for row in report.rows]


def expectation(report: Report, column: Column) -> str:
    """What perfectly calibrated forecasts would score at this n, where the column knows it."""
    cells = [(row, report.cells[row][column.key]) for row in report.rows]
    known = [(row, c) for row, c in cells if c.expected is not None]
    if not known:
        return ""
    places = decimals(column, [c for _, c in cells])
    parts = [
        f"{row} {fixed(column, c.expected, places)} (up to {fixed(column, c.expected_high, places)})"
        for row, c in known
    ]
    return (
        f"{column.label} under perfect calibration at n = {column.n}, mean and upper quantile, {unit(column)}: "
        + "; ".join(parts)
    )


def notes(report: Report, *, shown: Sequence[Column] | None = None) -> list[str]:
    """Everything a reader needs below the tables: definitions, expectations, temperatures, how intervals were made."""
    columns = report.headline() if shown is None else shown
    lines = list(dict.fromkeys(f"{heading(c)}: {c.definition}" for c in columns if c.definition))
    lines += [text for c in columns if (text := expectation(report, c))]
    lines += [str(line) for line in report.details.get("notes", ())]
    return lines


def footer(report: Report) -> str:
    """One line: n, what intervals are, level, seed, data, device, versions, command."""
    d = report.details
    parts = [f"n = {d['n']}"] if "n" in d else []
    if "num_seeds" in d:
        parts.append(f"means and standard errors over {d['num_seeds']} training seeds")
    elif d.get("bootstrap"):
        parts += [f"{d['bootstrap']} paired bootstrap resamples", f"{100 * d['level']:g} % intervals"]
        parts += [f"seed {d['seed']}"] if d.get("seed") is not None else []
    elif "bootstrap" in d:
        parts.append("no resampling, no intervals")
    parts += [f"targets {d['data']}"] if d.get("data") else []
    parts += [f"device {d['device']}"] if d.get("device") else []
    parts += [f"{name} {version}" for name, version in d.get("versions", {}).items()]
    parts += [f"by: {d['command']}"] if d.get("command") else []
    return ", ".join(parts)


def failed(report: Report, row: str) -> str:
    """`failed: why`, or nothing for a method that did not fail."""
    return f"failed: {report.failures[row]}" if row in report.failures else ""


def groups(report: Report) -> list[tuple[str, tuple[Column, ...]]]:
    """Title and columns of every group that has headline columns, in print order."""
    return [(title, columns) for key, title in GROUPS.items() if (columns := report.headline(key))]


def plain_text(report: Report) -> str:
    """One block a group; `*` marks the best and what is not separable from it."""
    if not report.rows:
        return "Report without rows"
    lines: list[str] = []
    for title, columns in groups(report):
        table = [["", *(heading(c) for c in columns)]]
        places = [decimals(c, column_cells(report, c)) for c in columns]
        for row in report.ran:
            entries = []
            for c, p in zip(columns, places, strict=True):
                cell = report.cells[row][c.key]
                text = f"{value_text(c, cell, p)}{'*' if cell.best else ''} {interval_text(c, cell, p)}"
                entries.append(text.rstrip())
            table.append([row, *entries])
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines.append(title)
        lines += [
            "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.append("")
    lines += [f"{row} {failed(report, row)}" for row in report.failures]
    if any(cell.best for cells in report.cells.values() for cell in cells.values()):
        lines.append(_MARK)
    lines.append(footer(report))
    return "\n".join(lines)


def markdown(report: Report, *, intervals: bool, notes: bool) -> str:
    """One pipe table of the headline columns."""
    columns = report.headline()
    lines = ["| method | " + " | ".join(_pipe(heading(c)) for c in columns) + " |", "|---|" + "---:|" * len(columns)]
    places = [decimals(c, column_cells(report, c)) for c in columns]
    for row in report.rows:
        if row in report.failures:
            lines.append(f"| {_pipe(row)} | {_pipe(failed(report, row))} |" + " |" * (len(columns) - 1))
            continue
        entries = []
        for c, p in zip(columns, places, strict=True):
            cell = report.cells[row][c.key]
            text = f"**{value_text(c, cell, p)}**" if cell.best else value_text(c, cell, p)
            span = interval_text(c, cell, p) if intervals else ""
            entries.append(_pipe(f"{text} {span}".rstrip()))
        lines.append(f"| {_pipe(row)} | " + " | ".join(entries) + " |")
    if notes:
        lines += ["", "Bold: best of its column, or not separable from the best at 5 % (paired bootstrap, Holm)."]
        lines += [f"- {_pipe(line)}" for line in _notes(report)]
        lines += ["", footer(report)]
    return "\n".join(lines) + "\n"


_notes = notes  # `markdown` has a flag of the same name


def _pipe(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def csv_text(report: Report) -> str:
    """All columns at full precision."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    with_intervals = {c.key for c in report.specs for row in report.rows if report.cells[row][c.key].low is not None}
    head = ["method"]
    for column in report.specs:
        head += [column.key, *([f"{column.key}.low", f"{column.key}.high"] if column.key in with_intervals else [])]
    writer.writerow([*head, "failed"] if report.failures else head)
    for row in report.rows:
        line = [row]
        for column in report.specs:
            cell = report.cells[row][column.key]
            values = [cell.value, *([cell.low, cell.high] if column.key in with_intervals else [])]
            line += ["" if value is None else repr(float(value)) for value in values]
        writer.writerow([*line, report.failures.get(row, "")] if report.failures else line)
    return stream.getvalue()


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↓": r"$\downarrow$", "↑": r"$\uparrow$",
    "→": r"$\rightarrow$", "∞": r"$\infty$", "\N{MINUS SIGN}": "$-$", "\N{THIN SPACE}": r"\,",
    "²": r"\textsuperscript{2}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(ch, ch) for ch in text)


def latex(report: Report) -> str:
    """One booktabs table: the best bold, underlined as well what is not separable from it."""
    columns = report.headline()
    places = [decimals(c, column_cells(report, c)) for c in columns]
    lines = [r"\begin{tabular}{l" + "r" * len(columns) + "}", r"\toprule"]
    lines += ["method & " + " & ".join(_tex(heading(c)) for c in columns) + r" \\", r"\midrule"]
    for row in report.rows:
        if row in report.failures:
            span = rf"\multicolumn{{{len(columns)}}}{{l}}{{{_tex(failed(report, row))}}}"
            lines.append(rf"{_tex(row)} & {span} \\")
            continue
        entries = []
        for c, p in zip(columns, places, strict=True):
            cell = report.cells[row][c.key]
            text = _tex(value_text(c, cell, p))
            # The best is bold; underlined too is what cannot be told from it.
            text = rf"\textbf{{{text}}}" if cell.best else text
            entries.append(rf"\underline{{{text}}}" if cell.best and cell.p is not None else text)
        lines.append(f"{_tex(row)} & " + " & ".join(entries) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def rich_group(report: Report) -> Group:
    """One rich table a group; intervals dimmed below the values."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Table | Text] = []
    for title, columns in groups(report):
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("method", no_wrap=True)
        places = [decimals(c, column_cells(report, c)) for c in columns]
        for c in columns:
            table.add_column(Text(heading(c)), justify="right")
        for row in report.ran:
            entries = []
            for c, p in zip(columns, places, strict=True):
                cell = report.cells[row][c.key]
                # the star survives where a terminal or a file shows no bold
                text = Text(value_text(c, cell, p) + "*" * cell.best, style="bold green" if cell.best else "")
                if span := interval_text(c, cell, p):
                    text.append(f"\n{span}", style="dim not bold")
                entries.append(text)
            table.add_row(Text(row), *entries)  # Text, so that a name with brackets is no markup
        parts.append(table)
    parts += [Text(f"{row} {failed(report, row)}", style="bold red") for row in report.failures]
    parts.append(Text(_MARK, style="dim"))
    parts.append(Text(footer(report), style="dim"))
    return Group(*parts)
