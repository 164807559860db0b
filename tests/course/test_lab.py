"""A page of the course that is opened and saved in JupyterLab stays as it was, byte by byte.

The real server runs on loopback. What is saved is what JupyterLab's front end sends: the page as it
was given, with the metadata that a running kernel reports.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from minivllm.course.authoring.tool import ROOT

pytest.importorskip("jupyter_server", reason="JupyterLab is not installed")

from minivllm.course.lab import add_kernel, remove_kernel
from minivllm.course.notebooks import METADATA

pytestmark = pytest.mark.slow

PAGES = ("notebooks/00_tour", "exercises/01_online_softmax", "solutions/01_online_softmax")
#: What a Python kernel reports, as JupyterLab writes it into a notebook.
LIVE = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": sys.version.split()[0],
    },
}


class Server:
    """A Jupyter server with the course's contents manager, on folders with some pages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in PAGES:
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / f"{name}.ipynb", root / f"{name}.ipynb")
        (root / "minivllm/course").mkdir(parents=True)
        (root / "elsewhere").mkdir()
        shutil.copy(ROOT / f"{PAGES[0]}.ipynb", root / "elsewhere/00_tour.ipynb")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        [option] = re.findall(r"--ServerApp\.contents_manager_class=\S+", makefile())
        command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", option]
        command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.address[17:]}"]
        command += ["--ServerApp.port_retries=0", "--IdentityProvider.token="]
        command += ["--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={root}"]
        places = {f"JUPYTER_{what}_DIR": str(root / what) for what in ("CONFIG", "RUNTIME", "DATA")}
        self.log = root / "log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                command, env={**os.environ, **places}, stdout=output, stderr=subprocess.STDOUT
            )

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(f"{self.address}/api", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.address}/api/contents/{path}", timeout=20) as answer:
            return json.load(answer)["content"]

    def put(self, path: str, notebook: dict[str, Any]) -> None:
        body = json.dumps({"type": "notebook", "format": "json", "content": notebook}).encode()
        request = urllib.request.Request(
            f"{self.address}/api/contents/{path}",
            data=body,
            method="PUT",
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=20).close()


def makefile() -> str:
    """The commands of `make lab`."""
    text = (ROOT / "Makefile").read_text()
    return text[text.index("\nlab:") : text.index("\nsetup:")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("lab"))
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        server.process.wait(20)


@pytest.mark.parametrize("page", PAGES)
def test_an_untouched_page_keeps_its_bytes(server: Server, page: str) -> None:
    path = f"{page}.ipynb"
    before = (server.root / path).read_bytes()
    notebook = server.get(path)
    opened = copy.deepcopy(notebook)
    assert {key: opened["metadata"][key] for key in LIVE} == LIVE, "a kernel changes nothing in it"

    notebook["metadata"].update(LIVE)
    for cell in notebook["cells"]:
        cell["metadata"]["trusted"] = True
        if cell["cell_type"] == "code":
            cell["metadata"]["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00.000Z"}
            cell["metadata"] |= {"collapsed": False, "scrolled": True}
    server.put(path, notebook)
    assert (server.root / path).read_bytes() == before

    server.put(path, opened)
    assert (server.root / path).read_bytes() == before


def test_what_a_learner_writes_is_saved(server: Server) -> None:
    path = f"{PAGES[1]}.ipynb"
    before = (server.root / path).read_bytes()
    notebook = server.get(path)
    answer = next(cell for cell in notebook["cells"] if cell["id"] == "answer-1")
    answer["source"] = "def safe_softmax(x):\n    return x  # äöü"
    answer["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "hello\n"}]
    answer["execution_count"] = 7
    server.put(path, notebook)
    saved = nbformat.read(server.root / path, as_version=4)
    cell = next(cell for cell in saved.cells if cell.id == "answer-1")
    assert (cell.source, cell.execution_count) == (answer["source"], 7)
    assert cell.outputs[0].text == "hello\n"
    assert saved.metadata == {**METADATA, "minivllm": {"chapter": "01_online_softmax"}}
    (server.root / path).write_bytes(before)


def test_other_notebooks_are_left_alone(server: Server) -> None:
    path = "elsewhere/00_tour.ipynb"
    notebook = server.get(path)
    assert notebook["metadata"] == METADATA
    notebook["metadata"].update(LIVE)
    server.put(path, notebook)
    assert nbformat.read(server.root / path, as_version=4).metadata == LIVE


def test_another_kernel_is_kept() -> None:
    metadata = {"kernelspec": {"name": "gpu", "display_name": "GPU"}, "language_info": {"x": 1}}
    notebook = {"metadata": copy.deepcopy(metadata), "cells": []}
    add_kernel(notebook)
    remove_kernel(notebook)
    assert notebook["metadata"] == metadata
