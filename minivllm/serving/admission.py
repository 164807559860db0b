"""Who may come in, and when a refused client may try again.

The course builds one in exercise 12.5.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

#: Limits of `Admission.retry_after`, in seconds.
SHORTEST, LONGEST = 1, 60


class Admission:
    """Counts the places of a server: `slots` requests run at a time, `max_queue` more may wait.

    clock: gives seconds. window: over how many of them the rate of the ends is measured.
    """

    def __init__(
        self,
        slots: int,
        max_queue: int,
        clock: Callable[[], float] = time.monotonic,
        window: float = 10.0,
    ) -> None:
        self.slots, self.max_queue = slots, max_queue
        #: Requests that were let in and that the engine does not have yet.
        self.num_promised = 0
        self._clock, self._window = clock, window
        self._ends: deque[float] = deque()
        self._has_ended_any = False

    def has_room(self, count: int, num_unfinished: int) -> bool:
        """Whether `count` more may come in. num_unfinished: requests that the engine has."""
        inside = num_unfinished + self.num_promised
        return inside + count <= self.slots + self.max_queue

    def note_end(self) -> None:
        """A request has ended, in whatever way."""
        self._has_ended_any = True
        self._ends.append(self._clock())
        self._forget()

    def retry_after(self, num_unfinished: int) -> int:
        """The seconds until all who wait now will probably have begun; 1 to 60.

        That is the number of those who wait, divided by the rate at which requests ended lately.
        Before the first end nothing is known: 1.
        """
        self._forget()
        if not self._ends:
            return LONGEST if self._has_ended_any else SHORTEST
        waiting = num_unfinished + self.num_promised - self.slots
        seconds = math.ceil(waiting * self._window / len(self._ends))
        return min(LONGEST, max(SHORTEST, seconds))

    def _forget(self) -> None:
        """Let go of the ends before the window."""
        now = self._clock()
        while self._ends and self._ends[0] <= now - self._window:
            self._ends.popleft()
