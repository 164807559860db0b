"""12.6: debug this: a stream of events."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect
from minivllm.errors import EngineEndedError, MiniVLLMError, OutOfMemoryError

#: What a step brought: (token ids, finish reason).
Step = tuple[list[int], str | None]


@dataclass
class _Case:
    """An answer. pieces: token id -> its bytes. fails: whether the engine dies after the steps."""

    steps: list[Step]
    pieces: list[bytes]
    num_prompt: int = 5
    usage: bool = False
    fails: bool = False
    what: str = ""
    decode: Callable[[list[int]], str] | None = None
    head: dict[str, Any] = field(
        default_factory=lambda: {"id": "cmpl-7", "object": "text_completion", "model": "mini"}
    )

    def text(self, count: int) -> str:
        """The text of the first steps, as many as count."""
        return self.text_of([token for tokens, _ in self.steps[:count] for token in tokens])

    def text_of(self, token_ids: list[int]) -> str:
        if self.decode is not None:
            return self.decode(token_ids)
        return b"".join(self.pieces[token] for token in token_ids).decode("utf-8", "replace")

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens, _ in self.steps)


def _cut(text: str, rng: Random, most: int = 3) -> list[bytes]:
    """The bytes of a text in pieces of 1 to `most` bytes."""
    data, pieces = text.encode(), []
    while data:
        size = rng.randint(1, most)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def _steps(count: int, rng: Random, most: int, reason: str) -> list[Step]:
    """Steps that bring 0 to `most` tokens each, of `count` in all; the last has the reason."""
    steps: list[Step] = []
    first = 0
    while first < count:
        tokens = list(range(first, min(count, first + rng.randint(min(1, most - 1), most))))
        first += len(tokens)
        steps.append((tokens, reason if first >= count else None))
    return steps


_TEXTS = (
    "Once upon a time",
    'She said: "Hi!"\r\n\nThen she left.\tdata: [DONE]\n',
    "Zoë and the 🦊 went to the café. 12 € were 你好 enough. 👍🏽",
    "🦊🦊🦊",
    "é",
    "data: {}\n\ndata: more \\ of it",
)


def _cases() -> list[_Case]:
    def plain(steps: list[Step], pieces: list[bytes], what: str, **more: Any) -> _Case:
        return _Case(steps, pieces, what=what, **more)

    abc = [b"Once", b" upon", b" a time"]
    one_each: list[Step] = [([0], None), ([1], None), ([2], "stop")]
    cases = [
        plain([([0], "stop")], abc, "one token, with its end"),
        plain(one_each, abc, "three tokens, one per step"),
        plain([([0, 1], None), ([2], None), ([], "length")], abc, "the end comes without a token"),
        plain(one_each, abc, "three tokens, and usage", usage=True),
        plain([([0, 1, 2], "stop")], abc, "three tokens in one step, and usage", usage=True),
        plain([([], "stop")], abc, "no token at all", usage=True),
        plain([([], None), *one_each], abc, "a first step without a token"),
        plain([([0], None), ([1], None), ([2], "stop")], [b"a\xc3", b"\xa9", b"!"], "an é in two"),
        plain([([0], None), ([1], "length")], [b"a", b"\xf0\x9f\xa6"], "it ends inside of a 🦊"),
        plain([([0], None), ([1], None), ([2], "stop")], [b"a\xf0", b"b", b"c"], "a broken byte"),
        plain(one_each[:2], abc, "the engine dies after two tokens", fails=True, usage=True),
        plain([], abc, "the engine dies before the first token", fails=True),
        plain([([0], None)], [b"a\xc3"], "the engine dies inside of an é", fails=True),
        plain([([0], None), ([1], None), ([2], "stop")], [b"ha"] * 3, "the same text three times"),
    ]
    # A tokenizer whose text loses the space at its front, many tokens, and a long head.
    words = [f" w{i}" for i in range(90)]
    front = plain([([i], "stop" if i == 89 else None) for i in range(90)], [], "a text of 90 words")
    front.decode = lambda ids: "".join(words[i] for i in ids).lstrip(" ")
    front.head["model"] = "mini" * 200
    cases.append(front)
    for seed, text in enumerate(_TEXTS * 2):
        rng = Random(seed)
        pieces = _cut(text, rng)
        steps = _steps(len(pieces), rng, rng.randint(1, 4), rng.choice(("stop", "length")))
        cases.append(
            _Case(steps, pieces, rng.randint(1, 99), rng.random() < 0.5, what=f"the text {text!r}")
        )
    return cases


# --- a client -------------------------------------------------------------------------------------


class _Run:
    """The events of an answer, and which step each one came after."""

    def __init__(self, answer: Callable, case: _Case) -> None:
        self.case = case
        self.num_taken = 0
        #: (event, number of steps that had been taken from the engine).
        self.events: list[tuple[str, int]] = []
        self.error: Exception | None = None
        steps = copy.deepcopy(case.steps)
        head = copy.deepcopy(case.head)
        try:
            found = answer(self._taken(steps), case.text_of, head, case.num_prompt, case.usage)
            for event in found:
                self.events.append((event, self.num_taken))
                if len(self.events) > 10_000:
                    break
        except MiniVLLMError as error:
            self.error = error
        changed = "head" if head != case.head else "a list of token ids"
        expect(
            head == case.head and steps == case.steps,
            "changed-input",
            f"Your code changed {changed}, which belongs to its caller.\nWork on a copy.",
        )

    def _taken(self, steps: list[Step]) -> Iterator[Step]:
        for step in steps:
            self.num_taken += 1
            yield step
        if self.case.fails:
            error = EngineEndedError if self.case.usage else OutOfMemoryError
            raise error("The engine's core has died.")
        self.num_taken += 1

    @property
    def seen(self) -> str:
        return f"{self.case.what[:1].upper()}{self.case.what[1:]}:"


def _mistake(name: str, seen: str) -> Mistake:
    return EXERCISE.mistake(name, seen)


def _expect_framed(run: _Run) -> list[Any]:
    """The data of all events: JSON, or the text [DONE]."""
    found: list[Any] = []
    for event, _ in run.events:
        said = f"{run.seen} your function yielded {event!r}."
        if not isinstance(event, str) or not event.startswith("data: "):
            raise _mistake("no-event", said)
        if not event.endswith("\n\n"):
            raise _mistake("no-blank-line", said)
        if "\n" in event[:-2] or "\r" in event:
            raise _mistake("no-event", said)
        data = event[6:-2]
        if data == "[DONE]":
            found.append(data)
            continue
        try:
            found.append(json.loads(data))
        except ValueError:
            raise _mistake("no-event", said) from None
        if not isinstance(found[-1], dict):
            raise _mistake("no-event", said)
    return found


def _expect_end(run: _Run, found: list[Any]) -> list[dict[str, Any]]:
    """Judge how the stream ends. Returns the chunks with choices."""
    last = ", ".join(show(one) for one in found[-3:])
    if run.case.fails:
        _expect_error(run, found, last)
        return found[:-1]
    if run.error is not None:
        raise run.error
    if found.count("[DONE]") != 1:
        raise _mistake("no-done", f"{run.seen} the last events are {last}.")
    if found[-1] != "[DONE]":
        raise _mistake("done-too-early", f"{run.seen} after [DONE] comes {show(found[-1])}.")
    return _without_usage(run, found[:-1], last)


def _expect_error(run: _Run, found: list[Any], last: str) -> None:
    if run.error is not None:
        raise _mistake("error-escapes", f"{run.seen} your generator raised {run.error!r}.")
    errors = [one for one in found if isinstance(one, dict) and "error" in one]
    right = {"error": {"message": "The engine's core has died."}}
    seen = f"{run.seen} the last events are {last}."
    if not errors:
        raise _mistake("error-hidden", seen)
    if "[DONE]" in found:
        raise _mistake("done-after-error", seen)
    if errors != [right] or found[-1] != right:
        raise Mistake("wrong-error-event", f"{seen}\nExpected one at the end: {right}.")


def _without_usage(run: _Run, chunks: list[Any], last: str) -> list[dict[str, Any]]:
    """Judge the usage. Returns the chunks without it."""
    case, seen = run.case, run.seen
    with_usage = [one for one in chunks if one.get("usage") is not None]
    if not case.usage:
        if with_usage:
            raise _mistake("usage-unasked", f"{seen} nobody asked for {show(with_usage[0])}.")
        return chunks
    if not with_usage:
        raise _mistake("no-usage", f"{seen} usage was asked for, the last events are {last}.")
    usage = chunks[-1]
    total = case.num_prompt + case.num_tokens
    right = {
        "prompt_tokens": case.num_prompt,
        "completion_tokens": case.num_tokens,
        "total_tokens": total,
    }
    if usage.get("usage") != right:
        said = f"{seen} the usage is {usage.get('usage')}.\nExpected {right}."
        raise _mistake("wrong-usage", said)
    if usage.get("choices") != [] or len(with_usage) != 1:
        raise Mistake(
            "wrong-usage-event",
            f"{seen} usage comes in {show(usage)}.\nIt comes once, in an event of its own before"
            " [DONE], whose choices are an empty list.",
        )
    expect_head(run, usage)
    return chunks[:-1]


def expect_head(run: _Run, chunk: dict[str, Any]) -> None:
    for name, value in run.case.head.items():
        if chunk.get(name) != value:
            said = f"{run.seen} an event has {name} = {show(chunk.get(name))}."
            raise Mistake(
                "wrong-head",
                f"{said}\nThe fields of `head` stand in every event but errors and [DONE].",
            )


def _expect_choices(run: _Run, chunks: list[dict[str, Any]]) -> None:
    """Judge the texts and the finish reasons."""
    case, seen = run.case, run.seen
    texts, reasons = [], []
    for chunk in chunks:
        expect_head(run, chunk)
        try:
            (choice,) = chunk["choices"]
            texts.append(choice["text"])
            reasons.append(choice["finish_reason"])
            good = choice["index"] == 0 and isinstance(texts[-1], str) and len(choice) == 3
        except (KeyError, TypeError, ValueError):
            good = False
        expect(
            good,
            "wrong-choice",
            f"{seen} an event is {show(chunk)}.\nExpected one choice, with index 0, text and"
            " finish_reason.",
        )
    _expect_texts(run, texts)
    right = (
        [None] * (len(texts) - 1) + [case.steps[-1][1]] if not case.fails else [None] * len(texts)
    )
    if reasons != right:
        raise _mistake("wrong-reason", f"{seen} the finish reasons are {show(reasons)}.")
    empty = [i for i, text in enumerate(texts) if not text and reasons[i] is None]
    if empty:
        raise _mistake("empty-event", f"{seen} the texts are {show(texts)}.")


def _expect_texts(run: _Run, texts: list[str]) -> None:
    case, seen = run.case, run.seen
    whole = case.text(len(case.steps))
    got, said = "".join(texts), f"{run.seen} the events' texts are {show(texts)}."
    right = whole.rstrip("�") if case.fails else whole
    # Whether what stands before half a character waits with it is left open.
    waiting = case.fails and right.startswith(got) and whole.endswith("�")
    if got != right and not waiting:
        if got.count("�") > right.count("�"):
            raise _mistake("broken-characters", said)
        late = _first_late(run, texts)
        lost_end = right.startswith(got) and late in (0, len(case.steps))
        if lost_end:
            raise _mistake("end-of-text-lost", f"{said}\nThe whole text is {whole!r}.")
        if _is_again(right, texts):
            raise _mistake("text-again", f"{said}\nThe whole text is {whole!r}.")
        raise _mistake("wrong-text", f"{said}\nThe whole text is {whole!r}.")
    if late := _first_late(run, texts):
        seen += f" after {late} steps the text is {case.text(late)!r}, and not all of it was sent."
        raise _mistake("sent-late", seen)


def _is_again(right: str, texts: list[str]) -> bool:
    """Whether the first event that is wrong brings text which was sent before."""
    sent = ""
    for text in texts:
        if not right.startswith(sent + text):
            # All of what was sent, or its last letters, stand in it again.
            return bool(sent) and (text.startswith(sent) or 0 <= right.find(text) < len(sent))
        sent += text
    return False


def _first_late(run: _Run, texts: list[str]) -> int:
    """After how many steps the client has not got what is known by then; 0: always.

    A text that ends inside of a character may wait.
    """
    case = run.case
    sent = ""
    moments = iter([*zip(texts, (taken for _, taken in run.events), strict=False), ("", 10**9)])
    text, taken = next(moments)
    for count in range(1, len(case.steps) + 1):
        while taken <= count:
            sent += text
            text, taken = next(moments)
        known = case.text(count)
        if not known.endswith("�") and len(sent) < len(known):
            return count
    return 0


def _expect_closed(answer: Callable) -> None:
    """The client leaves: the generator is closed between two events."""
    case = next(case for case in _cases() if case.what == "three tokens, one per step")
    steps = iter(copy.deepcopy(case.steps))
    events = answer(steps, case.text_of, dict(case.head), 5, False)
    next(events)
    try:
        events.close()
    except RuntimeError as error:
        raise _mistake("catches-too-much", f"A generator was closed: {error}") from error


def _expect_apart(answer: Callable) -> None:
    """Two streams in turns, as a server writes them: each is what it is alone."""
    case = next(case for case in _cases() if case.what == "three tokens, one per step")

    def stream() -> Iterator[str]:
        steps = iter(copy.deepcopy(case.steps))
        return iter(answer(steps, case.text_of, dict(case.head), 5, False))

    alone = list(stream())
    both = list(zip(stream(), stream(), strict=False))
    if both != list(zip(alone, alone, strict=True)):
        raise Mistake(
            "keeps-state",
            "Two streams at a time disturb each other: your code keeps something that both of them"
            " use.\nLook for a default argument that is changed, and for what is made outside of"
            " `events`.",
        )


@functools.cache
def _tokenizer() -> Any:
    from minivllm.bundled import BUNDLED_MODEL_PATH
    from minivllm.tokenizer import Tokenizer

    return Tokenizer(BUNDLED_MODEL_PATH)


def _real_case() -> _Case:
    """The bundled model's tokenizer, which splits what it has never seen into bytes."""
    token_ids = _tokenizer().encode("Pip 🦊 said: Zoë, 你好! 👍🏽 €5")
    steps: list[Step] = [([token], None) for token in token_ids]
    steps[-1] = steps[-1][0], "stop"
    what = "the bundled model's tokens"
    return _Case(steps, [], usage=True, what=what, decode=lambda ids: _tokenizer().decode(ids))


def _judge(answer: Callable, case: _Case) -> None:
    run = _Run(answer, case)
    _expect_choices(run, _expect_end(run, _expect_framed(run)))


def check_events(answer: Callable) -> str:
    cases = [*_cases(), _real_case()]
    for case in cases:
        # Twice: nothing may stay.
        _judge(answer, case)
        try:
            _judge(answer, case)
        except Mistake as mistake:
            raise Mistake(
                "keeps-state",
                "The first call is right, and the same call again is not: your code keeps something"
                f" between calls.\nLook for what is made outside of `events`.\n{mistake.message}",
            ) from mistake
    _expect_apart(answer)
    _expect_closed(answer)
    return f"{len(cases)} answers, byte by byte, and a client that can read them all"


EXERCISE = Exercise(
    id="12.6",
    title="Debug this: a stream that nobody can read",
    check=check_events,
    mistakes=(
        Known(
            "no-blank-line",
            "An event ends with a blank line: two newlines. A client collects lines until it sees"
            " one, and here it waits for the end of the connection.",
            hint=1,
            answers=r"""
# %% one newline
@@
-    return f"data: {json.dumps(value)}\n\n"
+    return f"data: {json.dumps(value)}\n"

# %% one newline after [DONE]
@@
-        yield "data: [DONE]\n\n"
+        yield "data: [DONE]\n"
""",
        ),
        Known(
            "no-event",
            "An event is one line, `data: ` and JSON (or [DONE]), and a blank line.",
            answers=r"""
# %% Python in place of JSON
@@
-    return f"data: {json.dumps(value)}\n\n"
+    return f"data: {value}\n\n"

# %% JSON in several lines
@@
-    return f"data: {json.dumps(value)}\n\n"
+    return f"data: {json.dumps(value, indent=1)}\n\n"
""",
        ),
        Known(
            "broken-characters",
            "`�` stands for bytes that are no character. A token may hold half of one: decode *all*"
            " tokens so far, and hold back what is not complete until the rest comes.",
            hint=2,
            answers=r"""
# %% the tokens of each step by themselves
@@
-            token_ids += new
-            text = decode(token_ids)
-            if reason is None:
-                text = text.rstrip("\ufffd")  # half a character
-            delta, sent = text[len(sent) :], text
+            token_ids += new
+            delta = decode(new)

# %% nothing is held back
@@
-            if reason is None:
-                text = text.rstrip("\ufffd")  # half a character

# %% held back, and sent although the engine has died
@@
-    except MiniVLLMError as error:
+    except MiniVLLMError as error:
+        if len(decode(token_ids)) > len(sent):
+            delta = decode(token_ids)[len(sent) :]
+            choice = {"index": 0, "text": delta, "finish_reason": None}
+            yield as_event({**head, "choices": [choice]})
""",
        ),
        Known(
            "end-of-text-lost",
            "The end of the text is missing. The step that brings the finish reason may bring"
            " tokens, too; and at the end, what was held back is sent as it is.",
            hint=3,
            answers=r"""
# %% the last step has no text
@@
-            delta, sent = text[len(sent) :], text
+            delta, sent = text[len(sent) :] if reason is None else "", text

# %% holds back at the end, too
@@
-            if reason is None:
-                text = text.rstrip("\ufffd")  # half a character
+            text = text.rstrip("\ufffd")

# %% takes broken bytes away
@@
-            text = decode(token_ids)
-            if reason is None:
-                text = text.rstrip("\ufffd")  # half a character
+            text = decode(token_ids).rstrip("\ufffd")
""",
        ),
        Known(
            "text-again",
            "Text is sent that was sent before. Remember what was *sent*, and send what comes"
            " behind it.",
            hint=2,
            answers=r"""
# %% all text so far
@@
-            delta, sent = text[len(sent) :], text
+            delta, sent = text, text

# %% behind the text of the step before, which was held back or not
@@
-            delta, sent = text[len(sent) :], text
+            delta = text[len(sent) :]
+            sent = delta
""",
        ),
        Known(
            "error-escapes",
            "The status 200 and some text are on their way: an exception cannot become a status 500"
            " any more, the connection just breaks. Yield an error event, and end.",
            hint=4,
            answers=r"""
# %% knows one of the errors only
@@
-    except MiniVLLMError as error:
+    except EngineEndedError as error:

# %% goes up
@@
-    except MiniVLLMError as error:
-        yield as_event({"error": {"message": str(error)}})
+    finally:
+        pass
""",
        ),
        Known(
            "error-hidden",
            "The stream ends as if the answer were complete. The client must hear that it is not.",
            hint=4,
            answers=r"""
# %% just ends
@@
-        yield as_event({"error": {"message": str(error)}})
+        return
""",
        ),
        Known(
            "done-after-error",
            "[DONE] says that all is well: a client takes the half answer for a whole one. After an"
            " error event, nothing comes.",
            hint=4,
            answers=r"""
# %% DONE in any case
@@
-        yield "data: [DONE]\n\n"
-    except MiniVLLMError as error:
-        yield as_event({"error": {"message": str(error)}})
+    except MiniVLLMError as error:
+        yield as_event({"error": {"message": str(error)}})
+    yield "data: [DONE]\n\n"
""",
        ),
        Known(
            "no-done",
            "A complete stream ends with one [DONE]: that is how a client tells an end from a"
            " broken connection.",
            answers=r"""
# %% none
@@
-        yield "data: [DONE]\n\n"
""",
        ),
        Known(
            "done-too-early",
            "A client stops reading at [DONE]. Nothing comes after it.",
            hint=3,
            answers=r"""
# %% usage at the very end
@@
-        if include_usage:
+        yield "data: [DONE]\n\n"
+        if include_usage:
@@
-            yield as_event({**head, "choices": [], "usage": usage})
-        yield "data: [DONE]\n\n"
+            yield as_event({**head, "choices": [], "usage": usage})
""",
        ),
        Known(
            "no-usage",
            "Usage was asked for: an event of its own, before [DONE].",
            answers=r"""
# %% none
@@
-        if include_usage:
+        if include_usage and not token_ids:
""",
        ),
        Known(
            "usage-unasked",
            "Usage comes only where it was asked for: other clients do not expect an event without"
            " choices.",
            answers=r"""
# %% always
@@
-        if include_usage:
+        if True:
""",
        ),
        Known(
            "wrong-usage",
            "Count tokens, not events: a step may bring several tokens, or none, and a token may"
            " give no text yet.",
            hint=3,
            answers=r"""
# %% counts steps
@@
-    token_ids, sent = [], ""
+    token_ids, sent, num_output = [], "", 0
@@
-            token_ids += new
+            token_ids += new
+            num_output += 1
@@
-            num_output = len(token_ids)
""",
        ),
        Known(
            "wrong-reason",
            "The finish reason stands in the last choice, and only there; all others have null. It"
            " also comes when the last step brings no text.",
            hint=3,
            answers=r"""
# %% only with text
@@
-            if delta or reason is not None:
+            if delta:

# %% the word of the API for none
@@
-                choice = {"index": 0, "text": delta, "finish_reason": reason}
+                choice = {"index": 0, "text": delta, "finish_reason": reason or ""}
""",
        ),
        Known(
            "empty-event",
            "An event without text, and without an end, says nothing. A first one would even be"
            " taken for the first token.",
            answers=r"""
# %% an event for each step
@@
-            if delta or reason is not None:
+            if True:
""",
        ),
        Known(
            "sent-late",
            "Send what is known before you wait for the next step. A user reads along.",
            answers=r"""
# %% all at the end
@@
-        for new, reason in steps:
+        for new, reason in list(steps):

# %% one step late: looks whether another one comes
@@
-        for new, reason in steps:
-            token_ids += new
+        late = []
+        for new, reason in steps:
+            late.append(new)
+            if reason is None and len(late) < 2:
+                continue
+            new = [token for tokens in late for token in tokens]
+            late = []
+            token_ids += new
""",
        ),
        Known(
            "catches-too-much",
            "When the client has gone, the generator is closed: `GeneratorExit` is raised in it,"
            " and it must not yield any more. Catch `MiniVLLMError`, or `Exception`.",
            answers=r"""
# %% catches everything
@@
-    except MiniVLLMError as error:
+    except BaseException as error:
""",
        ),
        Known(
            "wrong-text",
            "The texts of all events, joined, must be that of all tokens. The text of two tokens"
            " need not be their two texts, one after the other: decode all tokens so far.",
            hint=2,
            answers=r"""
# %% decodes by itself what is not sent yet
@@
-            token_ids += new
-            text = decode(token_ids)
-            if reason is None:
-                text = text.rstrip("\ufffd")  # half a character
-            delta, sent = text[len(sent) :], text
+            token_ids += new
+            waiting = [*(sent or []), *new]
+            delta, sent = decode(waiting), []
+            if reason is None and delta.endswith("\ufffd"):
+                delta, sent = "", waiting
""",
        ),
        Known(
            "keeps-state",
            answers=r"""
# %% one list for all answers, which each begins by emptying
@@
-    include_usage: bool,
-) -> Iterator[str]:
+    include_usage: bool,
+    token_ids=[],
+) -> Iterator[str]:
@@
-    token_ids, sent = [], ""
+    token_ids.clear()
+    sent = ""

# %% one list for all answers
@@
-def as_event(value) -> str:
+TOKEN_IDS = []
+
+
+def as_event(value) -> str:
@@
-    token_ids, sent = [], ""
+    token_ids, sent = TOKEN_IDS, ""
""",
        ),
        Known(
            "changed-input",
            answers=r"""
# %% the head gets the choices
@@
-                yield as_event({**head, "choices": [choice]})
+                head["choices"] = [choice]
+                yield as_event(head)

# %% the first step's list grows
@@
-    token_ids, sent = [], ""
+    token_ids, sent = None, ""
@@
-            token_ids += new
+            if token_ids is None:
+                token_ids = new
+            else:
+                token_ids += new
""",
        ),
    ),
    right=r"""
# %% holds back all of a step that ends inside of a character, as vLLM does
@@
-            if reason is None:
-                text = text.rstrip("\ufffd")  # half a character
-            delta, sent = text[len(sent) :], text
+            delta = ""
+            if reason is not None or not text.endswith("\ufffd"):
+                delta, sent = text[len(sent) :], text

# %% characters as they are
@@
-    return f"data: {json.dumps(value)}\n\n"
+    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
+    return "data: " + data + "\n\n"

# %% the chunks have a usage of null
@@
-                yield as_event({**head, "choices": [choice]})
+                yield as_event({**head, "choices": [choice], "usage": None})
""",
)
