"""A small chapter for tests of the course: a function, a class with a bug, a prediction."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minivllm.course.notebooks import Chapter

SETUP = """
import math
from minivllm.course import attempted, check
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, register
from minivllm.course.grading.judges import expect

offset = 0


def check_double(answer):
    suspects = {"squared": ("You square; twice is asked for.", lambda x: x * x)}
    diagnose(answer, [(2,), (3,), (-7,)], lambda x: 2 * x, suspects)
    return "right on 3 numbers"


register(Exercise("99.1", "Double", check_double))


def check_counter(answer):
    counter = answer(1)
    counter.add(2)
    still = "After add(2) the total is still 1.\\nLook at what add assigns to."
    expect(counter.total != 1, "not-updated", still)
    expect(counter.total == 3, "wrong-values", f"1 and 2 gave {counter.total}.\\nLook at add.")
    return "counts"


register(Exercise("99.2", "Debug this", check_counter))


def check_prediction(blocks, tokens):
    held = f"{blocks} blocks hold {16 * blocks} tokens, not 50.\\nThe last is not full."
    expect(blocks == 4, "rounded-down", held)
    expect(tokens == 64, "wrong-values", "Four blocks of 16.\\nMultiply.")
    return "4 blocks, 64 tokens"


register(Exercise("99.3", "Predict", check_prediction))
"""

DOUBLE = '''def double(x: float) -> float:
    """Twice x."""
    return _times(x, 2)  # the whole secret


def _times(
    x: float,  # any number
    by: float = {"a": 2}["a"],
) -> float:
    result = x * by
    return result'''

COUNTER = '''class Counter:
    """Adds up."""

    def __init__(self, total: int) -> None:
        self.total = total

    def add(self, number: int) -> None:
        self.total = self.total + number'''

BUGGY = COUNTER.replace("self.total = self.total + number", "total = self.total + number")
PREDICTION = "blocks = 4  # 50 tokens in blocks of 16\ntokens: int = 16 * 4"
SOURCES = {"99.1": DOUBLE, "99.2": COUNTER, "99.3": PREDICTION}
CHECKS = {
    "99.1": 'check("99.1", double)',
    "99.2": 'check("99.2", Counter)',
    "99.3": 'check("99.3", blocks, tokens)',
}
HINT = "<details><summary>Hint 1</summary>\n\nTwice.\n\n</details>"
PRINTED = {"99.1": "right on 3 numbers", "99.2": "counts", "99.3": "4 blocks, 64 tokens"}


def find(notebook: NotebookNode, id: str) -> NotebookNode:
    """The cell with this id."""
    return next(cell for cell in notebook.cells if cell.id == id)


def fill_in(notebook: NotebookNode, **answers: str) -> None:
    """Fill in the right answers, or others: answer_1="def …"."""
    for id, source in SOURCES.items():
        find(notebook, f"answer-{id[-1]}").source = answers.get(f"answer_{id[-1]}", source)


def make_chapter(root: Path) -> Chapter:
    """Make a repository's three folders at root, with the solution of chapter 99 in them.

    The solution looks as if it had been executed.
    """
    for folder in ("notebooks", "solutions", "exercises"):
        (root / folder).mkdir(parents=True)
    cells = [new_markdown_cell("# 99 · Demo", id="intro"), new_code_cell(SETUP.strip(), id="setup")]
    for id, title in (("99.1", "Double"), ("99.2", "Debug this"), ("99.3", "Predict")):
        text = f"## {id} · {title}\n\n●●○ · 5 minutes\n\nDo it.\n\n{HINT}"
        answer = new_code_cell(SOURCES[id], id=f"answer-{id[-1]}", metadata={"tags": ["exercise"]})
        answer.metadata.minivllm = (
            {"exercise": id, "stub": BUGGY} if id == "99.2" else {"exercise": id}
        )
        output = new_output("stream", name="stdout", text=f"{id} passed: {PRINTED[id]}\n")
        check = new_code_cell(
            CHECKS[id], id=f"check-{id[-1]}", outputs=[output], metadata={"tags": ["check"]}
        )
        check.metadata.minivllm = {"check": id}
        cells += [
            new_markdown_cell(text, id=f"text-{id[-1]}", metadata={"minivllm": {"statement": id}}),
            answer,
        ]
        if id == "99.1":
            cells.append(
                new_code_cell("print(double(2) if attempted(double) else 'later')", id="picture")
            )
        cells.append(check)
    for count, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
    cells[4].outputs = [new_output("stream", name="stdout", text="4\n")]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = new_notebook(
        cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}}
    )
    chapter = Chapter(root, "99_demo")
    nbformat.write(notebook, chapter.solution_path)
    return chapter
