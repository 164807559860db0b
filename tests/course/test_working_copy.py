"""What a learner has done in exercises/ and saved in notebooks/ leaves `make test` green, and is
named.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from minivllm.course.authoring.tool import ROOT
from minivllm.course.notebooks import role

pytestmark = pytest.mark.slow

#: Of what `make test` runs, what looks at the files that are changed below. A folder, since
#: test_notebooks.py takes the files as they are where it is named itself.
PLACES = ("tests/course/test_chapters.py", "tests/whole", "notebooks")
#: No browser: it would open what the learner has saved, as it must.
SELECTED = (
    "(00_tour and not opened) or (ch01 and (step or published or leak))"
    " or (01_online_softmax and links)"
)


def clone_of(repository: Path, folder: Path) -> Path:
    done = subprocess.run(
        ["git", "clone", "-q", repository, folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"not a git repository: {done.stderr.strip()}")
    return folder


def learn(root: Path) -> None:
    """Half of an exercise written, a check deleted, a page run with another result, a page of their
    own.
    """
    path = root / "exercises/01_online_softmax.ipynb"
    exercises = nbformat.read(path, as_version=4)
    first = next(cell for cell in exercises.cells if role(cell) == ("exercise", "01.1"))
    first.source, first.execution_count = first.source.replace("raise", "1 / 0\n    raise"), 3
    first.outputs = [new_output("stream", name="stdout", text="mine\n")]
    exercises.cells = [cell for cell in exercises.cells if role(cell) != ("check", "01.2")]
    exercises.cells[0].source += "\n\nMy notes, with [a link](nowhere.md)."
    nbformat.write(exercises, path)
    shutil.copy(path, path.with_suffix(".kept-1.ipynb"))
    path.with_name(".progress.json").write_text("{}")

    tour = nbformat.read(root / "notebooks/00_tour.ipynb", as_version=4)
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    code[0].outputs = [new_output("stream", name="stdout", text="something else\n")]
    code[1].outputs = [new_output("error", ename="KeyboardInterrupt", evalue="", traceback=[])]
    tour.cells.append(new_code_cell("1 / 0"))
    nbformat.write(tour, root / "notebooks/00_tour.ipynb")
    nbformat.write(
        new_notebook(cells=[new_code_cell("1 / 0")]), root / "notebooks/00_tour-mine.ipynb"
    )


def test_a_learners_working_copy_is_green(tmp_path: Path) -> None:
    root = clone_of(ROOT, tmp_path / "minivllm")
    if not (root / "exercises/01_online_softmax.ipynb").exists():
        pytest.skip("chapter 01 has not been committed")
    learn(root)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        SELECTED,
        *PLACES,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 20, done.stdout
    said = " ".join(done.stdout.split())
    for name in ("notebooks/00_tour.ipynb", "exercises/01_online_softmax.ipynb"):
        assert (
            f"{name} was changed; its committed copy was tested. To have that again: git checkout"
            f" -- {name}" in said
        )
    assert "notebooks/00_tour-mine.ipynb is not in git, and was left out" in said

    write_pages = (
        "import sys; sys.path.insert(0, 'site')\n"
        "import build; build.course_pages(build.Path('pages'), committed=True)"
    )
    subprocess.run([sys.executable, "-c", write_pages], cwd=root, env=environment, check=True)
    for name in ("notebooks/00_tour.ipynb", "exercises/01_online_softmax.ipynb"):
        page = (root / "pages" / name).read_text(encoding="utf-8")
        assert "nowhere.md" not in page
        assert "something else" not in page
