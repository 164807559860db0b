"""The pytest plugin for the course's notebooks under ``--nbval``.

Pytest finds it by an entry point. A notebook of exercises becomes one test per exercise. The
solution's checks judge the answers (`graft`, `runner`); the checks and outputs in the file itself
do not count.

`make test` lets pytest collect the repository's notebooks. If a learner has saved another version
of such a notebook, the committed version is compared. A notebook that was never committed is left
out. A notebook that is named on the command line is taken as it is. The plugin imports no large
package before it meets a notebook.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from minivllm.course.grading.runner import Verdict


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Iterator[None]:
    found = yield
    option = parent.config.option
    if file_path.suffix != ".ipynb" or not (
        getattr(option, "nbval", False) or getattr(option, "nbval_lax", False)
    ):
        return found
    from minivllm.course.grading.graft import chapter_of
    from minivllm.course.notebooks import CourseNotFoundError, is_kept

    named = file_path in {
        Path(parent.config.invocation_params.dir, arg).resolve() for arg in parent.config.args
    }
    try:
        chapter = chapter_of(file_path)
    except CourseNotFoundError as error:
        return [ExerciseFile.from_parent(parent, path=file_path, trouble=error)]
    if chapter is not None:
        return (
            []
            if is_kept(file_path) and not named
            else [ExerciseFile.from_parent(parent, path=file_path)]
        )
    return found if named else _as_committed(found, file_path, parent)


@pytest.hookimpl
def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave the player out of what nbval compares: it holds the durations of a run's steps."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("text/html",)


class ExerciseFile(pytest.File):
    """The exercises of one notebook, run one after the other in one kernel."""

    def __init__(self, *, trouble: Exception | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._trouble = trouble
        self._running: Iterator[Verdict] | None = None
        self._known: dict[str, Verdict] = {}

    def collect(self) -> Iterator[pytest.Item]:
        from minivllm.course.grading.graft import chapter_of, graft
        from minivllm.errors import MiniVLLMError

        try:
            if self._trouble:
                raise self._trouble
            self._groups = graft(self.path, chapter_of(self.path))
        except MiniVLLMError as error:
            self._trouble = error
            yield ExerciseItem.from_parent(self, name="file")
        else:
            for group in self._groups[1:]:
                yield ExerciseItem.from_parent(self, name=group.id)

    def verdict(self, id: str) -> Verdict:
        """Run this exercise, and before it everything in the file that has not run yet."""
        from minivllm.course.grading.runner import CELL_TIMEOUT, verdicts

        if self._trouble:
            raise self._trouble
        timeout = min(CELL_TIMEOUT, self.config.option.nbval_cell_timeout)
        if self._running is None:
            self._running = verdicts(self._groups, self.path.parent, timeout=timeout)
        while id not in self._known:
            verdict = next(self._running)
            self._known[verdict.id] = verdict
        return self._known[id]

    def teardown(self) -> None:
        if self._running is not None:
            self._running.close()


class NotPassedError(Exception):
    """An exercise that did not pass; the report shows its message alone."""


class ExerciseItem(pytest.Item):
    """One exercise as a test.

    It passes, it fails with the mistake's name, or it is skipped where this machine cannot run it.
    """

    def runtest(self) -> None:
        from minivllm.course.grading.runner import NOT_RUNNABLE, PASSED

        verdict = self.parent.verdict(self.name)
        if verdict.state == NOT_RUNNABLE:
            pytest.skip(f"not runnable here: {verdict.message}")
        if verdict.state != PASSED:
            raise NotPassedError("\n".join([verdict.headline, verdict.message, *verdict.notes]))

    def repr_failure(self, excinfo: pytest.ExceptionInfo) -> Any:
        from minivllm.errors import MiniVLLMError

        expected = isinstance(excinfo.value, NotPassedError | MiniVLLMError)
        return str(excinfo.value) if expected else super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} {self.name}"


def _as_committed(found: list[Any], path: Path, parent: pytest.Collector) -> list[Any]:
    """nbval's collectors of a notebook.

    A notebook in one of the repository's folders is taken as it was committed.
    """
    from minivllm.course.notebooks import FOLDERS, as_committed

    if path.parent.name not in FOLDERS or not (path.parents[1] / "minivllm/course").is_dir():
        return found
    text, note = as_committed(path)
    if note:
        warnings.warn(note, stacklevel=1)
    if text is None:
        return []
    if not note:
        return found
    import nbformat
    from nbval.plugin import IPyNbFile

    class Committed(IPyNbFile):
        nb = property(lambda self: nbformat.reads(text, as_version=4), lambda self, as_saved: None)

    return [Committed.from_parent(parent, path=path)]
