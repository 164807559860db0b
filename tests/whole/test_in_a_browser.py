"""The pages as a learner opens them: JupyterLab in a headless Chromium, all cells run from its
menu, a widget scrubbed.

support/browser.py says how the browser is found.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from minivllm.course.authoring.tool import ROOT
from minivllm.course.notebooks import chapters, role
from minivllm.course.stubs import make_exercises
from support.browser import Page, wait_until

pytestmark = pytest.mark.slow

CHAPTERS = ("08_cuda_graphs",)
#: Pages that are opened and saved, and not run.
UNTOUCHED = ("notebooks/00_tour.ipynb", "exercises/05_scheduler.ipynb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository: chapters with their outputs cleared, pages as they were
    committed, and the exercises of one chapter with one answer.
    """
    folder = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "exercises", "solutions", "minivllm/course"):
        (folder / name).mkdir(parents=True)
    for name in UNTOUCHED:
        shutil.copy(ROOT / name, folder / name)
    chapter = next(chapter for chapter in chapters(ROOT) if chapter.number == "04")
    shutil.copy(chapter.solution_path, folder / "solutions")
    exercises = make_exercises(chapter)
    for cell, right in zip(exercises.cells, chapter.solution.cells, strict=True):
        if role(cell) == ("exercise", "04.1"):
            cell.source = right.source
    nbformat.write(exercises, folder / "exercises" / chapter.exercises.name)
    for name in CHAPTERS:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        if path.exists():
            notebook = nbformat.read(path, as_version=4)
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
            nbformat.write(notebook, folder / "notebooks" / path.name)
    return folder


@pytest.fixture(scope="module")
def lab(folder: Path) -> Iterator[str]:
    """The address of a JupyterLab on the folder, with settings of its own."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    settings = {
        "notebook-extension/tracker": (
            '{"windowingMode": "none"}'
        ),  # all cells are in the page, on the screen or not
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    }
    for name, text in settings.items():
        path = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {f"JUPYTER_{what}_DIR": str(folder / what.lower()) for what in ("CONFIG", "RUNTIME")}
    places |= {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "spaces"),
    }
    command = [
        sys.executable,
        "-P",  # the folder holds a minivllm/ without a package
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
    ]
    command += [
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
    ]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    command += ["--ServerApp.contents_manager_class=minivllm.course.lab.CourseContents"]
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}/lab"

    def is_up() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_until(is_up, server, log)
        yield address
    finally:
        server.terminate()  # which ends its kernels
        server.wait(20)


NOTEBOOK = (
    "[...jupyterapp.shell.widgets('main')].find((widget) =>"
    " widget.context?.path.includes('CHAPTER'))"
)
#: What the code cells hold: how many there are, how many have run, and the errors among their
#: outputs.
CELLS = f"""(() => {{
    const code = [...{NOTEBOOK}.content.model.cells].filter((cell) => cell.type === "code");
    const outputs = code.flatMap((cell) => cell.outputs.toJSON());
    return {{
        cells: code.length, run: code.filter((cell) => cell.executionCount).length,
        errors: outputs.filter((o) => o.output_type === "error")
            .map((o) => o.ename + ": " + o.evalue),
    }};
}})()"""
#: The widget with the first slider in the page: where its handle is, and what it shows.
SCRUBBER = """(() => {
    const box = [...document.querySelectorAll(".widget-vbox")]
        .find((box) => box.querySelector(".noUi-handle"));
    box.scrollIntoView({block: "center"});
    const [handle, track] = [".noUi-handle", ".noUi-base"]
        .map((s) => box.querySelector(s).getBoundingClientRect());
    const image = box.querySelector("img");
    return {
        x: handle.x + handle.width / 2, y: handle.y + handle.height / 2,
        left: track.x, right: track.right,
        image: image ? image.src : "", width: image ? image.naturalWidth : 0,
        value: box.querySelector(".widget-readout").textContent,
        caption: [...box.querySelectorAll(".widget-html-content")]
            .map((e) => e.textContent).join(" "),
    };
})()"""


@pytest.mark.timeout(290)
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_runs_from_the_menu_and_its_widget_moves(
    page: Page, lab: str, chapter: str
) -> None:
    if not (ROOT / "notebooks" / f"{chapter}.ipynb").exists():
        pytest.skip(f"{chapter} has not been written")
    notebook, cells = (text.replace("CHAPTER", chapter) for text in (NOTEBOOK, CELLS))
    page.send("Page.navigate", url=f"{lab}/tree/notebooks/{chapter}.ipynb")
    idle = f"{notebook}.context.sessionContext.session.kernel.status === 'idle'"
    page.wait_for(f"{notebook}.context.isReady && {idle}", 60)

    page.click(".lm-MenuBar-itemLabel", "Run")
    page.click(".lm-Menu-itemLabel", "Run All Cells")
    done = f"({cells}.errors.length || {cells}.run === {cells}.cells) && {idle}"
    page.wait_for(done, 200, otherwise=cells)
    state = page.evaluate(cells)
    assert state["errors"] == []
    assert state["run"] == state["cells"] > 10

    page.wait_for(f"{SCRUBBER}.width > 0", 20)
    before = page.evaluate(SCRUBBER)
    assert before["caption"]
    seen = "document.querySelector('.jp-Notebook').innerText"
    assert "running kernel you see a still" not in page.evaluate(seen), "the kernel is running"
    target = (
        before["left"] + 8
        if before["x"] > (before["left"] + before["right"]) / 2
        else before["right"] - 8
    )
    page.mouse("mousePressed", before["x"], before["y"])
    for step in range(1, 9):
        page.mouse("mouseMoved", before["x"] + (target - before["x"]) * step / 8, before["y"])
    page.mouse("mouseReleased", target, before["y"])
    others = [
        f"{SCRUBBER}.{what} !== {json.dumps(before[what])}"
        for what in ("value", "image", "caption")
    ]
    page.wait_for(" && ".join([*others, f"{SCRUBBER}.width > 0"]), 30, otherwise=SCRUBBER)
    page.wait_for(idle, 60)  # it draws each step that was passed
    time.sleep(0.5)
    assert page.screenshot(chapter).stat().st_size > 30_000


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", UNTOUCHED)
def test_a_page_that_is_opened_and_saved_stays_as_it_was(
    page: Page, lab: str, folder: Path, name: str
) -> None:
    """Neither the page counts as edited, nor do the bytes of the file change."""
    notebook = NOTEBOOK.replace("CHAPTER", name)
    page.send("Page.navigate", url=f"{lab}/tree/{name}")
    kernel = f"{notebook}.context.sessionContext.session.kernel"
    page.wait_for(f"{notebook}.context.isReady && {kernel}.status === 'idle'", 60)
    page.evaluate(f"{kernel}.info.then(() => true)")
    time.sleep(2)  # JupyterLab writes into the metadata what the kernel has said
    assert page.evaluate(f"{notebook}.context.model.dirty") is False
    page.evaluate(f"{notebook}.context.save().then(() => true)")
    assert (folder / name).read_bytes() == (ROOT / name).read_bytes()


#: The frame of the first player in the page.
FRAME = "document.querySelector('.jp-OutputArea iframe[srcdoc]')"


@pytest.mark.timeout(120)
def test_the_player_plays_without_a_kernel(page: Page, lab: str) -> None:
    """In a page as it was committed, whose kernel has been shut down; light and dark as the lab."""
    notebook = NOTEBOOK.replace("CHAPTER", "00_tour")
    page.send("Page.navigate", url=f"{lab}/tree/notebooks/00_tour.ipynb")
    session = f"{notebook}.context.sessionContext"
    page.wait_for(f"{notebook}.context.isReady && !!{session}.session.kernel", 60)
    page.evaluate(f"{session}.shutdown().then(() => true)")
    page.wait_for(f"!{session}.session?.kernel", 20)

    page.wait_for(f"{FRAME}.scrollIntoView({{block: 'center'}}) || true", 20)
    player = f"{FRAME}.contentWindow.player"
    page.wait_for(f"{player}.run.states.length > 100", 20)
    assert page.evaluate(f"{player}.at") == 2
    assert page.evaluate(f"{FRAME}.parentElement.querySelector('.mv-note')") is None
    page.evaluate(f"{player}.play()")
    page.wait_for(f"{player}.at > 6", 20)
    page.evaluate(f"{player}.pause()")
    said = page.evaluate(f"{FRAME}.contentDocument.querySelector('.news').textContent")
    assert "blocks in use" in said

    for theme, dark in (("JupyterLab Dark", True), ("JupyterLab Light", False)):
        page.evaluate(
            f"jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})"
            ".then(() => true)"
        )
        page.wait_for(f"{FRAME}.contentWindow.player.dark === {json.dumps(dark)}", 20)
        time.sleep(0.5)
        page.screenshot(f"player-in-{theme.split()[1].lower()}")


@pytest.mark.timeout(290)
def test_all_exercises_run_whatever_the_others_do(page: Page, lab: str) -> None:
    """One exercise is answered and passes, the others are stubs. The passed one leads on."""
    notebook, cells = (text.replace("CHAPTER", "04_block") for text in (NOTEBOOK, CELLS))
    page.send("Page.navigate", url=f"{lab}/tree/exercises/04_block_manager.ipynb")
    idle = f"{notebook}.context.sessionContext.session.kernel.status === 'idle'"
    page.wait_for(f"{notebook}.context.isReady && {idle}", 60)
    page.click(".lm-MenuBar-itemLabel", "Run")
    page.click(".lm-Menu-itemLabel", "Run All Cells")
    page.wait_for(f"{cells}.run === {cells}.cells && {idle}", 200, otherwise=cells)
    errors = page.evaluate(cells)["errors"]
    assert {error.partition(":")[0] for error in errors} <= {"NotAttempted", "Mistake"}, errors
    link = "[...document.querySelectorAll('.jp-OutputArea a')].find((a) => /^04.2/.test(a.text))"
    page.wait_for(f"{link}.scrollIntoView({{block: 'end'}}) || true", 20)
    heading = """[...document.querySelectorAll('h2')].find((h) => /^04.2/.test(h.textContent)
        && h.offsetParent).getBoundingClientRect().top"""
    page.screenshot("exercises")
    before = page.evaluate(heading)
    page.evaluate(f"{link}.click()")
    page.wait_for(f"{heading} < {before}", 20, otherwise=heading)
    page.screenshot("exercises-next")
