"""Build the site: `python site/build.py [--out build/site] [--committed]`, or `make site`.

The site is a folder of static pages. Every link in it is relative, so that it can be opened from a
disk and put on any host. No notebook is run: the pages show the committed outputs. The player on
the front page shows a run of `minivllm demo`, which takes some seconds.
"""

from __future__ import annotations

import argparse
import base64
import html
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# The package of this checkout, wherever another one is installed.
sys.path.insert(1, str(ROOT))

import nbformat  # noqa: E402
from typer.main import get_command  # noqa: E402

import adapt  # noqa: E402
import reference  # noqa: E402
from minivllm.cli.app import app  # noqa: E402
from minivllm.course.notebooks import ROAD, Stop, road  # noqa: E402

#: The height of the player on the front page, in CSS pixels.
PLAYER_HEIGHT = 760


@dataclass(frozen=True)
class GuidePage:
    """A page of the guide, made of sections of README.md."""

    name: str
    title: str
    headings: tuple[str, ...]


GUIDE = (
    GuidePage("library", "Using the library", ("As a library",)),
    GuidePage("command_line", "The command line", ("On the command line",)),
    GuidePage("installing", "Installing", ("Installing",)),
    GuidePage("measured", "What was measured", ("What was measured",)),
    GuidePage("trust", "Why you can trust the tokens", ("Why you can trust the tokens",)),
)


def write(folder: Path, page: str, text: str) -> None:
    path = folder / f"{page}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def course_pages(folder: Path, committed: bool) -> None:
    """The chapters and the exercises."""
    for stop in ROAD:
        chapter = adapt.notebook(ROOT / "notebooks" / f"{stop.name}.ipynb", committed)
        exercises = ROOT / "exercises" / f"{stop.name}.ipynb"
        if exercises.exists():
            toctree = f"```{{toctree}}\n:hidden:\n\n../exercises/{stop.name}\n```"
            chapter.cells.append(nbformat.v4.new_markdown_cell(toctree))
            save(adapt.notebook(exercises, committed), folder / "exercises" / exercises.name)
        save(chapter, folder / "notebooks" / f"{stop.name}.ipynb")
    for name in ("cheat_sheet", "glossary"):
        text = (ROOT / "notebooks" / f"{name}.md").read_text(encoding="utf-8")
        text = adapt.links(adapt.symbols(text), "notebooks", f"notebooks/{name}")
        write(folder, f"notebooks/{name}", text)
    shutil.copytree(ROOT / "notebooks/images", folder / "notebooks/images")


def save(notebook: nbformat.NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def guide_pages(folder: Path) -> None:
    """The guide: sections of the README, and the files beside it."""
    sections = dict(adapt.sections((ROOT / "README.md").read_text(encoding="utf-8")))
    for page in GUIDE:
        text = "".join(sections[heading] for heading in page.headings)
        text += command_help() if page.name == "command_line" else ""
        name = f"guide/{page.name}"
        write(folder, name, f"# {page.title}\n{adapt.links(text, '', name)}")
    for name in ("architecture", "contributing", "changelog"):
        text = (ROOT / f"{name.upper()}.md").read_text(encoding="utf-8")
        write(folder, f"guide/{name}", adapt.links(text, "", f"guide/{name}"))


def command_help() -> str:
    """The help of each command, as Markdown."""
    environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "84"}
    parts = ["\n## Each command\n"]
    for command in get_command(app).commands:
        arguments = [sys.executable, "-m", "minivllm", command, "--help"]
        told = subprocess.run(
            arguments, env=environment, cwd=ROOT, capture_output=True, encoding="utf-8", check=True
        )
        parts.append(f"### minivllm {command}\n\n```text\n{told.stdout.strip()}\n```\n")
    return "\n".join(parts)


def front_page(folder: Path, player: str) -> None:
    text = (HERE / "pages/index.md").read_text(encoding="utf-8")
    text = text.replace("{{player}}", player).replace("{{road}}", table(road(ROOT)))
    text = text.replace("{{chapters}}", "\n".join(f"notebooks/{stop.name}" for stop in ROAD))
    write(folder, "index", text)
    for page in ("exercises/index", "guide/index"):
        source = (HERE / "pages" / f"{page}.md").read_text(encoding="utf-8")
        write(folder, page, source.replace("{{road}}", table(road(ROOT), "../")))


def table(stops: list[Stop], up: str = "") -> str:
    """The chapters, their minutes and their exercises, as a table."""
    lines = ["| chapter | | minutes | exercises |", "|---|---|---|---|"]
    for stop in stops:
        chapter = f"[{stop.number} {stop.title}]({up}notebooks/{stop.name}.ipynb)"
        exercises = f"[{stop.exercises} minutes]({up}exercises/{stop.name}.ipynb)"
        lines.append(
            f"| {chapter} | {stop.about} | {stop.reading} | {exercises if stop.exercises else ''} |"
        )
    return "\n".join(lines)


def run_of_the_demo(folder: Path) -> str:
    """Run the demo, write its player to _static/run.html, and return a frame with it."""
    page = folder / "static" / "run.html"
    page.parent.mkdir(parents=True)
    environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    arguments = ["demo", "--pace", "0", "-e", "device=cpu", "--html", str(page)]
    subprocess.run(
        [sys.executable, "-m", "minivllm", *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    # As in a notebook: see `minivllm.viz.player.Player`.
    address = base64.b64encode(page.read_bytes()).decode()
    title = html.escape("A run of minivllm demo")
    return (
        f'<iframe class="player" title="{title}" src="data:text/html;base64,{address}"'
        f' style="width: 100%; height: {PLAYER_HEIGHT}px; border: 0"></iframe>'
    )


def tidy(pages: Path) -> None:
    """Remove what a reader of the site does not need."""
    for path in pages.rglob("*.map"):
        path.unlink()
    (pages / ".buildinfo").unlink(missing_ok=True)
    shutil.rmtree(pages / "_sources", ignore_errors=True)
    # GitHub Pages leaves out folders whose names begin with "_", unless it finds this file.
    (pages / ".nojekyll").touch()


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    parser.add_argument(
        "--committed",
        action="store_true",
        help="show the notebooks as git has them, whatever has been saved since",
    )
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    work = out.with_name(f"{out.name}-work")
    source, pages = work / "source", work / "pages"
    shutil.rmtree(work, ignore_errors=True)
    source.mkdir(parents=True)

    front_page(source, run_of_the_demo(work))
    course_pages(source, arguments.committed)
    guide_pages(source)
    reference.write(source)
    # -W: a link that leads nowhere, or a page that no page leads to, stops the build.
    arguments = ["-b", "html", "-c", str(HERE), "-d", str(work / "doctrees"), "-W", "-q"]
    arguments += ["-j", "auto", "-D", f"html_static_path=static,{work / 'static'}"]
    from sphinx.cmd.build import build_main

    if code := build_main([*arguments, str(source), str(pages)]):
        return code
    tidy(pages)
    # An older site stays until the new one is complete.
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(pages, out)
    print(f"{sum(1 for _ in out.rglob('*.html'))} pages: {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
