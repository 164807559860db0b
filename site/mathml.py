"""Formulas as MathML, which browsers draw themselves: no script, no font and no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.logging import getLogger

if TYPE_CHECKING:
    from sphinx.application import Sphinx

logger = getLogger(__name__)
#: Characters that MathJax reads and docutils does not.
_CHARACTERS = {"…": r"\ldots ", "·": r"\cdot ", "−": "-", "×": r"\times ", "≤": r"\le "}


def mathml(tex: str, *, block: bool) -> str:
    """A formula as a <math> element. Raises docutils' MathError."""
    for character, command in _CHARACTERS.items():
        tex = tex.replace(character, command)
    return tex2mathml(tex, as_block=block)


def _inline(self: Any, node: Any) -> None:
    self.body.append(_converted(node, block=False))
    raise SkipNode


def _block(self: Any, node: Any) -> None:
    self.body.append(f'<div class="math">{_converted(node, block=True)}</div>\n')
    raise SkipNode


def _converted(node: Any, *, block: bool) -> str:
    try:
        return mathml(node.astext(), block=block)
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        return ""


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
