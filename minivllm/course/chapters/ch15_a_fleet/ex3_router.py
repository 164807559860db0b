"""15.3: a router."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from minivllm.bench.conversations import TraceSettings, draw_conversations
from minivllm.course.chapters.ch15_a_fleet.common import ClassMemory, suspects_of
from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import CheckError, Mistake, raised
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_no_growth
from minivllm.course.sim.fleet import Asked, Engine, Fleet

# --- the right one, and its options ---------------------------------------------------------------


@dataclass(frozen=True)
class _Ways:
    """How a router does its work. The defaults are right, everything else is a mistake.

    limit: whose queue is short enough. counts: of a prompt's blocks. expects: which of the blocks
    that were sent. publishes: what a summary does to what is known. leaves: what is forgotten. key:
    what decides between those that are near, the most important first; ties: the last of it.
    absent: what is thought of a replica that is not in `loads`.
    """

    limit: str = "near"
    counts: str = "leading"
    expects: str = "sent"
    publishes: str = "replaces"
    leaves: str = "held sent turns"
    key: str = "known load turn"
    ties: str = "longest ago"
    absent: str = "is busy"


class _Router:
    """The right one, or a wrong one."""

    def __init__(self, balance: int, keep: float, ways: _Ways) -> None:
        self.balance, self.keep, self.ways = balance, keep, ways
        self.held: dict[str, Collection[int]] = {}
        self.sent: dict[str, dict[int, float]] = {}
        self.turns: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.number = 0

    def publish(self, name: str, hashes: set[int]) -> None:
        how = self.ways.publishes
        if how == "same set":
            self.held[name] = hashes
        elif how == "adds":
            self.held[name] = {*self.held.get(name, ()), *hashes}
        elif hashes or how != "not empty":
            self.held[name] = set(hashes)
        if how == "forgets sent":
            self.sent.pop(name, None)
        elif how == "confirms":
            sent = self.sent.get(name, {})
            self.sent[name] = {value: sent[value] for value in sent if value not in hashes}

    def leave(self, name: str) -> None:
        for known in self.ways.leaves.split():
            getattr(self, known).pop(name, None)
        self.counts.pop(name, None)

    def known(self, name: str, hashes: list[int], now: float) -> int:
        found = [self.knows(name, value, now) for value in hashes]
        match self.ways.counts:
            case "all":
                return sum(found)
            case "last":
                return max((i + 1 for i, one in enumerate(found) if one), default=0)
            case "any":
                return int(any(found[:1]))
            case "none":
                return 0
        return found.index(False) if False in found else len(found)

    def knows(self, name: str, value: int, now: float) -> bool:
        if value in self.held.get(name, ()):
            return True
        names = list(self.sent) if self.ways.expects == "of all" else [name]
        for each in names:
            when = self.sent.get(each, {}).get(value)
            if when is None or self.ways.expects == "no":
                continue
            if self.ways.expects == "for ever" or when > now - self.keep:
                return True
            if self.ways.expects != "edge" and when == now - self.keep:
                return True
        return False

    def near(self, loads: dict[str, int]) -> list[str]:
        least = min(loads.values())
        most = {
            "none": max(loads.values()),
            "edge": least + self.balance - 1,
            "one more": least + self.balance + 1,
            "mean": sum(loads.values()) / len(loads) + self.balance,
            "absolute": self.balance,
        }.get(self.ways.limit, least + self.balance)
        return [name for name in loads if loads[name] <= most] or [
            name for name in loads if loads[name] == least
        ]

    def choose(self, hashes: list[int], loads: dict[str, int], now: float) -> str:
        if self.ways.absent == "has left":
            for name in {*self.held, *self.sent, *self.turns}.difference(loads):
                self.leave(name)
        known = {name: self.known(name, hashes, now) for name in loads}
        near = self.near(loads)
        if self.ways.limit == "gives up":
            best = self.best(list(loads), known, loads)
            if loads[best] > min(loads.values()) + self.balance:
                best = self.best(list(loads), dict.fromkeys(loads, 0), loads)
        else:
            best = self.best(near, known, loads)
        self.note(best, hashes, known[best], now)
        return best

    def best(self, names: list[str], known: dict[str, int], loads: dict[str, int]) -> str:
        places = list(loads)
        last = {
            "longest ago": lambda name: self.turns.get(name, 0),
            "first": lambda name: 0,
            "last": lambda name: -places.index(name),
            "newest": lambda name: -self.turns.get(name, 0),
            "fewest": lambda name: self.counts.get(name, 0),
            "name": lambda name: name,
            "name, from the end": lambda name: [-ord(letter) for letter in name],
        }[self.ways.ties]
        parts: dict[str, Callable[[str], Any]] = {
            "known": lambda name: -known[name],
            "load": lambda name: loads[name],
            "turn": last,
            "less": lambda name: loads[name] - known[name],
        }
        return min(names, key=lambda name: [parts[part](name) for part in self.ways.key.split()])

    def note(self, best: str, hashes: list[int], known: int, now: float) -> None:
        self.number += 1
        self.turns[best] = self.number
        self.counts[best] = self.counts.get(best, 0) + 1
        sent = self.sent.setdefault(best, {})
        expects = self.ways.expects
        for i, value in enumerate(hashes):
            if expects == "first time" and value in sent:
                continue
            if expects == "what is new" and i < known:
                continue
            sent[value] = now


#: What a scene holds: ("publish", name, hashes), ("leave", name), ("choose", hashes, loads, now).
Call = tuple[Any, ...]


@dataclass(frozen=True)
class _Scene:
    """Calls of one router, in order. They are the same whatever it answers."""

    what: str
    calls: tuple[Call, ...]
    balance: int = 2
    keep: float = 10.0


def _tree(*path: int) -> list[int]:
    """The hashes of a text of so many blocks: those of equal beginnings are equal."""
    found, previous = [], 17
    for block in path:
        previous = (previous * 1000003 + block * 7919 + 5) % (1 << 32)
        found.append(previous)
    return found


def _play(router: Any, scene: _Scene) -> Iterator[tuple[Call, Any]]:
    """Make the calls of a scene; yields each choose, and what it returned."""
    theirs: dict[str, set[int]] = {}
    for call in scene.calls:
        if call[0] == "publish":
            # The replica's own set, which it changes later on.
            held = theirs.setdefault(call[1], set())
            held.clear()
            held.update(call[2])
            router.publish(call[1], held)
        elif call[0] == "leave":
            theirs.pop(call[1], None)
            router.leave(call[1])
        elif call[0] == "change":
            theirs[call[1]].update(call[2])
        else:
            hashes, loads = list(call[1]), dict(call[2])
            chosen = router.choose(hashes, loads, call[3])
            if (hashes, loads) != (list(call[1]), dict(call[2])):
                raise Mistake(
                    "changed-input",
                    "Your code changed the hashes or the loads, which belong to the caller.\nWork"
                    " on copies.",
                )
            yield call, chosen


# --- scenes ---------------------------------------------------------------------------------------


def _loads(**loads: int) -> dict[str, int]:
    return loads


def _small_scenes() -> list[_Scene]:
    a, b = _tree(1, 2, 3, 4), _tree(1, 2, 7)
    none = _tree(50, 51)
    even = _loads(x=0, y=0, z=0)
    return [
        _Scene("One replica", (("choose", a, {"x": 3}, 0.0), ("choose", b, {"x": 0}, 1.0))),
        _Scene(
            "Nobody knows anything, and the loads differ",
            (("choose", a, _loads(x=2, y=1, z=4), 0.0),),
        ),
        _Scene(
            "A summary names the prompt's blocks",
            (
                ("publish", "z", set(a)),
                ("publish", "y", set(a[:2])),
                ("choose", a, even, 0.0),
            ),
        ),
        _Scene(
            "The best queue is exactly `balance` longer, then one more",
            (
                ("publish", "y", set(a)),
                ("publish", "z", set(a[:1])),
                ("choose", a, _loads(x=1, y=3, z=3), 0.0),
                ("choose", b[:2], _loads(x=1, y=4, z=2), 1.0),
                ("choose", a, _loads(x=5, y=8, z=7), 2.0),
            ),
        ),
        _Scene(
            "Some blocks behind a gap",
            (
                ("publish", "x", set(a[1:])),
                ("publish", "y", set(a[:1])),
                ("choose", a, even, 0.0),
            ),
        ),
        _Scene(
            "A prompt was sent, and no summary has come since",
            (
                ("choose", a, _loads(x=1, y=0, z=1), 0.0),
                ("choose", a, _loads(x=0, y=2, z=1), 1.0),
                ("choose", [*a, 5], _loads(x=0, y=2, z=0), 2.0),
            ),
        ),
        _Scene(
            "A summary that was made before the prompt arrived",
            (
                ("choose", a, _loads(x=1, y=0, z=1), 0.0),
                ("publish", "y", set(none)),
                ("choose", a, _loads(x=0, y=1, z=1), 1.0),
            ),
        ),
        _Scene(
            "What was sent is not there after `keep` seconds",
            (
                ("choose", a, _loads(x=1, y=0, z=1), 0.0),
                ("publish", "y", set()),
                ("choose", a, _loads(x=0, y=1, z=1), 10.0),
                ("choose", a, _loads(x=0, y=1, z=1), 20.5),
                ("choose", b, _loads(x=1, y=1, z=0), 31.0),
                ("choose", b, _loads(x=1, y=0, z=0), 41.0),
                ("choose", b, _loads(x=0, y=1, z=0), 51.5),
            ),
        ),
        _Scene(
            "Sent again in time",
            (
                ("choose", a, _loads(x=1, y=0, z=1), 0.0),
                ("choose", a, _loads(x=1, y=0, z=1), 8.0),
                ("choose", a, _loads(x=0, y=1, z=1), 16.0),
            ),
        ),
        _Scene(
            "A known prefix is sent, and evicted",
            (
                ("publish", "y", set(a)),
                ("choose", a, even, 0.0),
                ("publish", "y", set()),
                ("choose", a, _loads(x=0, y=1, z=1), 1.0),
            ),
        ),
        _Scene(
            "A new summary without the blocks of the old one",
            (
                ("publish", "y", set(a)),
                ("publish", "y", set(none)),
                ("choose", a, _loads(x=0, y=1, z=1), 0.0),
            ),
        ),
        _Scene(
            "A summary names what was sent, and the next one is empty",
            (
                ("choose", a, _loads(x=1, y=0, z=1), 0.0),
                ("publish", "y", set(a)),
                ("publish", "y", set()),
                ("choose", a, _loads(x=0, y=1, z=1), 2.0),
            ),
        ),
        _Scene(
            "An empty summary after another one",
            (
                ("publish", "y", set(a)),
                ("publish", "y", set()),
                ("choose", a, _loads(x=0, y=1, z=1), 2.0),
            ),
        ),
        _Scene(
            "A replica that cannot be chosen for a while",
            (
                ("publish", "y", set(a)),
                ("choose", a, _loads(x=0, z=1), 0.0),
                ("choose", a, _loads(x=1, y=2, z=0), 20.0),
                ("choose", none, even, 30.0),
                ("choose", none[:1], _loads(x=0, z=0), 50.0),
                ("choose", _tree(62), even, 70.0),
            ),
        ),
        _Scene(
            "Long prompts, many of them, and the first one again",
            (
                *(("choose", _tree(i, *range(150)), even, 0.1 * i) for i in range(40)),
                ("choose", _tree(0, *range(150)), even, 5.0),
                ("choose", _tree(1, *range(150)), even, 5.5),
            ),
        ),
        _Scene(
            "A replica goes on using the set that it has published",
            (
                ("publish", "y", set(none)),
                ("change", "y", set(a)),
                ("choose", a, _loads(x=0, y=1, z=1), 0.0),
            ),
        ),
        _Scene(
            "A replica leaves, and another one comes with its name",
            (
                ("publish", "y", set(a)),
                ("choose", b, _loads(x=1, y=0, z=1), 0.0),
                ("leave", "y"),
                ("choose", a, _loads(x=0, z=0), 1.0),
                ("leave", "w"),
                ("choose", b, _loads(w=2, x=2, y=1, z=0), 2.0),
                ("choose", none, even, 3.0),
            ),
        ),
        _Scene(
            "A replica leaves after its turn, and another one comes with its name",
            (
                ("choose", a, even, 0.0),
                ("choose", b, even, 20.0),
                ("choose", none, even, 40.0),
                ("leave", "z"),
                ("choose", _tree(60), even, 60.0),
                ("choose", _tree(61), even, 80.0),
            ),
        ),
        _Scene(
            "Equal ones take turns",
            tuple(("choose", _tree(70 + i), even, 20.0 * i) for i in range(7)),
        ),
        _Scene(
            "Equal ones, in another order each time",
            tuple(
                ("choose", _tree(80 + i), dict.fromkeys(names, 1), 20.0 * i)
                for i, names in enumerate(("zyx", "xyz", "yzx", "xzy", "zyx", "xyz"))
            ),
        ),
        _Scene(
            "Two that know as much, with other loads",
            (
                ("publish", "x", set(a)),
                ("publish", "z", set(a)),
                ("choose", a, _loads(x=2, y=0, z=1), 0.0),
            ),
        ),
        _Scene(
            "Balance 0: only the shortest queues",
            (
                ("publish", "y", set(a)),
                ("choose", a, _loads(x=0, y=1, z=0), 0.0),
                ("choose", a, _loads(x=1, y=1, z=1), 20.0),
            ),
            balance=0,
        ),
        _Scene("An empty prompt", (("choose", [], _loads(x=1, y=0), 0.0),)),
    ]


def _random_scene(seed: int) -> _Scene:
    rng = random.Random(1530 + seed)
    names = list("pqrstuvw")[: rng.randint(2, 8)]
    rng.shuffle(names)
    talks = [[rng.randrange(3), rng.randrange(4)] for _ in range(12)]
    here, now = names[: rng.randint(2, len(names))], 0.0
    calls: list[Call] = []
    for _ in range(60):
        now += rng.choice((0.0, 0.25, 0.5, 1.0, 4.0, 30.0))
        what = rng.random()
        name = rng.choice(names)
        if what < 0.15:
            known = [value for talk in rng.sample(talks, 3) for value in _tree(*talk)]
            held = {value for value in known if rng.random() < 0.9}
            calls.append(("publish", name, held))
        elif what < 0.2 and len(here) > 1 and name in here:
            here.remove(name)
            calls.append(("leave", name))
        elif what < 0.25 and name not in here:
            here.append(name)
        else:
            talk = rng.choice(talks)
            loads = {each: rng.randrange(rng.choice((1, 4, 9))) for each in here}
            calls.append(("choose", _tree(*talk), loads, now))
            talk.append(rng.randrange(100))
    return _Scene(
        "Twelve conversations, and replicas that come and go",
        tuple(calls),
        rng.choice((0, 1, 2, 4)),
        rng.choice((2.0, 10.0, 50.0)),
    )


@functools.cache
def _scenes() -> tuple[_Scene, ...]:
    return (*_small_scenes(), *map(_random_scene, range(12)))


@functools.cache
def _right_choices() -> tuple[tuple[Any, ...], ...]:
    return tuple(
        tuple(chosen for _, chosen in _play(_Router(scene.balance, scene.keep, _Ways()), scene))
        for scene in _scenes()
    )


def _does(ways: _Ways, found: list[list[Any]]) -> bool:
    """Whether a router of these ways chooses as was found, and not always right."""
    for scene, mine in zip(_scenes(), found, strict=True):
        theirs = _play(_Router(scene.balance, scene.keep, ways), scene)
        if any(chosen != each for (_, chosen), each in zip(theirs, mine, strict=False)):
            return False
    return True


def _suspect(**ways: str) -> partial:
    return partial(_Router, ways=_Ways(**ways))


# --- judging --------------------------------------------------------------------------------------


def _choices(make: Callable[[int, float], Any], scene: _Scene) -> list[Any]:
    found: list[Any] = []
    try:
        for _, chosen in _play(make(scene.balance, scene.keep), scene):
            found.append(chosen)
    except (CheckError, NotImplementedError):
        raise
    except Exception as error:
        after = f"after {len(found)} choices" if found else "before its first choice was made"
        raise raised(error, f"{scene.what}: {after}.") from error
    return found


def _expect_choices(make: type) -> None:
    kept = ClassMemory(make)
    found = [_choices(make, scene) for scene in _scenes()]
    wrong = [
        i
        for i, (mine, right) in enumerate(zip(found, _right_choices(), strict=True))
        if tuple(mine) != right
    ]
    if not wrong:
        return
    scene = _scenes()[wrong[0]]
    seen = _described(make, scene, found[wrong[0]], _right_choices()[wrong[0]])
    if kept.forget() and tuple(_choices(make, scene)) == _right_choices()[wrong[0]]:
        raise EXERCISE.mistake("shared-between-objects", seen.message)
    matching = [
        name
        for name, (_, *suspects) in suspects_of(EXERCISE, _Router).items()
        if any(_does(suspect.keywords["ways"], found) for suspect in suspects)
    ]
    if matching:
        also = "".join(
            f"\nOr, which looks the same here: {EXERCISE.mistake(name).message}"
            for name in matching[1:]
        )
        mistake = EXERCISE.mistake(matching[0], seen.message)
        raise Mistake(mistake.name, mistake.message + also)
    raise Mistake(seen.name, f"{seen.message}\n{_ADVICE[seen.name]}")


_ADVICE = {
    "not-a-replica": "Return one of the names in `loads`.",
    "too-long-a-queue": "Only those count whose load is at most the least one plus `balance`.",
    "less-of-the-prefix": "Among those whose queue is short enough, the leading blocks decide:"
    " those of its latest summary, and those that you have sent there at most `keep` seconds ago.",
    "more-load": "They know as many leading blocks; then the load decides.",
    "not-the-longest-ago": "They know as many leading blocks and have the same load; then the one"
    " comes first that you have chosen the longest ago, or never.",
}


def _described(make: type, scene: _Scene, mine: list[Any], right: tuple[Any, ...]) -> Mistake:
    """The first wrong choice of a scene: what it breaks, as a Mistake without advice."""
    number = next(i for i, (a, b) in enumerate(zip(mine, right, strict=True)) if a != b)
    judge = _Router(scene.balance, scene.keep, _Ways())
    known: dict[str, int] = {}
    call: Call = ()

    class Watched:
        publish, leave = judge.publish, judge.leave

        def choose(self, hashes: list[int], loads: dict[str, int], now: float) -> str:
            known.clear()
            known.update({name: judge.known(name, hashes, now) for name in loads})
            return judge.choose(hashes, loads, now)

    for i, (each, _) in enumerate(_play(Watched(), scene)):
        if i == number:
            call = each
            break
    loads, chosen, best = call[2], mine[number], right[number]
    fleet = ", ".join(f"{n}: load {loads[n]}, {known[n]} leading blocks" for n in loads)
    which = f"choice {number + 1}" if len(right) > 1 else "the choice"
    text = (
        f"{scene.what} (balance {scene.balance}, keep {scene.keep:g}): {which}, at"
        f" {call[3]:g} s, for a prompt of {len(call[1])} blocks.\n{fleet}. You chose"
        f" {show(chosen)}, expected {best!r}."
    )
    if not isinstance(chosen, str) or chosen not in loads:
        return Mistake("not-a-replica", text)
    if loads[chosen] > min(loads.values()) + scene.balance:
        return Mistake("too-long-a-queue", text)
    if known[chosen] < known[best]:
        return Mistake("less-of-the-prefix", text)
    name = "more-load" if loads[chosen] > loads[best] else "not-the-longest-ago"
    return Mistake(name, text)


def _come_and_go(make: Callable[[int, float], Any], kind: str, rounds: int) -> Any:
    """A router after so many prompts, or after so many replicas.

    kind: "prompts"; "talks", prompts that begin with the same block; or "replicas".
    """
    router = make(2, 5.0)
    for number in range(rounds):
        now = 3.0 * number
        names = [f"r{number}", f"s{number}"] if kind == "replicas" else ["x", "y"]
        if kind == "replicas":
            for name in names:
                router.publish(name, set(_tree(number)))
        prompt = _tree(0, number, 1) if kind == "talks" else _tree(number, 1, 2)
        router.choose(prompt, dict.fromkeys(names, 0), now)
        if kind == "replicas":
            for name in names:
                router.leave(name)
    return router


# --- in a fleet -----------------------------------------------------------------------------------

#: The conversations of the simulated fleet. keep: longer than a summary is old.
_TRACE = TraceSettings(conversations=40, rate=4.0, pause=1.0, answer=(8, 24), system=64)
_BALANCE, _KEEP, _ENGINES = 4, 3.0, 4


def _in_fleet(choose: Callable, publish: Callable | None = None) -> Fleet:
    """Play the conversations. Summaries come every second of the trace."""

    def route(asked: Asked, engines: Any) -> Engine:
        by_name = {f"engine {engine.name}": engine for engine in engines}
        loads = {name: engine.load for name, engine in by_name.items()}
        return by_name[choose(list(asked.hashes), loads, fleet.now)]

    fleet = Fleet(_ENGINES, route)

    def say() -> None:
        if publish is not None:
            for engine in fleet.engines:
                held = {value & 0xFFFFFFFF for value in engine.block_manager.hash_to_block}
                publish(f"engine {engine.name}", held)

    for second in range(1, 40):
        fleet.at(float(second), say)
    return fleet.play(draw_conversations(_TRACE))


@functools.cache
def _at_random() -> tuple[float, float]:
    rng = random.Random(15)
    fleet = _in_fleet(lambda hashes, loads, now: rng.choice(list(loads)))
    return fleet.hit_rate, fleet.imbalance


@functools.cache
def _right_in_fleet() -> tuple[float, float]:
    router = _Router(_BALANCE, _KEEP, _Ways())
    fleet = _in_fleet(router.choose, router.publish)
    return fleet.hit_rate, fleet.imbalance


def check_router(answer: type) -> str:
    expect(
        isinstance(answer, type),
        "wrong-form",
        f"{show(answer)} is no class.\nHand in the class itself.",
    )
    for method in ("publish", "leave", "choose"):
        expect(
            callable(getattr(answer, method, None)),
            "wrong-form",
            f"{answer.__name__} has no method `{method}`.\nThe statement names three.",
        )
    _expect_choices(answer)
    for kind, what in (
        ("prompts", "new prompts"),
        ("talks", "new prompts that begin with the same block"),
        ("replicas", "replicas that come and leave"),
    ):
        expect_no_growth(partial(_come_and_go, answer, kind), what)
    router = answer(_BALANCE, _KEEP)
    try:
        fleet = _in_fleet(router.choose, router.publish)
    except (CheckError, NotImplementedError):
        raise
    hit_rate, imbalance = fleet.hit_rate, fleet.imbalance
    expect(
        (hit_rate, imbalance) == _right_in_fleet(),
        "another-fleet",
        f"In a simulated fleet your hit rate is {hit_rate:.3f} and the imbalance {imbalance:.2f};"
        f" by the rules they are {_right_in_fleet()[0]:.3f} and {_right_in_fleet()[1]:.2f}.\nThe"
        " prompts there are longer, and there are more of them: does a choice depend on anything"
        " but the calls?",
    )
    return (
        f"{len(_scenes())} scenes; in a fleet of {_ENGINES}: hit rate {hit_rate:.0%} (at random"
        f" {_at_random()[0]:.0%}), imbalance {imbalance:.2f} ({_at_random()[1]:.2f})"
    )


EXERCISE = Exercise(
    id="15.3",
    title="A router",
    check=check_router,
    mistakes=(
        Known(
            "balance-forgotten",
            "You follow the prefix wherever it is, however long the queue there. A system prompt"
            " that all share then sends everybody to one replica.",
            hint=1,
            suspects=(_suspect(limit="none"), _suspect(limit="none", ties="first")),
            answers=r"""
# %% everybody is near enough
@@
-        near = [name for name in loads if loads[name] <= least + self.balance]
+        near = list(loads)
""",
        ),
        Known(
            "balance-edge",
            "A queue may be up to `balance` requests longer than the shortest one, `balance`"
            " included.",
            hint=1,
            suspects=(_suspect(limit="edge"), _suspect(limit="one more")),
            answers=r"""
# %% less than
@@
-        near = [name for name in loads if loads[name] <= least + self.balance]
+        near = [name for name in loads if loads[name] < least + max(1, self.balance)]
""",
        ),
        Known(
            "another-limit",
            "`balance` is counted from the *shortest* queue: a load is too long if it is more than"
            " least + balance.",
            hint=1,
            suspects=(_suspect(limit="mean"), _suspect(limit="absolute")),
            answers=r"""
# %% from the mean
@@
-        least = min(loads.values())
+        least = sum(loads.values()) / len(loads)

# %% from nothing
@@
-        near = [name for name in loads if loads[name] <= least + self.balance]
+        near = [name for name in loads if loads[name] <= self.balance]
+        near = near or [name for name in loads if loads[name] == least]
""",
        ),
        Known(
            "gives-up",
            "Where the best replica's queue is too long you forget the prefix altogether. The next"
            " best may have a part of it, and a short queue: choose among all whose queue is short"
            " enough.",
            hint=1,
            suspects=(_suspect(limit="gives up"),),
            answers=r"""
# %% the least load instead
@@
-        near = [name for name in loads if loads[name] <= least + self.balance]
+        near = list(loads)
@@
-        best = min(near, key=place)
+        best = min(near, key=place)
+        if loads[best] > least + self.balance:
+            best = min(near, key=lambda name: place(name)[1:])
""",
        ),
        Known(
            "prefix-forgotten",
            "The prefix decides nothing: your choices are those by load alone.",
            hint=2,
            suspects=(_suspect(counts="none"), _suspect(counts="none", ties="first")),
            answers=r"""
# %% the least load
@@
-            return -known, loads[name], self.turns.get(name, 0)
+            return 0, loads[name], self.turns.get(name, 0)
""",
        ),
        Known(
            "load-first",
            "Among those whose queue is short enough, the leading blocks come first, and the load"
            " decides only between those that have as many.",
            hint=2,
            suspects=(
                _suspect(key="load known turn"),
                _suspect(key="less turn"),
                _suspect(key="less load turn"),
                _suspect(counts="any"),
            ),
            answers=r"""
# %% the other way round
@@
-            return -known, loads[name], self.turns.get(name, 0)
+            return loads[name], -known, self.turns.get(name, 0)
""",
        ),
        Known(
            "load-forgotten",
            "Of two that hold as many leading blocks, the one with the least load gets the prompt.",
            hint=2,
            suspects=(_suspect(key="known turn"), _suspect(key="known turn", ties="first")),
            answers=r"""
# %% by the prefix, then in turn
@@
-            return -known, loads[name], self.turns.get(name, 0)
+            return -known, 0, self.turns.get(name, 0)
""",
        ),
        Known(
            "not-leading",
            "You count blocks behind one that is missing. Only the leading ones are of use: those"
            " up to the first that the replica has not.",
            hint=2,
            suspects=(_suspect(counts="all"), _suspect(counts="last")),
            answers=r"""
# %% all that are known
@@
-            if value not in held and sent.get(value, -math.inf) < now - self.keep:
-                return count
-        return len(hashes)
+            if value not in held and sent.get(value, -math.inf) < now - self.keep:
+                continue
+            found += 1
+        return found
@@
-        held, sent = self.held.get(name, ()), self.sent.get(name, {})
+        held, sent, found = self.held.get(name, ()), self.sent.get(name, {}), 0
""",
        ),
        Known(
            "sent-forgotten",
            "You know only what the summaries say, and they are old: the second turn of a"
            " conversation comes before the summary that names the first. What you have sent"
            " somewhere will be there.",
            hint=3,
            suspects=(_suspect(expects="no"),),
            answers=r"""
# %% summaries only
@@
-            if value not in held and sent.get(value, -math.inf) < now - self.keep:
+            if value not in held:
""",
        ),
        Known(
            "sent-for-ever",
            "What you sent more than `keep` seconds ago counts for ever. It may have been evicted:"
            " after `keep` seconds only a summary counts. `now` is the time; there is no other"
            " clock.",
            hint=3,
            suspects=(_suspect(expects="for ever"),),
            answers=r"""
# %% no end
@@
-            if value not in held and sent.get(value, -math.inf) < now - self.keep:
+            if value not in held and value not in sent:
@@
-        while sent and next(iter(sent.values())) < now - self.keep:
-            del sent[next(iter(sent))]

# %% with a clock of its own
@@
-            sent[value] = now
+            sent[value] = time.monotonic()
@@
-        while sent and next(iter(sent.values())) < now - self.keep:
-            del sent[next(iter(sent))]
@@
-            if value not in held and sent.get(value, -math.inf) < now - self.keep:
+            if value not in held and sent.get(value, -math.inf) < time.monotonic() - self.keep:
@@
-class Router:
+import time
+
+
+class Router:
""",
        ),
        Known(
            "keep-edge",
            "What you sent exactly `keep` seconds ago is still expected.",
            hint=3,
            suspects=(_suspect(expects="edge"),),
            answers=r"""
# %% less than keep
@@
-            if value not in held and sent.get(value, -math.inf) < now - self.keep:
+            if value not in held and sent.get(value, -math.inf) <= now - self.keep:
""",
        ),
        Known(
            "not-sent-again",
            "A block that is sent once more is expected for `keep` seconds from then on, whether it"
            " was known there or not.",
            hint=3,
            suspects=(
                _suspect(expects="first time"),
                _suspect(expects="what is new"),
            ),
            answers=r"""
# %% what is new there
@@
-        for value in hashes:
+        for value in hashes[self.num_known(best, hashes, now) :]:
""",
        ),
        Known(
            "sent-to-all",
            "What was sent to one replica is not at another one. Keep it by name.",
            hint=3,
            suspects=(_suspect(expects="of all"),),
            answers=r"""
# %% one dict for all
@@
-        held, sent = self.held.get(name, ()), self.sent.get(name, {})
+        held, sent = self.held.get(name, ()), self.sent.get("", {})
@@
-        sent = self.sent.setdefault(best, {})
+        sent = self.sent.setdefault("", {})
""",
        ),
        Known(
            "summary-forgets-sent",
            "A summary says nothing about what you sent: it was made before it came, perhaps before"
            " the prompt did. What was sent in the last `keep` seconds counts all the same.",
            hint=3,
            suspects=(_suspect(publishes="forgets sent"), _suspect(publishes="confirms")),
            answers=r"""
# %% the summary is all there is
@@
-        self.held[name] = set(hashes)
+        self.held[name] = set(hashes)
+        self.sent.pop(name, None)

# %% what is named is no longer expected
@@
-        self.held[name] = set(hashes)
+        self.held[name] = set(hashes)
+        for value in hashes:
+            self.sent.get(name, {}).pop(value, None)
""",
        ),
        Known(
            "keeps-evicted",
            "A summary names all that a replica holds. What the one before named and this one does"
            " not was evicted.",
            hint=3,
            suspects=(_suspect(publishes="adds"), _suspect(publishes="not empty")),
            answers=r"""
# %% adds up
@@
-        self.held[name] = set(hashes)
+        self.held.setdefault(name, set()).update(hashes)

# %% an empty one is no news
@@
-        self.held[name] = set(hashes)
+        if hashes:
+            self.held[name] = set(hashes)
""",
        ),
        Known(
            "same-set",
            "The set belongs to the replica, which changes it later on. Keep a copy: what it told"
            " you is what it held then.",
            hint=3,
            suspects=(_suspect(publishes="same set"),),
            answers=r"""
# %% the very set
@@
-        self.held[name] = set(hashes)
+        self.held[name] = hashes
""",
        ),
        Known(
            "not-forgotten",
            "A replica that left is gone with all its blocks. One that comes with the same name"
            " later has an empty cache, and was never chosen.",
            hint=4,
            suspects=(
                _suspect(leaves=""),
                _suspect(leaves="held"),
                _suspect(leaves="sent"),
                _suspect(leaves="turns"),
                _suspect(leaves="held sent"),
                _suspect(leaves="held turns"),
                _suspect(leaves="sent turns"),
            ),
            answers=r"""
# %% what was sent stays
@@
-        for known in (self.held, self.sent, self.turns):
+        for known in (self.held, self.turns):

# %% its turn stays
@@
-        for known in (self.held, self.sent, self.turns):
+        for known in (self.held, self.sent):
""",
        ),
        Known(
            "not-gone",
            "A replica that is not in `loads` cannot be chosen now; perhaps it is full. It has not"
            " left: only `leave` says that.",
            hint=4,
            suspects=(_suspect(absent="has left"),),
            answers=r"""
# %% who is not in loads has left
@@
-        least = min(loads.values())
+        for name in {*self.held, *self.sent, *self.turns}.difference(loads):
+            self.leave(name)
+        least = min(loads.values())
""",
        ),
        Known(
            "other-turns",
            "Between equal ones another rule is asked for: the one that was chosen the longest ago,"
            " or never; of several that were never chosen, the first one in `loads`.",
            hint=2,
            suspects=(
                _suspect(ties="first"),
                _suspect(ties="last"),
                _suspect(ties="newest"),
                _suspect(ties="fewest"),
                _suspect(ties="name"),
                _suspect(ties="name, from the end"),
            ),
            answers=r"""
# %% the first one
@@
-            return -known, loads[name], self.turns.get(name, 0)
+            return -known, loads[name], 0

# %% the one with the fewest so far
@@
-        self.turns[best] = self.number
+        self.turns[best] = self.turns.get(best, 0) + 1
""",
        ),
        Known(
            "shared-between-objects",
            "By itself this router is right, and after others it is not: they share what they"
            " remember. It belongs into `__init__`, as `self.…`.",
            answers=r"""
# %% attributes of the class
@@
-        self.held: dict[str, set[int]] = {}
+        self.held = self.all_held
@@
-class Router:
+class Router:
+    all_held = {}
""",
        ),
        Known(
            "not-the-longest-ago",
            hint=2,
            answers=r"""
# %% by hash
@@
-            return -known, loads[name], self.turns.get(name, 0)
+            return -known, loads[name], hash(name)

# %% at random
@@
-            return -known, loads[name], self.turns.get(name, 0)
+            return -known, loads[name], random.random()
@@
-class Router:
+import random
+
+
+class Router:
""",
        ),
        Known(
            "grows",
            hint=4,
            answers=r"""
# %% what is too old stays
@@
-        while sent and next(iter(sent.values())) < now - self.keep:
-            del sent[next(iter(sent))]

# %% a block that is sent again and again stays the oldest, and what is behind it is not looked at
@@
-            sent.pop(value, None)
             sent[value] = now

# %% the turns of those that left
@@
-        for known in (self.held, self.sent, self.turns):
+        self.turns[name] = 0
+        for known in (self.held, self.sent):
""",
        ),
    ),
    right=r"""
# %% one record for each replica; turns as a list
class Router:
    def __init__(self, balance, keep):
        self.balance, self.keep, self.known, self.order = balance, keep, {}, []

    def of(self, name):
        return self.known.setdefault(name, [frozenset(), {}])

    def publish(self, name, hashes):
        self.of(name)[0] = frozenset(hashes)

    def leave(self, name):
        self.known.pop(name, None)
        if name in self.order:
            self.order.remove(name)

    def choose(self, hashes, loads, now):
        least, best = min(loads.values()), None
        for name, load in loads.items():
            if load - least > self.balance:
                continue
            held, sent = self.of(name)
            for old in [value for value, when in sent.items() if now - when > self.keep]:
                del sent[old]
            count = 0
            while count < len(hashes) and (hashes[count] in held or hashes[count] in sent):
                count += 1
            turn = self.order.index(name) if name in self.order else -1
            if best is None or (count, -load, -turn) > best[0]:
                best = (count, -load, -turn), name
        name = best[1]
        self.of(name)[1].update(dict.fromkeys(hashes, now))
        if name in self.order:
            self.order.remove(name)
        self.order.append(name)
        return name

# %% a dataclass
from dataclasses import dataclass, field


@dataclass
class Router:
    balance: int
    keep: float
    held: dict = field(default_factory=dict)
    sent: dict = field(default_factory=dict)
    turns: dict = field(default_factory=dict)
    number: int = 0

    def publish(self, name, hashes):
        self.held[name] = frozenset(hashes)

    def leave(self, name):
        for known in (self.held, self.sent, self.turns):
            known.pop(name, None)

    def has(self, name, value, now):
        when = self.sent.get(name, {}).get(value, -math.inf)
        return value in self.held.get(name, ()) or now - when <= self.keep

    def choose(self, hashes, loads, now):
        most = min(loads.values()) + self.balance
        places = []
        for i, name in enumerate(loads):
            found = [self.has(name, value, now) for value in hashes] + [False]
            place = -found.index(False), loads[name], self.turns.get(name, -1), i, name
            places += [place] if loads[name] <= most else []
        best = min(places)[-1]
        self.number += 1
        self.turns[best] = self.number
        old = self.sent.get(best, {}).items()
        young = {value: when for value, when in old if now - when <= self.keep}
        self.sent[best] = young | dict.fromkeys(hashes, now)
        return best
""",
)
