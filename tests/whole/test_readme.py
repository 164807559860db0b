"""The README: its links, its picture, and a table of chapters that says what the chapters
themselves say.
"""

from __future__ import annotations

import re

import nbformat
import pytest

from minivllm.course.authoring import effort
from minivllm.course.authoring.tool import PICTURES, ROOT, broken_links, picture_of
from minivllm.course.notebooks import Stop, as_committed, road

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")
PICTURE = ROOT / "notebooks/images/demo.svg"
COMMITTED = [
    stop for stop in road(ROOT) if as_committed(ROOT / "notebooks" / f"{stop.name}.ipynb")[0]
]


def test_its_links_lead_somewhere() -> None:
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(README)])
    headings = {
        re.sub(r"[^\w -]", "", h).replace(" ", "-").lower()
        for h in re.findall(r"^#+ (.+)$", README, re.M)
    }
    found = {problem.partition(": ")[2] for problem in broken_links(page, ROOT)}
    assert {link for link in found if link.removeprefix("#") not in headings} == set()


def test_the_picture_is_small_and_described() -> None:
    """To draw it anew: minivllm demo --pace 0 --picture notebooks/images/demo.svg, and read the
    description again.
    """
    alt, path = re.search(r"!\[([^\]]+)\]\(([^)]+)\)", README).groups()
    assert ROOT / path == PICTURE
    assert PICTURE.stat().st_size < 150_000
    drawn = re.sub(r"<[^>]+>", "", PICTURE.read_text(encoding="utf-8")).replace("&#160;", " ")
    step = int(re.search(r"Step (\d+)", alt)[1])
    assert re.search(rf"step {step} ", drawn)
    used, cached, free = re.search(r"(\d+) used, (\d+) cached, (\d+) free", alt).groups()
    for count, name in ((used, "used"), (cached, "cached"), (free, "free")):
        assert re.search(rf"\b{count} {name}", drawn)
    assert "http" not in re.sub(
        r'xmlns="[^"]+"|<!--.*?-->', "", PICTURE.read_text(encoding="utf-8")
    ), "no fonts fetched"


@pytest.mark.parametrize("chapter", PICTURES)
def test_a_picture_from_a_chapter_is_the_chapters(chapter: str) -> None:
    """To bring it up to date: python -m minivllm.course.authoring execute notebooks/NN_*.ipynb."""
    call, name = PICTURES[chapter]
    text, _ = as_committed(ROOT / "notebooks" / f"{chapter}.ipynb")
    notebook = nbformat.reads(text, as_version=4)
    assert f"(notebooks/{name})" in README
    assert (ROOT / "notebooks" / name).read_bytes() == picture_of(notebook, call)


@pytest.mark.parametrize("stop", COMMITTED, ids=[stop.name for stop in COMMITTED])
def test_the_table_says_what_the_chapter_says(stop: Stop) -> None:
    row = next(line for line in README.splitlines() if f"](notebooks/{stop.name}.ipynb) |" in line)
    *_, needs, minutes = (cell.strip() for cell in row.strip("|").split("|"))
    expected = [*stop.needs, *([f"({', '.join(stop.helps)})"] if stop.helps else [])]
    assert needs == (", ".join(expected) or "–")
    assert effort.refresh_table(row, ROOT) == row, (
        f"not {minutes}: run `python -m minivllm.course.authoring links`"
    )
