"""The published part of a solution: exercises and digests.

In the exercises every answer is a stub. The digests show whether a solution was changed.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import io
import json
import tokenize
from typing import TYPE_CHECKING

from minivllm.course import navigation
from minivllm.course.notebooks import ChangedSolutionError, Chapter, compared_text, role

if TYPE_CHECKING:
    from nbformat import NotebookNode


#: What the body of a stub raises: ``NotImplementedError("01.2: your code here")``.
STUB = "your code here"
#: What `predict.compare` prints as long as the reader has not guessed.
NOT_YET = "No guess yet: write your number in place of `...` in the cell above, and run both again."
#: The tag of a cell whose exception does not stop "Run All Cells". JupyterLab and nbclient know it.
MAY_RAISE = "raises-exception"


def stub_source(cell: NotebookNode) -> str:
    """The stub that replaces this answer cell.

    It is metadata.minivllm.stub where there is one. Otherwise functions and methods keep
    decorators, signature and docstring, and raise. In a cell without functions, the values of `name
    = value` become `...`. Imports stay; comments between definitions do not. ValueError where the
    cell has something else at its top level, or where the stub defines other names.
    """
    _, id = role(cell)
    given = cell.metadata.minivllm.get("stub")
    tree = ast.parse(cell.source)
    if given is None:
        definitions = any(isinstance(node, _DEFINITIONS) for node in tree.body)
        parts = [_stub(node, cell.source, id, definitions) for node in tree.body]
        return _spaced(parts, tree.body)
    if (names := defined_names(given)) != defined_names(cell.source):
        raise ValueError(
            f"the stub defines {sorted(names)}, the answer {sorted(defined_names(cell.source))}"
        )
    return given


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)


def _stub(node: ast.stmt, source: str, id: str, definitions: bool = True, indent: str = "") -> str:
    lines = source.splitlines()
    if isinstance(node, _DEFINITIONS):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        head = lines[first : node.lineno - 1] + _header(lines[node.lineno - 1 :])
        inner = indent + " " * 4
        if ast.get_docstring(node, clean=False) is not None:
            head += lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
        if isinstance(node, _FUNCTIONS):
            return "\n".join([*head, f'{inner}raise NotImplementedError("{id}: {STUB}")'])
        members = node.body[1:] if ast.get_docstring(node) is not None else node.body
        body = _spaced([_stub(member, source, id, True, inner) for member in members], members)
        return "\n".join(head) + (
            "\n" + ("\n" if ast.get_docstring(node) else "") + body if body else ""
        )
    if isinstance(node, ast.Assign | ast.AnnAssign) and not definitions:
        return f"{_before_value(node)} = ..."
    docstring = (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
    if docstring or isinstance(
        node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.Pass
    ):
        return "\n".join(lines[node.lineno - 1 : node.end_lineno])
    raise ValueError(
        f"`{ast.unparse(node).splitlines()[0]}` in an answer: write its stub as"
        " metadata.minivllm.stub"
    )


def _before_value(node: ast.Assign | ast.AnnAssign) -> str:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    if len(targets) != 1 or not isinstance(targets[0], ast.Name):
        raise ValueError(f"`{ast.unparse(node)}`: a prediction is `name = value`")
    annotation = f": {ast.unparse(node.annotation)}" if isinstance(node, ast.AnnAssign) else ""
    return targets[0].id + annotation


def _header(lines: list[str]) -> list[str]:
    """The lines from `def` or `class` to its final colon, with a comment after that colon."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
            if token.string == ":" and depth == 0:
                row, column = token.end
                rest = lines[row - 1][column:].strip()
                end = f"  {rest}" if rest.startswith("#") else ""
                return [*lines[: row - 1], lines[row - 1][:column] + end]
    raise ValueError("a definition without an end")


def _spaced(parts: list[str], nodes: list[ast.stmt]) -> str:
    """Join the parts, with the empty lines that Python's style requires."""
    text = ""
    for i, part in enumerate(parts):
        if i and isinstance(nodes[i], _DEFINITIONS) | isinstance(nodes[i - 1], _DEFINITIONS):
            text += "\n" if part.startswith(" ") else "\n\n"
        text += ("\n" if i else "") + part
    return text


def defined_names(source: str) -> set[str]:
    """The names that a cell binds at its top level, without imports."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, _DEFINITIONS):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)
            }
    return names


def names_in(source: str, context: type[ast.expr_context] = ast.Load) -> set[str]:
    """The names that a source reads, or the names that it binds (ast.Store).

    Empty where the source has magics.
    """
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return set()
    names = {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)
    }
    if context is ast.Store:
        names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        imports = [
            alias
            for node in nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        names |= {(alias.asname or alias.name).partition(".")[0] for alias in imports}
    return names


def make_exercises(chapter: Chapter) -> NotebookNode:
    """The learner's notebook: the solution with stubs as answers, and without outputs."""
    return exercises_of(chapter.solution, chapter.name)


def exercises_of(solution: NotebookNode, name: str) -> NotebookNode:
    """`make_exercises` for a solution that is not in a file.

    name: the chapter's, which goes into the metadata. From the first statement on, a code cell may
    raise: without an answer, or with a wrong one, the cells below it still run.
    """
    notebook = copy.deepcopy(solution)
    notebook.metadata.minivllm = {"chapter": name}
    begun = False
    for cell in notebook.cells:
        begun = begun or role(cell)[0] == "statement"
        if cell.id in (navigation.TOP, navigation.BOTTOM):
            cell.source = navigation.source(cell.id, "exercises", name)
        if begun and cell.cell_type == "code":
            cell.metadata.tags = [*cell.metadata.get("tags", []), MAY_RAISE]
        if role(cell)[0] == "exercise":
            cell.source = stub_source(cell)
            cell.metadata.minivllm.pop("stub", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


# --- digests --------------------------------------------------------------------------------------


def digests(solution: NotebookNode) -> dict[str, str]:
    """A digest of every code cell, by its id.

    The digest of a check includes what it printed. The digest of an answer covers only its stub.
    """
    found = {}
    for cell in solution.cells:
        kind, _ = role(cell)
        if cell.cell_type != "code":
            continue
        text = cell.source + ("\0" + compared_text(cell) if kind == "check" else "")
        if kind == "exercise":
            try:
                text = stub_source(cell)
            except (ValueError, SyntaxError):
                text = ""
        found[cell.id] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def require_published(chapter: Chapter) -> None:
    """Raise ChangedSolutionError where a solution differs from the published one.

    The error names all changed cells. A chapter without digests is not compared.
    """
    if not chapter.digests.exists():
        return
    published = json.loads(chapter.digests.read_text(encoding="utf-8"))
    now = digests(chapter.solution)
    cells = {cell.id: role(cell) for cell in chapter.solution.cells}
    changed = []
    for name in published | now:
        if published.get(name) != now.get(name):
            kind, id = cells.get(name, ("given", ""))
            of = {
                "check": f"the check of {id}",
                "exercise": f"the names or signatures in the answer to {id}",
            }
            changed.append(of.get(kind, f"the cell {name!r}"))
    if changed:
        name = f"solutions/{chapter.name}.ipynb"
        raise ChangedSolutionError(
            f"{name} is not as it was published ({', '.join(changed)}), and answers are checked by"
            f" it. Restore it: git checkout -- {name} (its authors: python -m"
            " minivllm.course.authoring stubs)"
        )
