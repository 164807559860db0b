"""The tests of the chapters, tested on a chapter of their own: what is right passes, what is wrong
is caught.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell

from minivllm.course.authoring import tool as authoring
from minivllm.course.authoring.tool import misplaced, problems
from minivllm.course.notebooks import ChangedSolutionError, Chapter, read, role
from minivllm.course.stubs import make_exercises, require_published, stub_source
from support import demo
from support.answers import leaks, parts_of
from support.children import Children

# --- children -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    chapter = demo.make_chapter(tmp_path_factory.mktemp("demo"))
    with Children(parts_of(chapter)[0], "99", chapter.root) as children:
        yield children


@pytest.mark.slow
@pytest.mark.parametrize("id", list(demo.SOURCES))
def test_solutions_pass(children: Children, id: str) -> None:
    result = children.run(demo.SOURCES[id], demo.CHECKS[id])
    assert (result["raised"], result["printed"]) == (None, f"{id} passed: {demo.PRINTED[id]}")


@pytest.mark.parametrize(
    ("id", "source", "raised", "name"),
    [
        ("99.1", "def double(x): return x * x", "Mistake", "squared"),
        ("99.1", "def double(x): return x", "Mistake", "wrong-values"),
        ("99.1", "def double(x): return x / 0", "Mistake", "raised"),
        (
            "99.1",
            (
                "def double(x): return later(x)\ndef later(x): raise NotImplementedError('99.1:"
                " your code here')"
            ),
            "NotAttempted",
            None,
        ),
        ("99.2", demo.BUGGY, "Mistake", "not-updated"),
        ("99.3", "blocks, tokens = 3, 64", "Mistake", "rounded-down"),
        ("99.3", "blocks, tokens = 4, ...", "NotAttempted", None),
        ("99.1", "def double(x): exit()", "SystemExit", None),
        ("99.1", "import os\ndef double(x): os._exit(3)", "ProcessEnded", None),
        ("99.1", "def double(x):\n    while True: pass", "TimeoutError", None),
    ],
)
def test_outcomes(children: Children, id: str, source: str, raised: str, name: str | None) -> None:
    result = children.run(source, demo.CHECKS[id], limit=1)
    assert (result["raised"], result["name"]) == (raised, name)
    assert children.run(demo.DOUBLE, demo.CHECKS["99.1"])["raised"] is None, (
        "the next child is unharmed"
    )


def test_triton_kernels_run_interpreted(children: Children) -> None:
    pytest.importorskip("triton")
    kernel = (
        "import torch, triton, triton.language as tl\n@triton.jit\ndef kernel(out_ptr, x_ptr):\n   "
        " {body}\ndef double(x):\n    out = torch.empty(1)\n    kernel[(1,)](out, torch.full((1,),"
        " float(x)))\n    return out.item()"
    )
    body = "tl.store(out_ptr, 2 * tl.load(x_ptr))"
    assert children.run(kernel.format(body=body), demo.CHECKS["99.1"])["raised"] is None
    stub = kernel.format(body="raise NotImplementedError('99.1: your code here')")
    assert children.run(stub, demo.CHECKS["99.1"])["raised"] == "NotAttempted"
    wrong = kernel.format(body="tl.store(out_ptr, tl.load(x_ptr) * tl.load(x_ptr))")
    assert children.run(wrong, demo.CHECKS["99.1"])["name"] == "squared"


def test_a_child_is_cheap(children: Children) -> None:
    began = time.perf_counter()
    for _ in range(5):
        children.run(demo.DOUBLE, demo.CHECKS["99.1"])
    assert time.perf_counter() - began < 5


@pytest.mark.slow
def test_given_cells_that_fail_are_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        Children(["1 / 0"], "99", tmp_path)


# --- stubs and exercises --------------------------------------------------------------------------


def test_the_stub_keeps_signature_and_docstring(chapter: Chapter) -> None:
    answers = {role(c)[1]: c for c in chapter.solution.cells if role(c)[0] == "exercise"}
    assert (
        stub_source(answers["99.1"])
        == 'def double(x: float) -> float:\n    """Twice x."""\n    raise'
        ' NotImplementedError("99.1: your code here")\n\n\ndef _times(\n    x: float,  # any'
        ' number\n    by: float = {"a": 2}["a"],\n) -> float:\n    raise'
        ' NotImplementedError("99.1: your code here")'
    )
    assert stub_source(answers["99.2"]) == demo.BUGGY
    assert stub_source(answers["99.3"]) == "blocks = ...\ntokens: int = ..."


def answer_cell(source: str, **metadata):
    return new_code_cell(source, metadata={"minivllm": {"exercise": "01.2", **metadata}})


def test_stubs_of_classes_and_kernels() -> None:
    source = (
        "import triton\n# not kept\n@triton.jit\ndef kernel(x_ptr, N: tl.constexpr):  # one program"
        " a row\n    y = 1\nclass A(Base):\n    '''Doc.\n\n    More.\n    '''\n\n    size: int ="
        " 3\n    @property\n    def p(self): return 1\n    async def q(self, *, a=lambda: 1) ->"
        " dict[str, int]:\n        # how\n        return 2\nBLOCK = 16"
    )
    assert (
        stub_source(answer_cell(source))
        == "import triton\n\n\n@triton.jit\ndef kernel(x_ptr, N: tl.constexpr):  # one program a"
        " row\n"
        '    raise NotImplementedError("01.2: your code here")\n'
        "\n\nclass A(Base):\n    '''Doc.\n\n    More.\n    '''\n\n    size: int = 3\n\n"
        "    @property\n    def p(self):\n"
        '        raise NotImplementedError("01.2: your code here")\n\n'
        "    async def q(self, *, a=lambda: 1) -> dict[str, int]:\n"
        '        raise NotImplementedError("01.2: your code here")\n\n\nBLOCK = 16'
    )


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        (answer_cell("for i in range(3): print(i)"), "write its stub"),
        (answer_cell("a, b = 1, 2"), "a prediction is"),
        (answer_cell("def f(): pass", stub="def g(): pass"), "defines"),
        (answer_cell("def f(:"), "invalid syntax"),
    ],
)
def test_what_cannot_be_a_stub_is_refused(cell, complaint: str) -> None:
    with pytest.raises((ValueError, SyntaxError), match=complaint):
        stub_source(cell)


def test_exercises_are_written(chapter: Chapter) -> None:
    written = read(chapter.exercises)
    assert written.metadata.minivllm.chapter == "99_demo"
    assert [cell.id for cell in written.cells] == [cell.id for cell in chapter.solution.cells]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in written.cells)
    assert "stub" not in str(written.cells[6].metadata)
    assert leaks(chapter) == []
    require_published(chapter)


def test_a_changed_solution_is_named(chapter: Chapter) -> None:
    chapter.solution.cells[1].source += "\nmore = 1"
    check = next(cell for cell in chapter.solution.cells if role(cell) == ("check", "99.2"))
    check.outputs = []
    answer = next(cell for cell in chapter.solution.cells if role(cell) == ("exercise", "99.1"))
    answer.source = answer.source.replace("_times(x, 2)", "x + x")
    with pytest.raises(
        ChangedSolutionError, match=r"published \(the cell 'setup', the check of 99\.2\), and"
    ):
        require_published(chapter)
    for other in ("def double(y): pass", "def double(x"):
        answer.source = other
        with pytest.raises(
            ChangedSolutionError, match=r"the names or signatures in the answer to 99\.1"
        ):
            require_published(chapter)


def test_a_leak_is_found(chapter: Chapter) -> None:
    chapter.solution.cells[4].source = demo.DOUBLE
    assert leaks(chapter) == ["cell picture: most of the answer to 99.1"]


def test_a_solution_has_no_problems_and_bad_ones_are_named(chapter: Chapter) -> None:
    assert problems(chapter.solution) == []
    cells = chapter.solution.cells
    cells[-1].outputs = []
    assert problems(chapter.solution) == ["the check of 99.3 printed nothing"]
    cells[3], cells[5] = cells[5], cells[3]
    assert any("in this order" in problem for problem in misplaced(chapter.solution))
    cells[2].source = "## 99.1"
    assert any("minutes" in problem for problem in misplaced(chapter.solution))


def test_the_command_refuses_and_says_why(
    chapter: Chapter, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(authoring, "ROOT", chapter.root)
    monkeypatch.setattr("sys.argv", ["authoring", "stubs"])
    assert authoring.main() == 0
    assert "exercises/99_demo.ipynb: saved" in capsys.readouterr().out
    bad = dataclasses.replace(chapter, name="98_bad")
    notebook = read(chapter.solution_path)
    notebook.cells[-1].outputs = []
    authoring.nbformat.write(notebook, bad.solution_path)
    assert authoring.main() == 1
    assert "the check of 99.3 printed nothing" in capsys.readouterr().out
    assert not bad.exercises.exists()
    assert make_exercises(chapter) == read(chapter.exercises)
