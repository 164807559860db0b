"""`minivllm chat`: a conversation. Only its user ends it: a line that is refused, an answer that
fails, or Ctrl-C does not.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.cli.options import (
    Engine,
    MaxTokens,
    Mine,
    MinP,
    Model,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    open_llm,
    open_mine,
)
from minivllm.cli.stdio import complain, note, write
from minivllm.errors import (
    ConfigError,
    EmptyPromptError,
    MiniVLLMError,
    PromptTooLongError,
    RankError,
)
from minivllm.files import reason
from minivllm.sampling_params import SamplingParams
from minivllm.text import is_unicode, one_line

if TYPE_CHECKING:
    from minivllm.llm import LLM

HELP = "/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer."

Message = dict[str, str]


def chat(
    model: Model = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    system: System = None,
    mine: Mine = False,
    engine: Engine = None,
) -> None:
    """Talk with the model. Questions may also be piped in, one per line."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
    )
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if mine:
        own = open_mine(model, engine)
        llm, stream = own.llm, own.stream
    else:
        llm, stream = open_llm(model, engine), None
    conversation = Chat(llm, params, system, interactive, stream)
    if interactive:
        whose = " on your own engine" if mine else ""
        note(f"Chatting with {one_line(_model_name(llm))}{whose}. {HELP}")
    conversation.run()


def _texts(llm: LLM, prompt: list[int], params: SamplingParams) -> Iterator[str]:
    """The new text of an answer, piece by piece. Raises the error that ends it early."""
    stream = llm.stream(prompt, params)
    try:
        for output in stream:
            yield output.text
            if output.error is not None:
                raise output.error
    finally:
        # Aborts the request, if it has not ended.
        stream.close()


def _model_name(llm: LLM) -> str:
    path = llm.llm_engine.model_path
    return "the bundled model" if path == BUNDLED_MODEL_PATH else path.name


class Chat:
    """A conversation with a model.

    stream(prompt, params): yields the new text of an answer, and ends it when it is closed; by
    default the model's own.
    interactive: whether a person types; otherwise lines come from a file or a pipe, without
    comments. Raises `ConfigError` for a model without a chat template.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None,
        interactive: bool,
        stream: Callable[[list[int], SamplingParams], Iterator[str]] | None = None,
    ) -> None:
        self._llm, self._params, self._interactive = llm, params, interactive
        self._new_stream = stream or partial(_texts, llm)
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._interrupts = _Interrupts()
        llm.render_chat([*self._opening, {"role": "user", "content": "."}])

    def run(self) -> None:
        """Read lines and answer them until the end of the input."""
        if self._interactive:
            with suppress(ImportError):  # Python for Windows has none
                import readline  # noqa: F401 (gives input() its line editing)
        with self._interrupts:
            while (line := self._read_line()) is not None and line.strip() not in (
                "/exit",
                "/quit",
            ):
                self._take(line.strip())

    def _read_line(self) -> str | None:
        """The next line; None at the end. Ctrl-C drops the line that is being typed."""
        while True:
            try:
                with self._interrupts.reading:
                    return input("\n> " if self._interactive else "")
            except EOFError:
                if self._interactive:
                    print()
                return None
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                note(f"\n{HELP}")
            except OSError as error:
                raise ConfigError(f"Standard input cannot be read: {reason(error)}.") from error

    def _take(self, line: str) -> None:
        """Do what a line says. A line that is refused leaves the conversation as it was."""
        if line == "/reset":
            self._messages = list(self._opening)
            if self._interactive:
                note("The conversation begins anew.")
        elif line.startswith("/"):
            note(HELP)
        elif not is_unicode(line):
            complain(
                "Error: this line is not text in UTF-8. It was left out; the conversation goes on."
            )
        elif line:
            try:
                self._answer(line)
            except RankError:  # no line will be answered any more
                raise
            except MiniVLLMError as error:
                complain(f"Error: {error} The line was left out; the conversation goes on.")

    def _answer(self, line: str) -> None:
        """Stream the answer to a line; keep the line and the answer."""
        messages, prompt = self._fit([*self._messages, {"role": "user", "content": line}])
        room = self._limit() - len(prompt)
        params = replace(self._params, max_tokens=min(self._params.max_tokens or room, room))
        before, start = self._llm.metrics(), time.perf_counter()
        answer, stopped = self._stream(prompt, params)
        write("\n")
        if answer or not stopped:
            self._messages = [*messages, {"role": "assistant", "content": answer}]
        if self._interactive:
            after, elapsed = self._llm.metrics(), time.perf_counter() - start
            num_tokens = after.num_generated_tokens - before.num_generated_tokens
            hits = after.prefix_cache_hits - before.prefix_cache_hits
            cached = f"{hits} of {len(prompt)} prompt tokens from the prefix cache"
            note(f"{num_tokens} tokens in {elapsed:.1f} s; {cached}")

    def _stream(self, prompt: list[int], params: SamplingParams) -> tuple[str, bool]:
        """(the answer, whether Ctrl-C has cut it short)."""
        parts: list[str] = []
        stream = self._new_stream(prompt, params)
        try:
            with self._interrupts.stoppable:
                while not self._interrupts.pressed and (text := next(stream, None)) is not None:
                    parts.append(text)
                    write(text)
        except KeyboardInterrupt:  # pressed again, for the step took too long
            if not self._interactive:
                raise
        stream.close()  # which aborts the request, if it has not ended
        stopped = self._interrupts.pressed
        if stopped and self._interactive:
            note(
                (
                    " (stopped)"
                    if "".join(parts)
                    else " (stopped before it began; the line was left out)"
                ),
                newline=False,
            )
        return "".join(parts), stopped

    def _limit(self) -> int:
        """Tokens that a conversation and its answer may have together."""
        config = self._llm.llm_engine.config
        return min(config.max_model_len, config.num_kv_blocks * config.block_size)

    def _fit(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """(messages, their prompt), without the oldest turns if there is no room for an answer."""
        limit, first = self._limit(), len(self._opening)
        room = min(self._params.max_tokens or limit, limit // 4)
        forgotten = 0
        prompt = self._llm.render_chat(messages)
        while len(prompt) + room > limit and len(messages) > first + 2:
            messages = messages[:first] + messages[first + 2 :]
            prompt = self._llm.render_chat(messages)
            forgotten += 1
        if len(prompt) >= limit:
            raise PromptTooLongError(
                f"The line makes a prompt of {len(prompt)} tokens, and {limit - 1} fit. Shorten it,"
                " or raise max_model_len or num_kv_blocks (-e max_model_len=…)."
            )
        if not prompt:
            raise EmptyPromptError("The chat template makes nothing of this line.")
        if forgotten:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            note(f"(The context is full: the oldest {turns} forgotten.)")
        return messages, prompt


class _Interrupts:
    """What Ctrl-C does in a chat: it is noted in `pressed`, so that nothing is cut in two.

    It raises in two places. `with interrupts.reading`: at once. `with interrupts.stoppable`: if it
    was pressed before, since the line was read.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._mode = ""
        self._previous: Any = None

    @property
    @contextmanager
    def reading(self) -> Iterator[None]:
        self.pressed, self._mode = False, "reading"
        try:
            yield
        finally:
            self._mode = ""

    @property
    @contextmanager
    def stoppable(self) -> Iterator[None]:
        self._mode = "stoppable"
        try:
            yield
        finally:
            self._mode = ""

    def __enter__(self) -> None:
        with suppress(ValueError):  # only the main thread may
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        raises = self._mode == "reading" or (self._mode == "stoppable" and self.pressed)
        self.pressed = True
        if raises:
            self._mode = ""  # what clears up is not interrupted
            raise KeyboardInterrupt
