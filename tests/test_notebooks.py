"""The committed notebooks: executed, clean, and still true (nbval runs every one again and compares)."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minivllm.course.authoring import ROOT, clean, execute, problems

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_NOTEBOOK_BYTES = 1_200_000


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_is_a_first_page() -> None:
    assert ROOT / "notebooks/00_tour.ipynb" in NOTEBOOKS


def test_nbval(path: Path, pytestconfig: pytest.Config) -> None:
    arguments = [Path(argument).resolve() for argument in pytestconfig.args]
    if pytestconfig.getoption("nbval", False) and any(path.is_relative_to(argument) for argument in arguments):
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
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_committed_as_it_should_be(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    assert path.stat().st_size < MAX_NOTEBOOK_BYTES
    cleaned = copy.deepcopy(notebook)
    clean(cleaned)
    assert cleaned == notebook, "save it with `python -m minivllm.course.authoring execute`"


def test_pictures_bring_words(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 30
                assert output.data["text/plain"].startswith(output.metadata["image/png"]["alt"])
                assert any("text/markdown" in other.get("data", {}) for other in cell.outputs), "a caption below it"


def test_cells_are_short(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    lines = sorted(len([x for x in c.source.splitlines() if x.strip()]) for c in cells if c.cell_type == "code")
    words = sorted(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    assert 3 <= lines[len(lines) // 2] <= 7
    assert lines[-1] <= 20
    assert words[len(words) // 2] <= 35


# --- the rules themselves ---------------------------------------------------------------------------------------------


def cell(source: str, text: str | None = "ok\n", count: int = 1, **output) -> NotebookNode:
    outputs = [] if text is None else [new_output("stream", name="stdout", text=text)]
    outputs += [new_output(**output)] if output else []
    return new_code_cell(source, outputs=outputs, execution_count=count)


def test_a_good_notebook_has_no_problems() -> None:
    assert problems(new_notebook(cells=[new_markdown_cell("# One"), cell("print('ok')")])) == []


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        ([cell("print(1)", count=2)], "top to bottom"),
        ([cell("x = 1", None), cell("y = 1", None, 2), cell("print(1)", count=3)], "only 1 of 3"),
        ([cell("f()", output_type="error", ename="ValueError", evalue="no", traceback=[])], "ValueError: no"),
        ([cell("print(p)", "at /home/somebody/minivllm\n")], "a path"),
        ([cell("print(p)", "took 12.5 ms\n")], "a time"),
        ([cell("# NBVAL_IGNORE_OUTPUT\nf()"), cell("print(1)", count=2)], "asserts nothing"),
        ([cell("f()", output_type="display_data", data={"image/png": "A" * 90_000})], "an image of"),
    ],
)
def test_bad_notebooks_are_named(cells: list[NotebookNode], complaint: str) -> None:
    assert any(complaint in problem for problem in problems(new_notebook(cells=cells)))


def test_execute_cleans_and_refuses(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    root = f"print({str(ROOT)!r} + '/notebooks')"
    notebook = new_notebook(cells=[new_code_cell(root), new_code_cell("6 * 7")], metadata={"secret": "mine"})
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
