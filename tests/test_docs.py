"""The documentation: its snippets run, its links lead somewhere, its pages are made from all public names."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("methods/*.md"), ROOT / "CONTRIBUTING.md"])
START = DOCS / "index.md"
FENCE = re.compile(r"^```(python|py)\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")


def snippets(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


WITH_CODE = [page for page in PAGES if snippets(page, "python")]


def run(page: Path, session: dict[str, object], last: int | None = None) -> None:
    for number, code in enumerate(snippets(page, "python")[:last]):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), session)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page in one session, after the network and the data of the first page."""
    needs = re.search(r"^% needs: (.*)$", page.read_text(encoding="utf-8"), re.M)
    for name in needs[1].split() if needs else ():
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    with warnings.catch_warnings():
        for noise in (".*does not have many workers.*", ".*LeafSpec.*", ".*max_steps.*"):  # of lightning's own
            warnings.filterwarnings("ignore", message=noise)
        if page != START:
            run(START, session, last=1)
        run(page, session)


def test_pages_with_snippets_are_found() -> None:
    assert len(WITH_CODE) >= 15
    assert START in WITH_CODE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_that_do_not_run_say_why(page: Path) -> None:
    for code in snippets(page, "py"):
        assert re.match(r"# not run: \w", code), f"{page.name}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"^([\w/]+)$", START.read_text(encoding="utf-8"), re.M))
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES if DOCS in page.parents} <= listed | {"index"}


def test_every_method_and_metric_is_named() -> None:
    from bayesdl.methods import METHODS

    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("methods/*.md"))
    assert [name for name in METHODS if f'"{name}"' not in text] == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    """Skipped where the packages of the extra `docs` are absent."""
    for name in ("sphinx", "furo", "myst_nb", "jupytext"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "trees", DOCS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, tmp_path / "html"], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "html").rglob("*.html"))
    assert len(pages) > 30
    fetched = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]*"')
    assert [
        (page.name, found[0]) for page in pages if (found := fetched.findall(page.read_text(encoding="utf-8")))
    ] == []
