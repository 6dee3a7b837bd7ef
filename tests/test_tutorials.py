"""Every tutorial runs as a script and holds what it claims (each asserts its own claims)."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parent.parent / "tutorials").glob("*.py"))
OPTIONAL = ("botorch", "peft", "transformers")


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_runs_and_asserts_its_claims(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# %%") and "\nassert " in text
    for name in OPTIONAL:
        if re.search(rf"^\s*(from|import) {name}\b", text, re.M):
            pytest.importorskip(name, reason="an optional package that the tutorial is about")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    if "matplotlib" in text:
        from matplotlib import pyplot

        pyplot.close("all")  # a tutorial leaves its figures open, for the page of the documentation that shows them
