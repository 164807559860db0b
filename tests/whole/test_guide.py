"""The guide, notebooks/11: every option, every field of a request and every error is in it, so that
it cannot rot.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minivllm import errors
from minivllm.cli.app import app
from minivllm.config import EngineConfig
from minivllm.course.authoring.tool import ROOT, compared_text
from minivllm.course.notebooks import as_committed
from minivllm.engine.engine_core import EnginePieces
from minivllm.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

GUIDE = ROOT / "notebooks/11_using_minivllm.ipynb"
ERRORS = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.MiniVLLMError) and kind.__module__ == errors.__name__
}
#: Errors that one process cannot have; the guide's text tells of them.
ONLY_TOLD = {name for name in ERRORS if name.startswith("Rank") or name == "EngineEndedError"}


@pytest.fixture(scope="module")
def guide() -> NotebookNode:
    return nbformat.reads(as_committed(GUIDE)[0] or GUIDE.read_text(encoding="utf-8"), as_version=4)


def given_names(notebook: NotebookNode) -> set[str]:
    """What the code gives to something: the names of keyword arguments, and the keys of dicts."""
    found = set()
    for cell in notebook.cells:
        for node in ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ():
            if isinstance(node, ast.Call):
                found |= {keyword.arg for keyword in node.keywords}
            elif isinstance(node, ast.Dict):
                found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return found


def provoked(notebook: NotebookNode) -> set[str]:
    """Words in what the code printed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return set(
        re.findall(
            r"\w+", "\n".join(compared_text(output) for cell in cells for output in cell.outputs)
        )
    )


def test_every_engine_option_has_an_example(guide: NotebookNode) -> None:
    assert {field.name for field in dataclasses.fields(EngineConfig)} - given_names(guide) == set()


def test_every_sampling_field_has_an_example(guide: NotebookNode) -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} - given_names(
        guide
    ) == set()


def test_every_seam_has_an_example(guide: NotebookNode) -> None:
    seams = {field.name for field in dataclasses.fields(EnginePieces)}
    assert len(seams) >= 5
    assert seams - given_names(guide) == set()


def test_every_error_is_provoked(guide: NotebookNode) -> None:
    assert ERRORS.keys() - ONLY_TOLD - provoked(guide) == set()
    told = set(re.findall(r"\w+", "\n".join(cell.source for cell in guide.cells)))
    assert ONLY_TOLD - told == set()


def test_every_command_is_listed(guide: NotebookNode) -> None:
    text = "\n".join(cell.source for cell in guide.cells if cell.cell_type == "markdown")
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    commands += [group.name or group.typer_instance.info.name for group in app.registered_groups]
    assert len(commands) >= 6
    assert [name for name in commands if f"minivllm {name}" not in text] == []


def test_what_is_missing_is_noticed() -> None:
    cells = [
        new_markdown_cell("LLM(seed=1), ConfigError"),
        new_code_cell("LLM(trace=True, **{'dtype': 'auto'})"),
    ]
    assert given_names(new_notebook(cells=cells)) == {"trace", "dtype", None}
    printed = new_output("stream", name="stdout", text="ConfigError < MiniVLLMError\nno")
    cells[1].outputs = [printed]
    assert provoked(new_notebook(cells=cells)) == {"ConfigError", "MiniVLLMError", "no"}
