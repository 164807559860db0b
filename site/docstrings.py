"""Docstrings and comments of the package, for Sphinx.

The docstrings are plain text with a little of reStructuredText. Some things are missing for Sphinx:
it reads only comments of fields that begin with ``#:``, a few docstrings are laid out in a way that
it refuses, and some values say more than a reader wants to know.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.frontend import get_default_settings
from docutils.parsers.rst import Parser, roles
from docutils.utils import new_document
from sphinx import addnodes
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
        if token.type == tokenize.COMMENT
        and not token.string.startswith(("#:", "# type", "# noqa"))
    }
    found = {}
    for node in ast.walk(ast.parse(source)):
        for field in node.body if isinstance(node, ast.ClassDef) else ():
            if (
                not isinstance(field, ast.AnnAssign | ast.Assign)
                or field.end_lineno not in comments
            ):
                continue
            targets = field.targets if isinstance(field, ast.Assign) else [field.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    found[node.name, target.id] = comments[field.end_lineno]
    return found


def make_readable(app: Sphinx, *given: Any) -> None:
    """Keep a docstring's lines as they are, where reStructuredText refuses them.

    "Taught in notebooks/05_scheduler.ipynb" becomes a link.
    """
    lines: list[str] = given[-1]
    lines[:] = [_CHAPTER.sub(r":doc:`chapter \1 </notebooks/\1_\2>`", line) for line in lines]
    if _is_refused("\n".join(lines), app.env):
        lines[:] = ["| " + line.replace("*", r"\*") if line.strip() else "" for line in lines]


_CHAPTER = re.compile(r"(?<![`\w])notebooks/(\d\d)_(\w+)\.ipynb")


def _is_refused(text: str, env: BuildEnvironment) -> bool:
    settings = get_default_settings(Parser)
    # Nothing is printed, and nothing stops: the messages stand in the document.
    settings.report_level = settings.halt_level = 5
    settings.env = env
    document = new_document("docstring", settings)
    # A parser ends by forgetting what `name` means, also for the page that is being read.
    role = roles._roles.get("")
    Parser().parse(text, document)
    if role:
        roles._roles[""] = role
    return any(message["level"] > 1 for message in document.findall(nodes.system_message))


def skip_foreign(_app: Sphinx, _what: str, _name: str, member: Any, *_: Any) -> bool | None:
    """Leave out what another package gives to a class of ours."""
    module = getattr(member, "__module__", None) or "minivllm"
    return True if callable(member) and module.partition(".")[0] != "minivllm" else None


def hide_values(_app: Sphinx, document: nodes.document) -> None:
    """Leave out values that are long, and those that are about this machine or this run."""
    for part in list(document.findall(addnodes.desc_annotation)):
        text = part.astext()
        if text.startswith(" = ") and (len(text) > _LONGEST or re.search(r"Path\(| at 0x", text)):
            part.parent.remove(part)


#: Characters of a value that is shown.
_LONGEST = 60


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", read_field_comments)
    app.connect("autodoc-process-docstring", make_readable)
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("doctree-read", hide_values)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
