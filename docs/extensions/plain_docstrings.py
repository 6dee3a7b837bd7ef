"""Docstrings are plain text with backticks, indented code and Google's sections: here they become reStructuredText."""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx

SECTIONS = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Examples|Note|Warning):$")
QUOTED = re.compile(r"(``.+?``|`[^`]+`)", re.S)


def converted(lines: list[str]) -> list[str]:
    """Lines of one docstring as reStructuredText."""
    result: list[str] = []
    in_section = False
    number = 0
    while number < len(lines):
        line = lines[number]
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            in_section = bool(SECTIONS.match(line.strip()))
        starts_code = indent >= 4 and not in_section and (number == 0 or not lines[number - 1].strip())
        if not starts_code:
            result.append(line)
            number += 1
            continue
        end = number
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" " * indent)):
            end += 1
        block = textwrap.dedent("\n".join(lines[number:end])).rstrip().split("\n")
        result += [f".. code-block:: {_language(block)}", "", *("    " + part for part in block), ""]
        number = end
    return _escaped("\n".join(result)).split("\n")


def _language(block: list[str]) -> str:
    try:
        ast.parse("\n".join(block).replace("): ...", "): pass"))
    except SyntaxError:
        return "text"
    return "python"


def _escaped(text: str) -> str:
    """Backticks mean code; asterisks, bars and trailing underscores mean themselves. Code blocks stay as they are."""
    parts = re.split(r"(?m)((?:^\.\. code-block::.*\n\n(?:    .*\n|\n)+))", text)
    return "".join(part if number % 2 else _prose(part) for number, part in enumerate(parts))


def _prose(text: str) -> str:
    pieces = QUOTED.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            inside = piece.strip("`")
            after = pieces[number + 1][:1]
            pieces[number] = f"``{inside}``" + ("\\ " if after.isalnum() else "")
        else:
            pieces[number] = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", re.sub(r"([*|])", r"\\\1", piece))
    return "".join(pieces)


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Handler of autodoc's event; napoleon's comes after it."""
    lines[:] = converted(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the handler before napoleon's, whose priority is 500."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
