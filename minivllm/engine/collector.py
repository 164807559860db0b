"""Python's garbage collector while engines live: it looks for cycles rarely, not within a step.

The collector runs when 700 (Python 3.13: 2,000) more objects have been made than freed, and now and
then it walks through everything that Python holds, which with torch imported takes a tenth of a
second. A step of 1,024 streams makes some 5,000 objects and frees them before the next one: there
is no cycle among them, and yet the collector runs several times per step. With a threshold above
what a step makes, the count goes up and down without reaching it. Nothing is frozen or switched
off: a cycle that somebody leaves behind is still found, only later.
"""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

#: Several times the number of objects that a step of 1,024 streams has alive at once.
CALM = 50_000


class _Threshold:
    """The collector's first threshold. It belongs to the whole process, as the collector does."""

    def __init__(self) -> None:
        # Reentrant: the collector itself may run `release`, for an engine in a cycle.
        self._lock = threading.RLock()
        self._num_holders, self._before = 0, 0

    def hold(self) -> None:
        """Raise it. A collector that is off, or calmer already, is left alone."""
        with self._lock:
            self._num_holders += 1
            first, *others = gc.get_threshold()
            if self._num_holders == 1:
                self._before = first
                gc.set_threshold(max(first, CALM) if first else 0, *others)

    def release(self) -> None:
        """The last holder restores it, unless somebody else has changed it meanwhile."""
        with self._lock:
            self._num_holders -= 1
            first, *others = gc.get_threshold()
            if self._num_holders == 0 and first == CALM:
                gc.set_threshold(self._before, *others)


_threshold = _Threshold()


def calm_collector(engine: Any) -> weakref.finalize:
    """Have the collector run rarely until `engine` is gone, or until the result is called."""
    _threshold.hold()
    return weakref.finalize(engine, _threshold.release)
