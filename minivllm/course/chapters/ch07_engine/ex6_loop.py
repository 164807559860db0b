"""07.6: the loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.judges import expect
from minivllm.course.sim.requests import RequestMaker, in_chat

if TYPE_CHECKING:
    from minivllm.engine.engine_core import StepOutput
    from minivllm.engine.sequence import ScheduledBatch, Sequence
    from minivllm.llm import LLM
    from minivllm.outputs import RequestOutput
    from minivllm.sampling_params import SamplingParams
from minivllm.course.grading.exercise import Exercise, Known

#: More steps of the core than any run here needs.
_MOST_STEPS = 600


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

        return SamplingParams(**{"temperature": 0.0, "max_tokens": 24} | dict(self.wishes))


def _ask(question: str, **wishes: Any) -> _Asked:
    return _Asked(question, tuple(wishes.items()))


class _Rig:
    """The three parts of an engine, with a core under observation."""

    def __init__(self, **options: Any) -> None:
        from minivllm import LLM
        from minivllm.engine.output_processor import OutputProcessor

        self.llm = LLM(device="cpu", **_ROOM | options)
        self.core: Any = self.llm.llm_engine.core
        self.inputs, self.outputs = self.llm.llm_engine.input_processor, OutputProcessor()
        self.num_steps = 0
        #: What the core was given, in that order.
        self.sequences: list[Sequence] = []
        self.most_at_once = 0  # sequences that got tokens in one step
        self.served: set[str] = set()  # requests that got tokens in the last step
        self._step, self._add = self.core.step, self.core.add
        self.core.step, self.core.add = self.step, self.add

    def step(self) -> StepOutput:
        self.num_steps += 1
        if self.num_steps > _MOST_STEPS:
            raise _TooManySteps
        step = self._step()
        seq_ids = [output.seq_id for output in step.outputs]
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
        return step

    def add(self, seq: Sequence) -> None:
        self.sequences.append(seq)
        self._add(seq)

    def engine(self, cls: Callable) -> Any:
        new_request = RequestMaker(self.llm.get_tokenizer())
        return cls(self.inputs, self.core, self.outputs, new_request)

    @property
    def left_over(self) -> list[Sequence]:
        """What the core has not finished."""
        return [*self.core.scheduler.running, *self.core.scheduler.waiting]

    def run(self, engine: Any, asked: list[_Asked]) -> list[RequestOutput]:
        """engine.run, and an endless loop is a Mistake; so is what it returns, if it is no outputs
        to their end.
        """
        from minivllm.outputs import RequestOutput

        try:
            outputs = engine.run([a.prompt for a in asked], [a.params for a in asked])
        except _TooManySteps:
            num_left = len(self.left_over)
            raise Mistake(
                "endless",
                f"After {_MOST_STEPS} steps of the core `run` goes on; the core has {num_left}"
                " unfinished sequences.\nDoes `outputs` learn what each step brought (`process`),"
                " and do you see when a request has finished (`output.finished`)?",
            ) from None
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
def _right(asked: _Asked) -> RequestOutput:
    """What the package's `generate` gives: made once for a process, whoever is being checked."""
    llm = _package()
    [output] = llm.generate([asked.prompt], asked.params, use_tqdm=False)
    return output


@functools.cache
def _package() -> LLM:
    from minivllm import LLM

    return LLM(device="cpu", **_ROOM)


@functools.cache
def _chat_ids(question: str) -> tuple[int, ...]:
    return tuple(in_chat(_package(), question))


def _right_texts(asked: Iterable[_Asked]) -> list[str]:
    return _texts(map(_right, asked))


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
    _check_guest(answer)
    _check_stops(answer)
    _check_abort(answer)
    _check_refused(answer)
    _check_several_tokens(answer)
    return (
        f"{served} requests in chunks, preempted, stopped, aborted and refused: the package's"
        " texts, and no blocks left behind"
    )


def _check_texts(answer: Callable) -> int:
    """The right texts, in order, served together."""
    rig = _Rig(max_num_batched_tokens=24)
    asked = [_ask(question) for question in (_ASKED[2], _ASKED[0], *_ASKED[1::2])]
    right = _right_texts(asked)
    texts = _texts(rig.run(rig.engine(answer), asked))
    expect(
        rig.most_at_once > 1,
        "one-at-a-time",
        f"Never did two requests get tokens in one step: {rig.num_steps} steps for"
        f" {len(asked)} requests.\nQueue *all* of them first, then step: the scheduler puts them"
        " together, and a step costs a GPU nearly the same for one or for fifty.",
    )
    expect(
        texts == right or sorted(texts) != sorted(right),
        "order-of-the-end",
        "The texts are right, but they come in the order in which the requests ended.\nThe caller"
        " wants them in the order of the prompts: collect by request_id.",
    )
    for text, wanted in zip(texts, right, strict=True):
        expect(
            text == wanted,
            "wrong-text",
            f"Your engine says {text!r}, expected {wanted!r}.\nTake the last output of each"
            " request, the one that is `finished`.",
        )
    expect(
        not rig.left_over and not rig.outputs.requests,
        "left-behind",
        f"After `run` the core has {len(rig.left_over)} sequences and the output processor"
        f" {len(rig.outputs.requests)} requests.\nWho put them there? A request is forgotten when"
        " its end has been collected.",
    )
    return len(asked)


def _return_missing(value: Any) -> str:
    return " Is a `return` missing?" if value is None else ""


def _check_steps(answer: Callable) -> None:
    """`step` by itself: what it returns, requests that come later, and an idle engine."""
    rig = _Rig()
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
    before = rig.num_steps
    for number in range(40):
        if number == 3:
            made = rig.num_steps - before
            expect(
                made <= 3,
                "more-than-a-step",
                f"Three calls of `step` made {made} steps of the core.\n`step` makes one.",
            )
            ids.append(_added(engine, late))
        news = _news(engine)
        silent = rig.served - {output.request_id for output in news}
        expect(
            not silent,
            "unfinished-left-out",
            f"Request {', '.join(sorted(silent))} got a token, and `step` does not mention it."
            "\nReturn all that `outputs.collect` gives, also of requests that go on: somebody reads"
            " along.",
        )
        last |= {output.request_id: output for output in news}
        if len(last) == 2 and all(output.finished for output in last.values()):
            break
    for id, wanted in zip(ids, _right_texts([early, late]), strict=True):
        expect(
            id in last and last[id].finished,
            "late-request-lost",
            f"After 40 steps no output says that request {id} has finished.\nA request may come at"
            " any time, also between two steps: `add` gives it to `outputs` and to the core.",
        )
        text = last[id].outputs[0].text
        expect(
            text == wanted,
            "wrong-text",
            f"Stepped by hand, request {id} says {text!r}, expected {wanted!r}.",
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
    rig = _Rig()
    asked = [_ask(_ASKED[0], n=2)]
    message = (
        "A request with n=2 has two completions, and the core did not get two sequences for"
        " it.\nEach is a sequence of its own: give the core `request.new_sequence(request, index)`"
        " for every index below `checked.params.n`."
    )
    try:
        [output] = rig.run(rig.engine(answer), asked)
    except Mistake as mistake:
        if mistake.name != "endless" or len(rig.sequences) == 2:
            raise
        raise Mistake("completions-left-out", message) from None
    [wanted] = _right_texts([_ask(_ASKED[0])])
    texts = [completion.text for completion in output.outputs]
    expect(
        texts == [wanted, wanted],
        "wrong-text",
        f"A request with n=2 says {show(texts)}, expected twice {wanted!r}.",
    )


def _check_crowd(answer: Callable) -> None:
    """Equal prompts with other seeds, in a cache too small for all, in chunks: every text as
    when alone.
    """
    options = {
        "max_num_batched_tokens": 16,
        "num_kv_blocks": 12,
        "max_model_len": 128,
        "max_num_seqs": 4,
    }
    rig = _Rig(**options)
    asked = [
        _ask(question, temperature=1.0, seed=seed, max_tokens=32)
        for question in (_ASKED[2], _ASKED[1])
        for seed in (1, 2, 3)
    ]
    right = _right_texts(asked)
    got = _texts(rig.run(rig.engine(answer), asked))
    assert rig.core.scheduler.stats.num_preemptions > 0, "this case should preempt"
    expect(
        not any(got.count(text) > right.count(text) for text in got if text in right),
        "texts-overwritten",
        "Three requests have the same prompt and other seeds, and get the same text.\nKeep what"
        " belongs to a request by its request_id; prompts are no keys.",
    )
    for text, wanted in zip(got, right, strict=True):
        expect(
            text == wanted,
            "wrong-text",
            f"In a full cache a request says {text!r}, expected {wanted!r} as when it is alone."
            "\nWhat belongs to which request? Order and number change in every step.",
        )


def _check_guest(answer: Callable) -> None:
    """`run`, while a request that was added before is still being served."""
    rig = _Rig()
    engine = rig.engine(answer)
    guest, mine = _ask(_ASKED[2], max_tokens=5), _ask(_ASKED[0])
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


def _check_stops(answer: Callable) -> None:
    """Stop strings end the work, not only the text."""
    rig = _Rig()
    [text] = _right_texts([_ask(_ASKED[2], max_tokens=40)])
    words = text.split()
    stop = f"{words[5]} {words[6]}"
    free = rig.core.scheduler.block_manager.num_free_blocks
    [output] = rig.run(rig.engine(answer), [_ask(_ASKED[2], max_tokens=40, stop=stop)])
    [seq] = rig.sequences
    expect(
        seq.is_finished and seq.num_output_tokens < 40,
        "computes-past-the-stop",
        f"The text ended at {stop!r}, and the core knows nothing of it: it went on to"
        f" {seq.num_output_tokens} tokens, and has"
        f" {'' if seq.is_finished else 'not '}finished.\nThe core knows no text. `outputs.process`"
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
    expect(
        rig.core.scheduler.block_manager.num_free_blocks == free,
        "left-behind",
        "After a stop string blocks are still in use.\nUse `core.finish`.",
    )


def _check_abort(answer: Callable) -> None:
    """A reader goes away: both sides of the cut must know."""
    rig = _Rig()
    engine = rig.engine(answer)
    gone, stays = _ask(_ASKED[2], max_tokens=40), _ask(_ASKED[1])
    ids = [_added(engine, gone), _added(engine, stays)]
    for _ in range(3):
        engine.step()
    _aborted(engine, ids[0], "a request that runs")
    seq = rig.sequences[0]
    expect(
        seq.finish_reason == "abort" and not seq.block_table,
        "abort-goes-on",
        "A request was aborted, and the core goes on with it: its sequence has the finish_reason"
        f" {seq.finish_reason!r}.\nNobody reads these tokens, and they keep blocks. Tell the core:"
        ' `core.finish(seq_ids, "abort")`.',
    )
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
    try:
        outputs = engine.run([good.prompt, too_long], [good.params] * 2)
    except _TooManySteps:
        outputs = None
    except RequestError:
        expect(
            not rig.left_over and not rig.outputs.requests,
            "queued-before-checked",
            "Of two prompts the second was refused, and so nobody waits for the first; but it"
            f" stands in the engine: sequences in the core: {len(rig.left_over)}, requests in the"
            f" output processor: {len(rig.outputs.requests)}.\nCheck all prompts with"
            " `inputs.process` before you queue one.",
        )
        return
    raise Mistake(
        "request-dropped",
        f"A prompt of 150 tokens never fits a cache of 128, and `run` gave {show(outputs)}.\nLet"
        " the error of `inputs.process` through: the caller has to know.",
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
    right = _right(_ask(_ASKED[1]))
    known += right.outputs[0].token_ids
    engine = rig.engine(answer)
    [output] = rig.run(engine, [_ask(_ASKED[1])])
    assert rig.num_steps < len(known) / 2, "steps should bring several tokens each"
    text, wanted = output.outputs[0].text, right.outputs[0].text
    expect(
        text == wanted,
        "wrong-text",
        f"With steps that bring several tokens your engine says {text!r}, expected {wanted!r}."
        "\nHand `outputs.process` the step as it is.",
    )
    counts = getattr(engine, "num_tokens", None)
    expect(
        counts == len(known),
        "one-token-per-step",
        f"{rig.num_steps} steps brought {len(known)} tokens, and `num_tokens` is {show(counts)}."
        "\nA step gives each sequence a *list* of tokens: `output.token_ids`, of each output in"
        " `step.outputs`. Add up their lengths.",
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
""",
        ),
        Known(
            "abort-goes-on",
            answers=r"""
# %% ends it for the reader only
@@
-            self.core.finish(self.outputs.end(request), "abort")
+            self.outputs.end(request)
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
