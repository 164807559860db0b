"""07.6: the loop."""

from __future__ import annotations

import copy
import functools
import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect, expect_refusal, expect_unchanged
from minivllm.course.sim.requests import RequestMaker, in_chat

if TYPE_CHECKING:
    from minivllm.engine.engine_core import StepOutput
    from minivllm.engine.model_runner import StepResult
    from minivllm.engine.sequence import ScheduledBatch, Sequence
    from minivllm.llm import LLM
    from minivllm.outputs import CompletionOutput, RequestOutput
    from minivllm.sampling_params import SamplingParams

#: More steps of the core than any run here needs.
_MOST_STEPS = 1500


#: A small pool: its blocks are zeroed for each engine of the check.
_ROOM = {"num_kv_blocks": 64, "max_model_len": 512}


class _TooManySteps(Exception):
    pass


@dataclass(frozen=True)
class _Asked:
    """A question to be put into the chat template, and what it asks of `SamplingParams` besides."""

    question: str
    wishes: tuple[tuple[str, Any], ...] = ()

    @property
    def prompt(self) -> list[int]:
        return list(_chat_ids(self.question))

    @property
    def params(self) -> SamplingParams:
        from minivllm.sampling_params import SamplingParams

        wishes = {"temperature": 0.0, "max_tokens": 24} | dict(self.wishes)
        if isinstance(stops := wishes.get("stop"), tuple):
            wishes["stop"] = list(stops)
        return SamplingParams(**wishes)


def _ask(question: str, **wishes: Any) -> _Asked:
    return _Asked(question, tuple(wishes.items()))


_WORDS = (
    *("Zoë", "the", "fox", "a", "🦊", "café", "owl", "says:", "so,", "12 + 7", "= 19.", "key"),
    *("Then", "night", "\n\n", "an", "old", "market", "END", "of", "figs;", "why?", "No.", "1"),
)


@functools.lru_cache(maxsize=4096)
def _script(prompt: tuple[int, ...], seed: int | None) -> list[int]:
    """The tokens with which a scripted model answers: 15 to 60, and the end token.

    seed: None at temperature 0.
    """
    words = random.Random(zlib.crc32(repr((prompt, seed)).encode()))
    text = " ".join(words.choice(_WORDS) for _ in range(words.randint(7, 25)))
    tokenizer = _package(scripted=True).get_tokenizer()
    return [*tokenizer.encode(text), tokenizer.eos_token_id]


def _execute(batch: ScheduledBatch) -> StepResult:
    """A step without a model: everybody gets the next tokens of their script.

    So a long run takes no time, and what an answer says depends on nothing but its request.
    """
    import torch

    from minivllm.engine.model_runner import Sampled, StepResult

    found = []
    for item in batch.sampled:
        seq = item.sequence
        seed = None if seq.params.temperature == 0 else seq.seed
        words = _script(tuple(seq.token_ids[: seq.num_prompt_tokens]), seed)
        first = item.sample_position - seq.num_prompt_tokens
        tokens: list[int] = []
        for number in range(len(item.proposed_token_ids) + 1):
            tokens.append(words[min(first + number, len(words) - 1)])
            if tokens != list(item.proposed_token_ids[: number + 1]):
                break
        found.append(tokens)
    flat = torch.tensor([token for tokens in found for token in tokens], dtype=torch.int64)
    sampled = Sampled(list(range(len(found))), flat, counts=list(map(len, found)))
    return StepResult(sampled, flat, None, [])


class _Rig:
    """The three parts of an engine, with a core under observation.

    scripted: whether `_execute` stands in the place of the model.
    """

    def __init__(self, *, scripted: bool = True, **options: Any) -> None:
        from minivllm import LLM
        from minivllm.engine.output_processor import OutputProcessor

        self.llm = LLM(device="cpu", **_ROOM | options)
        if scripted:
            self.llm.llm_engine.core.model_runner.execute = _execute
        self.core: Any = self.llm.llm_engine.core
        self.inputs, self.outputs = self.llm.llm_engine.input_processor, OutputProcessor()
        self.num_steps = self.num_outputs = self.num_tokens = self.num_tokens_of_last = 0
        #: What the core was given, in that order.
        self.sequences: list[Sequence] = []
        self.most_at_once = 0  # sequences that got tokens in one step
        self.served: set[str] = set()  # requests that got tokens in the last step
        self.last_steps: dict[str, int] = {}  # request_id -> the last step that gave it tokens
        self._step, self._add = self.core.step, self.core.add
        self.core.step, self.core.add = self.step, self.add

    def step(self) -> StepOutput:
        self.num_steps += 1
        if self.num_steps > _MOST_STEPS:
            raise _TooManySteps
        step = self._step()
        seq_ids = [output.seq_id for output in step.outputs]
        if seq_ids:
            self.num_outputs += len(seq_ids)
            self.num_tokens_of_last = sum(len(output.token_ids) for output in step.outputs)
            self.num_tokens += self.num_tokens_of_last
        self.most_at_once = max(self.most_at_once, len(seq_ids))
        try:
            self.served = {self.outputs.owner_of(seq_id).request_id for seq_id in seq_ids}
        except KeyError as error:
            raise Mistake(
                "computes-past-the-stop",
                f"The core gave tokens to sequence {error.args[0]}, of which `outputs` knows"
                " nothing any more: for its reader the request has ended.\nWhoever ends a request"
                " outside of the core, by a stop string or an abort, tells the core, too, with"
                " `core.finish`.",
            ) from error
        self.last_steps |= dict.fromkeys(self.served, self.num_steps)
        return step

    def add(self, seq: Sequence) -> None:
        self.sequences.append(seq)
        self._add(seq)

    def engine(self, cls: Callable) -> Any:
        new_request = RequestMaker(self.llm.get_tokenizer())
        engine = cls(self.inputs, self.core, self.outputs, new_request)
        _expect_own_count(engine, 0)
        return engine

    def _endless(self) -> Mistake:
        """What to say where `run` does not come back."""
        going = [*self.outputs.requests]
        heard = any(c.token_ids for r in self.outputs.requests.values() for c in r.completions)
        if not self.left_over and going and heard:
            return Mistake(
                "waits-for-nothing",
                f"The core has nothing left to do, and `run` still waits: in `outputs` these"
                f" requests have not been collected to their ends: {show(going)}.\nDoes"
                " `core.finish` end a sequence that no stop string has ended? Does each output go"
                " to the collector that `step` collects from? Are all completions queued?",
            )
        return Mistake(
            "endless",
            f"After {_MOST_STEPS} steps of the core `run` goes on; the core has"
            f" {len(self.left_over)} unfinished sequences.\nDoes `outputs` learn what each step"
            " brought (`process`), and do you see when a request has finished"
            " (`output.finished`)?",
        )

    def expect_empty(self, after: str) -> None:
        """Nothing is left behind: no sequence, no request, no block."""
        used = self.core.num_used_kv_blocks
        expect(
            not self.left_over and not self.outputs.requests and not used,
            "left-behind",
            f"{after} the core has {len(self.left_over)} sequences and {used} blocks in use, and"
            f" the output processor {len(self.outputs.requests)} requests.\nWho put them there? A"
            " request is forgotten when its end has been collected; whoever ends one from outside"
            " tells the core, with `core.finish`.",
        )

    @property
    def left_over(self) -> list[Sequence]:
        """What the core has not finished."""
        return [*self.core.scheduler.running, *self.core.scheduler.waiting]

    def run(self, engine: Any, asked: list[_Asked]) -> list[RequestOutput]:
        """engine.run, and an endless loop is a Mistake; so is what it returns, if it is no outputs
        to their end.
        """
        from minivllm.outputs import RequestOutput

        prompts, params = [a.prompt for a in asked], [a.params for a in asked]
        before = copy.deepcopy((prompts, params))
        try:
            outputs = engine.run(prompts, params)
        except _TooManySteps:
            raise self._endless() from None
        expect_unchanged(prompts, before[0], "`prompts`, in `run`")
        expect_unchanged(params, before[1], "`params`, in `run`")
        expect(
            isinstance(outputs, list) and all(isinstance(o, RequestOutput) for o in outputs),
            "wrong-type",
            f"`run` gave {show(outputs)}.\nIt gives a list of `RequestOutput`s, one for each"
            f" prompt.{_return_missing(outputs)}",
        )
        expect(
            len(outputs) == len(asked),
            "outputs-missing",
            f"`run` gave {len(outputs)} outputs for {len(asked)} prompts.\nEach request must come"
            " back once, the shortest and the last too.",
        )
        unfinished = [output.request_id for output in outputs if not output.finished]
        expect(
            not unfinished,
            "unfinished",
            f"`run` came back with outputs of requests {unfinished} that are not finished.\nGo on"
            " until all have, and return the last output of each.",
        )
        return outputs


@functools.cache
def _right(asked: _Asked, scripted: bool = True) -> RequestOutput:
    """What the package's `generate` gives: made once for a process, whoever is being checked."""
    [output] = _package(scripted).generate([asked.prompt], asked.params, use_tqdm=False)
    return output


def _completions(asked: _Asked) -> list[CompletionOutput]:
    """The completions of a request. In `RequestMaker`'s hands, number i has the seed + i."""
    wishes = {name: wish for name, wish in asked.wishes if name not in ("n", "seed")}
    seed = dict(asked.wishes)["seed"]
    alone = [_ask(asked.question, seed=seed + i, **wishes) for i in range(asked.params.n)]
    return [_right(one).outputs[0] for one in alone]


@functools.cache
def _package(scripted: bool) -> LLM:
    from minivllm import LLM

    llm = LLM(device="cpu", **_ROOM)
    if scripted:
        llm.llm_engine.core.model_runner.execute = _execute
    return llm


@functools.cache
def _chat_ids(question: str) -> tuple[int, ...]:
    return tuple(in_chat(_package(scripted=True), question))


def _right_texts(asked: Iterable[_Asked], scripted: bool = True) -> list[str]:
    return _texts(_right(one, scripted) for one in asked)


def _texts(outputs: Iterable[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


_ASKED = (
    "What is 12 + 7?",
    "What is a KV cache?",
    "Tell me a story about a fox named Zoë.",
    "What is a block table?",
)


def check_loop(answer: Callable) -> str:
    served = _check_texts(answer)
    _check_steps(answer)
    _check_completions(answer)
    _check_crowd(answer)
    _check_stops(answer)
    _check_late_stops(answer)
    _check_guest(answer, 5)
    _check_guest(answer, 50)
    _check_abort(answer)
    _check_early_abort(answer)
    _check_two_engines(answer)
    _check_refused(answer)
    _check_several_tokens(answer)
    return (
        f"{served} requests in chunks, preempted, stopped, aborted and refused: the package's"
        " texts, and no blocks left behind"
    )


def _check_texts(answer: Callable) -> int:
    """The right texts, in order, served together."""
    rig = _Rig(scripted=False, max_num_batched_tokens=24)
    asked = [_ask(question) for question in (_ASKED[2], _ASKED[0], *_ASKED[1::2])]
    right = _right_texts(asked, scripted=False)
    engine = rig.engine(answer)
    outputs = rig.run(engine, asked)
    texts = _texts(outputs)
    expect(
        rig.most_at_once > 1,
        "one-at-a-time",
        f"Never did two requests get tokens in one step: {rig.num_steps} steps for"
        f" {len(asked)} requests.\nQueue *all* of them first, then step: the scheduler puts them"
        " together, and a step costs a GPU nearly the same for one or for fifty.",
    )
    if texts != right and sorted(texts) == sorted(right):
        ends = [rig.last_steps[output.request_id] for output in outputs]
        by_end = ends == sorted(ends)
        order = "the order in which the requests ended" if by_end else "another order, as of a set"
        raise Mistake(
            "order-of-the-end" if by_end else "wrong-order",
            f"The texts are right, but they come in {order}.\nThe caller wants them in the order of"
            " the prompts: collect by request_id, and look up the ids in the order of `queue`.",
        )
    for text, wanted in zip(texts, right, strict=True):
        expect(
            text == wanted,
            "wrong-text",
            f"Your engine says {text!r}, expected {wanted!r}.\nTake the last output of each"
            " request, the one that is `finished`.",
        )
    rig.expect_empty("After `run`")
    before = rig.num_steps
    expect(
        rig.run(engine, []) == [],
        "wrong-type",
        "`run([], [])` has nobody to serve: an empty list is expected.",
    )
    expect(
        rig.num_steps == before,
        "a-step-too-many",
        "`run([], [])` has nobody to serve, and it made a step.\nAsk whether somebody is left"
        " *before* each step, also before the first.",
    )
    return len(asked)


def _return_missing(value: Any) -> str:
    return " Is a `return` missing?" if value is None else ""


def _check_steps(answer: Callable) -> None:
    """`step` by itself: what it returns, requests that come later, and an idle engine.

    Prompts take several steps, which bring no news.
    """
    rig = _Rig(max_num_batched_tokens=8)
    engine = rig.engine(answer)
    idle = engine.step()
    expect(
        idle == [],
        "idle-step",
        f"With nothing to do, `step` gave {show(idle)}.\nExpected is an empty list."
        f"{_return_missing(idle)}",
    )
    early, late = _ask(_ASKED[1], max_tokens=8), _ask(_ASKED[0])
    ids, last = [_added(engine, early)], {}
    for number in range(60):
        if number == 6:
            ids.append(_added(engine, late))
        before = rig.num_steps
        news = _news(engine)
        made = rig.num_steps - before
        expect(
            made == 1,
            "more-than-a-step" if made else "no-step",
            f"One call of `step` made {made} steps of the core.\n`step` makes one, also where that"
            " brings no news, as in the middle of a prompt.",
        )
        _expect_heard(rig, engine, news)
        last |= {output.request_id: output for output in news}
        if len(last) == 2 and all(output.finished for output in last.values()):
            break
    for id, wanted in zip(ids, _right_texts([early, late]), strict=True):
        expect(
            id in last and last[id].finished,
            "late-request-lost",
            f"After 60 steps no output says that request {id} has finished.\nA request may come at"
            " any time, also between two steps: `add` gives it to `outputs` and to the core.",
        )
        text = last[id].outputs[0].text
        expect(
            text == wanted,
            "wrong-text",
            f"Stepped by hand, request {id} says {text!r}, expected {wanted!r}.",
        )
    _expect_count(rig, getattr(engine, "num_tokens", None), rig.num_tokens)


def _expect_heard(rig: _Rig, engine: Any, news: list[RequestOutput]) -> None:
    """Each request that got tokens in the last step has news."""
    silent = rig.served - {output.request_id for output in news}
    if not silent:
        return
    who = ", ".join(sorted(silent))
    expect(
        not silent <= {output.request_id for output in _news(engine) if not output.finished},
        "a-step-late",
        f"Request {who} got a token, and only the next `step` mentions it.\nDo you collect before"
        " `outputs.process` has seen the step? First `process`, then `collect`.",
    )
    raise Mistake(
        "unfinished-left-out",
        f"Request {who} got a token, and `step` does not mention it."
        "\nReturn all that `outputs.collect` gives, also of requests that go on: somebody reads"
        " along.",
    )


def _added(engine: Any, asked: _Asked) -> str:
    id = engine.add(asked.prompt, asked.params)
    expect(
        isinstance(id, str),
        "no-id",
        f"`add` gave {show(id)}.\nIt returns the `request_id` of the new request: the caller finds"
        f" its outputs by it, and can abort it.{_return_missing(id)}",
    )
    return id


def _news(engine: Any) -> list[RequestOutput]:
    """What a step returns, if it is a list of outputs."""
    from minivllm.outputs import RequestOutput

    news = engine.step()
    expect(
        isinstance(news, list) and all(isinstance(output, RequestOutput) for output in news),
        "wrong-type",
        f"`step` gave {show(news)}, expected a list of `RequestOutput`s: what `outputs.collect`"
        f" returns.{_return_missing(news)}",
    )
    return news


def _check_completions(answer: Callable) -> None:
    """A request may want several completions, and each is a sequence."""
    for n in (3, 17):
        _check_completions_of(answer, n)


def _check_completions_of(answer: Callable, n: int) -> None:
    rig = _Rig()
    asked = [_ask(_ASKED[0], n=n, temperature=1.0, seed=5)]
    message = (
        f"A request with n={n} has {n} completions, and the core did not get the sequences 0 to"
        f" {n - 1} of it.\nEach is a sequence of its own: give the core"
        " `request.new_sequence(request, index)` for every index below `checked.params.n`."
    )
    try:
        [output] = rig.run(rig.engine(answer), asked)
    except Mistake as mistake:
        usual = [seq.index for seq in rig.sequences] == list(range(n))
        if mistake.name not in ("endless", "waits-for-nothing") or usual:
            raise
        raise Mistake("completions-left-out", message) from None
    texts = [completion.text for completion in output.outputs]
    right = [completion.text for completion in _completions(asked[0])]
    expect(
        texts == right,
        "wrong-text",
        f"A request with n={n} says {show(texts)}, expected {show(right)}.\nCompletion i is the"
        " sequence `request.new_sequence(request, i)`.",
    )
    rig = _Rig()
    rig.engine(answer).add(asked[0].prompt, asked[0].params)
    queued = sorted(seq.index for seq in rig.sequences)
    seen = f"Of a request with n={n}, `add` gave the core the sequences {show(queued)}."
    expect(queued == list(range(n)), "completions-left-out", f"{seen}\n{message}")


def _check_crowd(answer: Callable) -> None:
    """Equal prompts with other seeds, in a cache too small for all, in chunks: every text as
    when alone.
    """
    options = {
        "max_num_batched_tokens": 32,
        "num_kv_blocks": 24,
        "max_model_len": 160,
        "max_num_seqs": 12,
    }
    rig = _Rig(**options)
    asked = [
        _ask(question, temperature=1.0, seed=seed, max_tokens=60)
        for question in (_ASKED[2], _ASKED[1])
        for seed in range(30)
    ]
    # The same prompt and seed, and another length; the same request twice.
    asked += [_ask(_ASKED[1], temperature=1.0, seed=1, max_tokens=9), asked[0]]
    right = _right_texts(asked)
    got = _texts(rig.run(rig.engine(answer), asked))
    given = [
        (seq.token_ids[: seq.num_prompt_tokens], seq.params.seed, seq.params.max_tokens)
        for seq in rig.sequences
    ]
    wishes = [(one.prompt, one.params.seed, one.params.max_tokens) for one in asked]
    expect(
        sorted(given) == sorted(wishes),
        "wishes-mixed-up",
        "Many requests have prompts and parameters of their own, and the core got other pairs of"
        " them.\n`params[i]` belongs to `prompts[i]`: process each prompt with its own.",
    )
    assert rig.core.scheduler.stats.num_preemptions > 0, "this case should preempt"
    expect(
        not any(got.count(text) > right.count(text) for text in got if text in right),
        "texts-overwritten",
        "Many requests have the same prompt and other seeds, and some get the text of another."
        "\nKeep what belongs to a request by its request_id; prompts are no keys.",
    )
    expect(
        got == right or sorted(got) != sorted(right),
        "wrong-order",
        f"{len(asked)} requests get the right texts, in another order than that of the prompts.\n"
        "Look outputs up by request_id, in the order in which `run` got its prompts. Ids are texts:"
        ' "10" sorts before "2".',
    )
    for text, wanted in zip(got, right, strict=True):
        expect(
            text == wanted,
            "wrong-text",
            f"In a full cache a request says {text!r}, expected {wanted!r} as when it is alone."
            "\nWhat belongs to which request? Order and number change in every step.",
        )
    rig.expect_empty(f"After `run` of {len(asked)} requests")


def _check_two_engines(answer: Callable) -> None:
    """Two engines at the same time: what belongs to one stays with it."""
    rigs, asked = [_Rig(), _Rig()], [_ask(_ASKED[1]), _ask(_ASKED[3], max_tokens=9)]
    engines = [rig.engine(answer) for rig in rigs]
    ids = [_added(engine, one) for engine, one in zip(engines, asked, strict=True)]
    last: list[dict[str, RequestOutput]] = [{}, {}]
    advice = (
        "Each engine has a collector and a dict of its own: make them in `__init__`, not in the"
        " class."
    )
    # The end of this one is news for whoever steps the first engine, and for nobody else.
    gone = _added(engines[0], asked[1])
    _aborted(engines[0], gone, "a request in another engine")
    heard = [output.request_id for output in _news(engines[1])]
    expect(
        gone not in heard,
        "shared-between-engines",
        f"Two engines run. Request {gone} of the first was aborted, and a step of the second"
        f" reports it.\n{advice}",
    )
    for _ in range(80):
        for number, engine in enumerate(engines):
            last[number] |= {output.request_id: output for output in _news(engine)}
    for id, outputs, wanted in zip(ids, last, _right_texts(asked), strict=True):
        text = outputs[id].outputs[0].text if id in outputs else None
        expect(
            text == wanted,
            "shared-between-engines",
            f"Two engines are stepped in turn, and one says {text!r}, expected {wanted!r}.\n"
            f"{advice}",
        )
    for rig, engine in zip(rigs, engines, strict=True):
        _expect_own_count(engine, rig.num_tokens)


def _expect_own_count(engine: Any, right: int) -> None:
    """`num_tokens` where other engines have been at work, too."""
    said = getattr(engine, "num_tokens", right)
    expect(
        said == right,
        "shared-between-engines",
        f"An engine is made, and its `num_tokens` is {show(said)} before its first step."
        "\nEach engine counts for itself, from 0: `self.num_tokens = 0` in `__init__`, and"
        " `self.num_tokens +=` in `step`. What stands in the class belongs to all engines."
        if right == 0
        else f"Two engines are stepped in turn. One of them has brought {right} tokens, and its"
        f" `num_tokens` is {show(said)}.\nEach engine counts for itself: `self.num_tokens`, which"
        " `__init__` makes.",
    )


def _check_guest(answer: Callable, length: int) -> None:
    """`run`, while a request that was added before is still being served.

    length: the number of tokens that this one wants; `run`'s own wants 8.
    """
    rig = _Rig()
    engine = rig.engine(answer)
    guest, mine = _ask(_ASKED[2], max_tokens=length, ignore_eos=True), _ask(_ASKED[0], max_tokens=8)
    _added(engine, guest)
    begins = "A request was added before `run` was called for another one"
    try:
        texts = _texts(rig.run(engine, [mine]))
    except KeyError as error:
        raise Mistake(
            "foreign-request",
            f"{begins}: KeyError: {show(error.args[0])}.\nA step serves everybody. `run` collects"
            " the outputs of its own requests, and passes over the others.",
        ) from error
    except Mistake as mistake:
        if mistake.name != "outputs-missing":
            raise
        raise Mistake(
            "foreign-request",
            f"{begins}, and `run` returned both.\nA step serves everybody; `run` returns the"
            " outputs of its own requests.",
        ) from None
    wanted = _right_texts([mine])
    expect(
        texts == wanted,
        "foreign-request",
        f"{begins}, and `run` gave {show(texts)}, expected {show(wanted)}.\nA step serves"
        " everybody; `run` returns the outputs of its own requests.",
    )
    steps, theirs = rig.num_steps, rig.sequences[0]
    expect(
        not theirs.is_finished or theirs.num_output_tokens == length,
        "foreign-request",
        f"{begins}: that one wants {length} tokens, and was ended after"
        f" {theirs.num_output_tokens}, as {theirs.finish_reason!r}.\n`run` leaves requests alone"
        " that are not its own: it neither aborts nor finishes them.",
    )
    if length < 20:
        return
    expect(
        rig.left_over and steps < 20,
        "waits-for-others",
        f"{begins}: that one wants 50 tokens, and `run`'s own wants 8. `run` came back after"
        f" {steps} steps, when the other had ended, too.\nWait for your own requests only: their"
        " ids say which they are. Somebody else may add requests for ever.",
    )
    written, own = (seq.num_output_tokens for seq in rig.sequences)
    expect(
        written == own,
        "a-step-too-many",
        f"{begins}. Both got a token in each step, and when `run` came back, its own had got"
        f" {own} and the other {written}.\nCome back after the step that ends the last of your own"
        " requests.",
    )
    last: list[RequestOutput] = []
    while rig.left_over and rig.num_steps < steps + 60:
        last = _news(engine) or last
    expect(
        last and last[-1].finished and _texts(last) == _right_texts([guest]),
        "foreign-request",
        f"{begins}. After `run` it was stepped on, and its last output is {show(_texts(last))},"
        f" expected {show(_right_texts([guest]))}.\n`run` leaves requests alone that are not its"
        " own.",
    )
    rig.run(engine, [mine])
    _expect_count(rig, getattr(engine, "num_tokens", None), rig.num_tokens, late=True)


def _check_stops(answer: Callable) -> None:
    """Stop strings end the work, not only the text."""
    rig = _Rig()
    [text] = _right_texts([_ask(_ASKED[2], max_tokens=40)])
    words = text.split(" ")
    stop = f"{words[5]} {words[6]}"
    wishes = {"max_tokens": 40, "stop": ("nowhere", stop)}
    [output] = rig.run(rig.engine(answer), [_ask(_ASKED[2], **wishes)])
    [seq] = rig.sequences
    expect(
        seq.is_finished and seq.num_output_tokens < 40,
        "computes-past-the-stop",
        f"The text ended at {stop!r}, and the core knows nothing of it: it went on to"
        f" {seq.num_output_tokens} tokens, and has {'' if seq.is_finished else 'not '}finished."
        "\nThe core knows no text. `outputs.process`"
        " returns whom a stop string has ended: tell the core, with `core.finish`.",
    )
    said = (seq.finish_reason, seq.stop_reason)
    expect(
        said == ("stop", stop),
        "no-stop-reason",
        f"The core has noted {said} as the end of the sequence, expected {('stop', stop)}.\nIt is"
        ' `core.finish([seq_id], "stop", stop_string)`.',
    )
    wanted = text[: text.index(stop)]
    expect(
        output.outputs[0].text == wanted,
        "wrong-text",
        f"With the stop string {stop!r} your engine says {output.outputs[0].text!r}, expected"
        f" {wanted!r}.",
    )
    rig.expect_empty("After a stop string")


def _check_late_stops(answer: Callable) -> None:
    """Many stops in few steps: by the last token allowed, one of several completions, with text
    before it in the same piece.
    """
    rig = _Rig()
    stops = {"stop": (" fox", "END", "café", " = 19.")}
    asked = [
        _ask(question, temperature=1.0, seed=seed, max_tokens=max_tokens, **stops)
        for question in _ASKED
        for seed, max_tokens in ((1, 60), (2, 7), (3, 60))
    ]
    asked += [_ask(_ASKED[1], n=4, temperature=1.0, seed=9, max_tokens=60, **stops)]
    for one in _stopped_at_the_end():
        asked.append(one)
    got = rig.run(rig.engine(answer), asked)
    for output, one in zip(got, asked, strict=True):
        right_ones = _completions(one) if one.params.n > 1 else _right(one).outputs
        for completion, wanted in zip(output.outputs, right_ones, strict=True):
            mine = (completion.text, completion.finish_reason, completion.stop_reason)
            right = (wanted.text, wanted.finish_reason, wanted.stop_reason)
            expect(
                mine == right,
                "wrong-text",
                f"With stop strings, max_tokens={one.params.max_tokens} and n={one.params.n}, a"
                f" completion ends as {show(mine)}, expected {show(right)} (text, finish_reason,"
                " stop_reason).\nHand on all pairs that `outputs.process` returns, one by one:"
                " each is about a sequence, not about a request.",
            )
    decode = rig.llm.get_tokenizer().decode
    for seq in rig.sequences:
        said = decode(seq.output_token_ids)
        expect(
            not isinstance(seq.stop_reason, str) or seq.stop_reason in said,
            "no-stop-reason",
            f"The core has noted {seq.stop_reason!r} as the stop string that ended the text"
            f" {said!r}, which does not have it.\nOne step may end several sequences:"
            ' `core.finish([seq_id], "stop", stop_string)`, for each pair with its own.',
        )
    rig.expect_empty("After stop strings in many requests")


def _stopped_at_the_end() -> list[_Asked]:
    """Requests whose stop string is completed by the last token that they may have."""
    whole = _right(_ask(_ASKED[2], max_tokens=40)).outputs[0]
    decode = _package(scripted=True).get_tokenizer().decode
    found = []
    for count in range(6, 14):
        before, after = decode(whole.token_ids[: count - 1]), decode(whole.token_ids[:count])
        stop = after[len(before) - 2 :]
        if after.startswith(before) and len(stop) > 2 and after.find(stop) == len(before) - 2:
            found.append(_ask(_ASKED[2], max_tokens=count, stop=stop))
    assert found, "some stop string should end at a token's end"
    return found


def _check_abort(answer: Callable) -> None:
    """A reader goes away: both sides of the cut must know."""
    rig = _Rig()
    engine = rig.engine(answer)
    gone, stays = _ask(_ASKED[2], max_tokens=40), _ask(_ASKED[1])
    ids = [_added(engine, gone), _added(engine, stays)]
    for _ in range(3):
        engine.step()
    _aborted(engine, ids[0], "a request that runs")
    _expect_aborted(rig.sequences[:1])
    last: dict[str, RequestOutput] = {}
    while rig.num_steps < 80 and not (ids[1] in last and last[ids[1]].finished):
        last |= {output.request_id: output for output in _news(engine)}
    end = last[ids[0]].outputs[0].finish_reason if ids[0] in last else None
    expect(
        end == "abort",
        "abort-unreported",
        "A request was aborted, and no later `step` says that it has ended: its last output has"
        f" finish_reason {end!r}.\nWhoever waits for it waits for ever. `outputs.end(request)` ends"
        " it on this side of the cut, and returns the seq_ids for the other.",
    )
    [wanted] = _right_texts([stays])
    text = last[ids[1]].outputs[0].text if ids[1] in last else ""
    expect(
        text == wanted,
        "abort-hits-others",
        f"Another request ran beside the one that was aborted: it says {text!r}, expected"
        f" {wanted!r}.",
    )
    _aborted(engine, ids[0], "a request that has ended")
    _aborted(engine, "no such id", "an id that never was")
    rig.expect_empty("After an abort, and when the other request has ended,")
    _expect_count(rig, getattr(engine, "num_tokens", None), rig.num_tokens, late=True)


def _expect_aborted(sequences: list[Sequence]) -> None:
    """The core has ended these, as aborted."""
    for number, seq in enumerate(sequences, start=1):
        which = f"sequence {number} of {len(sequences)}" if len(sequences) > 1 else "its sequence"
        expect(
            seq.is_finished and not seq.block_table,
            "abort-goes-on",
            f"A request was aborted, and the core goes on with it: {which} has the finish_reason"
            f" {seq.finish_reason!r}.\nNobody reads these tokens, and they keep blocks. Tell the"
            ' core: `core.finish(seq_ids, "abort")`, with all seq_ids that `outputs.end` returns.',
        )
        expect(
            seq.finish_reason == "abort",
            "wrong-abort-reason",
            f"A request was aborted. The core has ended {which}, and noted {seq.finish_reason!r} as"
            ' the reason.\nIt is `core.finish(seq_ids, "abort")`.',
        )


def _check_early_abort(answer: Callable) -> None:
    """A request ends before its first step; and one with several completions, alone."""
    rig = _Rig(max_num_seqs=2)
    engine = rig.engine(answer)
    ids = [_added(engine, _ask(question, max_tokens=40)) for question in _ASKED[1:]]
    _news(engine)
    _aborted(engine, ids[2], "a request that waits for its first step")
    _aborted(engine, ids[2], "a request that was aborted just now")
    several = _added(engine, _ask(_ASKED[0], n=2, max_tokens=40))
    for id in ids[:2]:
        _aborted(engine, id, "a request that runs")
    last: dict[str, RequestOutput] = {}
    for _ in range(3):
        last |= {output.request_id: output for output in _news(engine)}
    _aborted(engine, several, "a request with two completions")
    _expect_aborted(rig.sequences[3:5])
    last |= {output.request_id: output for output in _news(engine)}
    for id in (*ids, several):
        ends = [one.finish_reason for one in last[id].outputs] if id in last else []
        expect(
            ends and set(ends) == {"abort"},
            "abort-unreported",
            f"Request {id} was aborted, and the next `step` does not report it: the finish_reasons"
            f" of its completions are {ends}.\n`outputs.end(request)` ends all of them for the"
            " reader, and `step` collects, also where the core has nothing left to do.",
        )
    rig.expect_empty("After all requests were aborted")


def _aborted(engine: Any, request_id: str, what: str) -> None:
    try:
        engine.abort(request_id)
    except KeyError as error:
        raise Mistake(
            "abort-raises",
            f"`abort` of {what}: KeyError: {show(error.args[0])}.\nA request may end while its"
            " caller decides to abort it. An id that `outputs.requests` does not have is ignored.",
        ) from error


def _check_refused(answer: Callable) -> None:
    """What can never be served is refused, and nothing of that call is left behind."""
    from minivllm.errors import RequestError

    rig = _Rig(num_kv_blocks=8, max_model_len=128)
    engine, good, too_long = rig.engine(answer), _ask(_ASKED[0]), list(range(100, 250))
    for prompts in ([good.prompt, too_long], [good.prompt, too_long, good.prompt], [too_long]):
        try:
            outputs = engine.run(prompts, [good.params] * len(prompts))
        except _TooManySteps:
            outputs = None
        except RequestError:
            expect(
                not rig.left_over and not rig.outputs.requests,
                "queued-before-checked",
                f"Of {len(prompts)} prompts the second was refused, and so nobody waits for the"
                " others; but there are still in the engine: sequences in the core:"
                f" {len(rig.left_over)}, requests in the output processor:"
                f" {len(rig.outputs.requests)}.\nCheck all prompts with `inputs.process` before"
                " you queue one.",
            )
            continue
        raise Mistake(
            "request-dropped",
            f"A prompt of 150 tokens never fits a cache of 128, and `run` gave {show(outputs)}."
            "\nLet the error of `inputs.process` through: the caller has to know.",
        )
    expect_refusal(lambda: engine.add(too_long, good.params), "150 tokens in `add`", RequestError)
    texts = _texts(rig.run(engine, [good]))
    expect(
        texts == _right_texts([good]),
        "wrong-text",
        f"After a refused request the engine says {show(texts)}, expected"
        f" {show(_right_texts([good]))}.\nA refused request changes nothing.",
    )


def _check_several_tokens(answer: Callable) -> None:
    """A step may bring several tokens of a sequence: all of them count."""
    from minivllm.engine.scheduler import Scheduler

    known: list[int] = []

    class Guessing(Scheduler):
        """Proposes what follows; it happens to know."""

        def schedule(self) -> ScheduledBatch:
            for seq in self.running:
                self.propose(seq, known[seq.num_output_tokens :][:3])
            return super().schedule()

    rig = _Rig(scheduler_cls=Guessing)
    asked = _ask(_ASKED[1], max_tokens=60)
    right = _right(asked)
    known += right.outputs[0].token_ids
    engine = rig.engine(answer)
    [output] = rig.run(engine, [asked])
    assert rig.num_steps < len(known) / 2, "steps should bring several tokens each"
    text, wanted = output.outputs[0].text, right.outputs[0].text
    expect(
        text == wanted,
        "wrong-text",
        f"With steps that bring several tokens your engine says {text!r}, expected {wanted!r}."
        "\nHand `outputs.process` the step as it is.",
    )
    _expect_count(rig, getattr(engine, "num_tokens", None), len(known))


def _expect_count(rig: _Rig, said: Any, right: int, *, late: bool = False) -> None:
    """`num_tokens` counts all tokens of all steps.

    late: what a step adds has been seen to be right.
    """
    if said == right:
        return
    seen = f"{rig.num_steps} steps brought {right} tokens, and `num_tokens` is {show(said)}."
    expect(
        late or said != rig.num_tokens_of_last,
        "last-step-only",
        f"{seen}\nSo many came in the last step. `num_tokens` counts since the engine was made:"
        " add, with `+=`.",
    )
    expect(
        late or (said != rig.num_outputs and said not in (rig.num_steps, rig.num_steps - 1)),
        "one-token-per-step",
        f"{seen}\nA step gives each sequence a *list* of tokens: `output.token_ids`, of each output"
        " in `step.outputs`. Add up their lengths.",
    )
    expect(
        said == right,
        "wrong-count",
        f"{seen}\nAdd up the lengths of `output.token_ids`, of each output in `step.outputs`, in"
        " each step. Nothing else changes it: not a new `run`, and not an abort.",
    )


EXERCISE = Exercise(
    id="07.6",
    title="The loop",
    check=check_loop,
    mistakes=(
        Known(
            "order-of-the-end",
            answers=r"""
# %% outputs as they finish
@@
-        return [ended[id] for id in ids]
+        return [output for id, output in ended.items() if id in ids]
""",
        ),
        Known(
            "one-at-a-time",
            answers=r"""
# %% one request after the other
@@
-        ids = [self.queue(one) for one in checked]
-        ended = {}
-        while not all(id in ended for id in ids):
-            ended |= {
-                output.request_id: output for output in self.step() if output.finished
-            }
-        return [ended[id] for id in ids]
+        ended = []
+        for one in checked:
+            id, last = self.queue(one), None
+            while last is None:
+                last = next(
+                    (o for o in self.step() if o.request_id == id and o.finished), None
+                )
+            ended.append(last)
+        return ended
""",
        ),
        Known(
            "computes-past-the-stop",
            answers=r"""
# %% the text stops, the work does not
@@
-        for seq_id, stop_string in self.outputs.process(step):
-            self.core.finish([seq_id], "stop", stop_string)
+        self.outputs.process(step)

# %% goes on until the core has nothing left, which nobody tells of stops
@@
-        for seq_id, stop_string in self.outputs.process(step):
-            self.core.finish([seq_id], "stop", stop_string)
+        self.outputs.process(step)
@@
-        while not all(id in ended for id in ids):
+        while self.core.scheduler.running or self.core.scheduler.waiting:
""",
        ),
        Known(
            "no-stop-reason",
            answers=r"""
# %% does not say which
@@
-            self.core.finish([seq_id], "stop", stop_string)
+            self.core.finish([seq_id], "stop")

# %% a stop string is taken for an abort
@@
-            self.core.finish([seq_id], "stop", stop_string)
+            self.core.finish([seq_id], "abort")

# %% one stop string for all that end in this step
@@
-        for seq_id, stop_string in self.outputs.process(step):
-            self.core.finish([seq_id], "stop", stop_string)
+        pairs = self.outputs.process(step)
+        if pairs:
+            self.core.finish([seq_id for seq_id, _ in pairs], "stop", pairs[0][1])
""",
        ),
        Known(
            "texts-overwritten",
            answers=r"""
# %% keeps outputs by prompt
@@
         ended = {}
+        by_prompt = {}
@@
-            ended |= {
-                output.request_id: output for output in self.step() if output.finished
-            }
-        return [ended[id] for id in ids]
+            for output in self.step():
+                if output.finished:
+                    ended[output.request_id] = by_prompt[
+                        str(output.prompt_token_ids)
+                    ] = output
+        return [by_prompt[str(prompt)] for prompt in prompts]
""",
        ),
        Known(
            "endless",
            answers=r"""
# %% what a step brought is not handed on
@@
-        for seq_id, stop_string in self.outputs.process(step):
-            self.core.finish([seq_id], "stop", stop_string)

# %% looks for the end in the core, which knows other ids
@@
-        while not all(id in ended for id in ids):
+        while not all(int(id) + len(prompts) in ended for id in ids):
""",
        ),
        Known(
            "unfinished",
            answers=r"""
# %% the first output of each, not the last
@@
-            ended |= {
-                output.request_id: output for output in self.step() if output.finished
-            }
+            ended |= {output.request_id: output for output in self.step()}
""",
        ),
        Known(
            "more-than-a-step",
            answers=r"""
# %% step serves all to the end
@@
-        step = self.core.step()
-        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
-        for seq_id, stop_string in self.outputs.process(step):
-            self.core.finish([seq_id], "stop", stop_string)
+        while True:
+            step = self.core.step()
+            self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
+            for seq_id, stop_string in self.outputs.process(step):
+                self.core.finish([seq_id], "stop", stop_string)
+            if not step.outputs:
+                break
""",
        ),
        Known(
            "idle-step",
            answers=r"""
# %% gives nothing where there is nothing
@@
-        return self.outputs.collect(self.collector)
+        return self.outputs.collect(self.collector) or None
@@
-                output.request_id: output for output in self.step() if output.finished
+                output.request_id: output
+                for output in self.step() or []
+                if output.finished
""",
        ),
        Known(
            "unfinished-left-out",
            answers=r"""
# %% step mentions only requests that have ended
@@
-        return self.outputs.collect(self.collector)
+        return [
+            output for output in self.outputs.collect(self.collector) if output.finished
+        ]
""",
        ),
        Known(
            "no-id",
            answers=r"""
# %% add says nothing
@@
-        return self.queue(self.inputs.process(prompt, params))
+        self.queue(self.inputs.process(prompt, params))
""",
        ),
        Known(
            "foreign-request",
            answers=r"""
# %% run knows only its own requests
@@
-        ended = {}
-        while not all(id in ended for id in ids):
-            ended |= {
-                output.request_id: output for output in self.step() if output.finished
-            }
+        ended = {id: None for id in ids}
+        while None in ended.values():
+            for output in self.step():
+                if output.finished and ended[output.request_id] is None:
+                    ended[output.request_id] = output

# %% returns whatever ends
@@
-        return [ended[id] for id in ids]
+        while self.outputs.requests:
+            ended |= {
+                output.request_id: output for output in self.step() if output.finished
+            }
+        return [ended[id] for id in sorted(ended, key=int)]

# %% clears the engine before it begins
@@
         checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
+        for id in list(self.outputs.requests):
+            self.abort(id)
""",
        ),
        Known(
            "queued-before-checked",
            answers=r"""
# %% queues one after the other
@@
-        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
-        ids = [self.queue(one) for one in checked]
+        ids = [self.add(*asked) for asked in zip(prompts, params)]
""",
        ),
        Known(
            "completions-left-out",
            answers=r"""
# %% one sequence for a request
@@
-        for index in range(checked.params.n):
-            self.core.add(request.new_sequence(request, index))
+        self.core.add(request.new_sequence(request, 0))

# %% four completions at most
@@
-        for index in range(checked.params.n):
+        for index in range(min(checked.params.n, 4)):

# %% in `run` only
@@
-        return self.queue(self.inputs.process(prompt, params))
+        request = self.new_request(self.inputs.process(prompt, params), self.collector)
+        self.outputs.add(request)
+        self.core.add(request.new_sequence(request, 0))
+        return request.request_id
""",
        ),
        Known(
            "abort-goes-on",
            answers=r"""
# %% ends it for the reader only
@@
-            self.core.finish(self.outputs.end(request), "abort")
+            self.outputs.end(request)

# %% tells the core of the first completion only
@@
-            self.core.finish(self.outputs.end(request), "abort")
+            self.core.finish(self.outputs.end(request)[:1], "abort")
""",
        ),
        Known(
            "wrong-abort-reason",
            answers=r"""
# %% aborted by a stop
@@
-            self.core.finish(self.outputs.end(request), "abort")
+            self.core.finish(self.outputs.end(request), "stop")
""",
        ),
        Known(
            "abort-unreported",
            answers=r"""
# %% ends it in the core only
@@
-            self.core.finish(self.outputs.end(request), "abort")
+            self.core.finish([one.seq_id for one in request.completions], "abort")

# %% ends it, and forgets it before anybody has heard
@@
             self.core.finish(self.outputs.end(request), "abort")
+            self.outputs.forget(request)
""",
        ),
        Known(
            "abort-raises",
            answers=r"""
# %% expects every id to be there
@@
-        request = self.outputs.requests.get(request_id)
-        if request is not None:
-            self.core.finish(self.outputs.end(request), "abort")
+        self.core.finish(self.outputs.end(self.outputs.requests[request_id]), "abort")
""",
        ),
        Known(
            "abort-hits-others",
            answers=r"""
# %% ends everything
@@
-            self.core.finish(self.outputs.end(request), "abort")
+            for other in list(self.outputs.requests.values()):
+                self.core.finish(self.outputs.end(other), "abort")
""",
        ),
        Known(
            "request-dropped",
            answers=r"""
# %% leaves out what is refused
@@
-        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
+        checked = []
+        for asked in zip(prompts, params):
+            try:
+                checked.append(self.inputs.process(*asked))
+            except ValueError:
+                pass
""",
        ),
        Known(
            "waits-for-others",
            answers=r"""
# %% until the output processor is empty
@@
-        while not all(id in ended for id in ids):
+        while self.outputs.requests:
""",
        ),
        Known(
            "a-step-too-many",
            answers=r"""
# %% one step more, to be sure
@@
+        self.step()
         return [ended[id] for id in ids]

# %% a step before anybody asks, even for no prompts
@@
-        while not all(id in ended for id in ids):
+        while True:
             ended |= {
                 output.request_id: output for output in self.step() if output.finished
             }
+            if all(id in ended for id in ids):
+                break
""",
        ),
        Known(
            "a-step-late",
            answers=r"""
# %% collects, then processes
@@
+        news = self.outputs.collect(self.collector)
         for seq_id, stop_string in self.outputs.process(step):
@@
-        return self.outputs.collect(self.collector)
+        return news
""",
        ),
        Known(
            "wishes-mixed-up",
            answers=r"""
# %% the first parameters for all
@@
-        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
+        checked = [self.inputs.process(prompt, params[0]) for prompt in prompts]
""",
        ),
        Known(
            "wrong-count",
            answers=r"""
# %% counts in `run` what its requests got
@@
-        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
@@
-        return [ended[id] for id in ids]
+        for id in ids:
+            self.num_tokens += sum(len(one.token_ids) for one in ended[id].outputs)
+        return [ended[id] for id in ids]

# %% `run` begins at 0
@@
         checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
+        self.num_tokens = 0

# %% an abort takes its tokens back
@@
             self.core.finish(self.outputs.end(request), "abort")
+            self.num_tokens -= sum(len(one.token_ids) for one in request.completions)
""",
        ),
        Known(
            "raised",
            answers=r"""
# %% asks for the sequences first
@@
-        self.outputs.add(request)
@@
             self.core.add(request.new_sequence(request, index))
+        self.outputs.add(request)
""",
        ),
        Known(
            "shared-between-engines",
            answers=r"""
# %% one collector for all engines
@@
-        self.collector = OutputCollector()
+        MyEngine.collector = OutputCollector()

# %% one count for all engines
@@
-        self.num_tokens = 0  # that the core has brought so far
@@
-        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
+        MyEngine.num_tokens += sum(len(output.token_ids) for output in step.outputs)
@@
         return self.outputs.collect(self.collector)
+
+    num_tokens = 0

# %% one count for all engines, and each new engine begins anew
@@
-        self.num_tokens = 0  # that the core has brought so far
+        MyEngine.num_tokens = 0
@@
-        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
+        MyEngine.num_tokens += sum(len(output.token_ids) for output in step.outputs)
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% empties the list of prompts
@@
-        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
+        checked = []
+        for one in params:
+            checked.append(self.inputs.process(prompts.pop(0), one))
""",
        ),
        Known(
            "wrong-order",
            answers=r"""
# %% ids in the order of their texts
@@
-        return [ended[id] for id in ids]
+        return [ended[id] for id in sorted(ids)]
""",
        ),
        Known(
            "last-step-only",
            answers=r"""
# %% does not add up
@@
-        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
+        self.num_tokens = sum(len(output.token_ids) for output in step.outputs)
""",
        ),
        Known(
            "waits-for-nothing",
            answers=r"""
# %% a stop string ends all completions of its request in the core
@@
-            self.core.finish([seq_id], "stop", stop_string)
+            request = self.outputs.owner_of(seq_id)
+            for one in request.completions:
+                self.core.finish([one.seq_id], "stop", stop_string)

# %% a collector for each request, and one that is read
@@
-        request = self.new_request(checked, self.collector)
+        self.collector = OutputCollector()
+        request = self.new_request(checked, self.collector)
""",
        ),
        Known(
            "one-token-per-step",
            answers=r"""
# %% counts sequences
@@
-        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
+        self.num_tokens += len(step.outputs)

# %% counts steps
@@
-        self.num_tokens += sum(len(output.token_ids) for output in step.outputs)
+        self.num_tokens += 1
""",
        ),
    ),
    right=r"""
# %% keeps the last output of each, asks the output processor who is left
@@
-        checked = [self.inputs.process(*asked) for asked in zip(prompts, params)]
+        checked = [
+            self.inputs.process(*asked) for asked in zip(prompts, params, strict=True)
+        ]
@@
-        ended = {}
-        while not all(id in ended for id in ids):
-            ended |= {
-                output.request_id: output for output in self.step() if output.finished
-            }
-        return [ended[id] for id in ids]
+        last = {}
+        while any(id in self.outputs.requests for id in ids):
+            for output in self.step():
+                last[output.request_id] = output
+        return [last[id] for id in ids]
""",
)
