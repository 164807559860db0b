"""The committed notebooks: executed, clean, and still true (nbval runs every one again and
compares).
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minivllm.course import navigation
from minivllm.course.authoring import effort
from minivllm.course.authoring.tool import (
    IGNORED,
    ROOT,
    broken_links,
    clean,
    execute,
    problems,
    write_links,
)
from minivllm.course.notebooks import Chapter, as_committed, chapters
from minivllm.course.stubs import make_exercises

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ALL = [
    path
    for folder in ("notebooks", "solutions", "exercises")
    for path in sorted((ROOT / folder).glob("*.ipynb"))
]
MAX_NOTEBOOK_BYTES, MAX_BYTES_TOGETHER = 1_200_000, 12_000_000


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def text(path: Path, request: pytest.FixtureRequest) -> str:
    return text_of(path, request.config)


def text_of(path: Path, config: pytest.Config) -> str:
    """What is held against the rules: the committed text, whatever a learner has saved; but where
    this file of tests is named on the command line, as authors do, what was saved."""
    if Path(__file__) in [
        Path(config.invocation_params.dir, arg.partition("::")[0]).resolve() for arg in config.args
    ]:
        return path.read_text(encoding="utf-8")
    text, note = as_committed(path)
    if note:
        warnings.warn(note, stacklevel=1)
    if text is None:
        pytest.skip(note)
    return text


def test_there_is_a_first_page() -> None:
    assert ROOT / "notebooks/00_tour.ipynb" in NOTEBOOKS


def test_nbval(path: Path, pytestconfig: pytest.Config) -> None:
    arguments = [Path(argument).resolve() for argument in pytestconfig.args]
    if pytestconfig.getoption("nbval", False) and any(
        path.is_relative_to(argument) for argument in arguments
    ):
        pytest.skip("this very run collects the notebook with --nbval")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-cell-timeout=120",
        "-p",
        "no:cacheprovider",
        str(path),
    ]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_committed_as_it_should_be(text: str) -> None:
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    assert len(text.encode()) < MAX_NOTEBOOK_BYTES
    cleaned = copy.deepcopy(notebook)
    clean(cleaned)
    assert cleaned == notebook, "save it with `python -m minivllm.course.authoring execute`"


def test_pictures_bring_words(text: str) -> None:
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 30
                assert output.data["text/plain"].startswith(output.metadata["image/png"]["alt"])
                assert any("text/markdown" in other.get("data", {}) for other in cell.outputs), (
                    "a caption below it"
                )


def test_cells_are_short(text: str) -> None:
    cells = nbformat.reads(text, as_version=4).cells
    lines = sorted(
        len([x for x in c.source.splitlines() if x.strip()]) for c in cells if c.cell_type == "code"
    )
    words = sorted(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    assert 3 <= lines[len(lines) // 2] <= 7
    assert lines[-1] <= 20
    assert words[len(words) // 2] <= 35


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_links_lead_somewhere(path: Path, pytestconfig: pytest.Config) -> None:
    notebook = nbformat.reads(text_of(path, pytestconfig), as_version=4)
    assert broken_links(notebook, path.parent) == []


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_neighbours_are_linked(path: Path, pytestconfig: pytest.Config) -> None:
    notebook = nbformat.reads(text_of(path, pytestconfig), as_version=4)
    linked = copy.deepcopy(notebook)
    navigation.place(linked, path.parent.name, path.stem)
    effort.refresh_page(linked, Chapter(ROOT, path.stem))
    assert linked == notebook, "run `python -m minivllm.course.authoring links`"


def test_sums_of_exercises_are_written_into_pages(copied: Path) -> None:
    """A statement with other minutes changes the chapter, its exercises and the README."""
    name = "04_block_manager"
    shutil.copy(ROOT / "README.md", copied)
    write_links(copied)
    path = copied / "solutions" / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("●●○ · 25 minutes", "●●○ · 1025 minutes"), encoding="utf-8")
    changed = {path.relative_to(copied).as_posix() for path in write_links(copied)}
    pages = {f"{folder}/{name}.ipynb" for folder in ("notebooks", "solutions", "exercises")}
    assert changed == {*pages, "README.md"}
    assert "1140 minutes of exercises" in (copied / f"notebooks/{name}.ipynb").read_text("utf-8")
    assert "about 1140 minutes together" in path.read_text("utf-8")
    assert "| 60, 1140 |" in (copied / "README.md").read_text("utf-8")


@pytest.mark.parametrize("folder", ["notebooks", "solutions"])
def test_every_page_says_the_sums(folder: str) -> None:
    for chapter in chapters(ROOT):
        page = nbformat.read(ROOT / folder / f"{chapter.name}.ipynb", as_version=4)
        for cell in page.cells:
            cell.source = re.sub(r"\d+ minutes", "0 minutes", cell.source)
        before = copy.deepcopy(page)
        effort.refresh_page(page, chapter)
        assert page != before, chapter.name


def test_small_together(pytestconfig: pytest.Config) -> None:
    texts = [as_committed(path)[0] or "" for path in ALL]
    assert sum(len(text.encode()) for text in texts) < MAX_BYTES_TOGETHER


# --- the rules themselves -------------------------------------------------------------------------


def cell(source: str, text: str | None = "ok\n", count: int = 1, **output) -> NotebookNode:
    outputs = [] if text is None else [new_output("stream", name="stdout", text=text)]
    outputs += [new_output(**output)] if output else []
    return new_code_cell(source, outputs=outputs, execution_count=count)


def ignored(source: str) -> NotebookNode:
    code = cell(source)
    code.metadata.tags = [IGNORED]
    return code


def test_a_good_notebook_has_no_problems() -> None:
    assert problems(new_notebook(cells=[new_markdown_cell("# One"), cell("print('ok')")])) == []


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        ([cell("print(1)", count=2)], "top to bottom"),
        ([cell("x = 1", None), cell("y = 1", None, 2), cell("print(1)", count=3)], "only 1 of 3"),
        (
            [cell("f()", output_type="error", ename="ValueError", evalue="no", traceback=[])],
            "ValueError: no",
        ),
        ([cell("print(p)", "at /home/somebody/minivllm\n")], "a path"),
        ([cell("print(p)", "took 12.5 ms\n")], "a time"),
        ([ignored("f()"), cell("print(1)", count=2)], "asserts nothing"),
        ([cell("# NBVAL_SKIP\nf()")], "a marker of nbval"),
        (
            [cell("f()", output_type="display_data", data={"image/png": "A" * 90_000})],
            "an image of",
        ),
    ],
)
def test_bad_notebooks_are_named(cells: list[NotebookNode], complaint: str) -> None:
    assert any(complaint in problem for problem in problems(new_notebook(cells=cells)))


def test_execute_cleans_and_refuses(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    root = f"print({str(ROOT)!r} + '/notebooks')"
    notebook = new_notebook(
        cells=[new_code_cell(root), new_code_cell("6 * 7")], metadata={"secret": "mine"}
    )
    nbformat.write(notebook, good)
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), bad)
    before = bad.read_bytes()
    assert execute(good) == []
    saved = nbformat.read(good, as_version=4)
    assert saved.cells[0].outputs[0].text == "notebooks\n"
    assert saved.cells[1].outputs[0].data["text/plain"] == "42"
    assert set(saved.metadata) == {"kernelspec", "language_info"}
    assert any("ZeroDivisionError" in problem for problem in execute(bad))
    assert bad.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        (
            (
                "[a](b.ipynb) [c](../minivllm/x.py) [d](../minivllm) [e](#Big-idea)"
                " [f](b.ipynb#Other)"
            ),
            [],
        ),
        ("[paper](https://arxiv.org/abs/2205.14135v2), https://arxiv.org/abs/1805.02867.", []),
        ("[web](https://example.org/#x) `[0](1)`-like [m](mailto:me@example.org)", []),
        ("[a](missing.ipynb)", ["missing.ipynb"]),
        (
            "[a](../minivllm/x.py#L4) and <a href='../minivllm/y.py'>",
            ["../minivllm/x.py#L4", "../minivllm/y.py"],
        ),
        (
            "[a](../minivllm/x.py#L3-L2) [b](../minivllm/x.py#line2)",
            ["../minivllm/x.py#L3-L2", "../minivllm/x.py#line2"],
        ),
        ("[a](#cell-id=text) [b](#cell-id=other)", ["#cell-id=other"]),
        ("[a](#nowhere) [b](b.ipynb#nowhere)", ["#nowhere", "b.ipynb#nowhere"]),
        ("http://arxiv.org/abs/2205.14135", ["http://arxiv.org/abs/2205.14135"]),
        ("[p](https://arxiv.org/abs/2213.14135)", ["https://arxiv.org/abs/2213.14135"]),
        ("[p](https://arxiv.org/2205.14135)", ["https://arxiv.org/2205.14135"]),
    ],
)
def test_broken_links_are_named(tmp_path: Path, text: str, broken: list[str]) -> None:
    (tmp_path / "minivllm").mkdir()
    (tmp_path / "minivllm/x.py").write_text("1\n2\n3\n")
    (tmp_path / "notebooks").mkdir()
    nbformat.write(
        new_notebook(cells=[new_markdown_cell("# Other")]), tmp_path / "notebooks/b.ipynb"
    )
    cells = [
        new_markdown_cell("## Big idea\n\n" + text, id="text"),
        new_code_cell("x = '[a](nowhere)'"),
    ]
    assert broken_links(new_notebook(cells=cells), tmp_path / "notebooks") == [
        f"cell text: {link}" for link in broken
    ]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with the course's notebooks, as they are, and a folder for what they link to."""
    for path in ALL:
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    return tmp_path


def test_links_are_written_once_into_every_page(copied: Path) -> None:
    for path in copied.rglob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if "nav-" not in cell.id]
        nbformat.write(notebook, path)
    assert len(write_links(copied)) == len(ALL)
    written = {path: path.read_bytes() for path in copied.rglob("*.ipynb")}
    for path in written:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        notebook.cells = [cell for cell in notebook.cells if "nav-" in cell.id]
        assert [cell.id for cell in notebook.cells] == ["nav-top", "nav-bottom"]
        assert broken_links(notebook, path.parent) == []
    assert write_links(copied) == []
    assert written == {path: path.read_bytes() for path in copied.rglob("*.ipynb")}


def test_a_page_links_to_both_sides() -> None:
    assert navigation.links("notebooks", "03_paged_kv_cache") == (
        "[← 02 flash attention](02_flash_attention.ipynb) · [the tour](00_tour.ipynb)"
        " · [exercises 03](../exercises/03_paged_kv_cache.ipynb)"
        " · [04 block manager →](04_block_manager.ipynb)"
    )
    assert navigation.links("notebooks", "00_tour") == (
        "[01 online softmax →](01_online_softmax.ipynb)"
    )
    assert navigation.links("notebooks", "11_using_minivllm") == (
        "[← 10 measuring](10_measuring.ipynb) · [the tour](00_tour.ipynb)"
        " · [12 serving →](12_serving.ipynb)"
    )
    assert navigation.links("notebooks", "12_serving") == (
        "[← 11 using minivllm](11_using_minivllm.ipynb) · [the tour](00_tour.ipynb)"
        " · [exercises 12](../exercises/12_serving.ipynb)"
        " · [13 speculative decoding →](13_speculative_decoding.ipynb)"
    )
    assert navigation.links("notebooks", "13_speculative_decoding") == (
        "[← 12 serving](12_serving.ipynb) · [the tour](00_tour.ipynb)"
        " · [exercises 13](../exercises/13_speculative_decoding.ipynb)"
        " · [14 quantization →](14_quantization.ipynb)"
    )
    assert navigation.links("notebooks", "14_quantization") == (
        "[← 13 speculative decoding](13_speculative_decoding.ipynb) · [the tour](00_tour.ipynb)"
        " · [exercises 14](../exercises/14_quantization.ipynb)"
        " · [15 a fleet →](15_a_fleet.ipynb)"
    )
    assert navigation.links("notebooks", "15_a_fleet") == (
        "[← 14 quantization](14_quantization.ipynb) · [the tour](00_tour.ipynb)"
        " · [exercises 15](../exercises/15_a_fleet.ipynb)"
    )
    top = navigation.source("nav-top", "exercises", "03_paged_kv_cache")
    assert "[chapter 03](../notebooks/03_paged_kv_cache.ipynb)" in top
    assert "(../solutions/03_paged_kv_cache.ipynb)" in top
    assert "last hint" in top


def test_exercises_get_links_of_their_own(copied: Path) -> None:
    write_links(copied)
    chapter = Chapter(copied, "03_paged_kv_cache")
    made, written = make_exercises(chapter), nbformat.read(chapter.exercises, as_version=4)
    for id in ("nav-top", "nav-bottom"):
        [theirs], [ours] = (
            [cell.source for cell in notebook.cells if cell.id == id]
            for notebook in (made, written)
        )
        assert theirs == ours
        assert theirs != next(c.source for c in chapter.solution.cells if c.id == id)
