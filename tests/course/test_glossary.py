"""The glossary and the links between modules and chapters lead where they say, in both
directions.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest

from minivllm.course.authoring.glossary import PACKAGE, TERMS, Term, find, render
from minivllm.course.authoring.tool import GLOSSARY, ROOT, broken_links
from minivllm.course.notebooks import MODULES, ROAD, as_committed

NAMES = {stop.number: stop.name for stop in ROAD}


# --- the glossary ---------------------------------------------------------------------------------


def test_the_glossary_is_in_step() -> None:
    """It is written by a command."""
    written = (ROOT / GLOSSARY).read_text(encoding="utf-8")
    assert written == render(), "python -m minivllm.course.authoring glossary"


def test_its_links_lead_somewhere() -> None:
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(render())])
    assert len(re.findall(r"\]\(", render())) == 2 * len(TERMS)
    assert "#L" not in render(), "a line number breaks when a line is added"
    assert broken_links(page, (ROOT / GLOSSARY).parent) == []


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_a_term_says_what_it_is(term: Term) -> None:
    assert term.chapter in NAMES
    assert term.text.endswith(".")
    assert 20 < len(term.text) < 260
    assert len(re.findall(r"[.:;](?= |$)", term.text)) <= 3, "one or two sentences"
    find(term.place)


def test_no_term_is_there_twice() -> None:
    assert len({term.name for term in TERMS}) == len(TERMS)


def test_every_chapter_has_terms() -> None:
    assert {term.chapter for term in TERMS} == set(NAMES)


def test_a_place_that_is_gone_is_an_error(tmp_path: Path) -> None:
    source = (
        '"""What it is about."""\n\nclass A:\n    x: int = 1\n\n    def f(self):\n        y ='
        " 2\n\nB, C = 1, 2\n"
    )
    (tmp_path / "a.py").write_text(source)
    lines = {"a.py:A": 3, "a.py:A.x": 4, "a.py:A.f": 6, "a.py:A.f.y": 7, "a.py:C": 9}
    assert {place: find(place, tmp_path).lineno for place in lines} == lines
    for place in ("a.py:D", "a.py:A.y", "a.py:x", "b.py:A", "a.py", "a.py:"):
        with pytest.raises(LookupError, match=re.escape(place)):
            find(place, tmp_path)


# --- modules and chapters -------------------------------------------------------------------------

PAIRS = [(number, module) for number, modules in MODULES.items() for module in modules]


def docstring_of(path: Path) -> str:
    """A module's docstring in one line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return " ".join((ast.get_docstring(tree) or "").split())


@pytest.mark.parametrize(("number", "module"), PAIRS, ids=[module for _, module in PAIRS])
def test_a_module_names_its_chapter(number: str, module: str) -> None:
    docstring = docstring_of(PACKAGE / module)
    assert f"Taught in notebooks/{NAMES[number]}.ipynb." in docstring


@pytest.mark.parametrize(("number", "module"), PAIRS, ids=[module for _, module in PAIRS])
def test_a_chapter_links_to_its_modules(number: str, module: str) -> None:
    text, _ = as_committed(ROOT / "notebooks" / f"{NAMES[number]}.ipynb")
    if not text:
        pytest.skip("its notebook has not been committed")
    cells = nbformat.reads(text, as_version=4).cells
    assert any(
        f"](../minivllm/{module}" in cell.source for cell in cells if cell.cell_type == "markdown"
    )


def test_whoever_names_a_chapter_is_listed() -> None:
    said = {}
    for path in PACKAGE.rglob("*.py"):
        docstring = docstring_of(path)
        if found := re.findall(r"Taught in notebooks/(\d\d)", docstring):
            said[path.relative_to(PACKAGE).as_posix()] = found
    assert said == {module: [number] for number, module in PAIRS}
