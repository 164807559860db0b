"""Notebooks and Markdown files of the repository, as pages of the site.

The text stays. Links change, because the site has no source files; cells get the tags by which
myst-nb folds them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from minivllm.course.navigation import BOTTOM
from minivllm.course.notebooks import as_committed
from reference import document_of
from repository import ROOT, url_of

WIDGET = "application/vnd.jupyter.widget-view+json"
#: Files of the repository that are pages under another name.
RENAMED = {
    "README.md": "guide/index",
    "ARCHITECTURE.md": "guide/architecture",
    "CONTRIBUTING.md": "guide/contributing",
    "CHANGELOG.md": "guide/changelog",
    "exercises": "exercises/index",
    "notebooks": "index",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)


def page_of(path: str) -> str:
    """The page of a file or folder of the repository, without a suffix; "" where there is none."""
    if path in RENAMED:
        return RENAMED[path]
    folder, name = posixpath.split(path)
    stem, suffix = posixpath.splitext(name)
    if folder in ("notebooks", "exercises") and suffix in (".ipynb", ".md"):
        return f"{folder}/{stem}"
    return document_of(path) if path.startswith("minivllm") else ""


def links(text: str, folder: str, page: str) -> str:
    """Markdown with links that lead somewhere on the site.

    folder: of the repository, in which the text stands. page: the page that shows it. A link to a
    file that is not on the site leads to the repository if pyproject.toml names its address;
    otherwise only its words remain.
    """
    parts = _FENCE.split(text)
    return "".join(
        part if part.startswith("```") else _LINK.sub(lambda m: _link(m, folder, page), part)
        for part in parts
    )


def _link(match: re.Match[str], folder: str, page: str) -> str:
    mark, label, target = match.groups()
    if re.match(r"\w+:", target):
        return match[0]
    path, _, anchor = target.partition("#")
    anchor = f"#{slug(anchor)}" if anchor else ""
    if not path:
        return f"{mark}[{label}]({anchor})"
    here = posixpath.dirname(page)
    path = posixpath.normpath(posixpath.join(folder, path))
    if not (ROOT / path).exists():
        return match[0]
    if mark:
        return f"![{label}]({posixpath.relpath(path, here or '.')})"
    if document := page_of(path):
        return f"[{label}]({posixpath.relpath(source_of(document), here or '.')}{anchor})"
    if url := url_of(path):
        return f"[{label}]({url})"
    return label if "`" in label else f"`{label}`"


def source_of(document: str) -> str:
    """The source file of a page, in the folder that Sphinx reads."""
    if document.startswith("reference/"):
        return f"{document}.rst"
    notebook = re.match(r"(notebooks|exercises)/\d\d_", document)
    return f"{document}.{'ipynb' if notebook else 'md'}"


def symbols(text: str) -> str:
    """Link the names behind links to files, as in the glossary: [engine/batch.py](…): `Batch`."""
    return _SYMBOL.sub(lambda m: f"{m[1]}{{py:obj}}`{m[3]} <{_module(m[2])}.{m[3]}>`", text)


_SYMBOL = re.compile(r"(\]\((?:\.\./)*(minivllm/[\w/]+)\.py\): )`([\w.]+)`")


def _module(path: str) -> str:
    return path.replace("/", ".").removesuffix(".__init__")


def slug(heading: str) -> str:
    """The anchor of a heading: as on GitHub, in small letters, where Jupyter keeps capitals."""
    return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))


def notebook(path: Path, committed: bool = False) -> NotebookNode:
    """A notebook of notebooks/ or exercises/ as a page of the site.

    committed: as git has it, whatever a learner has saved since.
    """
    text = as_committed(path)[0] if committed else None
    found = nbformat.reads(path.read_text(encoding="utf-8") if text is None else text, as_version=4)
    folder = path.parent.name
    # The theme has links to the neighbours at the end of each page.
    found.cells = [cell for cell in found.cells if cell.get("id") != BOTTOM]
    for cell in found.cells:
        if cell.cell_type == "markdown":
            cell.source = links(cell.source, folder, f"{folder}/{path.stem}")
        elif cell.cell_type == "code":
            _fold(cell)
            cell.outputs = [output for output in cell.outputs if _shows(output)]
            _describe(cell)
    return found


def _fold(cell: NotebookNode) -> None:
    """Tags for what JupyterLab folds."""
    jupyter = cell.metadata.get("jupyter", {})
    tags = list(cell.metadata.get("tags", []))
    tags += ["hide-input"] * bool(jupyter.get("source_hidden"))
    tags += ["hide-output"] * bool(jupyter.get("outputs_hidden"))
    cell.metadata.tags = tags


def _shows(output: NotebookNode) -> bool:
    """Whether an output shows something without a kernel. Takes the widgets out of it."""
    data = output.get("data")
    if data is None or WIDGET not in data:
        return True
    del data[WIDGET]
    return any(key != "text/plain" for key in data)


def _describe(cell: NotebookNode) -> None:
    """The alt text and the width of a cell's picture, where myst-nb looks for them."""
    for output in cell.outputs:
        about = output.get("metadata", {}).get("image/png")
        if about:
            image = {"alt": about.get("alt", ""), "classes": "picture"}
            if "width" in about:
                image["width"] = f"{about['width']}px"
            cell.metadata.mystnb = {"image": image}


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The sections of a Markdown text: (heading of level 2, text below it)."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)
