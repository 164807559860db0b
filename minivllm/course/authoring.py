"""For those who write notebooks: `python -m minivllm.course.authoring execute notebooks/00_tour.ipynb`, or `stubs`.

`execute` runs in place with a fresh kernel, removes what belongs to this machine, and saves only what has no
`problems`. `stubs` writes exercises/ from solutions/, where every answer becomes a stub, and the digests by which a
changed solution is noticed.
"""

from __future__ import annotations

import argparse
import ast
import base64
import copy
import io
import json
import re
import tokenize
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from minivllm.course.chapters import KINDS, Chapter, Statement, chapters, digests, role
from minivllm.course.checking import STUB

ROOT = Path(__file__).resolve().parents[2]
MACHINE_PATH = re.compile(r"(?<![\w.])(/(work|home|root|Users|tmp|usr|opt)/|[A-Z]:\\)")
TIMING = re.compile(r"\d ?(ms|µs|it/s|tok/s|tokens/s)\b|\d\.\d+ ?(s|seconds)\b")
WIDGET = "application/vnd.jupyter.widget-view+json"
NOT_COMPARED = {"image/png", "image/jpeg", WIDGET}
MAX_IMAGE_BYTES, MIN_COMPARED_SHARE = 60_000, 0.6


def compared_text(output: NotebookNode) -> str:
    """Everything in an output that nbval compares."""
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), *(str(data[key]) for key in data if key not in NOT_COMPARED)]).strip()


def clean(notebook: NotebookNode) -> None:
    """Remove paths, times and versions of this machine, and widgets, whose static twin stays."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    for cell in notebook.cells:
        for key in ("execution", "collapsed", "scrolled", "trusted"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if len(data) > 1:
                data.pop(WIDGET, None)
            for holder, key in ((output, "text"), *((data, key) for key in data if key.startswith("text/"))):
                if key in holder:
                    holder[key] = holder[key].replace(f"{ROOT}/", "").replace(str(Path.home()) + "/", "~/")


def problems(notebook: NotebookNode) -> list[str]:
    """Why this notebook must not be committed as it is; empty when it may."""
    found: list[str] = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("the cells have not been executed once, top to bottom")
    compared = 0
    for number, cell in enumerate(code, start=1):
        ignored = "NBVAL_IGNORE_OUTPUT" in cell.source
        if ignored and not (number < len(code) and "assert " in code[number].source):
            found.append(f"cell {number}: its output is ignored and the next code cell asserts nothing")
        compared += not ignored and any(map(compared_text, cell.outputs))
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number}: {output.ename}: {output.evalue}")
            text = compared_text(output)
            if MACHINE_PATH.search(text):
                found.append(f"cell {number}: a path of this machine in its output")
            if TIMING.search(text) and not ignored:
                found.append(f"cell {number}: a time in an output that is compared")
            image = base64.b64decode(output.get("data", {}).get("image/png", ""))
            if len(image) > MAX_IMAGE_BYTES:
                found.append(f"cell {number}: an image of {len(image):,} bytes; {MAX_IMAGE_BYTES:,} are allowed")
    if any(role(cell)[0] != "given" for cell in notebook.cells):
        found += misplaced(notebook)
        for cell in code:
            if role(cell)[0] == "check" and not any(map(compared_text, cell.outputs)):
                found.append(f"the check of {role(cell)[1]} printed nothing")
            if role(cell)[0] == "exercise" and cell.outputs:
                found.append(f"the answer to {role(cell)[1]} prints or shows something")
    elif compared < MIN_COMPARED_SHARE * len(code):
        found.append(f"only {compared} of {len(code)} code cells have outputs that nbval compares")
    return found


def misplaced(solution: NotebookNode) -> list[str]:
    """What is wrong with the order and the metadata of a solution's cells."""
    found: list[str] = []
    roles = [(role(cell), cell) for cell in solution.cells if role(cell)[0] != "given"]
    expected = [(kind, id) for (first, id), _ in roles if first == "statement" for kind in KINDS]
    if [what for what, _ in roles] != expected:
        found.append(f"statement, answer, check of each exercise in this order, not {[what for what, _ in roles]}")
    for (kind, id), cell in roles:
        if (cell.cell_type == "markdown") != (kind == "statement"):
            found.append(f"{id}: its {kind} is a {cell.cell_type} cell")
        if kind == "statement":
            statement = Statement.parse(id, cell.source)
            if not (statement.minutes and statement.difficulty and statement.hints):
                found.append(f"{id}: its statement needs a line like `●●○ · 15 minutes` and hints in <details>")
        elif kind not in cell.metadata.get("tags", []):
            found.append(f"{id}: its {kind} cell lacks the tag")
        if kind == "exercise":
            try:
                stub_source(cell)
            except ValueError as error:
                found.append(f"{id}: {error}")
    return found


def broken_links(notebook: NotebookNode, folder: Path) -> list[str]:
    """The links in markdown that lead nowhere from a notebook in folder.

    Relative ones must name a file or folder, with #L12 or #L12-L20 lines that it has, or a heading of a notebook;
    those to arXiv must be of the form https://arxiv.org/abs/2205.14135. Others on the web are not looked at.
    """
    found = []
    for cell in notebook.cells:
        text = _CODE.sub("", cell.source) if cell.cell_type == "markdown" else ""
        found += [f"cell {cell.id}: {url}" for url in _ARXIV.findall(text) if not _ARXIV_PAPER.fullmatch(url)]
        for target in map("".join, _LINK.findall(text)):
            path, _, anchor = target.partition("#")
            on_the_web = re.match(r"[a-z]+:", path)
            if not on_the_web and not _leads_somewhere(folder / path if path else None, anchor, notebook):
                found.append(f"cell {cell.id}: {target}")
    return found


_CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
_LINK = re.compile(r"""\]\(\s*<?([^)>\s]+)|\b(?:href|src)=["']([^"']+)["']""")
_ARXIV = re.compile(r"[\w:/.]*\barxiv\.org/[\w./-]*\w", re.IGNORECASE)
_ARXIV_PAPER = re.compile(r"https://arxiv\.org/(abs|pdf)/\d\d(0[1-9]|1[0-2])\.\d{4,5}(v\d+)?")


def _leads_somewhere(path: Path | None, anchor: str, notebook: NotebookNode) -> bool:
    if path is not None and not path.exists():
        return False
    if path is not None and path.suffix == ".ipynb":
        notebook = nbformat.read(path, as_version=4)
    if not anchor:
        return True
    if path is None or path.suffix == ".ipynb":  # JupyterLab's anchors: the heading with - for spaces
        headings = re.findall(r"^#+ +(.+?)\s*$", "\n".join(c.source for c in notebook.cells), re.MULTILINE)
        return anchor.lower() in {heading.replace(" ", "-").lower() for heading in headings}
    lines = re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor)
    last = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
    return bool(lines) and 1 <= int(lines[1]) <= int(lines[2] or lines[1]) <= last


# --- stubs ------------------------------------------------------------------------------------------------------------


def stub_source(cell: NotebookNode) -> str:
    """What a learner finds in place of this answer cell.

    metadata.minivllm.stub where there is one. Otherwise functions and methods keep decorators, signature and docstring,
    and raise; in a cell without functions the values of `name = value` become `...`; imports stay, comments between
    definitions do not. ValueError where the cell has something else at its top level, or the stub defines other names.
    """
    _, id = role(cell)
    given = cell.metadata.minivllm.get("stub")
    tree = ast.parse(cell.source)
    if given is None:
        definitions = any(isinstance(node, _DEFINITIONS) for node in tree.body)
        parts = [_stub(node, cell.source, id, definitions) for node in tree.body]
        return _spaced(parts, tree.body)
    if (names := defined_names(given)) != defined_names(cell.source):
        raise ValueError(f"the stub defines {sorted(names)}, the answer {sorted(defined_names(cell.source))}")
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
        return "\n".join(head) + ("\n" + ("\n" if ast.get_docstring(node) else "") + body if body else "")
    if isinstance(node, ast.Assign | ast.AnnAssign) and not definitions:
        return f"{_before_value(node)} = ..."
    docstring = (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    if docstring or isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.Pass):
        return "\n".join(lines[node.lineno - 1 : node.end_lineno])
    raise ValueError(f"`{ast.unparse(node).splitlines()[0]}` in an answer: write its stub as metadata.minivllm.stub")


def _before_value(node: ast.Assign | ast.AnnAssign) -> str:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    if len(targets) != 1 or not isinstance(targets[0], ast.Name):
        raise ValueError(f"`{ast.unparse(node)}`: a prediction is `name = value`")
    annotation = f": {ast.unparse(node.annotation)}" if isinstance(node, ast.AnnAssign) else ""
    return targets[0].id + annotation


def _header(lines: list[str]) -> list[str]:
    """The lines from `def` or `class` to the colon that ends it, and a comment behind that."""
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
    """The parts below each other, with the empty lines that Python's style has."""
    text = ""
    for i, part in enumerate(parts):
        if i and isinstance(nodes[i], _DEFINITIONS) | isinstance(nodes[i - 1], _DEFINITIONS):
            text += "\n" if part.startswith(" ") else "\n\n"
        text += ("\n" if i else "") + part
    return text


def defined_names(source: str) -> set[str]:
    """What a cell binds at its top level, imports apart."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, _DEFINITIONS):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def make_exercises(chapter: Chapter) -> NotebookNode:
    """The notebook that a learner gets: the solution with stubs for answers, and without outputs."""
    return exercises_of(chapter.solution, chapter.name)


def exercises_of(solution: NotebookNode, name: str) -> NotebookNode:
    """`make_exercises` for a solution that is not in a file. name: the chapter's."""
    notebook = copy.deepcopy(solution)
    clean(notebook)
    notebook.metadata.minivllm = {"chapter": name}
    for cell in notebook.cells:
        if role(cell)[0] == "exercise":
            cell.source = stub_source(cell)
            cell.metadata.minivllm.pop("stub", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def write_stubs(chapter: Chapter) -> list[str]:
    """Write the chapter's exercises and digests, unless there are problems, which are returned."""
    if not (found := problems(chapter.solution)):
        chapter.exercises.parent.mkdir(exist_ok=True)
        nbformat.write(make_exercises(chapter), chapter.exercises)
        chapter.digests.write_text(json.dumps(digests(chapter.solution), indent=1) + "\n", encoding="utf-8")
    return found


# --- the command line -------------------------------------------------------------------------------------------------


def execute(path: Path) -> list[str]:
    """Execute the notebook with a fresh kernel, and save it unless there are problems, which are returned."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    options = {"timeout": 120, "allow_errors": True, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, kernel_name="python3", **options).execute(cwd=str(path.resolve().parent))
    clean(notebook)
    if not (found := problems(notebook)):
        nbformat.write(notebook, path)  # validates, too
    return found


def main() -> int:
    """The command line; the exit code is the number of notebooks refused."""
    parser = argparse.ArgumentParser(prog="python -m minivllm.course.authoring", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, number in (
        ("execute", "execute notebooks in place", "+"),
        ("stubs", "write exercises/ from solutions/ (all, or those given)", "*"),
    ):
        commands.add_parser(name, help=what).add_argument("notebooks", nargs=number, type=Path)
    arguments = parser.parse_args()
    if arguments.command == "execute":
        results = {path: execute(path) for path in arguments.notebooks}
    else:
        paths = arguments.notebooks or [chapter.solution_path for chapter in chapters(ROOT)]
        chosen = [Chapter(path.resolve().parent.parent, path.stem) for path in paths]
        results = {chapter.exercises: write_stubs(chapter) for chapter in chosen}
    for path, found in results.items():
        print(f"{path}: " + ("\n  ".join(["not saved:", *found]) if found else f"saved, {path.stat().st_size:,} bytes"))
    return sum(map(bool, results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
