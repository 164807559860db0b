"""For those who write notebooks: `python -m minivllm.course.authoring execute notebooks/00_tour.ipynb`.

Executes in place with a fresh kernel, removes what belongs to this machine, and saves only what has no `problems`.
"""

from __future__ import annotations

import argparse
import base64
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

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
    if compared < MIN_COMPARED_SHARE * len(code):
        found.append(f"only {compared} of {len(code)} code cells have outputs that nbval compares")
    return found


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
    parser.add_argument("command", choices=["execute"])
    parser.add_argument("notebooks", nargs="+", type=Path)
    results = {path: execute(path) for path in parser.parse_args().notebooks}
    for path, found in results.items():
        print(f"{path}: " + ("\n  ".join(["not saved:", *found]) if found else f"saved, {path.stat().st_size:,} bytes"))
    return sum(map(bool, results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
