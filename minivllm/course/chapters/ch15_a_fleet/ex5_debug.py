"""15.5: debug this: a front that loses replicas."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from minivllm.course.chapters.ch15_a_fleet.common import ClassMemory
from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import CheckError, Mistake, raised
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_no_growth

#: What a front did: ("send", name, request), ("tell", request, what) or ("stop", name).
Action = tuple[str, ...]


@dataclass
class _Hands:
    """The three functions that a front gets; they note what it does."""

    done: list[Action] = field(default_factory=list)

    def send(self, name: str, request: str) -> None:
        self.done.append(("send", name, request))

    def tell(self, request: str, what: str) -> None:
        self.done.append(("tell", request, what))

    def stop(self, name: str) -> None:
        self.done.append(("stop", name))


class _Front:
    """The right one."""

    def __init__(self, send: Callable, tell: Callable, stop: Callable, tries: int) -> None:
        self.send, self.tell, self.stop, self.tries = send, tell, stop, tries
        #: Replica -> its requests, and whether something has come of each.
        self.requests: dict[str, dict[str, bool]] = {}
        self.draining: set[str] = set()
        self.waiting: deque[str] = deque()
        self.handed: dict[str, int] = {}

    def join(self, name: str) -> None:
        self.requests[name] = {}
        waiting, self.waiting = self.waiting, deque()
        for request in waiting:
            self.place(request)

    def ask(self, request: str) -> None:
        self.handed[request] = 0
        self.place(request)

    def place(self, request: str) -> None:
        there = [name for name in self.requests if name not in self.draining]
        if not there:
            self.waiting.append(request)
            return
        name = min(there, key=lambda name: len(self.requests[name]))
        self.handed[request] += 1
        self.requests[name][request] = False
        self.send(name, request)

    def token(self, name: str, request: str, text: str) -> None:
        if request in self.requests.get(name, ()):
            self.requests[name][request] = True
            self.tell(request, text)

    def end(self, name: str, request: str) -> None:
        if request in self.requests.get(name, ()):
            del self.requests[name][request], self.handed[request]
            self.tell(request, "end")
            self.idle(name)

    def die(self, name: str) -> None:
        self.draining.discard(name)
        for request, has_begun in self.requests.pop(name, {}).items():
            if has_begun or self.handed[request] >= self.tries:
                del self.handed[request]
                self.tell(request, "error")
            else:
                self.place(request)

    def drain(self, name: str) -> None:
        if name in self.requests:
            self.draining.add(name)
            self.idle(name)

    def idle(self, name: str) -> None:
        if name in self.draining and not self.requests[name]:
            del self.requests[name]
            self.draining.discard(name)
            self.stop(name)


# --- scripts --------------------------------------------------------------------------------------

#: A call of a method: its name, and the arguments.
Event = tuple[str, ...]


@dataclass
class _Script:
    """What happens, one event after the other. Later ones depend on what a right front has done.

    share: how often a request is asked rather than anything else.
    """

    what: str
    seed: int = 0
    length: int = 0
    events: tuple[Event, ...] = ()
    tries: int = 2
    share: float = 0.4

    def next(self, i: int, front: _Front, rng: Random) -> Event | None:
        """The event with the number i; None after the last one."""
        if self.events:
            return self.events[i] if i < len(self.events) else None
        if i >= self.length:
            return None
        return self._drawn(i, front, rng)

    def _drawn(self, i: int, front: _Front, rng: Random) -> Event:
        names = list(front.requests)
        running = [(name, request) for name in names for request in front.requests[name]]
        roll = rng.random()
        if not names and roll < 0.5:
            return "join", f"r{i}"
        if roll < self.share or not running:
            return "ask", f"q{i}"
        name, request = rng.choice(running)
        what = rng.choices(
            ("token", "end", "die", "drain", "join", "late", "unknown"),
            (6, 5, 2, 1.5, 1.5, 0.6, 0.4),
        )[0]
        match what:
            case "token":
                return "token", name, request, f"t{i}"
            case "end":
                return "end", name, request
            case "die" | "drain":
                return what, rng.choice(names)
            case "join":
                return "join", f"r{i}"
            case "late":
                who = rng.choice([each for each in names if each != name] or ["gone"])
                return rng.choice((("token", who, request, f"t{i}"), ("end", who, request)))
        return rng.choice((("die", "gone"), ("drain", "gone")))


def _small_scripts() -> list[_Script]:
    two: tuple[Event, ...] = (("join", "a"), ("join", "b"))
    return [
        _Script("One replica, one request", events=(
            ("join", "a"), ("ask", "1"), ("token", "a", "1", "Hi"), ("end", "a", "1"),
        )),
        _Script("Nobody is there yet", events=(
            ("ask", "1"), ("ask", "2"), ("ask", "3"), ("join", "a"), ("join", "b"), ("ask", "4"),
        )),
        _Script("Equal ones, and their names are not in the order in which they joined", events=(
            ("join", "z"), ("join", "a"), ("join", "m"), *(("ask", str(i)) for i in range(1, 6)),
        )),
        _Script("The least load", events=(
            *two, ("ask", "1"), ("ask", "2"), ("ask", "3"), ("end", "b", "2"), ("ask", "4"),
            ("ask", "5"), ("end", "a", "1"), ("end", "a", "3"), ("ask", "6"), ("ask", "7"),
        )),
        _Script("A replica dies, and its request has begun", events=(
            *two, ("ask", "1"), ("token", "a", "1", "Once"), ("die", "a"), ("ask", "2"),
        )),
        _Script("A replica dies, and its request has not begun", events=(
            *two, ("ask", "1"), ("die", "a"), ("token", "b", "1", "Once"), ("end", "b", "1"),
        )),
        _Script("The only replica dies", events=(
            ("join", "a"), ("ask", "1"), ("ask", "2"), ("die", "a"), ("ask", "3"), ("join", "b"),
        )),
        _Script("Several of both kinds", events=(
            *two, *(("ask", str(i)) for i in range(1, 9)), ("token", "a", "3", "x"),
            ("token", "a", "5", "x"), ("die", "a"), ("join", "c"), ("ask", "9"), ("ask", "10"),
        )),
        _Script("A request that kills its replicas", events=(
            *two, ("join", "c"), ("join", "d"), ("ask", "1"), ("die", "a"), ("die", "b"),
            ("ask", "2"), ("ask", "3"),
        )),
        _Script("With one try only", tries=1, events=(*two, ("ask", "1"), ("die", "a"))),
        _Script("Three tries, and the last one succeeds", tries=3, events=(
            *two, ("join", "c"), ("ask", "1"), ("die", "a"), ("die", "b"), ("token", "c", "1", "x"),
            ("end", "c", "1"),
        )),
        _Script("A replica without requests is drained", events=(
            *two, ("drain", "a"), ("ask", "1"),
        )),
        _Script("A replica with requests is drained", events=(
            *two, ("ask", "1"), ("ask", "2"), ("ask", "3"), ("drain", "a"),
            ("token", "a", "1", "x"), ("ask", "4"), ("ask", "5"), ("end", "a", "1"),
            ("token", "a", "3", "y"),
            ("end", "a", "3"), ("end", "b", "2"), ("ask", "6"),
        )),
        _Script("The only replica is drained, and another one comes", events=(
            ("join", "a"), ("ask", "1"), ("drain", "a"), ("ask", "2"), ("join", "b"),
            ("end", "a", "1"), ("end", "b", "2"),
        )),
        _Script("The only replica is drained, and stops while a request waits", events=(
            ("join", "a"), ("ask", "1"), ("drain", "a"), ("ask", "2"), ("end", "a", "1"),
            ("join", "b"),
        )),
        _Script("Very many requests", events=(
            ("join", "a"), *(("ask", str(i)) for i in range(600)), ("join", "b"), ("die", "a"),
        )),
        _Script("A drained replica dies", events=(
            *two, ("ask", "1"), ("ask", "2"), ("drain", "a"), ("die", "a"), ("end", "b", "2"),
            ("end", "b", "1"), ("drain", "b"),
        )),
        _Script("Another one dies while one drains", events=(
            *two, ("join", "c"), ("ask", "1"), ("ask", "2"), ("drain", "a"), ("die", "b"),
            ("die", "c"), ("join", "d"), ("end", "a", "1"),
        )),
        _Script("Drained twice", events=(
            *two, ("ask", "1"), ("drain", "a"), ("drain", "a"), ("end", "a", "1"), ("drain", "a"),
        )),
        _Script("A dead replica's last words", events=(
            *two, ("ask", "1"), ("die", "a"), ("token", "a", "1", "x"), ("end", "a", "1"),
            ("token", "b", "1", "y"), ("end", "b", "1"), ("token", "b", "1", "z"),
        )),
        _Script("A replica speaks of a request that another one has", events=(
            *two, ("ask", "1"), ("token", "b", "1", "x"), ("end", "b", "1"), ("die", "a"),
            ("token", "b", "1", "y"), ("end", "b", "1"),
        )),
        _Script("Dies twice", events=(
            *two, ("ask", "1"), ("die", "a"), ("die", "a"), ("die", "never there"),
        )),
        _Script("Waiting is not a try", events=(
            ("ask", "1"), ("join", "a"), ("die", "a"), ("join", "b"), ("die", "b"), ("join", "c"),
            ("ask", "2"),
        )),
    ]  # fmt: skip


def _scripts() -> list[_Script]:
    drawn = [
        _Script(
            "Replicas that come, drain and die",
            seed=1550 + i,
            length=(30, 80, 200, 400)[i % 4],
            tries=1 + i % 3,
            share=(0.3, 0.45, 0.6)[i % 3],
        )
        for i in range(16)
    ]
    return [*_small_scripts(), *drawn]


# --- judging --------------------------------------------------------------------------------------


@dataclass
class _Moment:
    """One event, and what it led to.

    before: what each replica had before it, and whether something had come of each request.
    """

    script: _Script
    number: int
    event: Event
    before: dict[str, dict[str, bool]]
    draining: set[str]
    handed: dict[str, int]
    mine: list[Action]
    right: list[Action]

    @property
    def seen(self) -> str:
        fleet = "; ".join(
            f"{name}{' (draining)' if name in self.draining else ''}: {_listed(requests)}"
            for name, requests in list(self.before.items())[:6]
        )
        call = f"{self.event[0]}({', '.join(map(repr, self.event[1:]))})"
        return (
            f"{self.script.what} (tries = {self.script.tries}): event {self.number + 1}, {call}."
            f" Replicas before it: {fleet or 'none'}.\n{self.did}"
        )

    @property
    def did(self) -> str:
        """What the answer did, and what it should have done; of much, only what differs."""
        if max(len(self.mine), len(self.right)) <= 5 or not (self.extra or self.missing):
            return f"Your front: {_told(self.mine)}. Expected: {_told(self.right)}."
        return f"Not expected: {_told(self.extra)}. Missing: {_told(self.missing)}."

    @property
    def extra(self) -> list[Action]:
        return [action for action in self.mine if action not in self.right]

    @property
    def missing(self) -> list[Action]:
        return [action for action in self.right if action not in self.mine]

    def name(self) -> str:
        """The name of the first thing that went wrong."""
        twice = [action for action in self.mine if self.mine.count(action) > 1]
        for action in [*self.extra, *twice]:
            if action[0] == "send" and (name := self.sent_wrongly(action)):
                return name
        for action in self.extra:
            if action[0] == "stop":
                return self.stopped_wrongly(action[1])
        for action in self.extra:
            if action[0] == "tell":
                return self.told_wrongly(action)
        for action in self.missing:
            return self.left_undone(action)
        return "done-twice" if twice else "another-order"

    def sent_wrongly(self, action: Action) -> str:
        _, name, request = action
        kind, subject = self.event[0], self.event[1]
        here = self.before.get(subject, {})
        if kind == "die" and request in here:
            if here[request]:
                return "begins-again"
            if self.handed[request] >= self.script.tries:
                return "tries-for-ever"
        if kind == "die" and name == subject:
            return "to-the-dead"
        if name in self.draining or (kind == "drain" and name == subject):
            return "to-a-draining-one"
        if kind == "drain":
            return "moves-what-runs"
        there = {*self.before, *(self.event[1:2] if kind == "join" else ())}
        if name not in there:
            return "to-the-dead"
        wanted = [right for right in self.right if right[0] == "send"]
        if request not in {right[2] for right in wanted}:
            return "sent-unasked"
        mine = [act[2] for act in self.mine if act[0] == "send"]
        if mine != [right[2] for right in wanted] and set(mine) == {act[2] for act in wanted}:
            return "another-order"
        return "wrong-load"

    def stopped_wrongly(self, name: str) -> str:
        if name not in self.before:
            return "stops-twice"
        if self.event[0] == "die" and name == self.event[1]:
            return "stops-the-dead"
        if name not in self.draining and self.event[:2] != ("drain", name):
            return "stops-unasked"
        return "drains-by-killing"

    def told_wrongly(self, action: Action) -> str:
        _, request, what = action
        kind = self.event[0]
        if kind in ("token", "end") and self.event[2] not in self.before.get(self.event[1], ()):
            return "last-words"
        if kind == "drain":
            return "drains-by-killing"
        if kind == "die" and what == "error" and request in self.before.get(self.event[1], ()):
            return "gives-up"
        return "told-unasked"

    def left_undone(self, action: Action) -> str:
        kind = self.event[0]
        if action[0] == "stop":
            return "never-stops"
        if action[0] == "send":
            if self.handed.get(action[2]):
                return "loses-the-queue"
            return "waits-for-ever" if kind == "join" else "not-sent"
        if action[2] != "error":
            return "not-told"
        has_begun = self.before.get(self.event[1], {}).get(action[1], True)
        return "no-error" if has_begun else "tries-for-ever"


def _listed(requests: dict[str, bool]) -> str:
    """A replica's requests, in words."""
    names = [name + (" (begun)" if begun else "") for name, begun in requests.items()]
    if len(names) > 8:
        return f"{', '.join(names[:4])}, … ({len(names)} requests)"
    return ", ".join(names) or "nothing"


def _told(actions: list[Action]) -> str:
    if not actions:
        return "nothing"
    shown = [f"{kind}({', '.join(map(repr, rest))})" for kind, *rest in actions[:5]]
    return ", ".join(shown) + (", …" if len(actions) > 5 else "")


def _in_order(actions: list[Action]) -> list[list[Action]]:
    """What must be in order: what is sent. What clients are told in one event may be in any."""
    return [
        [action for action in actions if action[0] == "send"],
        sorted(action for action in actions if action[0] == "tell"),
        [action for action in actions if action[0] == "stop"],
    ]


def _expect_script(make: Callable, script: _Script) -> int:
    """Play a script, and raise the first thing that goes wrong. Returns the number of events."""
    mine, right = _Hands(), _Hands()
    judge = _Front(right.send, right.tell, right.stop, script.tries)
    front = make(mine.send, mine.tell, mine.stop, script.tries)
    rng = Random(script.seed)
    number = 0
    while (event := script.next(number, judge, rng)) is not None:
        before = {name: dict(requests) for name, requests in judge.requests.items()}
        draining, handed = set(judge.draining), dict(judge.handed)
        mine.done.clear()
        right.done.clear()
        getattr(judge, event[0])(*event[1:])
        try:
            getattr(front, event[0])(*event[1:])
        except (CheckError, NotImplementedError):
            raise
        except Exception as error:
            call = f"{event[0]}({', '.join(map(repr, event[1:]))})"
            raise raised(error, f"{script.what}: event {number + 1}, {call}.") from error
        if _in_order(mine.done) != _in_order(right.done):
            now = list(mine.done), list(right.done)
            moment = _Moment(script, number, event, before, draining, handed, *now)
            raise EXERCISE.mistake(moment.name(), moment.seen)
        number += 1
    return number


def _expect_scripts(make: type) -> int:
    kept, total = ClassMemory(make), 0
    for script in _scripts():
        try:
            total += _expect_script(make, script)
        except Mistake as mistake:
            if kept.forget():
                _expect_script(make, script)
                raise EXERCISE.mistake("shared-between-objects", f"{script.what}.") from mistake
            raise
    return total


def _come_and_go(make: Callable, kind: str, rounds: int) -> Any:
    """A front after so many requests, of which some fail, or so many replicas."""
    hands = _Hands()
    front = make(hands.send, hands.tell, hands.stop, 2)
    front.join("a")
    for i in range(rounds):
        if kind == "requests":
            front.ask(f"q{i}")
            front.token("a", f"q{i}", "x")
            front.end("a", f"q{i}")
        else:
            front.join(f"r{i}")
            for j in range(3):
                front.ask(f"q{i}.{j}")
            held = [act[1:] for act in hands.done if act[0] == "send"]
            for name, request in held:
                front.token(name, request, "x")
            if kind != "deaths":
                front.drain(f"r{i}")
            if kind != "drains":
                front.die(f"r{i}")
            for name, request in held:
                if name == "a" or kind == "drains":
                    front.end(name, request)
        hands.done.clear()
    return front


def check_debug(answer: type) -> str:
    expect(
        isinstance(answer, type),
        "wrong-form",
        f"{show(answer)} is no class.\nHand in the class itself.",
    )
    total = _expect_scripts(answer)
    for kind, what in (
        ("requests", "requests that come and end"),
        ("deaths", "replicas that come and die"),
        ("drains", "replicas that come and are drained"),
        ("both", "replicas that come, are drained, and die before they are idle"),
    ):
        expect_no_growth(partial(_come_and_go, answer, kind), what)
    return f"{len(_scripts())} scripts, {total} events: nobody waits for ever, nothing comes twice"


EXERCISE = Exercise(
    id="15.5",
    title="Debug this: a front that loses replicas",
    check=check_debug,
    mistakes=(
        Known(
            "begins-again",
            "A client has the beginning of this answer already, and gets another one from the start"
            " now. What has begun ends with an error: only the client can say whether it wants to"
            " ask again.",
            hint=1,
            answers=r"""
# %% everything goes elsewhere
@@
-            if has_begun or self.handed[request] >= self.tries:
+            if self.handed[request] >= self.tries:
""",
        ),
        Known(
            "loses-the-queue",
            "This request was with a replica that died, and nothing had come of it. It must go to"
            " another replica: its client waits, and nobody works on it.",
            hint=1,
            answers=r"""
# %% only what has begun
@@
-            else:
-                self.place(request)
+            else:
+                del self.handed[request]
""",
        ),
        Known(
            "gives-up",
            "This request ends with an error, though nothing had come of it and it may be sent once"
            " more. Another replica can do it, and its client need not know.",
            hint=1,
            answers=r"""
# %% everything fails
@@
-            if has_begun or self.handed[request] >= self.tries:
+            if has_begun or True:

# %% one try too few
@@
-            if has_begun or self.handed[request] >= self.tries:
+            if has_begun or self.handed[request] + 1 >= self.tries:
""",
        ),
        Known(
            "no-error",
            "The client of this request waits for ever: nobody works on it any more, and nobody has"
            " said so.",
            hint=1,
            answers=r"""
# %% what has begun is dropped
@@
-                self.forget(request)
-                self.tell(request, "error")
+                self.forget(request)
""",
        ),
        Known(
            "tries-for-ever",
            "This request has been sent `tries` times, and each time its replica died. Perhaps it"
            " is what kills them: it ends with an error.",
            hint=2,
            answers=r"""
# %% no limit
@@
-            if has_begun or self.handed[request] >= self.tries:
+            if has_begun:

# %% one more
@@
-            if has_begun or self.handed[request] >= self.tries:
+            if has_begun or self.handed[request] > self.tries:
""",
        ),
        Known(
            "to-the-dead",
            "You send a request to a replica that is not there any more.",
            hint=1,
            answers=r"""
# %% places before it forgets
@@
-        for request, has_begun in self.requests.pop(name, {}).items():
+        lost = dict(self.requests.get(name, {}))
+        if name in self.requests:
+            self.requests[name] = {}
+        for request, has_begun in lost.items():
@@
-                self.place(request)
-
-    def drain(self, name: str) -> None:
+                self.place(request)
+        self.requests.pop(name, None)
+
+    def drain(self, name: str) -> None:
""",
        ),
        Known(
            "to-a-draining-one",
            "A replica that drains gets nothing more, neither new requests nor those of a dead one:"
            " otherwise it never comes to its end.",
            hint=3,
            answers=r"""
# %% all of them
@@
-        there = [name for name in self.requests if name not in self.draining]
+        there = list(self.requests)
""",
        ),
        Known(
            "drains-by-killing",
            "You end a replica that still works for somebody. To drain means to wait for the last"
            " of its requests, and to stop it then.",
            hint=3,
            answers=r"""
# %% at once
@@
-        if name in self.draining and not self.requests[name]:
+        if name in self.draining:

# %% the first one that ends
@@
-            self.tell(request, "end")
-            self.stop_if_idle(name)
+            self.tell(request, "end")
+            if name in self.draining:
+                self.requests[name].clear()
+            self.stop_if_idle(name)
""",
        ),
        Known(
            "never-stops",
            "This replica drains, and has nothing left. Now it is to be stopped: at once if it had"
            " nothing to begin with, else after its last request.",
            hint=3,
            answers=r"""
# %% only after a request
@@
-        if name in self.requests:
-            self.draining.add(name)
-            self.stop_if_idle(name)
+        if name in self.requests:
+            self.draining.add(name)

# %% only where nothing runs
@@
-            self.tell(request, "end")
-            self.stop_if_idle(name)
+            self.tell(request, "end")
""",
        ),
        Known(
            "stops-twice",
            "You stop a replica that is not there any more.",
            hint=3,
            answers=r"""
# %% whoever is named
@@
-        if name in self.requests:
-            self.draining.add(name)
-            self.stop_if_idle(name)
+        if not self.requests.get(name):
+            self.requests.pop(name, None)
+            self.stop(name)
+        else:
+            self.draining.add(name)
""",
        ),
        Known(
            "stops-the-dead",
            "A replica that has died need not be stopped.",
            hint=3,
            answers=r"""
# %% to be sure
@@
-        self.draining.discard(name)
-        for request, has_begun in self.requests.pop(name, {}).items():
+        if name in self.draining:
+            self.draining.discard(name)
+            self.stop(name)
+        for request, has_begun in self.requests.pop(name, {}).items():
""",
        ),
        Known(
            "stops-unasked",
            "You stop a replica that has nothing to do. Nobody has asked for that.",
            hint=3,
            answers=r"""
# %% whoever is idle
@@
-        if name in self.draining and not self.requests[name]:
+        if not self.requests[name]:
""",
        ),
        Known(
            "moves-what-runs",
            "To drain a replica takes nothing from it: what it has, it finishes, begun or not.",
            hint=3,
            answers=r"""
# %% what has not begun goes elsewhere
@@
-        if name in self.requests:
-            self.draining.add(name)
+        if name in self.requests:
+            self.draining.add(name)
+            for request, has_begun in list(self.requests[name].items()):
+                if not has_begun:
+                    del self.requests[name][request]
+                    self.place(request)
""",
        ),
        Known(
            "wrong-load",
            "Another replica has fewer requests, or as few and joined before. What does your load"
            " count? A request is with one replica at a time: once when it is sent, and no more"
            " when it has ended or its replica has died.",
            hint=4,
            answers=r"""
# %% never counts down
@@
-        name = min(there, key=lambda name: len(self.requests[name]))
+        self.sent = getattr(self, "sent", {})
+        name = min(there, key=lambda name: self.sent.get(name, 0))
+        self.sent[name] = self.sent.get(name, 0) + 1

# %% what came from a dead one counts twice
@@
-        name = min(there, key=lambda name: len(self.requests[name]))
+        again = [
+            sum(self.handed[request] > 1 for request in self.requests[name]) for name in there
+        ]
+        name = min(there, key=lambda n: len(self.requests[n]) + again[there.index(n)])

# %% the last one of equal ones
@@
-        name = min(there, key=lambda name: len(self.requests[name]))
+        name = min(reversed(there), key=lambda name: len(self.requests[name]))
""",
        ),
        Known(
            "waits-for-ever",
            "Requests wait because no replica was there. Now one has joined, and they go to it.",
            hint=4,
            answers=r"""
# %% joins, and nobody looks
@@
-        waiting, self.waiting = self.waiting, deque()
-        for request in waiting:
-            self.place(request)

# %% the first one only
@@
-        for request in waiting:
-            self.place(request)
+        if waiting:
+            self.place(waiting.popleft())
+        self.waiting = waiting
""",
        ),
        Known(
            "another-order",
            "The requests are the right ones, and their order is not: who has waited longer goes"
            " first.",
            hint=4,
            answers=r"""
# %% the newest first
@@
-        for request in waiting:
+        for request in reversed(waiting):
""",
        ),
        Known(
            "last-words",
            "This replica does not have this request, or not any more. What it still says about it"
            " belongs to nobody: another replica may be at work on it.",
            hint=2,
            answers=r"""
# %% whoever says it
@@
-        if request in self.requests.get(name, ()):
-            self.requests[name][request] = True
-            self.tell(request, text)
+        if request in self.handed:
+            self.requests.get(name, {})[request] = True
+            self.tell(request, text)

# %% whoever is there may say it
@@
-        if request in self.requests.get(name, ()):
-            self.requests[name][request] = True
-            self.tell(request, text)
+        if name in self.requests and request in self.handed:
+            if request in self.requests[name]:
+                self.requests[name][request] = True
+            self.tell(request, text)
""",
        ),
        Known(
            "not-told",
            "A client was not told what came for it.",
            hint=2,
            answers=r"""
# %% the first token is lost
@@
-            self.requests[name][request] = True
-            self.tell(request, text)
+            if self.requests[name][request]:
+                self.tell(request, text)
+            self.requests[name][request] = True
""",
        ),
        Known(
            "not-sent",
            "A replica is there that can take this request, and it was not sent.",
            hint=4,
            answers=r"""
# %% behind the next one
@@
-        if not there:
+        if not there or all(self.requests[name] for name in there) and len(there) > 1:
""",
        ),
        Known(
            "sent-unasked",
            "Nothing has happened that this request should be sent for.",
            hint=2,
            answers=r"""
# %% the first one of the queue is sent, and stays in it
@@
-        waiting, self.waiting = self.waiting, deque()
-        for request in waiting:
+        for request in list(self.waiting):
""",
        ),
        Known(
            "told-unasked",
            "A client was told something that is not for it, or not true.",
            hint=2,
            answers=r"""
# %% an error as the last word of all
@@
-            self.tell(request, "end")
+            self.tell(request, "end")
+            self.tell(request, "error")
""",
        ),
        Known(
            "done-twice",
            "You do the same thing twice.",
            hint=2,
            answers=r"""
# %% says it twice
@@
-            self.tell(request, "end")
+            self.tell(request, "end")
+            self.tell(request, "end")
""",
        ),
        Known(
            "shared-between-objects",
            "By itself this front is right, and after others it is not: they share what they"
            " remember. It belongs into `__init__`, as `self.…`.",
            answers=r"""
# %% an attribute of the class
@@
-        self.waiting: deque[str] = deque()
+        self.waiting = self.line
@@
-class Front:
+class Front:
+    line = deque()
+
""",
        ),
        Known(
            "grows",
            hint=4,
            answers=r"""
# %% remembers all requests
@@
-        del self.handed[request]
+        pass

# %% remembers who drained when it died
@@
-        self.draining.discard(name)
-        for request, has_begun in self.requests.pop(name, {}).items():
+        for request, has_begun in self.requests.pop(name, {}).items():

# %% remembers who has died
@@
-        self.draining.discard(name)
-        for request, has_begun in self.requests.pop(name, {}).items():
+        self.draining.add(name)
+        for request, has_begun in self.requests.pop(name, {}).items():
""",
        ),
    ),
    right=r"""
# %% counts, and a place for each request
class Front:
    def __init__(self, send, tell, stop, tries):
        self.send, self.tell, self.stop, self.tries = send, tell, stop, tries
        self.load, self.leaving = {}, []
        self.owner, self.begun, self.sent = {}, set(), {}

    def join(self, name):
        self.load[name] = 0
        for request in [r for r, owner in self.owner.items() if owner is None]:
            self.place(request)

    def ask(self, request):
        self.place(request)

    def place(self, request):
        self.owner.pop(request, None)
        free = {n: load for n, load in self.load.items() if n not in self.leaving}
        name = min(free, key=free.get, default=None)
        self.owner[request] = name
        if name is not None:
            self.load[name] += 1
            self.sent[request] = self.sent.get(request, 0) + 1
            self.send(name, request)

    def token(self, name, request, text):
        if name in self.load and self.owner.get(request) == name:
            self.begun.add(request)
            self.tell(request, text)

    def end(self, name, request):
        if name in self.load and self.owner.get(request) == name:
            self.over(request, "end")
            self.load[name] -= 1
            self.look(name)

    def over(self, request, how):
        self.owner.pop(request)
        self.sent.pop(request)
        self.begun.discard(request)
        self.tell(request, how)

    def die(self, name):
        if self.load.pop(name, None) is None:
            return
        if name in self.leaving:
            self.leaving.remove(name)
        mine = [request for request, owner in self.owner.items() if owner == name]
        for request in [r for r in mine if r in self.begun or self.sent[r] == self.tries]:
            self.over(request, "error")
            mine.remove(request)
        for request in mine:
            self.place(request)

    def drain(self, name):
        if name in self.load and name not in self.leaving:
            self.leaving.append(name)
            self.look(name)

    def look(self, name):
        if name in self.leaving and self.load[name] == 0:
            self.leaving.remove(name)
            self.load.pop(name)
            self.stop(name)

# %% counts deaths
@@
-        self.handed[request] += 1
-        self.requests[name][request] = False
+        self.requests[name][request] = False
@@
-            if has_begun or self.handed[request] >= self.tries:
+            self.handed[request] += 1
+            if has_begun or self.handed[request] >= self.tries:
""",
)
