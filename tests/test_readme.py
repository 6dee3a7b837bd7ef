"""Every Python snippet of the README runs as it stands, top to bottom in one session."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(snippets) >= 3
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), session)
    assert "prior precision" in capsys.readouterr().out
    assert (tmp_path / "bayes.safetensors").is_file()
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_pictures_and_links_exist() -> None:
    text = README.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    assert targets
    assert [t for t in targets if not (README.parent / t).exists()] == []
