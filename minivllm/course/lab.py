"""The files of the course as JupyterLab sees them, so that a page that nobody edits stays as it is.

When a page is opened, JupyterLab writes into its metadata what the running kernel says about
itself: the name of the kernel, the version of Python, and more. The page then counts as edited, and
git shows a difference after it is saved. `CourseContents` gives each page with the metadata that
the kernel of this environment will report, so that JupyterLab changes nothing, and takes them out
again when the page is saved. `make lab` starts JupyterLab with it.

JupyterLab also hides what a program has drawn in a page that was not run here: the player of a run
would be missing until the cell runs. The chapters come with the package, whose code runs in this
server anyway, so their outputs are trusted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

from minivllm.course.notebooks import CELL_STATE, FOLDERS, METADATA, ROAD


class CourseContents(AsyncLargeFileManager):
    """The contents manager of JupyterLab's server, for the folders of the course."""

    async def get(self, path: str, content: bool = True, **more: Any) -> dict[str, Any]:
        """The model of a file or a folder; a page has the metadata of a running kernel."""
        model = await super().get(path, content=content, **more)
        if content and model["type"] == "notebook" and self._is_page(path):
            add_kernel(model["content"])
        return model

    async def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        """Save a file or a folder; a page without what belongs to this machine."""
        if model.get("type") == "notebook" and model.get("content") and self._is_page(path):
            remove_kernel(model["content"])
        return await super().save(model, path)

    def mark_trusted_cells(self, nb: Any, path: str = "") -> None:
        """Trust the outputs of the chapters; of other notebooks, those that ran here."""
        if self._is_page(path) and Path(path).stem in {stop.name for stop in ROAD}:
            self.notary.mark_cells(nb, True)
        else:
            super().mark_trusted_cells(nb, path)

    def _is_page(self, path: str) -> bool:
        folder = Path(self._get_os_path(path)).parent
        return (
            folder.name in (*FOLDERS, "exercises") and (folder.parent / "minivllm/course").is_dir()
        )


def add_kernel(notebook: dict[str, Any]) -> None:
    """Put into the metadata what a Python kernel of this environment reports about itself.

    A notebook for another kernel does not change.
    """
    from ipykernel.ipkernel import IPythonKernel
    from ipykernel.kernelspec import get_kernel_dict

    metadata = notebook["metadata"]
    if {key: metadata.get(key) for key in METADATA} == METADATA:
        metadata["kernelspec"]["display_name"] = get_kernel_dict()["display_name"]
        metadata["language_info"] = dict(IPythonKernel.language_info)


def remove_kernel(notebook: dict[str, Any]) -> None:
    """Undo `add_kernel`, and remove from the cells how a browser shows them and when they ran.

    Sources and outputs do not change. In a notebook for another kernel, the metadata stay.
    """
    metadata = notebook["metadata"]
    if metadata.get("kernelspec", {}).get("name") == METADATA["kernelspec"]["name"]:
        metadata.update({key: dict(value) for key, value in METADATA.items()})
    for cell in notebook["cells"]:
        for key in CELL_STATE:
            cell["metadata"].pop(key, None)
