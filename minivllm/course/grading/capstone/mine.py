"""The learner's own engine, to talk to and to watch."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.capstone.engine import build, stream
from minivllm.course.grading.capstone.examine import Report, collect
from minivllm.course.grading.capstone.pieces import PIECES
from minivllm.course.grading.capstone.worker import load
from minivllm.course.notebooks import find_root
from minivllm.errors import ConfigError

if TYPE_CHECKING:
    from minivllm.sampling_params import SamplingParams


class Mine:
    """The engine made of the answers in exercises/: `llm` has the pieces in it.

    options: of the engine. `ConfigError` where a piece is missing or does not run; the text says
    which, and what to do. The answers run in this process.
    """

    def __init__(self, root: Path | None = None, **options: Any) -> None:
        answers = _answers(root or find_root())
        self.llm, new_loop = build(answers, Counter(), options)
        self._engine = new_loop()

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        """Yield the new text of one answer after each step of the learner's loop."""
        return stream(self._engine, prompt, params)


def _answers(root: Path) -> dict[str, Any]:
    report = Report()
    cells = collect(root, report)
    problems = report.problems
    if not problems:
        # Cells that are given print pictures' digests and the like.
        with contextlib.redirect_stdout(io.StringIO()):
            answers, problems = load(cells, report.found)
    if problems:
        pieces = ", ".join(finding.piece for finding in problems)
        raise ConfigError(
            f"Your engine is not whole yet: {len(problems)} of {len(PIECES)} pieces are missing or"
            f" do not run ({pieces}). `minivllm check capstone` says more about each."
        )
    return answers
