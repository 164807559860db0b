"""Tools for the authors of notebooks.

    python -m minivllm.course.authoring execute notebooks/00_tour.ipynb
    python -m minivllm.course.authoring links
    python -m minivllm.course.authoring stubs
    python -m minivllm.course.authoring glossary

`execute` runs a notebook in place with a fresh kernel and removes what belongs to this machine. It
saves the notebook only if `problems` finds nothing. `links` writes what the pages say about each
other: the links to the chapters before and after, the tour and the exercises; and how many
exercises there are and how long they take, in README.md, too. `stubs` writes
exercises/ from solutions/: every answer becomes a stub. It also writes the digests that show when a
solution was changed. `glossary` writes notebooks/glossary.md.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from minivllm.course import navigation
from minivllm.course.authoring import effort, glossary
from minivllm.course.notebooks import (
    CELL_STATE,
    FOLDERS,
    KINDS,
    METADATA,
    ROAD,
    Chapter,
    Statement,
    chapters,
    role,
)
from minivllm.course.stubs import digests, make_exercises, stub_source

ROOT = Path(__file__).resolve().parents[3]
GLOSSARY = "notebooks/glossary.md"
MACHINE_PATH = re.compile(r"(?<![\w.])(/(work|home|root|Users|tmp|usr|opt)/|[A-Z]:\\)")
TIMING = re.compile(r"\d ?(ms|µs|it/s|tok/s|tokens/s)\b|\d\.\d+ ?(s|seconds)\b")
#: The tag of a cell whose output nbval does not compare. The reader of the page does not see tags.
IGNORED = "nbval-ignore-output"
WIDGET = "application/vnd.jupyter.widget-view+json"
NOT_COMPARED = {"image/png", "image/jpeg", "text/html", WIDGET}
#: Pictures that README.md shows, too: chapter -> (a call in the cell that draws it, the file).
PICTURES = {
    "05_scheduler": ('draw_places({"Static', "images/batching.png"),
    "12_serving": ("draw_served(report)", "images/knee.png"),
}
MAX_IMAGE_BYTES, MIN_COMPARED_SHARE = 60_000, 0.6


def compared_text(output: NotebookNode) -> str:
    """All text of an output that nbval compares."""
    data = output.get("data", {})
    return "\n".join(
        [output.get("text", ""), *(str(data[key]) for key in data if key not in NOT_COMPARED)]
    ).strip()


def clean(notebook: NotebookNode) -> None:
    """Remove paths, times and versions of this machine, and widgets.

    A widget's static picture stays.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        for key in CELL_STATE:
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if len(data) > 1:
                data.pop(WIDGET, None)
            for holder, key in (
                (output, "text"),
                *((data, key) for key in data if key.startswith("text/")),
            ):
                if key in holder:
                    holder[key] = (
                        holder[key].replace(f"{ROOT}/", "").replace(str(Path.home()) + "/", "~/")
                    )


def problems(notebook: NotebookNode) -> list[str]:
    """Return the reasons not to commit this notebook as it is; empty when there are none."""
    found: list[str] = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("the cells have not been executed once, top to bottom")
    compared = 0
    for number, cell in enumerate(code, start=1):
        ignored = IGNORED in cell.metadata.get("tags", [])
        if ignored and not (number < len(code) and "assert " in code[number].source):
            found.append(
                f"cell {number}: its output is ignored and the next code cell asserts nothing"
            )
        if "# NBVAL_" in cell.source:
            found.append(f"cell {number}: a marker of nbval in its code; use the tag {IGNORED}")
        compared += not ignored and any(map(compared_text, cell.outputs))
        for output in cell.outputs:
            found += (f"cell {number}: {what}" for what in _output_problems(output, ignored))
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


def _output_problems(output: NotebookNode, ignored: bool) -> Iterator[str]:
    """Yield what is wrong with one output.

    ignored: nbval does not compare the output.
    """
    if output.output_type == "error":
        yield f"{output.ename}: {output.evalue}"
    text = compared_text(output)
    if MACHINE_PATH.search(text):
        yield "a path of this machine in its output"
    if TIMING.search(text) and not ignored:
        yield "a time in an output that is compared"
    image = base64.b64decode(output.get("data", {}).get("image/png", ""))
    if len(image) > MAX_IMAGE_BYTES:
        yield f"an image of {len(image):,} bytes; {MAX_IMAGE_BYTES:,} are allowed"


def misplaced(solution: NotebookNode) -> list[str]:
    """Return what is wrong with the order and the metadata of a solution's cells."""
    found: list[str] = []
    roles = [(role(cell), cell) for cell in solution.cells if role(cell)[0] != "given"]
    expected = [(kind, id) for (first, id), _ in roles if first == "statement" for kind in KINDS]
    pairs = zip_longest([what for what, _ in roles], expected, fillvalue=("no cell", ""))
    for here, wanted in (pair for pair in pairs if pair[0] != pair[1]):
        found.append(
            "statement, answer, check of each exercise in this order: where"
            f" {' '.join(wanted).strip()} belongs, there is {' '.join(here).strip()}"
        )
        break
    for (kind, id), cell in roles:
        if (cell.cell_type == "markdown") != (kind == "statement"):
            found.append(f"{id}: its {kind} is a {cell.cell_type} cell")
        if kind == "statement":
            statement = Statement.parse(id, cell.source)
            if not (statement.minutes and statement.difficulty and statement.hints):
                found.append(
                    f"{id}: its statement needs a line like `●●○ · 15 minutes` and hints in"
                    " <details>"
                )
        elif kind not in cell.metadata.get("tags", []):
            found.append(f"{id}: its {kind} cell lacks the tag")
        if kind == "exercise":
            try:
                stub_source(cell)
            except ValueError as error:
                found.append(f"{id}: {error}")
    return found


def broken_links(notebook: NotebookNode, folder: Path) -> list[str]:
    """Return the broken links in the Markdown of a notebook in folder.

    A relative link must name a file, a folder, or a heading or a cell of a notebook. It must not
    name a line of a file: the line number is wrong as soon as a line is added above it. A link to
    arXiv must have the form https://arxiv.org/abs/2205.14135. Other links to the web are not
    checked.
    """
    found = []
    for cell in notebook.cells:
        text = _CODE.sub("", cell.source) if cell.cell_type == "markdown" else ""
        found += [
            f"cell {cell.id}: {url}"
            for url in _ARXIV.findall(text)
            if not _ARXIV_PAPER.fullmatch(url)
        ]
        for target in map("".join, _LINK.findall(text)):
            path, _, anchor = target.partition("#")
            on_the_web = re.match(r"[a-z]+:", path)
            if not on_the_web and not _leads_somewhere(
                folder / path if path else None, anchor, notebook
            ):
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
    # JupyterLab's anchor is cell-id=…, or the heading with - for spaces.
    if path is None or path.suffix == ".ipynb":
        headings = re.findall(
            r"^#+ +(.+?)\s*$", "\n".join(c.source for c in notebook.cells), re.MULTILINE
        )
        if anchor.startswith("cell-id="):
            return anchor[8:] in [cell.id for cell in notebook.cells]
        return anchor.lower() in {heading.replace(" ", "-").lower() for heading in headings}
    return False


def write_stubs(chapter: Chapter) -> list[str]:
    """Write the chapter's exercises and digests.

    Where there are problems, nothing is written; the problems are returned.
    """
    if not (found := problems(chapter.solution)):
        chapter.exercises.parent.mkdir(exist_ok=True)
        nbformat.write(make_exercises(chapter), chapter.exercises)
        chapter.digests.write_text(
            json.dumps(digests(chapter.solution), indent=1) + "\n", encoding="utf-8"
        )
    return found


def write_links(root: Path) -> list[Path]:
    """Write the links of all pages of the course in root, and the sums of their exercises.

    Returns the files that changed.
    """
    changed = []
    for stop in ROAD:
        for folder in (*FOLDERS, "exercises"):
            path = root / folder / f"{stop.name}.ipynb"
            if not path.exists():
                continue
            notebook = nbformat.read(path, as_version=4)
            before = copy.deepcopy(notebook.cells)
            navigation.place(notebook, folder, stop.name)
            effort.refresh_page(notebook, Chapter(root, stop.name))
            if notebook.cells != before:
                nbformat.write(notebook, path)
                changed.append(path)
    if (readme := root / "README.md").exists():
        text = readme.read_text(encoding="utf-8")
        if (refreshed := effort.refresh_table(text, root)) != text:
            readme.write_text(refreshed, encoding="utf-8")
            changed.append(readme)
    return changed


# --- the command line -----------------------------------------------------------------------------


def execute(path: Path) -> list[str]:
    """Execute the notebook with a fresh kernel, and save it.

    Where there are problems, nothing is saved; the problems are returned.
    """
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    options = {
        "timeout": 120,
        "allow_errors": True,
        "record_timing": False,
        "coalesce_streams": True,
    }
    NotebookClient(notebook, kernel_name="python3", **options).execute(
        cwd=str(path.resolve().parent)
    )
    clean(notebook)
    if not (found := problems(notebook)):
        # Validates the notebook, too.
        nbformat.write(notebook, path)
        # A solution has its chapter's name, and no picture.
        if path.stem in PICTURES and path.resolve().parent.name == "notebooks":
            target = path.parent / PICTURES[path.stem][1]
            target.write_bytes(picture_of(notebook, PICTURES[path.stem][0]))
    return found


def picture_of(notebook: NotebookNode, call: str) -> bytes:
    """The PNG that the one code cell with this call shows. ValueError without such a cell."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and call in cell.source:
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output.data["image/png"])
    raise ValueError(f"no cell with {call} shows a picture")


def main() -> int:
    """Run the command line; the exit code is the number of notebooks refused."""
    parser = argparse.ArgumentParser(
        prog="python -m minivllm.course.authoring", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, number in (
        ("execute", "execute notebooks in place", "+"),
        ("stubs", "write exercises/ from solutions/ (all, or those given)", "*"),
    ):
        commands.add_parser(name, help=what).add_argument("notebooks", nargs=number, type=Path)
    commands.add_parser(
        "links", help="write the links between the pages, and the minutes of the exercises"
    )
    commands.add_parser("glossary", help="write notebooks/glossary.md")
    arguments = parser.parse_args()
    if arguments.command == "links":
        print("\n".join([*map(str, write_links(ROOT)), "The other pages are as they should be."]))
        return 0
    if arguments.command == "glossary":
        (ROOT / GLOSSARY).write_text(glossary.render(), encoding="utf-8")
        print(f"{GLOSSARY}: {len(glossary.TERMS)} terms")
        return 0
    if arguments.command == "execute":
        results = {path: execute(path) for path in arguments.notebooks}
    else:
        paths = arguments.notebooks or [chapter.solution_path for chapter in chapters(ROOT)]
        # A chapter's name, "02_flash_attention", stands for its solution.
        paths = [path if path.suffix else ROOT / "solutions" / f"{path}.ipynb" for path in paths]
        chosen = [Chapter(path.resolve().parent.parent, path.stem) for path in paths]
        results = {chapter.exercises: write_stubs(chapter) for chapter in chosen}
    for path, found in results.items():
        print(
            f"{path}: "
            + (
                "\n  ".join(["not saved:", *found])
                if found
                else f"saved, {path.stat().st_size:,} bytes"
            )
        )
    return sum(map(bool, results.values()))
