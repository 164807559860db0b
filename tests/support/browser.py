"""A headless Chromium for tests, spoken to in its DevTools protocol through websocket-client, which
JupyterLab brings along: no driver has to be installed.

CHROME names a browser that is not found by itself. Screenshots are kept in .cache/screenshots, to
be looked at.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivllm.course.authoring.tool import ROOT

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
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
