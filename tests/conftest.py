"""Settings for all tests.

Without a GPU, kernels run in Triton's interpreter, and tests that need a GPU are skipped with a
reason.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # The variable must be set before triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # With `make test &` in a script, the shell makes pytest ignore Ctrl-C. Every process that a
    # test starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


COLOURS = "NO_COLOR FORCE_COLOR PY_COLORS CLICOLOR CLICOLOR_FORCE COLORTERM GITHUB_ACTIONS"
TERMINAL = "TERM COLUMNS LINES TERMINAL_WIDTH TTY_COMPATIBLE TTY_INTERACTIVE"
for variable in f"{COLOURS} {TERMINAL}".split():
    # What CI or a shell asks of terminals must not change what a test sees.
    os.environ.pop(variable, None)

# A failed assert of a helper shows its values, too.
pytest.register_assert_rewrite("support")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: small models run faster on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `-m "not slow"`, do not import files whose tests are all slow: that takes seconds."""
    only_quick = re.fullmatch(r"not slow( and not \w+)*", config.option.markexpr)
    if only_quick and collection_path.suffix == ".py":
        text = collection_path.read_text(encoding="utf-8")
        return True if re.search(r"^pytestmark = .*\bmark\.slow\b", text, re.MULTILINE) else None
    return None


#: The files that take a worker longest, which begin first.
LONGEST = (
    "course/test_journey.py",
    "course/test_capstone.py",
    "whole/test_site.py",
    "course/test_chapters.py",
    "parallel/test_parallel.py",
    "serving/test_operation.py",
    "whole/test_in_a_browser.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a missing GPU, and put files with slow tests first.

    So no worker begins a long file when the others have finished. The order within a file stays.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def turn(item: pytest.Item) -> int:
        path = item.path.as_posix()
        place = next((n for n, end in enumerate(LONGEST) if path.endswith(end)), len(LONGEST))
        return place + (item.path not in slow and item.path.suffix != ".ipynb")

    items.sort(key=turn)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker one file after the other; of tests/course/test_chapters.py, one chapter.

    The chapters' exercises are one file and almost half of all time: as one piece, they would keep
    one worker busy after the others have ended. No other file may be cut: the tests of a journey,
    for example, go on from one another.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByChapter(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            chapter = re.search(r"/test_chapters\.py::.*\[(ch\d\d)", nodeid)
            return super()._split_scope(nodeid) + (chapter[1] if chapter else "")

    return ByChapter(config, log) if config.getoption("dist") == "loadfile" else None
