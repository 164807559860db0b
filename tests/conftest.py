"""For all tests: Triton's interpreter where there is no GPU, and a reason with what is skipped for
want of one.
"""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is imported
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # `make test &` in a script: the shell has Ctrl-C ignored, and every process that a test starts
    # would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


COLOURS = "NO_COLOR FORCE_COLOR PY_COLORS CLICOLOR CLICOLOR_FORCE COLORTERM GITHUB_ACTIONS"
TERMINAL = "TERM COLUMNS LINES TERMINAL_WIDTH TTY_COMPATIBLE TTY_INTERACTIVE"
for variable in f"{COLOURS} {TERMINAL}".split():
    # What a CI or a shell asks of terminals must not decide what a test sees.
    os.environ.pop(variable, None)

pytest.register_assert_rewrite("support")  # a failed assert of a helper shows its values too


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small models run faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU that is not there, and puts files with slow tests first, so that no
    worker begins a long file when the others have ended. Within a file the order stays.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow and item.path.suffix != ".ipynb")
