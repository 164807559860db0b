"""The pages of the reference: a page per module, and a page per group of modules."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from repository import ROOT


@dataclass(frozen=True)
class Group:
    """Modules that stand together in the reference.

    folders: of the package, with all their public modules, or files of it. "" is the package
    itself.
    """

    name: str
    title: str
    about: str
    places: tuple[str, ...]


LIBRARY = ("llm", "sampling_params", "outputs", "inputs", "config", "errors", "metrics")
GROUPS = (
    Group(
        "library",
        "The library",
        "What a program imports: the offline interface, parameters, outputs and errors.",
        tuple(f"{name}.py" for name in LIBRARY),
    ),
    Group("engine", "The engine", "From a request to its tokens, step by step.", ("engine",)),
    Group(
        "kernels", "Kernels", "Each operation: the reference and the Triton kernel.", ("kernels",)
    ),
    Group("layers", "Layers", "What a model is made of.", ("layers",)),
    Group(
        "models", "Models", "The families of models, and how a checkpoint is loaded.", ("models",)
    ),
    Group("parallel", "Tensor parallelism", "Ranks, and what they exchange.", ("parallel",)),
    Group(
        "text",
        "Text and tokens",
        "The tokenizer and the chat templates.",
        ("tokenizer.py", "chat_template.py", "text.py"),
    ),
    Group("bench", "Benchmarks", "How speed is measured.", ("bench",)),
    Group("viz", "Pictures", "Pictures of a trace or of plain numbers, and the player.", ("viz",)),
    Group("sim", "Simulators of the course", "What the chapters simulate.", ("course/sim",)),
)
PACKAGE = ROOT / "minivllm"


def files(place: str) -> list[Path]:
    """The public Python files at a place of the package."""
    path = PACKAGE / place
    found = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [file for file in found if _is_public(file)]


def _is_public(file: Path) -> bool:
    if file.name == "__init__.py":
        return bool(file.read_text(encoding="utf-8").strip())
    return not file.name.startswith("_")


def module_of(file: Path) -> str:
    """The module's name: minivllm.engine.scheduler."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """The modules of the reference, each with its file."""
    return {
        module_of(file): file for group in GROUPS for place in group.places for file in files(place)
    }


def document_of(path: str) -> str:
    """The page of a file or folder of the repository, without a suffix; "" where there is none."""
    file = ROOT / path
    if file.is_dir():
        file /= "__init__.py"
    name = next((name for name, known in modules().items() if known == file), "")
    if not name:
        folders = {f"minivllm/{g.places[0]}": g.name for g in GROUPS if "." not in g.places[0]}
        return f"reference/{folders[path]}" if path in folders else ""
    return f"reference/{name}"


def summary(file: Path) -> str:
    """The first paragraph of a module's docstring, in one line."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("*", r"\*")


def write(folder: Path) -> None:
    """Write the sources of all pages to folder/reference."""
    folder /= "reference"
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in modules().items():
        (folder / f"{name}.rst").write_text(_module_page(name, file), encoding="utf-8")
    for group in GROUPS:
        (folder / f"{group.name}.rst").write_text(_group_page(group), encoding="utf-8")
    (folder / "index.rst").write_text(_index(), encoding="utf-8")


def _heading(text: str, line: str = "=") -> str:
    return f"{text}\n{line * (2 * len(text))}\n"


def _module_page(name: str, file: Path) -> str:
    path = file.relative_to(ROOT).as_posix()
    title = name.removeprefix("minivllm.")
    head = f"{_heading(title)}\n*The file:* ``{path}``\n\n"
    exported = getattr(importlib.import_module(name), "_HOMES", None)
    if exported is None and file.name == "__init__.py" and "__all__" in file.read_text("utf-8"):
        exported = _imported(file)
    if exported is None:
        return f"{head}.. automodule:: {name}\n"
    return f"{head}.. automodule:: {name}\n   :no-members:\n\n{_names(exported)}"


def _imported(file: Path) -> dict[str, str]:
    """The names that a package imports from its own modules, each with its module."""
    return {
        alias.name: node.module
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minivllm.")
        for alias in node.names
    }


def _names(homes: dict[str, str]) -> str:
    """A list of names, with links to where they are explained."""
    return "".join(
        f"- :py:obj:`{name} <{home}.{name}>`, in :py:mod:`{home}`\n" for name, home in homes.items()
    )


def _group_page(group: Group) -> str:
    names = [module_of(file) for place in group.places for file in files(place)]
    lines = [_heading(group.title), f"{group.about}\n"]
    for name in names:
        title = name.removeprefix("minivllm.")
        lines.append(f":doc:`{title} <{name}>`\n   {summary(modules()[name])}\n")
    lines.append(".. toctree::\n   :hidden:\n")
    lines += [f"   {name.removeprefix('minivllm.')} <{name}>" for name in names]
    return "\n".join(lines) + "\n"


def _index() -> str:
    homes = importlib.import_module("minivllm")._HOMES
    lines = [
        _heading("API reference"),
        "Made from the docstrings. ``import minivllm`` gives these names:\n",
        _names(homes),
        _heading("By subject", "-"),
    ]
    lines += [f":doc:`{group.title} <{group.name}>`\n   {group.about}\n" for group in GROUPS]
    lines.append(".. toctree::\n   :hidden:\n")
    lines += [f"   {group.name}" for group in GROUPS]
    return "\n".join(lines) + "\n"
