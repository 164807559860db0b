"""Docstrings and comments of the package, for Sphinx.

The docstrings are plain text with a little of reStructuredText. Two things are missing for Sphinx:
it reads only comments of fields that begin with ``#:``, and a few docstrings are laid out in a way
that it refuses.
"""

from __future__ import annotations

import ast
import importlib
import io
import tokenize
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.frontend import get_default_settings
from docutils.parsers.rst import Parser
from docutils.utils import new_document
from sphinx.pycode import ModuleAnalyzer

from reference import modules

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment


def read_field_comments(_app: Sphinx) -> None:
    """Give the comments behind fields to Sphinx, for all modules of the reference."""
    for name in modules():
        importlib.import_module(name)
        analyzer = ModuleAnalyzer.for_module(name)
        analyzer.analyze()
        for place, comment in field_comments(analyzer.code).items():
            analyzer.attr_docs.setdefault(place, [comment, ""])


def field_comments(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the comment on the field's line, where that is not a ``#:`` comment."""
    comments = {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith(("#:", "# type", "# noqa"))
    }
    return {
        (node.name, field.target.id): comments[field.end_lineno]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and field.end_lineno in comments
    }


def make_readable(app: Sphinx, *given: Any) -> None:
    """Keep a docstring's lines as they are, where reStructuredText refuses them."""
    lines: list[str] = given[-1]
    if _is_refused("\n".join(lines), app.env):
        lines[:] = ["| " + line.replace("*", r"\*") if line.strip() else "" for line in lines]


def _is_refused(text: str, env: BuildEnvironment) -> bool:
    settings = get_default_settings(Parser)
    # Nothing is printed, and nothing stops: the messages stand in the document.
    settings.report_level = settings.halt_level = 5
    settings.env = env
    document = new_document("docstring", settings)
    Parser().parse(text, document)
    return any(message["level"] > 1 for message in document.findall(nodes.system_message))


def skip_foreign(_app: Sphinx, _what: str, _name: str, member: Any, *_: Any) -> bool | None:
    """Leave out what another package gives to a class of ours."""
    module = getattr(member, "__module__", None) or "minivllm"
    return True if callable(member) and module.partition(".")[0] != "minivllm" else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", read_field_comments)
    app.connect("autodoc-process-docstring", make_readable)
    app.connect("autodoc-skip-member", skip_foreign)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
