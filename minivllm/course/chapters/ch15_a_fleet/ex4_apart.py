"""15.4: prefill and decode apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from random import Random

from minivllm.course.chapters.ch15_a_fleet.common import suspects_of
from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect_nothing_kept, one_by_one

#: (layers, kv_heads, head_dim, itemsize) of a model's cache.
Shape = tuple[int, int, int, int]

# --- bytes ----------------------------------------------------------------------------------------


def _kv_bytes(
    num_tokens: int, block_size: int, shape: Shape, *, blocks: str = "up", leaves_out: str = ""
) -> int:
    """The right one; each option makes it a wrong one."""
    layers, kv_heads, head_dim, itemsize = shape
    tokens = {
        "up": -(-num_tokens // block_size) * block_size,
        "tokens": num_tokens,
        "down": num_tokens // block_size * block_size,
        "one more": (num_tokens // block_size + 1) * block_size,
        "count": -(-num_tokens // block_size),
        "at least one": max(1, -(-num_tokens // block_size)) * block_size,
    }[blocks]
    factors = {
        "both": 2,
        "layers": layers,
        "heads": kv_heads,
        "dim": head_dim,
        "size": itemsize,
        "tokens": tokens,
    }
    factors.pop(leaves_out, None)
    if leaves_out == "bits":
        factors["size"] *= 8
    return math.prod(factors.values())


# --- the move -------------------------------------------------------------------------------------


def _exposed(
    prefill: float,
    num_bytes: int,
    layers: int,
    bandwidth: float,
    latency: float,
    *,
    way: str = "layers",
) -> float:
    whole = num_bytes / bandwidth
    part, step = whole / layers, prefill / layers
    if way == "after":
        return whole + latency
    if way == "after, by layer":
        return whole + layers * latency
    if way == "overlapped":
        return max(0.0, whole - prefill) + latency
    if way == "overlapped, but the last part":
        return max(whole / layers, whole - prefill) + latency
    if way == "overlapped, in all":
        return max(0.0, whole + latency - prefill)
    if way == "last part":
        return part + latency
    free = 0.0
    for layer in range(layers):
        ready = step * (layer + 1)
        if way == "before it is computed":
            ready = step * layer
        free = max(free, ready) + part
        is_last = layer + 1 == layers
        if way == "latency in line" or (way == "one part in flight" and not is_last):
            free += latency
    found = free - prefill
    if way == "from the beginning":
        found = free
    return found if way in ("latency in line", "no latency") else found + latency


# --- the plan -------------------------------------------------------------------------------------


def _plan(
    num_tokens: int,
    decode: float,
    per_token: float,
    exposed: float,
    goals: tuple[float, float],
    *,
    way: str = "",
) -> tuple[str, int]:
    """The right one; `way` makes it a wrong one."""
    chunk = _chunk(num_tokens, decode, per_token, goals, way)
    ttft = num_tokens * per_token
    gap = exposed + decode
    if way == "ttft with the move":
        ttft += exposed
    elif way == "ttft with decodes":
        ttft += decode
    gap = {"the move": exposed, "a step": decode, "the larger": max(exposed, decode)}.get(way, gap)
    if way == "apart first" and _meets(ttft, gap, goals, ""):
        return "apart", 0
    if chunk:
        return "pool", chunk
    is_good = _meets(ttft, gap, goals, way.removeprefix("apart: "))
    if way == "what is left" or (is_good and way != "pool only"):
        return "apart", 0
    return "neither", 0


def _meets(ttft: float, gap: float, goals: tuple[float, float], which: str) -> bool:
    """Whether both goals are met, or those that a wrong way looks at."""
    if which == "below":
        return ttft < goals[0] and gap < goals[1]
    return (ttft <= goals[0] or which == "no ttft") and (gap <= goals[1] or which == "no gap")


def _chunk(
    num_tokens: int, decode: float, per_token: float, goals: tuple[float, float], way: str
) -> int:
    """The largest chunk with which one pool meets both goals; 0 where there is none."""
    good = []
    for chunk in range(1, num_tokens + 1):
        steps = {
            "steps rounded down": num_tokens // chunk,
            "one step": 1,
            "a part of a step": num_tokens / chunk,
            "no decodes": 0,
            "one step more": -(-num_tokens // chunk) + 1,
            "one step fewer": -(-num_tokens // chunk) - 1,
        }.get(way, -(-num_tokens // chunk))
        longest = {
            "gap of the chunk": chunk * per_token,
            "gap of the last chunk": (num_tokens % chunk or chunk) * per_token + decode,
        }.get(way, chunk * per_token + decode)
        ttft = steps * decode + num_tokens * per_token
        if way == "full chunks":
            ttft = steps * (decode + chunk * per_token)
        if _meets(ttft, longest, goals, way.removeprefix("pool: ")):
            good.append(chunk)
    if way == "smallest":
        return min(good, default=0)
    if way == "power of two":
        return max((chunk for chunk in good if chunk.bit_count() == 1), default=0)
    return max(good, default=0)


def _beyond(num_tokens: int, *args: object) -> tuple[str, int]:
    """Chunks may be longer than the prompt."""
    decode, per_token, _, goals = args
    found = _plan(num_tokens, *args)  # type: ignore[arg-type]
    if found[0] != "pool":
        return found
    return "pool", math.floor((goals[1] - decode) / per_token)  # type: ignore[index, operator]


# --- the check ------------------------------------------------------------------------------------

_QWEN = (28, 8, 128, 2)


def _byte_cases() -> list[tuple[int, int, Shape]]:
    shapes: list[Shape] = [(1, 1, 1, 1), _QWEN, (3, 2, 5, 4), (80, 8, 128, 1)]
    counts = (0, 1, 15, 16, 17, 257, 1000, 100_000)
    return [
        (count, size, shape) for shape in shapes for count in counts for size in (16, 1, 7, 256)
    ]


def _move_cases() -> list[tuple[float, int, int, float, float]]:
    cases: list[tuple[float, int, int, float, float]] = [
        (1.0, 1 << 20, 1, float(1 << 20), 0.0),
        (1.0, 1 << 20, 1, float(1 << 20), 0.125),
        (1.0, 1 << 20, 4, float(1 << 22), 0.125),  # the link is faster than the model
        (1.0, 1 << 22, 4, float(1 << 20), 0.125),  # and slower
        (0.5, 1 << 20, 8, float(1 << 21), 0.0),  # as fast
        (0.0, 1 << 20, 8, float(1 << 21), 0.25),  # a prompt that was cached
        (1.0, 0, 4, 1e9, 0.001),
    ]
    rng = Random(1541)
    for _ in range(40):
        layers = rng.choice((1, 2, 28, 64))
        num_bytes = layers * rng.randrange(1, 1 << 20) + rng.choice((0, 1, 5))
        bandwidth = rng.choice((1e6, 1e7, 1e8, 5e10))
        cases.append((rng.uniform(0, 3), num_bytes, layers, bandwidth, rng.uniform(0, 0.05)))
    return cases


def _plan_cases() -> list[tuple[int, float, float, float, tuple[float, float]]]:
    # Powers of two, so that a sum that should be the goal is the goal.
    tick = 1 / 1024
    cases: list[tuple[int, float, float, float, tuple[float, float]]] = [
        (1, 8 * tick, tick, 0.0, (1.0, 1.0)),
        (64, 8 * tick, tick, tick, (10.0, 10.0)),  # the whole prompt at once
        (64, 8 * tick, tick, tick, (96 * tick, 24 * tick)),  # exactly
        (64, 8 * tick, tick, tick, (95 * tick, 24 * tick)),
        (65, 8 * tick, tick, tick, (97 * tick, 24 * tick)),  # the last chunk is short
        (65, 8 * tick, tick, tick, (105 * tick, 24 * tick)),
        (64, 8 * tick, tick, 16 * tick, (64 * tick, 24 * tick)),  # apart, exactly
        (64, 8 * tick, tick, 17 * tick, (64 * tick, 24 * tick)),
        (64, 8 * tick, tick, 16 * tick, (63 * tick, 24 * tick)),
        (64, 8 * tick, tick, 20 * tick, (72 * tick, 12 * tick)),
        (64, 8 * tick, tick, tick, (500 * tick, 7 * tick)),  # a decode alone is too slow
        (64, 8 * tick, tick, 0.0, (500 * tick, 8 * tick)),
        (64, 8 * tick, tick, 4 * tick, (66 * tick, 12 * tick)),
        (1000, 8 * tick, tick / 4, 2 * tick, (300 * tick, 10 * tick)),
        (1000, 8 * tick, tick / 4, 2 * tick, (4000 * tick, 10 * tick)),
        (1000, 8 * tick, tick / 4, 100 * tick, (300 * tick, 10 * tick)),
    ]
    rng = Random(1542)
    for _ in range(60):
        num_tokens, decode = rng.randrange(1, 300), rng.randrange(1, 16) * tick
        per_token = tick / 2 ** rng.randrange(0, 5)
        ttft = num_tokens * per_token * rng.choice((0.75, 1.0, 1.25, 2.0, 4.0))
        gap = decode + rng.randrange(-4, 64) * tick / 4
        exposed = rng.randrange(0, 32) * tick / 2
        cases.append((num_tokens, decode, per_token, exposed, (ttft, gap)))
    return cases


def check_apart(kv_bytes: Callable, exposed: Callable, plan: Callable) -> str:
    tight = {"rtol": 1e-9, "atol": 1e-12}
    caches = diagnose(kv_bytes, _byte_cases(), _kv_bytes, suspects_of(EXERCISE, _kv_bytes))
    suspects = suspects_of(EXERCISE, _exposed)
    moves = diagnose(exposed, _move_cases(), _exposed, suspects, **tight)
    suspects = suspects_of(EXERCISE, _plan)
    longer = next(known for known in EXERCISE.mistakes if known.name == "longer-than-the-prompt")
    suspects = {**suspects, longer.name: (longer.message, _beyond)}
    wording = {"item 0: ": "the kind: ", "item 1: ": "the chunk: "}
    machines = diagnose(plan, _plan_cases(), _plan, suspects, wording=wording)
    changed = "the numbers have changed"
    pairs = one_by_one((100, 16, _QWEN), (50, 8, (3, 2, 5, 4)))
    expect_nothing_kept(kv_bytes, pairs, _kv_bytes, changed)
    pairs = one_by_one((1.0, 4 << 20, 4, 1e6, 0.1), (2.0, 1 << 20, 2, 3e6, 0.2))
    expect_nothing_kept(exposed, pairs, _exposed, changed, **tight)
    tick = 1 / 1024
    first = 64, 8 * tick, tick, tick, (96 * tick, 24 * tick)
    second = 32, 4 * tick, tick / 2, 30 * tick, (64 * tick, 12 * tick)
    expect_nothing_kept(plan, one_by_one(first, second), _plan, changed)
    return f"{caches} caches, {moves} moves, {machines} machines"


EXERCISE = Exercise(
    id="15.4",
    title="Prefill and decode apart",
    check=check_apart,
    mistakes=(
        Known(
            "factor-missing",
            "Your bytes are too few or too many by a factor: keys and values, of each layer, of"
            " each KV head, `head_dim` numbers of `itemsize` bytes, for each token.",
            hint=1,
            suspects=(
                *(
                    partial(_kv_bytes, leaves_out=what)
                    for what in ("both", "layers", "heads", "dim", "size", "bits")
                ),
                partial(_kv_bytes, blocks="count"),
            ),
            answers=r"""
# %% keys only
@@
-    return num_blocks * block_size * 2 * math.prod(shape)
+    return num_blocks * block_size * math.prod(shape)

# %% a token for each block
@@
-    return num_blocks * block_size * 2 * math.prod(shape)
+    return num_blocks * 2 * math.prod(shape)
""",
        ),
        Known(
            "not-whole-blocks",
            "Whole blocks move: as many as the tokens need, the last one with all its places. A"
            " prompt that ends with a block needs no further one.",
            hint=1,
            suspects=(
                partial(_kv_bytes, blocks="tokens"),
                partial(_kv_bytes, blocks="down"),
                partial(_kv_bytes, blocks="one more"),
                partial(_kv_bytes, blocks="at least one"),
            ),
            answers=r"""
# %% tokens
@@
-    num_blocks = -(-num_tokens // block_size)
-    return num_blocks * block_size * 2 * math.prod(shape)
+    return num_tokens * 2 * math.prod(shape)

# %% one more
@@
-    num_blocks = -(-num_tokens // block_size)
+    num_blocks = num_tokens // block_size + 1
""",
        ),
        Known(
            "all-at-the-end",
            "You send everything when the prefill is done. A layer's keys and values are ready when"
            " the layer is: while the next one computes, they are on their way.",
            hint=2,
            suspects=(
                partial(_exposed, way="after"),
                partial(_exposed, way="after, by layer"),
            ),
            answers=r"""
# %% after the prefill
@@
-    return free + latency - prefill
+    return num_bytes / bandwidth + latency
""",
        ),
        Known(
            "before-it-is-computed",
            "You send a layer before it is computed. The first part is ready after"
            " `prefill / layers` seconds, and the last one at the end of the prefill.",
            hint=2,
            suspects=(
                partial(_exposed, way="before it is computed"),
                partial(_exposed, way="overlapped"),
                partial(_exposed, way="overlapped, in all"),
                partial(_exposed, way="overlapped, but the last part"),
            ),
            answers=r"""
# %% layer 0 at time 0
@@
-    for layer in range(1, layers + 1):
+    for layer in range(layers):

# %% a formula without the time of the first layer
@@
-    return free + latency - prefill
+    return max(part, num_bytes / bandwidth - prefill) + latency

# %% as if it overlapped completely
@@
-    return free + latency - prefill
+    return max(0.0, num_bytes / bandwidth - prefill) + latency
""",
        ),
        Known(
            "the-link-is-busy",
            "The last part waits for the link, too: it carries one part after the other. Where it"
            " is slower than the model, parts stand in a line.",
            hint=2,
            suspects=(partial(_exposed, way="last part"),),
            answers=r"""
# %% the last part alone
@@
-        free = max(free, prefill * layer / layers) + part
+        free = prefill * layer / layers + part
""",
        ),
        Known(
            "latency",
            "The latency is the time that a part travels; the link is free for the next part in the"
            " meantime. So it counts once, for the last part.",
            hint=2,
            suspects=(
                partial(_exposed, way="latency in line"),
                partial(_exposed, way="one part in flight"),
                partial(_exposed, way="no latency"),
            ),
            answers=r"""
# %% for each part, in line
@@
-        free = max(free, prefill * layer / layers) + part
-    return free + latency - prefill
+        free = max(free, prefill * layer / layers) + part + latency
+    return free - prefill

# %% none
@@
-    return free + latency - prefill
+    return free - prefill
""",
        ),
        Known(
            "from-the-beginning",
            "You count from the beginning of the prefill. What is asked for is what comes on top:"
            " the time from its end on.",
            hint=2,
            suspects=(partial(_exposed, way="from the beginning"),),
            answers=r"""
# %% with the prefill
@@
-    return free + latency - prefill
+    return free + latency
""",
        ),
        Known(
            "pool-ttft",
            "That is not how long the first token takes in one pool. Each of its steps decodes for"
            " others, too, and there are as many steps as chunks, the last one perhaps short.",
            hint=3,
            suspects=(
                partial(_plan, way="steps rounded down"),
                partial(_plan, way="one step"),
                partial(_plan, way="a part of a step"),
                partial(_plan, way="no decodes"),
                partial(_plan, way="one step more"),
                partial(_plan, way="one step fewer"),
                partial(_plan, way="full chunks"),
                partial(_plan, way="pool: no ttft"),
            ),
            answers=r"""
# %% the gap alone
@@
-        is_quick = steps * decode + num_tokens * per_token <= ttft_goal
+        is_quick = True

# %% the last chunk is taken for full
@@
-        is_quick = steps * decode + num_tokens * per_token <= ttft_goal
+        is_quick = steps * (decode + chunk * per_token) <= ttft_goal

# %% rounded down
@@
-        steps = -(-num_tokens // chunk)
+        steps = num_tokens // chunk

# %% the prompt alone
@@
-        is_quick = steps * decode + num_tokens * per_token <= ttft_goal
+        is_quick = num_tokens * per_token <= ttft_goal
""",
        ),
        Known(
            "pool-gap",
            "That is not the gap that others see in one pool: the time of a step with a whole chunk"
            " in it and their decodes.",
            hint=3,
            suspects=(
                partial(_plan, way="gap of the chunk"),
                partial(_plan, way="gap of the last chunk"),
                partial(_plan, way="pool: no gap"),
            ),
            answers=r"""
# %% without the decodes
@@
-        if is_quick and decode + chunk * per_token <= gap_goal:
+        if is_quick and chunk * per_token <= gap_goal:
""",
        ),
        Known(
            "not-the-largest",
            "Several chunks are small enough. Take the largest: it needs the fewest steps.",
            hint=3,
            suspects=(
                partial(_plan, way="smallest"),
                partial(_plan, way="power of two"),
            ),
            answers=r"""
# %% the smallest
@@
-    for chunk in range(num_tokens, 0, -1):
+    for chunk in range(1, num_tokens + 1):
""",
        ),
        Known(
            "longer-than-the-prompt",
            "A chunk is at most as long as the prompt.",
            hint=3,
            answers=r"""
# %% as the gap allows
@@
-            return "pool", chunk
+            return "pool", math.floor((gap_goal - decode) / per_token)
""",
        ),
        Known(
            "apart-ttft",
            "Apart, the engine that prefills also samples the first token, and does nothing else:"
            " nothing of the move or of a decode is in the TTFT.",
            hint=4,
            suspects=(
                partial(_plan, way="ttft with the move"),
                partial(_plan, way="ttft with decodes"),
            ),
            answers=r"""
# %% with the move
@@
-    is_quick = num_tokens * per_token <= ttft_goal
+    is_quick = num_tokens * per_token + exposed <= ttft_goal
""",
        ),
        Known(
            "apart-gap",
            "Apart, the longest gap is that between the first token and the second: the cache must"
            " arrive, and then a step of the other engine computes the token.",
            hint=4,
            suspects=(
                partial(_plan, way="the move"),
                partial(_plan, way="a step"),
                partial(_plan, way="the larger"),
                partial(_plan, way="apart: no gap"),
            ),
            answers=r"""
# %% the move alone
@@
-    if is_quick and exposed + decode <= gap_goal:
+    if is_quick and exposed <= gap_goal:

# %% a step alone
@@
-    if is_quick and exposed + decode <= gap_goal:
+    if is_quick and decode <= gap_goal:
""",
        ),
        Known(
            "apart-unasked",
            'Both goals count for "apart", too; where it misses one, the answer is "neither".',
            hint=4,
            suspects=(
                partial(_plan, way="what is left"),
                partial(_plan, way="pool only"),
                partial(_plan, way="apart: no ttft"),
            ),
            answers=r"""
# %% what is left
@@
-    if is_quick and exposed + decode <= gap_goal:
-        return "apart", 0
-    return "neither", 0
+    return "apart", 0
""",
        ),
        Known(
            "moves-without-need",
            "One pool comes first: where it meets both goals, nothing need move.",
            hint=4,
            suspects=(partial(_plan, way="apart first"),),
            answers=r"""
# %% apart first
def kv_bytes(num_tokens, block_size, shape):
    return -(-num_tokens // block_size) * block_size * 2 * math.prod(shape)


def exposed(prefill, num_bytes, layers, bandwidth, latency):
    free, part = 0.0, num_bytes / layers / bandwidth
    for layer in range(1, layers + 1):
        free = max(free, prefill * layer / layers) + part
    return free + latency - prefill


def plan(num_tokens, decode, per_token, exposed, goals):
    if num_tokens * per_token <= goals[0] and exposed + decode <= goals[1]:
        return "apart", 0
    for chunk in range(num_tokens, 0, -1):
        ttft = -(-num_tokens // chunk) * decode + num_tokens * per_token
        if ttft <= goals[0] and decode + chunk * per_token <= goals[1]:
            return "pool", chunk
    return "neither", 0
""",
        ),
        Known(
            "goal-edge",
            "A time that is exactly the goal meets it.",
            suspects=(
                partial(_plan, way="pool: below"),
                partial(_plan, way="apart: below"),
                partial(_plan, way="below"),
            ),
            answers=r"""
# %% below
@@
-        if is_quick and decode + chunk * per_token <= gap_goal:
+        if is_quick and decode + chunk * per_token < gap_goal:
@@
-        is_quick = steps * decode + num_tokens * per_token <= ttft_goal
+        is_quick = steps * decode + num_tokens * per_token < ttft_goal
""",
        ),
    ),
    right=r"""
# %% formulas
def kv_bytes(num_tokens, block_size, shape):
    layers, kv_heads, head_dim, itemsize = shape
    per_block = 2 * layers * kv_heads * head_dim * itemsize * block_size
    return math.ceil(num_tokens / block_size) * per_block


def exposed(prefill, num_bytes, layers, bandwidth, latency):
    whole = num_bytes / bandwidth
    # Either the last part meets a free link, or parts stand in line from the first one on.
    return max(whole / layers, prefill / layers + whole - prefill) + latency


def plan(num_tokens, decode, per_token, exposed, goals):
    chunk = min(num_tokens, math.floor((goals[1] - decode) / per_token))
    if chunk >= 1:
        steps = math.ceil(num_tokens / chunk)
        if steps * decode + num_tokens * per_token <= goals[0]:
            return "pool", chunk
    apart = num_tokens * per_token <= goals[0] and exposed + decode <= goals[1]
    return ("apart" if apart else "neither"), 0
""",
)
