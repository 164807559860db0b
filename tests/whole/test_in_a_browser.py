"""The pages as a learner opens them: JupyterLab in a headless Chromium, all cells run from its
menu, a widget scrubbed.

The browser is spoken to in its DevTools protocol through websocket-client, which JupyterLab brings
along: no driver has to be installed. CHROME names a browser that is not found by itself.
Screenshots are kept in .cache/screenshots, to be looked at.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from minivllm.course.authoring.tool import ROOT
from minivllm.course.notebooks import chapters, role
from minivllm.course.stubs import make_exercises

pytestmark = pytest.mark.slow

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
CHAPTERS = ("03_paged_kv_cache", "05_scheduler")
#: Pages that are opened and saved, and not run.
UNTOUCHED = ("notebooks/06_qwen3.ipynb", "exercises/05_scheduler.ipynb")
SCREENSHOTS = ROOT / ".cache" / "screenshots"


class Page:
    """One page of a browser, steered through its websocket."""

    def __init__(self, url: str) -> None:
        import websocket

        self._socket = websocket.create_connection(url, timeout=60, suppress_origin=True)
        self._count = 0

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            reply = json.loads(self._socket.recv())
            if reply.get("id") == self._count:
                assert "error" not in reply, reply
                return reply["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; what it throws is an AssertionError."""
        result = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]["exception"].get(
            "description", result
        )
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float, otherwise: str = "document.title") -> Any:
        """The expression's value as soon as that is true; what is not there yet, is not true.

        After some seconds an AssertionError with the value of otherwise, and a screenshot.
        """
        deadline = time.monotonic() + seconds
        while not (
            value := self.evaluate(
                f"(() => {{ try {{ return {expression} }} catch {{ return null }} }})()"
            )
        ):
            if time.monotonic() > deadline:
                seen = self.screenshot("failed")
                raise AssertionError(
                    f"not within {seconds} s: {expression}\n{self.evaluate(otherwise)}, see {seen}"
                )
            time.sleep(0.3)
        return value

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.send(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1
        )

    def click(self, selector: str, text: str) -> None:
        """Click on the visible element that selector finds and whose text this is."""
        at = self.wait_for(
            f"""(() => {{
                const found = [...document.querySelectorAll({json.dumps(selector)})].find(
                    (e) => e.textContent.trim() === {json.dumps(text)}
                        && e.getClientRects().length);
                const box = found.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})()""",
            20,
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.mouse(kind, *at)

    def screenshot(self, name: str) -> Path:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
        return path


def wait_until(
    condition: Callable[[], Any], process: subprocess.Popen, log: Path, seconds: float = 60
) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        said = log.read_text(errors="replace")[-3000:]
        assert process.poll() is None, f"it has ended: {said}"
        assert time.monotonic() < deadline, f"it does not come up: {said}"
        time.sleep(0.2)
    return value


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running browser's DevTools."""
    pytest.importorskip("websocket", reason="websocket-client is not installed")
    names = [os.environ["CHROME"]] if os.environ.get("CHROME") else BROWSERS
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)}; CHROME may name another Chromium")
    folder = tmp_path_factory.mktemp("browser")
    command = [
        program,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
    ]
    command += [
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        "--window-size=1400,1000",
        "about:blank",
    ]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    port_file = folder / "DevToolsActivePort"
    try:
        port = wait_until(
            lambda: port_file.exists() and port_file.read_text().split("\n")[0], process, log
        )
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def page(browser: str) -> Iterator[Page]:
    """A tab of its own: one with unsaved cells does not let go without being asked."""
    with urllib.request.urlopen(
        urllib.request.Request(f"{browser}/json/new", method="PUT"), timeout=20
    ) as answer:
        target = json.load(answer)
    yield Page(target["webSocketDebuggerUrl"])
    urllib.request.urlopen(f"{browser}/json/close/{target['id']}", timeout=20).close()


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
