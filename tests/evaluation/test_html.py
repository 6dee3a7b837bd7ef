"""The page: one file, valid, offline, escaped, readable by machines that read tables aloud."""

from __future__ import annotations

import os
import re
import stat
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from bayesdl.evaluation import html, style
from bayesdl.evaluation.compare import compare
from tests.evaluation.made_up import NAMES, classes, numbers, report

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Checker(HTMLParser):
    """Balanced tags, identifiers, and every attribute that could reach outside."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        self._note(dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._note(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def _note(self, attributes: dict[str, str | None]) -> None:
        if attributes.get("id"):
            self.ids.append(str(attributes["id"]))
        for key in ("href", "src", "xlink:href"):
            if attributes.get(key):
                self.references.append(str(attributes[key]))


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    return checker


@pytest.fixture(scope="module")
def full() -> str:
    """Classification with everything: an OOD set, a shift, an odd name."""
    odd = NAMES[1]

    def both(n: int, seed: int = 0, scale: float = 1.0) -> dict[str, object]:
        return {"plain": classes(n, sharpness=scale, seed=seed), odd: classes(n, sharpness=2 * scale, seed=seed)}

    rep = compare(
        both(150),
        ood={"far & <wide>": both(60, 1, 0.2)},
        shift={"blur": [both(150, scale=2.0)]},
        bootstrap=20,
        progress=False,
    )
    return html.page(rep)


def test_the_page_is_well_formed_and_self_contained(full: str) -> None:
    checker = checked(full)
    assert len(checker.ids) == len(set(checker.ids))
    assert all(reference.startswith("#") for reference in checker.references)
    assert {reference[1:] for reference in checker.references} <= set(checker.ids)
    assert "http:" not in full and "https:" not in full and "//" not in re.sub(r"<!--.*?-->", "", full, flags=re.S)
    assert "<script" not in full and "@import" not in full
    assert all(f"url(#{name}" not in full or name in checker.ids for name in re.findall(r"url\(#([^)]+)\)", full))


def test_names_are_escaped_everywhere(full: str) -> None:
    assert "<b>bold" not in full and "&lt;b&gt;bold &amp; &quot;quoted&quot;" in full
    assert "<wide>" not in full


def test_tables_and_figures_can_be_read_aloud(full: str) -> None:
    checker = checked(full)
    tables = [tag for tag, _ in checker.tags if tag == "table"]
    captions = [tag for tag, _ in checker.tags if tag == "caption"]
    assert len(tables) == len(captions) >= 4
    heads = [attributes for tag, attributes in checker.tags if tag == "th"]
    assert heads and all(attributes.get("scope") in ("row", "col", "colgroup") for attributes in heads)
    drawings = [attributes for tag, attributes in checker.tags if tag == "svg"]
    figures = [a for a in drawings if a.get("class") == "plot"]
    # two methods: reliability and OOD each; three metrics under shift; risk-coverage; decomposition on both sets
    assert len(figures) == 2 + 2 + 3 + 1 + 2
    assert all(a.get("role") == "img" and len(str(a.get("aria-label"))) > 30 for a in figures)
    assert all(a.get("aria-hidden") == "true" for a in drawings if a not in figures)
    labelled = [a["aria-labelledby"] for _, a in checker.tags if a.get("aria-labelledby")]
    assert set(labelled) <= set(checker.ids)
    assert '<html lang="en">' in full and 'name="viewport"' in full


def test_the_keyboard_reaches_everything_and_marks_are_said(full: str) -> None:
    checker = checked(full)
    links = [str(a["href"]) for tag, a in checker.tags if tag == "a"]
    assert links[0] == "#shows" and full.index('class="skip"') < full.index("<main")
    sections = re.findall(r'<h2 id="([^"]+)"', full)
    assert [f"#{name}" for name in sections[1:]] == links[1:]
    # Only what scrolls takes the focus without being a link, and it has a name.
    regions = [a for _, a in checker.tags if "tabindex" in a]
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-labelledby"] for a in regions)
    # Colour and weight say which values are best; so do words, once for every mark.
    marks = full.count('<td class="best">')
    said = full.count('<span class="said"> (best)') + full.count('<span class="said"> (level with the best)')
    assert marks == said > 0
    levels = [int(tag[1]) for tag, _ in checker.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_the_page_says_what_it_shows_first(full: str) -> None:
    assert full.index("What this shows") < full.index("<table") < full.index('class="plot"') < full.index('id="notes"')
    assert "predicts best by negative log-likelihood" in full
    assert "under perfect calibration at n = 150" in full


def test_figures_follow_the_colour_scheme(full: str) -> None:
    body = full[full.index("</style>") :]
    assert not any(colour in body for colour in style.css_names())
    assert "var(--s0)" in body and "var(--ink)" in body
    assert "prefers-color-scheme:dark" in full
    names = set(re.findall(r"var\(--([\w-]+)\)", full)) - {"cols"}
    dark = full[full.index("prefers-color-scheme:dark") : full.index("*{box-sizing")]
    assert all(f"--{name}:" in dark for name in names)


@pytest.mark.parametrize(
    "pair", [("ink", "card"), ("muted", "card"), ("muted", "page"), ("bestink", "best"), ("accent", "card")]
)
def test_text_has_enough_contrast_in_both_schemes(pair: tuple[str, str]) -> None:
    """WCAG 2.2, success criterion 1.4.3: at least 4.5 to 1."""
    for scheme in re.findall(r":root\{([^}]*)\}", style.style_sheet()):
        colours = dict(re.findall(r"--([\w-]+):(#[0-9a-f]{6})", scheme))
        bright, dark = sorted((luminance(colours[name]) for name in pair), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_regression_and_reports_from_json_make_pages() -> None:
    rep = compare({"right": numbers(80, scale=1.0), "wide": numbers(80, scale=3.0)}, bootstrap=20, progress=False)
    text = html.page(rep)
    checked(text)
    assert "probability integral transform" in text and "Do prediction intervals hold?" in text
    assert "Intervals that claim to hold 90\N{NO-BREAK SPACE}% of the targets hold" in text
    bare = html.page(report())
    checked(bare)
    assert 'class="plot"' not in bare and "not measured here" in bare and "T = 0.5" in bare


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.html"
    assert report().to_html(target) == target
    first = target.read_bytes()
    assert stat.S_IMODE(target.stat().st_mode) & 0o600 == 0o600

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        report().to_html(target)
    assert target.read_bytes() == first and [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(FileNotFoundError):
        report().to_html(tmp_path / "missing" / "page.html")


def test_the_same_report_gives_the_same_bytes() -> None:
    rep = compare({"a": classes(60, sharpness=1.0)}, bootstrap=10, progress=False)
    assert html.page(rep) == html.page(rep)
