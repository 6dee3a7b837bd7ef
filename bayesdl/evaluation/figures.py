"""The figures of the HTML page: which ones a report gets, each as inline SVG with its words and alternative text."""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bayesdl.errors import UnsupportedError
from bayesdl.evaluation import render, style
from bayesdl.evaluation.cells import place
from bayesdl.evaluation.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Panel:
    """One drawing: inline SVG, and the method it belongs to (None: all)."""

    title: str
    svg: str
    caption: str = ""
    row: str | None = None


@dataclass(frozen=True)
class Section:
    """Drawings that answer one question; `small` ones stand in a grid, `abreast` in a line (0: as fits their number).

    `key` pairs words with colours.
    """

    title: str
    lead: str
    panels: tuple[Panel, ...]
    small: bool = False
    abreast: int = 0
    key: tuple[tuple[str, str], ...] = ()


def panels(report: Report) -> list[Section]:
    """All figures that the report's predictions allow; none for a report read from JSON, except shift curves."""
    sections: list[Section] = []
    if report.predictions and report.task == "classification":
        sections.append(_reliability(report))
    if report.predictions and report.task == "regression":
        sections.append(_pit(report))
    if report.predictions and any(key.startswith("ood/") for key in report.details["sizes"]):
        sections.append(_ood(report))
    if report.predictions and report.task == "classification":
        lead = (
            "Keep the most confident share of the examples, hand over the rest: how many of those kept are wrong? "
            "Dotted: the errors of the most accurate method in the best possible order."
        )
        alt = "Error rate against the share of examples kept, one line a method. " + _listing(report, "aurc")
        sections.append(Section("Handing over doubtful cases", lead, (_panel("", report.plot.risk_coverage, alt),)))
    if report.predictions and report.task == "regression":
        lead = "How many targets fall inside intervals that claim to hold them with the nominal probability."
        alt = "Observed coverage against nominal level, one line a method. " + _listing(report, "picp_90")
        sections.append(Section("Do prediction intervals hold?", lead, (_panel("", report.plot.intervals, alt),)))
    sections += _shift(report)
    if any(found.epistemic is not None for sets in report.predictions.values() for found in sets.values()):
        sections.append(_decomposition(report))
    return sections


def _reliability(report: Report) -> Section:
    drawings = []
    for row in report.ran:
        caption = _cell_words(report, row, "ece")
        alt = f"Reliability diagram of {row}: accuracy against confidence. {caption}"
        drawings.append(_panel(row, partial(report.plot.reliability, row), alt, caption=caption, row=row))
    lead = (
        "Of all predictions made with 80 % confidence, 80 % should be right. Below the diagonal: over-confident. Grey "
        "bars: where 95 % of the points would fall by chance alone if the method were calibrated. Bottom: how many "
        "examples each bin holds."
    )
    return Section("Is the confidence right?", lead, tuple(drawings), small=True)


def _pit(report: Report) -> Section:
    drawings = []
    for row in report.ran:
        caption = _cell_words(report, row, "picp_90")
        alt = f"Histogram of the probability integral transform of {row}. {caption}"
        drawings.append(_panel(row, partial(report.plot.pit, row), alt, caption=caption, row=row))
    lead = (
        "Where the targets fall within their predictive distributions. Flat is right. A U shape: intervals too narrow. "
        "A hump: too wide. A slope: biased. Grey: 95 % range under right forecasts."
    )
    return Section("Are the predictive distributions right?", lead, tuple(drawings), small=True)


def _ood(report: Report) -> Section:
    score = str(report.details.get("score", "entropy"))
    drawings = []
    for row in report.ran:
        sets = [key[4:] for key in report.predictions[row] if key.startswith("ood/")]
        if not sets:
            continue
        known = [name for name in sets if f"ood/{name}/auroc" in report.columns]
        caption = "AUROC: " + ", ".join(f"{name} {_value_words(report, row, f'ood/{name}/auroc')}" for name in known)
        alt = f"Histograms of the {score} of {row} on test data and on {', '.join(sets)}. {caption}"
        drawings.append(
            _panel(row, partial(report.plot.ood_histogram, row, legend=False), alt, caption=caption, row=row)
        )
    lead = (
        f"Score: {score.replace('_', ' ')}. The less a line overlaps the grey area of the test data, the better "
        "unfamiliar data are noticed."
    )
    names = [place(key) for key in report.details["sizes"] if key.startswith("ood/")]
    outside = [(name, style.css_names()[style.set_colour(index)]) for index, name in enumerate(names)]
    key = (("test", "color-mix(in srgb, var(--muted) 35%, transparent)"), *outside)
    return Section("Does uncertainty rise on unfamiliar data?", lead, tuple(drawings), small=True, key=key)


def _decomposition(report: Report) -> Section:
    drawings = []
    for key in (key for key in report.details["sizes"] if not key.startswith("shift/")):
        name = place(key) or "test"
        alt = f"Bars of mean aleatoric and epistemic uncertainty of every method on {name}."
        drawings.append(_panel(name, partial(report.plot.decomposition, key), alt))
    lead = (
        "Aleatoric: the data are ambiguous. Epistemic: the model has not seen enough; this part should grow on "
        "unfamiliar data."
    )
    words = (("aleatoric", "var(--s5)"), ("epistemic", "var(--s1)"))
    return Section("Where the uncertainty comes from", lead, tuple(drawings), small=True, abreast=2, key=words)


def _shift(report: Report) -> list[Section]:
    sections = []
    for name, severities in report.details.get("shift", {}).items():
        drawings = []
        for metric in report.details.get("shift_metrics", ()):
            key = f"shift/{name}/{severities[-1]}/{metric}"
            if metric not in report.columns or key not in report.columns:
                continue
            label = report.column(metric).label
            alt = f"{label} against severity of {name}, one line a method. At the end: {_listing(report, key)}"
            drawings.append(_panel(label, partial(report.plot.shift, metric, name=name), alt))
        if drawings:
            lead = "From the unchanged test data on the left to the strongest shift on the right; bars are intervals."
            sections.append(Section(f"What happens under {name}?", lead, tuple(drawings), small=True))
    return sections


def _cell_words(report: Report, row: str, key: str) -> str:
    """`ECE 1.2 % [0.8, 1.7]`, or nothing where the report has no such column."""
    if key not in report.columns:
        return ""
    column, cell = report.column(key), report.cell(row, key)
    text = f"{column.label}: {_value_words(report, row, key)}"
    places = render.decimals(column, render.column_cells(report, column))
    if span := render.interval_text(column, cell, places):
        text += f" {span}"
    if cell.expected_high is not None and cell.value is not None and math.isfinite(cell.value):
        inside = cell.value <= cell.expected_high
        text += "; " + ("no more than chance explains" if inside else "more than chance explains")
    return text


def _value_words(report: Report, row: str, key: str) -> str:
    """`1.2 %`."""
    column = report.column(key)
    places = render.decimals(column, render.column_cells(report, column))
    return f"{render.value_text(column, report.cell(row, key), places)} {render.unit(column)}".rstrip()


def _listing(report: Report, key: str) -> str:
    if key not in report.columns:
        return ""
    return "; ".join(f"{row}: {_cell_words(report, row, key)}" for row in report.ran) + "."


def _panel(title: str, draw: Callable[[], Axes], alt: str, *, caption: str = "", row: str | None = None) -> Panel:
    return Panel(title=title, svg=svg(draw(), alt), caption=caption, row=row)


def svg(axes: Axes, alt: str) -> str:
    """The figure of `axes` as an `<svg>` element that scales with the page and follows its colour scheme.

    Text stays text. Identifiers get a prefix that depends on the drawing, so that several drawings can share a page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = axes.figure
    if not isinstance(figure, Figure):
        raise UnsupportedError("these Axes belong to no figure")
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bayesdl"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    prefix = "p" + hashlib.sha256((alt + text).encode()).hexdigest()[:10]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    for colour, name in style.css_names().items():
        text = text.replace(colour, name)
    head, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    box = view.group(0) if view else ""
    label = html.escape(alt, quote=True)
    return f'<svg class="plot" role="img" aria-label="{label}" {box}>{rest.strip()}'
