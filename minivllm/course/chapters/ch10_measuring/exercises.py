"""Chapter 10, measuring: the checks of its exercises."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.checking import (
    Mistake,
    diagnose,
    exercise,
    expect,
    expect_all,
    seeded,
    show,
)

if TYPE_CHECKING:
    from minivllm.bench.costs import ModelCosts
    from minivllm.config import ModelConfig
    from minivllm.course.sim.clocks import SimulatedMachine

# --- 10.1 -----------------------------------------------------------------------------------------


def _layer(
    config: ModelConfig,
    *,
    dim: int | None = None,
    query: int | None = None,
    joined: int | None = None,
    mlp: int = 3,
) -> int:
    """Numbers in the matrices of a layer. query, joined: width of the queries, and of what
    o_proj reads.
    """
    dim = dim or config.head_dim
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads
    hidden = config.hidden_size
    query, joined = (heads * dim if width is None else width for width in (query, joined))
    return hidden * (query + 2 * kv_heads * dim + joined + mlp * config.intermediate_size)


def _floor(
    config: ModelConfig,
    batch: int,
    context: int,
    element: int,
    bandwidth: float,
    *,
    layer: int | None = None,
    head: int = 1,
    repeated: bool = False,
    kv_heads: int | None = None,
    both: int = 2,
    kv_layers: int | None = None,
    sequences: int | None = None,
    dim: int | None = None,
    layers: int | None = None,
    overlap: bool = False,
) -> tuple[float, float, float]:
    """What the answer should give, or with other values what a mistake gives."""
    layer = _layer(config) if layer is None else layer
    layers = config.num_hidden_layers if layers is None else layers
    weights = element * (layers * layer + head * config.vocab_size * config.hidden_size)
    weights *= batch if repeated else 1
    kv = both * (config.num_hidden_layers if kv_layers is None else kv_layers) * element
    kv *= (kv_heads or config.num_key_value_heads) * (dim or config.head_dim)
    kv *= (batch if sequences is None else sequences) * context
    seconds = (max(weights, kv) if overlap else weights + kv) / bandwidth
    return float(weights), float(kv), seconds


def _guessed(config: ModelConfig, *more: Any) -> tuple:
    dim = config.hidden_size // config.num_attention_heads
    return _floor(config, *more, layer=_layer(config, dim=dim), dim=dim)


_FLOOR_SUSPECTS: dict[str, tuple] = {
    "head-forgotten": (
        (
            "The matrix that gives the logits is read in every step too, all of it: vocabulary"
            " times hidden size."
        ),
        lambda *case: _floor(*case, head=0),
    ),
    "embedding-counted": (
        (
            "The table of embeddings is not read, but for one row a token. The head is: where the"
            " two are tied, it is one matrix, used once as a table and once as a matrix."
        ),
        lambda *case: _floor(*case, head=2),
        lambda config, *more: _floor(config, *more, head=1 if config.tie_word_embeddings else 2),
        lambda config, *more: _floor(config, *more, head=2 if config.tie_word_embeddings else 1),
    ),
    "query-heads-for-kv": (
        (
            "K and V have num_key_value_heads heads. That several query heads share one of them is"
            " the point of GQA."
        ),
        lambda config, *more: _floor(config, *more, kv_heads=config.num_attention_heads),
    ),
    "k-without-v": (
        "There are keys and there are values: twice as much.",
        lambda *case: _floor(*case, both=1),
    ),
    "kv-of-one-layer": (
        "Each layer has a cache of its own.",
        lambda *case: _floor(*case, kv_layers=1),
    ),
    "kv-of-one-sequence": (
        (
            "Weights are read once for the whole batch; K and V are everybody's own, and read for"
            " every sequence."
        ),
        lambda *case: _floor(*case, sequences=1),
    ),
    "weights-for-each-sequence": (
        (
            "The weights are read once in a step, however many sequences it has. That is why one"
            " batches."
        ),
        lambda *case: _floor(*case, repeated=True),
    ),
    "weights-of-one-layer": (
        "That is one layer; the config says how many.",
        lambda *case: _floor(*case, layers=1),
    ),
    "head-dim-guessed": (
        (
            "You take hidden_size / num_attention_heads for the head's size. The config has"
            " head_dim, and in Qwen3-0.6B it is twice that."
        ),
        _guessed,
    ),
    "query-as-wide-as-the-stream": (
        (
            "You take hidden_size for the width of the queries. It is num_attention_heads ·"
            " head_dim; in Qwen3-0.6B that is twice as much."
        ),
        lambda c, *more: _floor(c, *more, layer=_layer(c, query=c.hidden_size)),
        lambda c, *more: _floor(
            c, *more, layer=_layer(c, query=c.hidden_size, joined=c.hidden_size)
        ),
    ),
    "element-size-typed": (
        (
            "You take two bytes for every number, whatever element_bytes says. In float32 there are"
            " four."
        ),
        lambda c, b, n, e, w: _floor(c, b, n, 2, w),
    ),
    "output-projection-forgotten": (
        "Attention has four matrices: for q, k, v, and the one that its output goes through.",
        lambda config, *more: _floor(config, *more, layer=_layer(config, joined=0)),
    ),
    "two-mlp-matrices": (
        "SwiGLU has three matrices: gate, up and down.",
        lambda config, *more: _floor(config, *more, layer=_layer(config, mlp=2)),
    ),
    "larger-of-both": (
        "The step reads both, the weights and the cache, through one memory: their times add up.",
        lambda *case: _floor(*case, overlap=True),
    ),
    "numbers-not-bytes": (
        "Those are numbers; each has element_bytes bytes.",
        lambda c, b, n, e, w: _floor(c, b, n, 1, w),
        lambda c, b, n, e, w: (*_floor(c, b, n, 1, w)[:2], _floor(c, b, n, e, w)[2]),
    ),
}


@exercise(
    "10.1",
    "Warm-up: the floor of a step",
    hints=dict.fromkeys(_FLOOR_SUSPECTS, 1) | {"embedding-counted": 2, "head-forgotten": 2},
)
def check_decode_floor(answer: Callable) -> str:
    from minivllm.bench.shapes import shape_config
    from minivllm.bundled import BUNDLED_MODEL_PATH
    from minivllm.models.loader import load_config

    shapes = [shape_config(name) for name in ("qwen3-0.6b", "qwen3-8b", "tiny")]
    shapes.append(load_config(BUNDLED_MODEL_PATH))
    cases = [
        (c, b, n, e, 4e12)
        for c in shapes
        for b, n, e in ((1, 1, 2), (1, 4096, 2), (64, 700, 4), (256, 1024, 2))
    ]
    wording = {
        "item 0:": "the bytes of the weights:",
        "item 1:": "the bytes of K and V:",
        "item 2:": "the seconds:",
    }
    count = diagnose(answer, cases, _floor, _FLOOR_SUSPECTS, wording=wording, rtol=1e-6, atol=0.0)
    return f"{count} steps of four models, to the byte"


# --- 10.2 -----------------------------------------------------------------------------------------

#: What the statement gives: bytes read and operations multiplied in a second.
READS, MULTIPLIES = 4.5e12, 675e12


def _costs() -> ModelCosts:
    from minivllm.bench.costs import ModelCosts
    from minivllm.bench.shapes import shape_config

    return ModelCosts.of(shape_config("qwen3-0.6b"), 2)


def _step_seconds(batch: int, context: int, kv_bytes: int = 2, compute: bool = True) -> float:
    costs = _costs()
    weights = costs.layer_weights + costs.head_weights
    matrices = max(2 * weights / READS, 2 * batch * weights / MULTIPLIES if compute else 0.0)
    return matrices + batch * context * costs.kv_elements_per_token * kv_bytes / READS


@exercise("10.2", "Predict: the turning points")
def check_turning_points(
    kv_passes_weights_1k: float,
    kv_passes_weights_8k: float,
    matrices_turn: float,
    attention_flops_per_byte: float,
    attention_turns: float,
    small_kv_speedup: float,
) -> str:
    costs = _costs()
    weights, kv = costs.layer_weights + costs.head_weights, costs.kv_elements_per_token

    def judge(
        name: str, guess: Any, right: float, why: str, known: dict[float, tuple[str, str]]
    ) -> None:
        if isinstance(guess, bool) or not isinstance(guess, int | float):
            raise Mistake("wrong-type", f"{name} is {show(guess)}.\nA prediction is one number.")
        if guess == right or math.isclose(guess, right, rel_tol=0.03):
            return
        for value, (mistake, explanation) in known.items():
            if guess == value or math.isclose(guess, value, rel_tol=0.03):
                raise Mistake(
                    mistake,
                    f"{name}: you predicted {guess:,.4g}, it is {right:,.4g}.\n{explanation} {why}",
                )
        raise Mistake(
            "wrong-prediction", f"{name}: you predicted {guess:,.4g}, it is {right:,.4g}.\n{why}"
        )

    one = weights / kv
    for name, guess, context in (
        ("kv_passes_weights_1k", kv_passes_weights_1k, 1024),
        ("kv_passes_weights_8k", kv_passes_weights_8k, 8192),
    ):
        judge(
            name,
            guess,
            one / context,
            f"A sequence of {context:,} tokens has {2 * kv * context / 1e6:,.0f} million "
            f"bytes of K and V, the matrices have {2 * weights / 1e6:,.0f} million.",
            {
                one / context / 2: (
                    "query-heads-for-kv",
                    "You counted K and V for 16 heads; there are 8.",
                ),
                2 * one / context: (
                    "k-without-v",
                    "You counted keys or values; a step reads both.",
                ),
                costs.layer_weights / kv / context: (
                    "head-forgotten",
                    "The matrix of the head is read as well.",
                ),
                (weights + costs.head_weights) / kv / context: (
                    "embedding-counted",
                    "You counted the embeddings and the head; tied, they are one matrix.",
                ),
                28 * one / context: ("kv-of-one-layer", "Each of the 28 layers has K and V."),
            },
        )
    ridge = MULTIPLIES / READS
    judge(
        "matrices_turn",
        matrices_turn,
        ridge,
        "A weight has 2 bytes, and makes 2 operations for every sequence: so "
        "many FLOPs a byte as there are sequences. The model's size does not matter.",
        {
            ridge / 2: (
                "bytes-or-operations",
                "A factor of two is missing: 2 bytes a weight, and 2 operations.",
            ),
            2 * ridge: (
                "bytes-or-operations",
                "A factor of two too many: 2 bytes a weight, and 2 operations.",
            ),
        },
    )
    judge(
        "attention_flops_per_byte",
        attention_flops_per_byte,
        costs.attention_flops_per_pair / (2 * kv),
        "A key and its value, 2 · 128 numbers of 2 bytes, meet the queries of 2 heads, with 2"
        " operations a number.",
        {
            1.0: (
                "gqa-forgotten",
                "That would be without GQA: here each pair of K and V serves 16 / 8 query heads.",
            ),
            4.0: (
                "k-without-v",
                "Bytes of K and of V, operations with K and with V: count both on both sides.",
            ),
            16.0: ("gqa-forgotten", "Only 16 / 8 query heads share a pair of K and V, not all 16."),
            0.5: (
                "bytes-or-operations",
                "2 bytes a number, 2 operations for each query that meets it.",
            ),
        },
    )
    if math.isfinite(attention_turns):
        raise Mistake(
            "attention-does-not-share",
            f"attention_turns: you predicted {attention_turns:,.4g}, it is infinite.\nMore"
            " sequences bring more operations, and as many more bytes: nobody shares K and V. It"
            f" stays at {attention_flops_per_byte:g} FLOPs a byte.",
        )
    before, after = _step_seconds(256, 1024), _step_seconds(256, 1024, kv_bytes=1)
    judge(
        "small_kv_speedup",
        small_kv_speedup,
        before / after,
        f"{1e3 * before:.2f} milliseconds before, "
        f"{1e3 * after:.2f} after: the matrices take as long as they did.",
        {
            2.0: ("weights-forgotten", "Half of K and V is not half of the step."),
            after / before: ("upside-down", "That is the new time divided by the old."),
            256 * 1024 * kv / (weights + 256 * 1024 * kv / 2): (
                "weights-forgotten",
                "The weights are read before, too.",
            ),
        },
    )
    return "six turning points"


# --- 10.3 -----------------------------------------------------------------------------------------

US = 1e-6


def _machine(**what: Any) -> SimulatedMachine:
    from minivllm.course.sim.clocks import SimulatedMachine

    return SimulatedMachine(**what)


def _compared(
    answer: Callable, machine: SimulatedMachine, tasks: dict, rounds: int
) -> dict[str, tuple]:
    """The answer's result, once its form is right: floats (median, least, greatest) by name."""
    found = answer(dict(tasks), machine.clock, machine.synchronize, rounds)
    good = isinstance(found, dict) and list(found) == list(tasks)
    good = good and all(isinstance(row, tuple | list) and len(row) == 3 for row in found.values())
    expect(
        good,
        "wrong-form",
        f"Got {show(found)}.\nExpected a dict with the names {', '.join(tasks)}, each with (median,"
        " least, greatest).",
    )
    return {name: tuple(map(float, row)) for name, row in found.items()}


def _close(one: float, other: float, tolerance: float = 0.01) -> bool:
    return math.isclose(one, other, rel_tol=tolerance)


def _waits(answer: Callable) -> None:
    """Work that is done behind the caller's back: 5 µs to call, 300 and 200 to do."""
    machine = _machine()
    tasks = {"A": machine.task("A", 300 * US), "B": machine.task("B", 200 * US)}
    found = _compared(answer, machine, tasks, 7)
    names = [name for kind, name in machine.log if kind == "call"]
    for name in tasks:
        expect(
            names.count(name) >= 7,
            "too-few-rounds",
            f"With rounds = 7, {name} was called {names.count(name)} times.\nOne warm-up, and then"
            " 7 that are timed.",
        )
    for name, right in (("A", 305 * US), ("B", 205 * US)):
        median, low, high = found[name]
        got = (
            f"{name} takes 5 microseconds to call and {right / US - 5:.0f} to do. Its median is"
            f" {median / US:.1f}."
        )
        expect(
            not _close(median, 5 * US, 0.2) and not _close(low, 5 * US, 0.2),
            "not-synchronised",
            f"{got}\nYour second reading of the clock comes when the work was put into the queue,"
            " not when it was done. Synchronize before you read it.",
        )
        expect(
            not _close(high, 505 * US)
            and not _close(high, 510 * US)
            and not _close(median, 500 * US, 0.03),
            "starts-while-busy",
            f"{got} The greatest is {high / US:.1f}.\nThe clock was started while other work still"
            " stood in the queue. Synchronize before the first reading, too.",
        )
        expect(
            _close(median, right) and low <= median <= high,
            "wrong-values",
            f"{got}\nExpected {right / US:.1f}: from an idle machine to an idle machine, one call.",
        )


def _warms_up(answer: Callable) -> None:
    """First calls that compile, and a machine that is busy afterwards."""
    machine = _machine()
    tasks = {"A": machine.task("A", 100 * US, cold=0.05), "B": machine.task("B", 80 * US, cold=0.3)}
    found = _compared(answer, machine, tasks, 5)
    for name, (_, low, high) in found.items():
        expect(
            high < 0.01,
            "not-warmed-up",
            f"The first call of {name} compiles. Your greatest time is {high / US:,.0f}"
            f" microseconds, the least {low / US:,.0f}.\nCall each candidate once before you time"
            " anything: that happens once, not in each run.",
        )
        expect(
            high < 150 * US,
            "starts-while-busy",
            f"{name}: from {low / US:.1f} to {high / US:.1f} microseconds, on a machine where all"
            " calls take the same.\nWhat was called before (the warm-up) was still running when"
            " the clock was started: synchronize first.",
        )


def _interleaves(answer: Callable) -> None:
    """The same work twice, on a machine that slows down as it gets warm."""
    machine = _machine(heat=0.5, warmth=0.004)
    tasks = {name: machine.task(name, 200 * US) for name in ("A", "B", "C")}
    found = _compared(answer, machine, tasks, 15)
    medians = {name: row[0] for name, row in found.items()}
    if max(medians.values()) > 1.05 * min(medians.values()):
        calls = [name for kind, name in machine.log if kind == "call"]
        said = ", ".join(f"{name} {median / US:.0f}" for name, median in medians.items())
        raise Mistake(
            "not-interleaved",
            f"A, B and C do the same work, and your medians are {said} microseconds. You called"
            f" {' '.join(calls[3:12])} …\nThe chip gets warm, and lowers its clock: whoever comes"
            " last is the slowest. Take one run of each candidate in every round.",
        )


def _takes_medians(answer: Callable) -> None:
    """Some calls are disturbed, some happen to run at a higher clock."""
    machine = _machine(disturbed=0.2, boosted=0.12, seed=3)
    tasks = {"A": machine.task("A", 100 * US), "B": machine.task("B", 400 * US)}
    found = _compared(answer, machine, tasks, 31)
    for name, usual in (("A", 105 * US), ("B", 405 * US)):
        median, low, high = found[name]
        got = (
            f"Most calls of {name} take {usual / US:.0f} microseconds, and you report"
            f" {median / US:.1f}."
        )
        expect(
            not _close(median, low) or median > 0.99 * usual,
            "least-for-median",
            f"{got}\nThat is the least: a run in which the clock happened to be high. It can't be"
            " repeated at will, and the more often one tries, the better it gets.",
        )
        expect(
            _close(median, usual),
            "mean-for-median" if median > 1.1 * usual else "wrong-values",
            f"{got}\nA mean has everything in it that disturbed the machine; one bad run moves it"
            " as far as it likes. Take the median.",
        )
        expect(
            low < 0.9 * usual and high > 1.5 * usual,
            "no-spread",
            f"{name}: you report from {low / US:.1f} to {high / US:.1f} microseconds.\nReport the"
            " least and the greatest of the timed runs as they were: they say how far to trust the"
            " median.",
        )


@exercise(
    "10.3",
    "An honest stopwatch",
    hints={"not-warmed-up": 1, "not-synchronised": 1, "starts-while-busy": 1, "not-interleaved": 2},
)
def check_compare(answer: Callable) -> str:
    for judge in (_waits, _warms_up, _interleaves, _takes_medians):
        judge(answer)
    return "cold, warm, busy and disturbed machines, and the medians are what they should be"


# --- 10.4 -----------------------------------------------------------------------------------------

#: Long questions, so that reading them costs something.
STORIES = tuple(
    f"Tell me a story about {who}. It should be long and have a beginning, a middle and an end, and"
    f" please do not forget that {who} has a friend who lives far away, behind the snowy mountains."
    for who in ("a fox named Pip", "an owl named Mira", "a robot named Ada")
)
SUMS = ("What is 12 + 7?", "What is 30 - 4?")
ANSWERS = (SUMS[0], "What is a KV cache?")  # a short one and a longer one


@functools.cache
def _chat(questions: tuple[str, ...]) -> tuple[list[int], ...]:
    """The questions as the chat template has them: the answers end by themselves."""
    from minivllm import LLM

    with LLM(device="cpu") as llm:
        return tuple(
            llm.render_chat([{"role": "user", "content": question}]) for question in questions
        )


def _served(
    answer: Callable, questions: tuple[str, ...], params: Any, repeats: int, **timer: Any
) -> tuple[float, Any]:
    """(what the answer says, the clock that it looked at) on a fresh engine."""
    from minivllm import LLM
    from minivllm.course.sim.clocks import EngineClock

    clock = EngineClock(**timer)
    prompts = [list(prompt) for prompt in _chat(questions)]
    with LLM(device="cpu", build_batch=clock.build_batch, num_kv_blocks=256) as llm:
        found = answer(llm, prompts, params, clock.clock, repeats)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Mistake(
            "wrong-type", f"Got {show(found)}.\nExpected a number: output tokens a second."
        )
    return float(found), clock


@dataclass(frozen=True)
class _Truth:
    """What a run really did, on a machine that nobody disturbs. cached: seconds where the
    prompts are not read.
    """

    tokens: int
    prompt_tokens: int
    allowed: int
    seconds: float
    cached: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def is_rate(self, found: float, pace: float = 1.0, cached: bool = True) -> bool:
        """Whether somebody who counts rightly can have found this; cached: also who serves from
        the cache.
        """
        times = [self.seconds, self.cached] if cached else [self.seconds]
        return any(_close(found, self.tokens / (pace * seconds)) for seconds in times)


@functools.cache
def _truth(questions: tuple[str, ...], max_tokens: int, ignore_eos: bool) -> _Truth:
    from minivllm import LLM
    from minivllm.course.sim.clocks import EngineClock

    clock, params = EngineClock(), _params(max_tokens, ignore_eos)
    with LLM(device="cpu", build_batch=clock.build_batch, num_kv_blocks=256) as llm:
        times = []
        for run in range(3):
            if run == 1:
                llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
            start = clock.now
            outputs = llm.generate([list(p) for p in _chat(questions)], params, use_tqdm=False)
            times.append(clock.now - start)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return _Truth(tokens, prompt_tokens, max_tokens * len(questions), times[1], times[2])


def _params(max_tokens: int, ignore_eos: bool) -> Any:
    from minivllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)


def _counts_tokens(answer: Callable) -> None:
    """Answers of different lengths, which end by themselves, served together."""
    truth = _truth(ANSWERS, 200, False)
    alone = [_truth((question,), 200, False) for question in ANSWERS]
    found, _ = _served(answer, ANSWERS, _params(200, False), 3)
    got = (
        f"Answers of {alone[0].tokens} and {alone[1].tokens} tokens: you report {found:,.1f} tokens"
        " a second, it is "
    )
    got += f"{truth.rate:,.1f}."
    expect(
        found < 0.3 * truth.allowed / truth.seconds,
        "counts-what-was-allowed",
        f"{got}\nYou count max_tokens for each request. These ended by themselves, long before:"
        " count what came out.",
    )
    expect(
        not any(
            _close(found, (truth.tokens + truth.prompt_tokens) / t)
            for t in (truth.seconds, truth.cached)
        ),
        "prompt-tokens-counted",
        f"{got}\nThat counts the tokens of the prompts as well, which come in bulk. Count what came"
        " out.",
    )
    expect(
        not any(
            _close(found, 2 * one.tokens / t)
            for one in alone
            for t in (truth.seconds, truth.cached)
        ),
        "one-answer-for-all",
        f"{got}\nYou count one answer, and take the others to be as long. Add up the tokens of all"
        " outputs.",
    )
    one_by_one = (sum(one.seconds for one in alone), sum(one.cached for one in alone))
    expect(
        not any(_close(found, truth.tokens / seconds) for seconds in one_by_one),
        "one-at-a-time",
        f"{got}\nYou serve one request after the other. Hand all prompts to one call of generate:"
        " the engine is fast because it serves them together.",
    )
    expect(
        truth.is_rate(found),
        "wrong-values",
        f"{got}\nExpected: tokens that came out, by the time of one whole run.",
    )


def _reads_prompts(answer: Callable) -> None:
    truth = _truth(STORIES, 4, True)
    found, _ = _served(answer, STORIES, _params(4, True), 3)
    got = (
        f"Three long prompts, 4 tokens each: you report {found:,.1f} tokens a second, it is"
        f" {truth.rate:,.1f}."
    )
    expect(
        not _close(found, truth.tokens / truth.cached),
        "served-from-the-cache",
        f"{got}\nFrom the second run on, the engine finds the prompts in its prefix cache and does"
        " not read them. Nobody's first question is served like that: reset_prefix_cache() before"
        " each run.",
    )
    expect(
        truth.is_rate(found, cached=False),
        "wrong-values",
        f"{got}\nExpected: tokens that came out, by the time of one whole run.",
    )


def _is_typical(answer: Callable) -> None:
    truth = _truth(SUMS, 6, True)
    for odd, pace in (
        (0.5, (1.0, 0.5, 1.0, 1.0, 2.5, 1.0, 1.0)),
        (0.6, (1.0, 1.0, 0.6, 3.0, 1.0, 1.0, 1.0)),
    ):
        found, _ = _served(answer, SUMS, _params(6, True), 7, pace=pace)
        got = (
            f"Most runs make {truth.rate:,.1f} tokens a second, one is faster, one slower. You"
            f" report {found:,.1f}."
        )
        expect(
            not truth.is_rate(found, odd),
            "best-of-all",
            f"{got}\nThat is the best run. The more often you try, the better it gets. Report the"
            " median.",
        )
        expect(
            not truth.is_rate(found, max(pace)),
            "worst-of-all",
            f"{got}\nThat is the worst run. Report the median.",
        )
        expect(
            truth.is_rate(found),
            "mean-for-median",
            f"{got}\nOne odd run must not move it. Report the median.",
        )


def _is_warm(answer: Callable) -> None:
    truth = _truth(SUMS, 5, True)
    found, clock = _served(answer, SUMS, _params(5, True), 1)
    said = f"With repeats = 1 you report {found:,.1f} tokens a second, it is {truth.rate:,.1f}."
    expect(
        clock.num_readings,
        "clock-not-used",
        f"{said}\nYour code never looked at the clock that it was given.",
    )
    expect(
        found > truth.rate / 3,
        "not-warmed-up",
        f"{said}\nThe very first step compiles, for two seconds. Serve something before you start"
        " the clock.",
    )


@exercise(
    "10.4",
    "Debug this: the fastest engine in the world",
    hints={"counts-what-was-allowed": 1, "served-from-the-cache": 2, "not-warmed-up": 3},
)
def check_tokens_per_second(answer: Callable) -> str:
    judges = (_counts_tokens, _reads_prompts, _is_typical, _is_warm)
    expect_all(*(functools.partial(judge, answer) for judge in judges))
    return "the engine is as fast as it is, whatever the prompts, the limits and the neighbours"


# --- 10.5 -----------------------------------------------------------------------------------------

Spans = list[tuple[float, float]]


def _union(
    spans: Spans, begin: float, end: float, *, nested: bool = True, ordered: bool = True
) -> Spans:
    """Disjoint spans in order, cut to the step."""
    cut = [(max(s, begin), min(e, end)) for s, e in spans]
    found: Spans = []
    for s, e in sorted(cut) if ordered else cut:
        if s >= e:
            continue
        if found and s <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], e) if nested else e)
        else:
            found.append((s, e))
    return found


def _length(spans: Spans) -> float:
    return sum(e - s for s, e in spans)


def _accounted(
    length: Callable, begin: float, end: float, kernels: Spans, cpu: Spans
) -> dict[str, float]:
    """`_attribute` of somebody for whom many spans take length(spans, begin, end)."""
    gpu, either = length(kernels, begin, end), length([*kernels, *cpu], begin, end)
    return {"gpu": gpu, "exposed_cpu": either - gpu, "idle": end - begin - either}


def _attribute(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    return _accounted(lambda *spans: _length(_union(*spans)), begin, end, kernels, cpu)


def _rest(gpu: float, exposed: float, begin: float, end: float) -> dict[str, float]:
    return {"gpu": gpu, "exposed_cpu": exposed, "idle": end - begin - gpu - exposed}


def _added_up(spans: Spans, begin: float, end: float) -> float:
    return sum(max(0.0, min(e, end) - max(s, begin)) for s, e in spans)


def _summed(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    gpu, right = _added_up(kernels, begin, end), _attribute(begin, end, kernels, cpu)
    return {**right, "gpu": gpu, "idle": end - begin - gpu - right["exposed_cpu"]}


def _summed_kept_idle(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    return {**_attribute(begin, end, kernels, cpu), "gpu": _added_up(kernels, begin, end)}


def _summed_clamped(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    found = _summed(begin, end, kernels, cpu)
    return {**found, "idle": max(0.0, found["idle"])}


def _all_cpu(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    gpu = _length(_union(kernels, begin, end))
    return _rest(gpu, _length(_union(cpu, begin, end)), begin, end)


def _all_cpu_kept_idle(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    return {**_attribute(begin, end, kernels, cpu), "exposed_cpu": _length(_union(cpu, begin, end))}


def _cpu_for_idle(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    gpu = _length(_union(kernels, begin, end))
    return _rest(gpu, end - begin - gpu, begin, end)


def _envelope(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    whole = [(min(s for s, _ in kernels), max(e for _, e in kernels))] if kernels else []
    return _attribute(begin, end, whole, cpu)


def _dropped(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    def inside(spans: Spans) -> Spans:
        return [(s, e) for s, e in spans if s >= begin and e <= end]

    return _attribute(begin, end, inside(kernels), inside(cpu))


def _variant(**how: bool) -> Callable:
    return functools.partial(_accounted, lambda *spans: _length(_union(*spans, **how)))


def _walked(spans: Spans, begin: float, end: float, *, back: bool) -> float:
    """For those who walk instead of merging. back: to the end of a short span in a long one; else
    less than nothing is added for it."""
    total, reached = 0.0, begin
    for s, e in sorted(spans):
        s, e = max(s, begin), min(e, end)
        added = e - max(s, reached)
        total += max(0.0, added) if back else added
        reached = max(begin if back else reached, e)
    return total


def _gaps_as_idle(begin: float, end: float, kernels: Spans, cpu: Spans) -> dict[str, float]:
    right = _attribute(begin, end, kernels, cpu)
    return {**right, "idle": end - begin - right["gpu"]}


_ATTRIBUTE_SUSPECTS: dict[str, tuple] = {
    "overlap-counted-twice": (
        (
            "Kernels on two streams can run at the same time. Whenever at least one runs, the GPU"
            " is busy: once, not twice. Add up the union, not the kernels."
        ),
        _summed,
        _summed_kept_idle,
        _summed_clamped,
        functools.partial(_accounted, _added_up),
    ),
    "hidden-cpu-counted": (
        (
            "CPU time costs something only where no kernel runs meanwhile. What the GPU's work"
            " hides is free."
        ),
        _all_cpu,
        _all_cpu_kept_idle,
    ),
    "idle-is-not-cpu": (
        (
            "Where no kernel runs, the CPU may be at fault, or it may be waiting too (for a lock,"
            " for the network, for the next request). Only time in which it works is exposed CPU"
            " time."
        ),
        _cpu_for_idle,
    ),
    "cpu-counted-as-idle": (
        (
            "Your idle time holds the CPU's as well. Idle is where neither works: the three numbers"
            " add up to the step."
        ),
        _gaps_as_idle,
    ),
    "less-than-nothing": (
        (
            "A span that lies within an earlier one adds nothing; yours takes something away:"
            " max(0, …)."
        ),
        functools.partial(_accounted, functools.partial(_walked, back=False)),
    ),
    "gaps-counted": (
        (
            "From the first kernel's start to the last one's end is not what the kernels ran: there"
            " are gaps between them."
        ),
        _envelope,
    ),
    "not-cut-to-the-step": (
        (
            "What reaches beyond the step belongs to its neighbours: count only the part between"
            " begin and end."
        ),
        functools.partial(
            _accounted, lambda spans, *_: _length(_union(spans, -math.inf, math.inf))
        ),
    ),
    "dropped-at-the-edge": (
        (
            "A kernel that begins before the step, or ends after it, runs partly within it. That"
            " part counts."
        ),
        _dropped,
    ),
    "nested-cuts-short": (
        (
            "A short kernel may lie within a long one on another stream. After it, the long one"
            " still runs: go on from the later of the two ends."
        ),
        _variant(nested=False),
        functools.partial(_accounted, functools.partial(_walked, back=True)),
    ),
    "order-assumed": (
        (
            "The spans come in no particular order: streams are recorded one after the other. Sort"
            " them by their start."
        ),
        _variant(ordered=False),
    ),
}


def _traces() -> list[tuple[float, float, Spans, Spans]]:
    """Steps: made by hand, and drawn."""
    import torch

    cases: list[tuple[float, float, Spans, Spans]] = [
        (0.0, 10.0, [(2.0, 5.0)], [(0.0, 1.0)]),
        (0.0, 10.0, [], [(3.0, 4.0)]),
        (0.0, 10.0, [(1.0, 9.0)], []),
        (0.0, 10.0, [(1.0, 4.0), (6.0, 9.0)], [(0.0, 2.0), (3.0, 7.0)]),
        (0.0, 20.0, [(2.0, 12.0), (4.0, 6.0), (14.0, 18.0)], [(0.0, 3.0), (12.0, 13.0)]),
        (0.0, 20.0, [(10.0, 15.0), (1.0, 4.0), (3.0, 8.0)], [(8.0, 9.0), (0.0, 1.0)]),
        (
            5.0,
            15.0,
            [(2.0, 7.0), (8.0, 11.0), (14.0, 18.0)],
            [(3.0, 6.0), (11.0, 12.0), (13.0, 20.0)],
        ),
        (0.0, 12.0, [(0.0, 4.0), (4.0, 8.0)], [(8.0, 9.0), (8.5, 11.0)]),
    ]
    generator = seeded(10)
    for size in (6, 15, 40):
        starts = torch.rand(2, size, generator=generator).mul(100).sub(5)
        lengths = torch.rand(2, size, generator=generator).mul(120 / size)
        spans = [
            [(round(s, 2), round(s + n, 2)) for s, n in zip(*rows, strict=True)]
            for rows in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        cases.append((0.0, 100.0, spans[0], spans[1]))
    return cases


@exercise(
    "10.5",
    "Where a step's time went",
    hints={
        "overlap-counted-twice": 1,
        "hidden-cpu-counted": 2,
        "nested-cuts-short": 3,
        "order-assumed": 3,
    },
)
def check_attribute(answer: Callable) -> str:
    count = diagnose(answer, _traces(), _attribute, _ATTRIBUTE_SUSPECTS, rtol=1e-6, atol=1e-6)
    return f"{count} recorded steps, every microsecond once"


# --- 10.6 -----------------------------------------------------------------------------------------

#: What has to be reached: the 99th percentile of the gaps and the worst TTFT in milliseconds, and
#: output tokens a second.
GAP, TTFT, RATE = 25.0, 3000.0, 6300.0


def evening() -> list:
    """A busy evening: the chat service's 22 seconds three times over, at eight times the pace."""
    from minivllm.course.sim.simulator import Arrival, azure_chat

    day = azure_chat(8)
    return [
        Arrival(a.time + k * 22.1 / 8, a.prompt_tokens, a.output_tokens)
        for k in range(3)
        for a in day
    ]


@exercise(
    "10.6", "Tune an engine", hints={"gaps-too-long": 1, "budget-too-small": 2, "too-few-seats": 3}
)
def check_tuning(max_num_batched_tokens: int, max_num_seqs: int) -> str:
    from minivllm.course.sim.simulator import simulate

    for name, value in (
        ("max_num_batched_tokens", max_num_batched_tokens),
        ("max_num_seqs", max_num_seqs),
    ):
        is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        expect(
            is_count, "wrong-type", f"{name} is {show(value)}.\nIt is a whole number, at least 1."
        )
    expect(
        max_num_seqs <= max_num_batched_tokens,
        "more-seats-than-tokens",
        f"{max_num_seqs} sequences may run, and a step has {max_num_batched_tokens} tokens.\nEach"
        " running sequence needs one of them in every step.",
    )

    def serve(budget: int, seats: int) -> dict[str, float]:
        return simulate(
            evening(), trace=False, max_num_batched_tokens=budget, max_num_seqs=seats
        ).summary()

    found = serve(max_num_batched_tokens, max_num_seqs)
    gap, ttft, rate = found["gap p99"], found["TTFT worst"], found["output tokens/s"]
    got = (
        f"99 % of the gaps are at most {gap:.1f} milliseconds, the worst TTFT is {ttft:,}, and"
        f" {rate:,} tokens come "
    )
    got += "out a second."
    expect(
        gap <= GAP,
        "gaps-too-long",
        f"{got}\nThe gaps are longer than {GAP:.0f} milliseconds. Whoever waits for the next token"
        " waits for the whole step: which of the two numbers says how long a step may become?",
    )
    if ttft <= TTFT and rate >= RATE:
        return "short gaps, short waits, and hardly a token lost"
    more = (
        serve(max_num_batched_tokens, 4 * max_num_seqs)
        if 4 * max_num_seqs <= max_num_batched_tokens
        else found
    )
    if more["output tokens/s"] > 1.01 * rate:
        raise Mistake(
            "too-few-seats",
            f"{got}\nWanted: {TTFT:,.0f} and {RATE:,.0f}. With more sequences at once, each reading"
            " of the weights would serve more of them; and who has no seat waits for the first"
            " token.",
        )
    raise Mistake(
        "budget-too-small",
        f"{got}\nWanted: {TTFT:,.0f} and {RATE:,.0f}. Prompts are read in small pieces, and each"
        " piece comes with a step that reads all weights: a larger budget reads them in fewer"
        " steps.",
    )
