"""10.4: debug this: the fastest engine in the world."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect, expect_all

if TYPE_CHECKING:
    pass
from minivllm.course.chapters.ch10_measuring.common import close
from minivllm.course.grading.exercise import Exercise, Known

#: Long questions, so that reading them costs something.
STORIES = tuple(
    f"Tell me a story about {who}. It should be long and have a beginning, a middle and an end, and"
    f" please do not forget that {who} has a friend who lives far away, behind the snowy mountains."
    for who in ("a fox named Pip", "an owl named Mira", "a robot named Ada")
)


SUMS = ("What is 12 + 7?", "What is 30 - 4?")


ANSWERS = ("Show me the emoji for a fox.", "What is 57 + 38?")  # a short one and a longer one
#: The most tokens of these answers: many times what they have.
LIMIT = 64

#: Two people ask the same.
SAME_AGAIN = (*SUMS, SUMS[0])


@functools.cache
def _chat(questions: tuple[str, ...]) -> tuple[list[int], ...]:
    """The questions as the chat template has them: the answers end by themselves."""
    from minivllm import LLM

    with LLM(device="cpu") as llm:
        return tuple(
            llm.render_chat([{"role": "user", "content": question}]) for question in questions
        )


def _served(
    answer: Callable,
    questions: tuple[str, ...],
    params: Any,
    repeats: int,
    lengths: tuple[int, ...] = (),
    **timer: Any,
) -> tuple[float, Any, list[_Run]]:
    """(what the answer says, the clock that it looked at, the runs) on a fresh engine.

    lengths: how many tokens the answers of the first run have, of the second and so on, in place of
    what params say. A run is a call of generate with all prompts. It is an "unequal-work" mistake
    where there are fewer than `repeats`, unless each prompt is served in calls of its own, which
    other judges name.
    """
    from minivllm import LLM
    from minivllm.course.sim.clocks import EngineClock

    clock = EngineClock(**timer)
    prompts = [list(prompt) for prompt in _chat(questions)]
    runs: list[_Run] = []
    with LLM(device="cpu", build_batch=clock.build_batch, num_kv_blocks=256) as llm:
        served = _note_runs(llm, [list(prompt) for prompt in prompts], clock, runs, lengths)
        found = answer(llm, prompts, params, clock.clock, repeats)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Mistake(
            "wrong-type", f"Got {show(found)}.\nExpected a number: output tokens a second."
        )
    expect(
        len(runs) >= repeats or sum(len(given) == 1 for given in served) >= repeats,
        "unequal-work",
        f"With repeats = {repeats} and {len(prompts)} prompts, {len(runs)} calls of generate got"
        " all prompts.\nEach of the timed runs does all the work: the prompts as they are given,"
        " `repeats` times, and once more to warm up.",
    )
    return float(found), clock, runs


def _note_runs(
    llm: Any, prompts: list[list[int]], clock: Any, runs: list[_Run], lengths: tuple[int, ...]
) -> list[list]:
    """Append to `runs` what each call of generate with all prompts does. Returns a list, which gets
    the prompts of every call. lengths: see `_served`.
    """
    generate, served = llm.generate, []

    def noting(given: Any, *more: Any, **named: Any) -> Any:
        served.append(list(given))
        start, whole = clock.now, served[-1] == prompts
        if whole and lengths:
            more, named["sampling_params"] = (), _params(lengths[len(runs) % len(lengths)], True)
        outputs = generate(given, *more, **named)
        if whole:
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            runs.append(_Run(tokens, clock.now - start))
        return outputs

    llm.generate = noting
    return served


@dataclass(frozen=True)
class _Run:
    """A call of generate with all prompts."""

    tokens: int
    seconds: float


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
        return any(close(found, self.tokens / (pace * seconds)) for seconds in times)


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
    truth = _truth(ANSWERS, LIMIT, False)
    alone = [_truth((question,), LIMIT, False) for question in ANSWERS]
    found, _, runs = _served(answer, ANSWERS, _params(LIMIT, False), 3)
    got = (
        f"Answers of {alone[0].tokens} and {alone[1].tokens} tokens: you report {found:,.1f} tokens"
        " a second, it is "
    )
    got += f"{truth.rate:,.1f}."
    expect(
        not any(
            close(found, (truth.tokens + truth.prompt_tokens) / t)
            for t in (truth.seconds, truth.cached)
        ),
        "prompt-tokens-counted",
        f"{got}\nThat counts the tokens of the prompts as well, which come in bulk. Count what came"
        " out.",
    )
    expect(
        found < 0.3 * truth.allowed / truth.seconds,
        "counts-what-was-allowed",
        f"{got}\nYou count max_tokens for each request. These ended by themselves, long before:"
        " count what came out.",
    )
    forced = _truth(ANSWERS, LIMIT, True)
    expect(
        not forced.is_rate(found),
        "changes-the-request",
        f"{got}\nThat is the speed with ignore_eos: answers that go on to max_tokens. Serve the"
        " parameters as they are given.",
    )
    expect(
        not any(
            close(found, 2 * one.tokens / t) for one in alone for t in (truth.seconds, truth.cached)
        ),
        "one-answer-for-all",
        f"{got}\nYou count one answer, and take the others to be as long. Add up the tokens of all"
        " outputs.",
    )
    one_by_one = (sum(one.seconds for one in alone), sum(one.cached for one in alone))
    expect(
        len(runs) >= 3 or not any(close(found, truth.tokens / seconds) for seconds in one_by_one),
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
    found, _, runs = _served(answer, STORIES, _params(4, True), 3)
    got = (
        f"Three long prompts, 4 tokens each: you report {found:,.1f} tokens a second, it is"
        f" {truth.rate:,.1f}."
    )
    # Three runs after each other read their prompts; a warm-up may come before or after them.
    reads = [run.seconds > (truth.seconds + truth.cached) / 2 for run in runs]
    hidden = len(reads) >= 3 and not any(all(reads[i : i + 3]) for i in range(len(reads) - 2))
    if hidden and truth.is_rate(found, cached=False):
        got += " But not each of the three runs took as long."
    expect(
        not hidden and not close(found, truth.tokens / truth.cached),
        "served-from-the-cache",
        f"{got}\nIn some of the timed runs, or in all, the engine finds the prompts in its prefix"
        " cache and does not read them: the warm-up has, or a run before. Nobody's first question"
        " is served like that: reset_prefix_cache() before each timed run.",
    )
    expect(
        truth.is_rate(found, cached=False),
        "wrong-values",
        f"{got}\nExpected: tokens that came out, by the time of one whole run.",
    )


def _is_typical(answer: Callable) -> None:
    truth = _truth(SUMS, 3, True)
    for odd, pace in (
        (0.5, (1.0, 0.5, 1.0, 1.0, 2.5, 1.0, 1.0)),
        (0.6, (1.0, 1.0, 0.6, 3.0, 1.0, 1.0, 1.0)),
    ):
        found, _, _ = _served(answer, SUMS, _params(3, True), 7, pace=pace)
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


def _counts_to_an_even_number(answer: Callable) -> None:
    """Twelve runs, three each at a half, once, twice and four times the usual time."""
    truth = _truth(SUMS, 2, True)
    found, _, _ = _served(answer, SUMS, _params(2, True), 12, pace=(1.0, 0.5, 2.0, 4.0))
    rates = [truth.tokens / (pace * truth.seconds) for pace in (4.0, 2.0, 1.0, 0.5)]
    # The median of the rates, or the rate of the median time.
    middles = ((rates[1] + rates[2]) / 2, truth.tokens / (1.5 * truth.seconds))
    expect(
        any(close(found, middle) for middle in middles),
        "one-of-the-two-middles",
        f"Of twelve runs three each make {', '.join(f'{rate:,.1f}' for rate in rates)} tokens per"
        f" second, and you report {found:,.1f}.\nOf an even number of values, the median is"
        " the mean of the two in the middle. `repeats` says how many runs there are.",
    )


def _counts_each_run(answer: Callable) -> None:
    """Runs whose answers have different lengths, as sampled ones do."""
    found, _, runs = _served(answer, SAME_AGAIN, _params(8, True), 3, lengths=(5, 8, 4, 2))
    rates = [run.tokens / run.seconds for run in runs]
    said = ", ".join(f"{run.tokens} in {run.seconds * 1e3:,.1f} ms" for run in runs)
    # A warm-up may come before or after the timed runs.
    expect(
        any(close(found, sorted(rates[i : i + 3])[1]) for i in range(len(rates) - 2)),
        "tokens-of-another-run",
        f"Sampled answers differ in length from run to run. These runs made {said}, and you report"
        f" {found:,.1f} tokens per second.\nDivide the tokens of each run by the time of the same"
        " run, and report the median of these rates.",
    )


def _is_warm(answer: Callable) -> None:
    truth = _truth(SUMS, 3, True)
    found, clock, runs = _served(answer, SUMS, _params(3, True), 1)
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
    # The median of two rates, or the rate of the median time.
    timed = runs[:2]
    both = (
        sum(run.tokens / run.seconds for run in timed) / 2,
        truth.tokens / (sum(run.seconds for run in timed) / 2),
    )
    expect(
        len(timed) < 2 or not any(close(found, rate) for rate in both),
        "warm-up-counted",
        f"{said}\nThat is the middle between the first run, which compiles, and the second. Serve"
        " once before the loop, without a look at the clock; then `repeats` runs count.",
    )


def check_tokens_per_second(answer: Callable) -> str:
    judges = (_counts_tokens, _reads_prompts, _is_typical, _is_warm)
    expect_all(*(functools.partial(judge, answer) for judge in judges))
    _counts_to_an_even_number(answer)
    _counts_each_run(answer)
    return "the engine is as fast as it is, whatever the prompts, the limits and the neighbours"


EXERCISE = Exercise(
    id="10.4",
    title="Debug this: the fastest engine in the world",
    check=check_tokens_per_second,
    mistakes=(
        Known(
            "one-of-the-two-middles",
            answers=r"""
# %% the middle of the sorted rates
@@
-    return median(rates)
+    return sorted(rates)[len(rates) // 2]
""",
        ),
        Known(
            "warm-up-counted",
            hint=3,
            answers=r"""
# %% one run more, and all of them count
@@
-    llm.generate(prompts, params, use_tqdm=False)
@@
-    for _ in range(repeats):
+    for _ in range(repeats + 1):
""",
        ),
        Known(
            "tokens-of-another-run",
            answers=r"""
# %% the tokens of the warm-up
@@
-    llm.generate(prompts, params, use_tqdm=False)
+    outputs = llm.generate(prompts, params, use_tqdm=False)
+    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
@@
-        outputs = llm.generate(prompts, params, use_tqdm=False)
+        llm.generate(prompts, params, use_tqdm=False)
@@
-        rates.append(
-            sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
-        )
+        rates.append(tokens / seconds)

# %% the tokens of the last run, by the median of the times
@@
-        rates.append(
-            sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
-        )
-    return median(rates)
+        rates.append(seconds)
+    return sum(len(output.outputs[0].token_ids) for output in outputs) / median(rates)
""",
        ),
        Known(
            "changes-the-request",
            answers=r"""
# %% answers that go on to the limit
@@
-    rates = []
+    rates = []
+    params = SamplingParams(temperature=0, max_tokens=params.max_tokens, ignore_eos=True)
""",
        ),
        Known(
            "counts-what-was-allowed",
            hint=1,
            answers=r"""
# %% all four complaints
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    for _ in range(repeats):
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(len(prompts) * params.max_tokens / seconds)
    return max(rates)

# %% the limit counts
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(len(prompts) * params.max_tokens / seconds)
    return median(rates)
""",
        ),
        Known(
            "prompt-tokens-counted",
            answers=r"""
# %% all tokens count
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(
            sum(
                len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
                for output in outputs
            )
            / seconds
        )
    return median(rates)
""",
        ),
        Known(
            "served-from-the-cache",
            hint=2,
            answers=r"""
# %% the warm-up fills the cache
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(
            sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
        )
    return median(rates)

# %% emptied after each run: the first one finds the warm-up's blocks
@@
-        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
-        start = clock()
+        start = clock()
@@
         seconds = clock() - start
+        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()

# %% emptied before every other run
@@
-        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
+        if len(rates) % 2 == 0:
+            llm.llm_engine.scheduler.block_manager.reset_prefix_cache()

# %% emptied once, before the loop
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
    for _ in range(repeats):
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(
            sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
        )
    return median(rates)
""",
        ),
        Known(
            "unequal-work",
            answers=r"""
# %% who asks the same is served once
@@
-    rates = []
+    rates = []
+    prompts = [p for i, p in enumerate(prompts) if p not in prompts[:i]]

# %% five runs are enough
@@
-    for _ in range(repeats):
+    for _ in range(min(repeats, 5)):

# %% seven runs are enough
@@
-    for _ in range(repeats):
+    for _ in range(min(repeats, 7)):

# %% equal prompts, and more than two, are served once
@@
-        outputs = llm.generate(prompts, params, use_tqdm=False)
+        outputs = llm.generate(prompts[:2], params, use_tqdm=False)
+        outputs = [outputs[n % 2] for n in range(len(prompts))]
""",
        ),
        Known(
            "best-of-all",
            answers=r"""
# %% the best run
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(
            sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
        )
    return max(rates)
""",
        ),
        Known(
            "mean-for-median",
            answers=r"""
# %% the mean run
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(
            sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
        )
    return sum(rates) / len(rates)

# %% all tokens by all time
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    llm.generate(prompts, params, use_tqdm=False)
    tokens = seconds = 0
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds += clock() - start
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
    return tokens / seconds
""",
        ),
        Known(
            "worst-of-all",
            answers=r"""
# %% to be on the safe side
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(
            sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
        )
    return min(rates)
""",
        ),
        Known(
            "not-warmed-up",
            hint=3,
            answers=r"""
# %% no warm-up
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(
            sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
        )
    return median(rates)
""",
        ),
        Known(
            "wrong-type",
            answers=r"""
# %% all rates
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate(prompts, params, use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(
            sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
        )
    return rates
""",
        ),
        Known(
            "one-answer-for-all",
            answers=r"""
# %% counts the first
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    llm.generate(prompts, params, use_tqdm=False)
    rates = []
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(len(outputs) * len(outputs[0].outputs[0].token_ids) / seconds)
    return median(rates)
""",
        ),
        Known(
            "one-at-a-time",
            answers=r"""
# %% a call for each prompt
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    llm.generate(prompts, params, use_tqdm=False)
    rates = []
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = [llm.generate([p], params, use_tqdm=False)[0] for p in prompts]
        seconds = clock() - start
        rates.append(sum(len(o.outputs[0].token_ids) for o in outputs) / seconds)
    return median(rates)
""",
        ),
    ),
    right=r"""
# %% another warm-up, tokens by time
def tokens_per_second(llm, prompts, params, clock, repeats=5):
    rates = []
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    for _ in range(repeats):
        llm.llm_engine.scheduler.block_manager.reset_prefix_cache()
        start = clock()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - start
        rates.append(
            sum(len(output.outputs[0].token_ids) for output in outputs) / seconds
        )
    return median(rates)
""",
)
