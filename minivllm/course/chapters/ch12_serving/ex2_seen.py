"""12.2: what a client saw."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random

from minivllm.course.grading.compare import show
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_nothing_kept, expect_unchanged
from minivllm.course.sim.clients import Record

Seen = tuple[float, float | None, float]
_EXACT = {"rtol": 1e-9, "atol": 1e-9}


# --- one request ----------------------------------------------------------------------------------


def _with_tokens(record: Record) -> list[tuple[float, int]]:
    return [(time, tokens) for time, tokens in record.events if tokens]


def tpot_of(record: Record) -> float | None:
    events = _with_tokens(record)
    total = sum(tokens for _, tokens in events)
    return (events[-1][0] - events[0][0]) / (total - 1) if total > 1 else None


def times_of(
    record: Record,
    start: Callable[[Record], float] = lambda record: record.due,
    tpot: Callable[[Record], float | None] = tpot_of,
    first: Callable[[Record], float] = lambda record: _with_tokens(record)[0][0],
    end: Callable[[Record], float] = lambda record: record.end,
) -> Seen:
    begin = start(record)
    return first(record) - begin, tpot(record), end(record) - begin


def _sent(record: Record) -> float:
    return record.sent


def _total(record: Record) -> int:
    return sum(tokens for _, tokens in record.events)


def per_event(record: Record) -> float | None:
    events = _with_tokens(record)
    return (events[-1][0] - events[0][0]) / (len(events) - 1) if len(events) > 1 else None


def per_any_event(record: Record) -> float | None:
    events = record.events
    return (events[-1][0] - events[0][0]) / (len(events) - 1) if len(events) > 1 else None


def per_event_or_zero(record: Record) -> float | None:
    return (
        per_event(record)
        if len(_with_tokens(record)) > 1
        else (0.0 if _total(record) > 1 else None)
    )


def by_all_tokens(record: Record) -> float | None:
    found = tpot_of(record)
    return None if found is None else found * (_total(record) - 1) / _total(record)


def by_all_tokens_or_zero(record: Record) -> float | None:
    events = _with_tokens(record)
    return (events[-1][0] - events[0][0]) / _total(record)


def with_the_wait(record: Record, start: Callable[[Record], float], by: int) -> float | None:
    if _total(record) <= by:
        return None
    return (_with_tokens(record)[-1][0] - start(record)) / (_total(record) - by)


def to_the_end(record: Record) -> float | None:
    if _total(record) < 2:
        return None
    return (record.end - _with_tokens(record)[0][0]) / (_total(record) - 1)


def without_the_first_event(record: Record) -> float | None:
    """Divided by the tokens of the events after the first."""
    events = _with_tokens(record)
    rest = sum(tokens for _, tokens in events[1:])
    return (events[-1][0] - events[0][0]) / rest if rest else None


def without_the_first_event_or_zero(record: Record) -> float | None:
    found = without_the_first_event(record)
    return 0.0 if found is None and _total(record) > 1 else found


def zero_for_one(record: Record) -> float | None:
    return tpot_of(record) or 0.0


def from_any_event(record: Record) -> float | None:
    """Between the first event and the last, of whatever kind."""
    if _total(record) < 2:
        return None
    return (record.events[-1][0] - record.events[0][0]) / (_total(record) - 1)


def from_first_any_event(record: Record) -> float | None:
    if _total(record) < 2:
        return None
    return (_with_tokens(record)[-1][0] - record.events[0][0]) / (_total(record) - 1)


def to_last_any_event(record: Record) -> float | None:
    if _total(record) < 2:
        return None
    return (record.events[-1][0] - _with_tokens(record)[0][0]) / (_total(record) - 1)


def _records(count: int, seed: int, *, ok: float = 1.0) -> list[Record]:
    """Records of a load; ok: the share that succeeds. No two sums of times are equal by chance."""
    rng, due, records = Random(seed), 10.0, []
    for number in range(count):
        due += rng.expovariate(4.0)
        now = sent = due + rng.choice((0.0, rng.uniform(0.01, 0.4)))
        events: list[tuple[float, int]] = []
        # The API of chats begins with an event without tokens, and may end with some.
        for tokens in [0] * rng.randint(0, 1) + _lengths(rng, number) + [0] * rng.randint(0, 2):
            now += rng.uniform(0.02, 0.3)
            events.append((now, tokens))
        fine = rng.random() < ok
        if not fine:
            events = events[: rng.randint(0, len(events))]
        records.append(Record(due, sent, events, now + rng.uniform(0.01, 0.2), fine))
    return records


def _lengths(rng: Random, number: int) -> list[int]:
    if number % 7 == 3:
        return [1]
    if number % 7 == 5:
        return [rng.randint(2, 5)]
    return [rng.choice((1, 1, 1, 2, 3, 0)) for _ in range(rng.randint(1, 12))] + [1]


def _one_by_one() -> list[tuple[Record]]:
    return [
        (Record(0.0, 0.0, [(0.5, 1)], 0.5),),
        (Record(0.0, 0.0, [(0.5, 1), (0.7, 1), (0.9, 1)], 0.9),),
        (Record(1.0, 1.0, [(1.5, 4)], 1.75),),
        (Record(1.0, 1.0, [(1.25, 0), (1.5, 1), (1.75, 0)], 2.0),),
        (Record(2.0, 2.5, [(3.0, 2), (4.0, 3)], 4.0),),
        *((record,) for record in _records(28, 3)),
    ]


# --- percentiles ----------------------------------------------------------------------------------


def percentile(values: list[float], p: float) -> float:
    return _at(sorted(values), p / 100 * (len(values) - 1))


def _at(ordered: Sequence[float], place: float) -> float:
    place = min(max(place, 0.0), len(ordered) - 1.0)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def unsorted(values: list[float], p: float) -> float:
    return _at(values, p / 100 * (len(values) - 1))


def downwards(values: list[float], p: float) -> float:
    return percentile(values, 100 - p)


def lower(values: list[float], p: float) -> float:
    return sorted(values)[int(p / 100 * (len(values) - 1))]


def nearest(values: list[float], p: float) -> float:
    return sorted(values)[round(p / 100 * (len(values) - 1))]


def upper(values: list[float], p: float) -> float:
    return sorted(values)[-int(-p / 100 * (len(values) - 1) // 1)]


def of_n(values: list[float], p: float) -> float:
    return sorted(values)[min(int(p / 100 * len(values)), len(values) - 1)]


def nearest_rank(values: list[float], p: float) -> float:
    return sorted(values)[max(0, -int(-p / 100 * len(values) // 1) - 1)]


def between_of_n(values: list[float], p: float) -> float:
    return _at(sorted(values), p / 100 * len(values))


def between_of_n_less(values: list[float], p: float) -> float:
    return _at(sorted(values), p / 100 * len(values) - 1)


def of_range(values: list[float], p: float) -> float:
    return min(values) + p / 100 * (max(values) - min(values))


def wrong_way_between(values: list[float], p: float) -> float:
    place = p / 100 * (len(values) - 1)
    part = place - int(place)
    return _at(sorted(values), int(place) + (1 - part if part else 0))


def weights_swapped(values: list[float], p: float) -> float:
    ordered, place = sorted(values), p / 100 * (len(values) - 1)
    low, high = int(place), min(int(place) + 1, len(values) - 1)
    return ordered[high] + (place - low) * (ordered[low] - ordered[high])


def of_shares(values: list[float], p: float) -> float:
    return _at(sorted(values), p * (len(values) - 1))


def _percentile_cases() -> list[tuple[list[float], float]]:
    rng = Random(4)
    cases: list[tuple[list[float], float]] = [
        ([3.0], 50),
        ([3.0], 99),
        ([1.0, 2.0], 50),
        ([4.0, 1.0, 8.0], 50),
        ([4.0, 1.0, 8.0], 100),
        ([4.0, 1.0, 8.0], 0),
        ([9.0, 1.0, 1.0, 5.0, 2.0], 90),
        ([5.0, 3.0, 9.0, 1.0], 25),
    ]
    for count, p in ((10, 99), (11, 90), (64, 50), (65, 75), (100, 99), (101, 99), (257, 99.9)):
        cases.append(([round(rng.expovariate(3.0), 6) for _ in range(count)], p))
    return cases


# --- goodput --------------------------------------------------------------------------------------


def _kept(record: Record, ttft: float, tpot: float) -> bool:
    first, each, _ = times_of(record)
    return first <= ttft and (each is None or each <= tpot)


def goodput(
    records: list[Record],
    ttft: float,
    tpot: float,
    kept: Callable[[Record, float, float], bool] = lambda r, a, b: r.ok and _kept(r, a, b),
    begin: Callable[[Record], float] = lambda record: record.due,
    span: Callable[[Record, float, float], bool] = lambda record, ttft, tpot: True,
) -> float:
    good = [record for record in records if kept(record, ttft, tpot)]
    counted = [record for record in records if span(record, ttft, tpot)]
    if not good or not counted:
        return 0.0
    first = min(begin(record) for record in counted)
    return len(good) / (max(record.end for record in counted) - first)


def _failed_too(record: Record, ttft: float, tpot: float) -> bool:
    return bool(_with_tokens(record)) and _kept(record, ttft, tpot)


def _all_failed(record: Record, ttft: float, tpot: float) -> bool:
    return not record.ok or _kept(record, ttft, tpot)


def _strictly(record: Record, ttft: float, tpot: float) -> bool:
    if not record.ok:
        return False
    first, each, _ = times_of(record)
    return first < ttft and (each is None or each < tpot)


def _first_only(record: Record, ttft: float, tpot: float) -> bool:
    return record.ok and _kept(record, ttft, float("inf"))


def _each_only(record: Record, ttft: float, tpot: float) -> bool:
    return record.ok and _kept(record, float("inf"), tpot)


def _either(record: Record, ttft: float, tpot: float) -> bool:
    return _first_only(record, ttft, tpot) or _each_only(record, ttft, tpot)


def _not_one_token(record: Record, ttft: float, tpot: float) -> bool:
    return record.ok and tpot_of(record) is not None and _kept(record, ttft, tpot)


def _is_ok(record: Record, *_: float) -> bool:
    return record.ok


def _is_good(record: Record, ttft: float, tpot: float) -> bool:
    return record.ok and _kept(record, ttft, tpot)


def throughput(records: list[Record], ttft: float, tpot: float) -> float:
    return goodput(records, ttft, tpot, kept=_is_ok)


def _number(records: list[Record], ttft: float, tpot: float) -> float:
    return float(sum(_is_good(record, ttft, tpot) for record in records))


def _share(records: list[Record], ttft: float, tpot: float) -> float:
    return _number(records, ttft, tpot) / len(records) if records else 0.0


def _share_of_ok(records: list[Record], ttft: float, tpot: float) -> float:
    num_ok = sum(record.ok for record in records)
    return _number(records, ttft, tpot) / num_ok if num_ok else 0.0


def from_zero(records: list[Record], ttft: float, tpot: float) -> float:
    return _number(records, ttft, tpot) / max((r.end for r in records), default=1.0)


def ends_in_order(records: list[Record], ttft: float, tpot: float) -> float:
    """The first of the list and the last of the list."""
    if not records:
        return 0.0
    return _number(records, ttft, tpot) / (records[-1].end - records[0].due)


def begins_in_order(records: list[Record], ttft: float, tpot: float) -> float:
    """From the first of the list on."""
    if not records:
        return 0.0
    return _number(records, ttft, tpot) / (max(r.end for r in records) - records[0].due)


def _goodput_cases() -> list[tuple[list[Record], float, float]]:
    exact = [
        # On both limits, and beyond one of them by a hair.
        Record(0.0, 0.0, [(0.25, 1), (0.5, 1), (0.75, 1)], 0.75),
        Record(0.5, 0.5, [(0.75, 1), (1.0, 1), (1.25, 1)], 1.25),
        Record(1.0, 1.0, [(1.25, 1), (1.5, 1), (1.875, 1)], 2.0),
        Record(1.5, 1.5, [(1.875, 1), (2.0, 1)], 2.0),
        # One token, and one that failed after it.
        Record(1.5, 1.5, [(1.75, 1)], 1.75),
        Record(1.75, 1.75, [(1.875, 1)], 8.0, ok=False),
    ]
    cases: list[tuple[list[Record], float, float]] = [
        ([], 1.0, 1.0),
        (exact[:1], 0.25, 0.25),
        (exact[:1], 0.25, 0.125),
        # Beyond each limit by very little.
        (exact[:1], 0.25 * (1 - 1e-5), 0.25),
        (exact[:1], 0.25, 0.25 * (1 - 1e-5)),
        ([exact[4]], 0.25, 0.125),
        ([exact[5]], 10.0, 10.0),
        ([Record(0.0, 0.0, [], 2.0, ok=False), exact[1]], 1.0, 1.0),
        (exact, 0.25, 0.25),
        ([exact[i] for i in (3, 0, 5, 2, 1, 4)], 0.25, 0.25),
        # The first one was sent late.
        ([Record(0.0, 1.5, [(2.0, 1), (2.5, 1)], 3.0), *exact[3:5]], 2.0, 0.5),
        # The answer that ends last began first.
        ([Record(3.0, 3.0, [(3.5, 1), (9.0, 1)], 9.25), *exact[:4]], 0.5, 0.5),
    ]
    for count, seed, ok, ttft, tpot in ((13, 1, 0.8, 0.4, 0.1), (64, 2, 0.9, 0.3, 0.12)):
        records = _records(count, seed, ok=ok)
        Random(seed).shuffle(records)
        cases.append((records, ttft, tpot))
    return cases


def _expect_left_alone(goodput_: Callable, times_: Callable) -> None:
    for records, ttft, tpot in _goodput_cases()[1:]:
        given = copy.deepcopy(records)
        goodput_(given, ttft, tpot)
        expect_unchanged([vars(one) for one in given], [vars(one) for one in records], "records")
    for (record,) in _one_by_one():
        given = copy.deepcopy(record)
        times_(given)
        expect_unchanged(vars(given), vars(record), "the record")


def check_seen(times_: Callable, percentile_: Callable, goodput_: Callable) -> str:
    for (record,) in _one_by_one():
        found = times_(copy.deepcopy(record))
        expect(
            isinstance(found, tuple | list) and len(found) == 3,
            "wrong-form",
            f"times_of gave {show(found)}.\nExpected three values: (TTFT, TPOT, end to end).",
        )
    cases, ranks, loads = _one_by_one(), _percentile_cases(), _goodput_cases()
    wording = {"item 0: ": "the TTFT: ", "item 1: ": "the TPOT: ", "item 2: ": "end to end: "}
    suspects = EXERCISE.suspects
    diagnose(times_, cases, _times, _of(suspects, _TIMES), wording=wording, **_EXACT)
    diagnose(percentile_, ranks, percentile, _of(suspects, _RANKS), **_EXACT)
    loads_suspects = _of(suspects, set(suspects) - _TIMES - _RANKS)
    diagnose(goodput_, loads, _goodput, loads_suspects, **_EXACT)
    _expect_left_alone(goodput_, times_)
    changed = [(([1.0, 2.0, 9.0], 50), ([5.0, 4.0, 8.0], 50)), (([1.0, 2.0], 50), ([1.0, 2.0], 90))]
    expect_nothing_kept(percentile_, changed, percentile, "the values have changed", **_EXACT)
    exact = loads[8][0]
    failed = [replace(record, ok=not record.ok) for record in exact]
    again = [
        ((exact, 0.25, 0.25), (failed, 0.25, 0.25)),
        ((exact, 0.25, 0.25), (exact[:4], 0.25, 0.25)),
        ((exact, 0.25, 0.25), (exact, 9.0, 0.1)),
    ]
    expect_nothing_kept(goodput_, again, _goodput, "the records or limits have changed", **_EXACT)
    return f"{len(cases)} requests, {len(ranks)} percentiles, {len(loads)} loads"


def _times(record: Record) -> Seen:
    return times_of(record)


def _goodput(records: list[Record], ttft: float, tpot: float) -> float:
    return goodput(records, ttft, tpot)


def _of(suspects: dict[str, tuple], names: set[str]) -> dict[str, tuple]:
    return {name: what for name, what in suspects.items() if name in names}


#: Mistakes about one request, and about percentiles; all others are about goodput.
_TIMES = {
    "from-sent",
    "empty-event-first",
    "per-event",
    "one-token-too-many",
    "wait-in-tpot",
    "end-in-tpot",
    "first-event-left-out",
    "empty-events-in-tpot",
    "zero-for-none",
    "end-is-last-token",
}
_RANKS = {"not-sorted", "downwards", "no-between", "place-of-n", "of-the-range", "wrong-share"}


EXERCISE = Exercise(
    id="12.2",
    title="What a client saw",
    check=check_seen,
    mistakes=(
        Known(
            "from-sent",
            "You count from when the request was *sent*. A client that waits for a slow server"
            " sends late, and then it leaves out just the waiting that a user would see"
            " (coordinated omission). Count from when it was due.",
            hint=1,
            suspects=(
                partial(times_of, start=_sent),
                lambda r: (*times_of(r, start=_sent)[:2], times_of(r)[2]),
                lambda r: (*times_of(r)[:2], times_of(r, start=_sent)[2]),
            ),
            answers=r"""
# %% both
@@
-    return first - record.due, tpot, record.end - record.due
+    return first - record.sent, tpot, record.end - record.sent

# %% only the TTFT
@@
-    return first - record.due, tpot, record.end - record.due
+    return first - record.sent, tpot, record.end - record.due
""",
        ),
        Known(
            "empty-event-first",
            "Your first token comes with the first event, but an event may bring no token: chats"
            " begin with one that says only who speaks. A user cannot read that.",
            hint=1,
            suspects=(
                partial(times_of, first=lambda r: r.events[0][0]),
                partial(times_of, first=lambda r: r.events[0][0], tpot=from_first_any_event),
                partial(times_of, first=lambda r: r.events[0][0], tpot=from_any_event),
            ),
            answers=r"""
# %% all events
@@
-    events = [(time, tokens) for time, tokens in record.events if tokens]
+    events = record.events
""",
        ),
        Known(
            "empty-events-in-tpot",
            "Events without tokens stand before or behind the tokens, and your TPOT goes to them."
            " It goes from the first event that brought tokens to the last one that did.",
            hint=1,
            suspects=tuple(
                partial(times_of, tpot=tpot)
                for tpot in (from_any_event, from_first_any_event, to_last_any_event)
            ),
            answers=r"""
# %% to the last event
@@
-    first, last = events[0][0], events[-1][0]
+    first, last = events[0][0], record.events[-1][0]
""",
        ),
        Known(
            "per-event",
            "You divide by events. A busy server joins several tokens into one event: that is a"
            " mean gap between events, and not the time per *token*.",
            hint=1,
            suspects=tuple(
                partial(times_of, tpot=tpot)
                for tpot in (per_event, per_any_event, per_event_or_zero)
            ),
            answers=r"""
# %% the mean gap
@@
-    tpot = (last - first) / (total - 1) if total > 1 else None
+    tpot = (last - first) / (len(events) - 1) if len(events) > 1 else None
""",
        ),
        Known(
            "one-token-too-many",
            "You divide by all tokens. The time before the first one is the TTFT: between n tokens"
            " lie n - 1 gaps.",
            suspects=(
                partial(times_of, tpot=by_all_tokens),
                partial(times_of, tpot=by_all_tokens_or_zero),
            ),
            answers=r"""
# %% n gaps
@@
-    tpot = (last - first) / (total - 1) if total > 1 else None
+    tpot = (last - first) / total if total > 1 else None
""",
        ),
        Known(
            "wait-in-tpot",
            "Your TPOT has the wait for the first token in it, so a long prompt makes each token"
            " slow. The first token has a number of its own, the TTFT.",
            suspects=tuple(
                partial(times_of, tpot=partial(with_the_wait, start=start, by=by))
                for start in (lambda r: r.due, _sent)
                for by in (0, 1)
            ),
            answers=r"""
# %% from the start on
@@
-    tpot = (last - first) / (total - 1) if total > 1 else None
+    tpot = (last - record.due) / total
""",
        ),
        Known(
            "end-in-tpot",
            "Your TPOT goes to `end`, which comes after the last token: usage, [DONE], the end of"
            " the connection. It goes to the last event that brought tokens.",
            suspects=(partial(times_of, tpot=to_the_end),),
            answers=r"""
# %% to the end
@@
-    tpot = (last - first) / (total - 1) if total > 1 else None
+    tpot = (record.end - first) / (total - 1) if total > 1 else None
""",
        ),
        Known(
            "first-event-left-out",
            "You divide by the tokens that came after the first event. The number of *all* tokens"
            " minus one is asked for, also where the first event brings several.",
            suspects=(
                partial(times_of, tpot=without_the_first_event),
                partial(times_of, tpot=without_the_first_event_or_zero),
            ),
            answers=r"""
# %% the tokens of the other events
@@
-    tpot = (last - first) / (total - 1) if total > 1 else None
+    rest = sum(tokens for _, tokens in events[1:])
+    tpot = (last - first) / rest if rest else None
""",
        ),
        Known(
            "zero-for-none",
            "An answer of one token has no time per token after the first. Your 0.0 would pull the"
            " mean and every percentile down: say None.",
            suspects=(partial(times_of, tpot=zero_for_one),),
            answers=r"""
# %% zero
@@
-    tpot = (last - first) / (total - 1) if total > 1 else None
+    tpot = (last - first) / max(1, total - 1)
""",
        ),
        Known(
            "end-is-last-token",
            "Your end to end stops at the last token. It goes to `end`.",
            suspects=(
                partial(times_of, end=lambda r: _with_tokens(r)[-1][0]),
                partial(times_of, end=lambda r: r.events[-1][0]),
            ),
            answers=r"""
# %% the last event
@@
-    return first - record.due, tpot, record.end - record.due
+    return first - record.due, tpot, record.events[-1][0] - record.due
""",
        ),
        Known(
            "not-sorted",
            "You take places of the list as it is given. A percentile is a place in the *sorted*"
            " list.",
            suspects=(unsorted,),
            answers=r"""
# %% as it came
@@
-    ordered = sorted(values)
+    ordered = list(values)
""",
        ),
        Known(
            "downwards",
            "You sort downwards: your 99th percentile is the first one.",
            suspects=(downwards,),
            answers=r"""
# %% the largest first
@@
-    ordered = sorted(values)
+    ordered = sorted(values, reverse=True)
""",
        ),
        Known(
            "no-between",
            "Your place is cut or rounded to a whole number. Between two places the percentile lies"
            " between their values: else it jumps when one more request is measured.",
            hint=2,
            suspects=(lower, nearest, upper),
            answers=r"""
# %% cut
@@
-    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
+    return ordered[low]

# %% rounded
@@
-    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
+    return ordered[round(place)]
""",
        ),
        Known(
            "place-of-n",
            "Your place is a share of n. The places are 0 to n - 1, so p percent of the way is at"
            " `p / 100 * (n - 1)`.",
            hint=2,
            suspects=(of_n, nearest_rank, between_of_n, between_of_n_less),
            answers=r"""
# %% p percent of n
@@
-    place = p / 100 * (len(ordered) - 1)
+    place = min(p / 100 * len(ordered), len(ordered) - 1)

# %% the nearest rank
@@
-    place = p / 100 * (len(ordered) - 1)
-    low = int(place)
-    high = min(low + 1, len(ordered) - 1)
-    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
+    rank = -int(-p / 100 * len(ordered) // 1)
+    return ordered[max(rank, 1) - 1]
""",
        ),
        Known(
            "of-the-range",
            "You go p percent of the way from the least to the greatest *value*. Go that far along"
            " the list: half of the requests lie below the median.",
            suspects=(of_range,),
            answers=r"""
# %% of the values
@@
-    place = p / 100 * (len(ordered) - 1)
-    low = int(place)
-    high = min(low + 1, len(ordered) - 1)
-    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
+    return ordered[0] + p / 100 * (ordered[-1] - ordered[0])
""",
        ),
        Known(
            "wrong-share",
            "The two neighbours have each other's weights (or p is not divided by 100). At place"
            " 2.25, the value at place 2 counts three quarters.",
            hint=2,
            suspects=(wrong_way_between, weights_swapped, of_shares),
            answers=r"""
# %% the weights of the other
@@
-    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
+    return ordered[high] + (place - low) * (ordered[low] - ordered[high])
""",
        ),
        Known(
            "failed-counted",
            "A request that failed counts as good, because the tokens that it had came in time."
            " Nobody is served by half an answer: ask `ok` first.",
            hint=3,
            suspects=(partial(goodput, kept=_failed_too), partial(goodput, kept=_all_failed)),
            answers=r"""
# %% whoever has tokens
@@
-        if record.ok:
+        if any(tokens for _, tokens in record.events):
""",
        ),
        Known(
            "limit-not-kept-at-the-limit",
            "A request whose time is exactly the limit keeps it: *at most*.",
            suspects=(partial(goodput, kept=_strictly),),
            answers=r"""
# %% below
@@
-            good += first <= ttft and (each is None or each <= tpot)
+            good += first < ttft and (each is None or each < tpot)
""",
        ),
        Known(
            "one-limit",
            "A request is good when it keeps *both* limits.",
            suspects=(
                partial(goodput, kept=_first_only),
                partial(goodput, kept=_each_only),
                partial(goodput, kept=_either),
            ),
            answers=r"""
# %% the first token only
@@
-            good += first <= ttft and (each is None or each <= tpot)
+            good += first <= ttft

# %% or
@@
-            good += first <= ttft and (each is None or each <= tpot)
+            good += first <= ttft or each is None or each <= tpot
""",
        ),
        Known(
            "one-token-left-out",
            "An answer of one token has no TPOT, and keeps any limit of it.",
            suspects=(partial(goodput, kept=_not_one_token),),
            answers=r"""
# %% not without a TPOT
@@
-            good += first <= ttft and (each is None or each <= tpot)
+            good += first <= ttft and each is not None and each <= tpot
""",
        ),
        Known(
            "throughput",
            "You count every answer. Goodput counts those that kept both limits.",
            suspects=(throughput,),
        ),
        Known(
            "other-span",
            "The span is that of all records, also of those that failed or were too slow, from the"
            " earliest `due` to the latest `end`: the machine was running all that time.",
            hint=3,
            suspects=(
                partial(goodput, span=_is_good),
                partial(goodput, span=_is_ok),
                partial(goodput, begin=_sent),
                from_zero,
                ends_in_order,
                begins_in_order,
            ),
            answers=r"""
# %% only those that succeeded
@@
-    if not records:
+    records = [record for record in records if record.ok]
+    if not records:

# %% the first and the last of the list
@@
-    begin = min(record.due for record in records)
-    return good / (max(record.end for record in records) - begin)
+    return good / (records[-1].end - records[0].due)
""",
        ),
        Known(
            "not-per-second",
            "That is a number of requests, or their share. Goodput is a rate: good requests per"
            " second of the span.",
            suspects=(_number, _share, _share_of_ok),
            answers=r"""
# %% the share
@@
-    begin = min(record.due for record in records)
-    return good / (max(record.end for record in records) - begin)
+    return good / len(records)
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% sorts the caller's list
@@
-    ordered = sorted(values)
+    values.sort()
+    ordered = values

# %% takes the empty events away
@@
-    events = [(time, tokens) for time, tokens in record.events if tokens]
+    record.events = [(time, tokens) for time, tokens in record.events if tokens]
+    events = record.events
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% counts on
@@
-def goodput(records: list[Record], ttft: float, tpot: float) -> float:
+KNOWN = {}
+
+
+def goodput(records: list[Record], ttft: float, tpot: float) -> float:
@@
-    good = 0
+    key = (ttft, tpot, len(records), sum(record.due for record in records))
+    if key in KNOWN:
+        return KNOWN[key]
+    good = 0
@@
-    return good / (max(record.end for record in records) - begin)
+    KNOWN[key] = good / (max(record.end for record in records) - begin)
+    return KNOWN[key]
""",
        ),
    ),
    right=r"""
# %% NumPy's percentile, one pass over the records
@@
-    ordered = sorted(values)
-    place = p / 100 * (len(ordered) - 1)
-    low = int(place)
-    high = min(low + 1, len(ordered) - 1)
-    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
+    import numpy as np
+
+    return float(np.percentile(values, p))
@@
-    begin = min(record.due for record in records)
-    return good / (max(record.end for record in records) - begin)
+    begins, ends = zip(*((record.due, record.end) for record in records))
+    return good / (max(ends) - min(begins))

# %% without helpers
@@
-    events = [(time, tokens) for time, tokens in record.events if tokens]
-    total = sum(tokens for _, tokens in events)
-    first, last = events[0][0], events[-1][0]
-    tpot = (last - first) / (total - 1) if total > 1 else None
+    first = last = tpot = None
+    total = 0
+    for time, tokens in record.events:
+        if tokens:
+            first, last = time if first is None else first, time
+            total += tokens
+    if total > 1:
+        tpot = (last - first) / (total - 1)
""",
)
