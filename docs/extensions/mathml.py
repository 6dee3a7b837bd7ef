"""Equations as MathML, which browsers draw by themselves: no script and nothing from a network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)


def _converted(node: nodes.Element, inline: bool) -> str:
    try:
        return tex2mathml(node.astext(), as_block=not inline)
    except (MathError, SyntaxError) as error:
        log.warning("an equation cannot be drawn: %s", error, location=node)
        return ""


def visit_inline(writer: Any, node: nodes.Element) -> None:
    """A formula in a line of text."""
    writer.body.append(_converted(node, inline=True))
    raise nodes.SkipNode


def visit_block(writer: Any, node: nodes.Element) -> None:
    """A formula on lines of its own."""
    writer.body.append(f'<div class="equation">{_converted(node, inline=False)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
