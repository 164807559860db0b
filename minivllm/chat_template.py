"""Turn conversations into prompts with a checkpoint's chat templates, as transformers does.

Templates come with checkpoints and are not trusted. They run in a separate process with limits of
time and memory; see template_worker.py. The process starts with the first conversation and is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import marshal
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivllm.errors import ConfigError, RequestError
from minivllm.pipes import read_frame, write_frame
from minivllm.text import printable

logger = logging.getLogger(__name__)

#: Seconds per rendering; an ordinary rendering takes less than a millisecond.
TIME_LIMIT = 3
#: Bytes of the rendering process (Linux; elsewhere only time is limited).
MEMORY_LIMIT = 512 << 20
#: Seconds for the start of the process, even on a very busy machine.
START_LIMIT = 60
#: Characters of a template's own text in an error message.
MAX_MESSAGE = 500

#: Types of a text part: OpenAI's names in its two interfaces.
TEXT_PARTS = ("text", "input_text", "output_text")
#: Names of the field that holds a message's reasoning. Most templates read the first, gpt-oss's
#: reads the second.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def clean(text: str, limit: int = MAX_MESSAGE) -> str:
    """Make untrusted text safe to print (see `printable`), and cut it to `limit` characters."""
    return printable(text if len(text) <= limit else text[: limit - 1] + "…")


# --- what a conversation is made of -------------------------------------------------------------


@dataclass(frozen=True)
class TemplateSource:
    """The text of a template and its file. file: None for a template that the caller passed."""

    text: str
    file: Path | None = None


@dataclass(frozen=True)
class Conversation:
    """All that a template sees, apart from special tokens and its own variables."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    #: Leave the last message open: True, or the name of the message's field to continue.
    continue_final_message: bool | str = False
    variables: Mapping[str, Any] = field(default_factory=dict)


def render(worker: TemplateWorker, source: TemplateSource, conversation: Conversation) -> str:
    """Render the prompt. Raises `RequestError` if the template refuses, `ConfigError` if broken."""
    try:
        variables = _template_variables(conversation)
    except RecursionError as error:
        raise RequestError("The messages are nested too deeply, or contain themselves.") from error
    final = None
    if conversation.continue_final_message:
        final = _open_final_message(variables["messages"], conversation, source)
    text = worker.render(source, variables)
    return text if final is None else _cut_after(text, final)


def _template_variables(conversation: Conversation) -> dict[str, Any]:
    for name in ("tools", "documents"):
        value = getattr(conversation, name)
        if value is not None and not (
            isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)
        ):
            raise RequestError(f"{name} must be a list of dicts (JSON schemas), got {value!r:.80}.")
    messages = conversation.messages
    if not isinstance(messages, list | tuple):
        raise RequestError(f"messages must be a list of dicts, got {type(messages).__name__}.")
    return {
        **_plain(conversation.variables),
        "messages": [_message(number, m) for number, m in enumerate(messages, 1)],
        "tools": _plain(conversation.tools),
        "documents": _plain(conversation.documents),
        "add_generation_prompt": bool(conversation.add_generation_prompt),
    }


def _message(number: int, value: Any) -> dict[str, Any]:
    """Convert a message to plain data, in a new dict. number: counted from 1."""
    message = _plain(value)
    if not isinstance(message, dict):
        raise RequestError(
            f'Message {number} must be a dict like {{"role": "user", "content": "…"}}, got'
            f" {value!r:.80}."
        )
    # Some interfaces pass None where others leave a key out. Templates expect the key left out.
    message = {key: item for key, item in message.items() if item is not None}
    if isinstance(message.get("content"), list | tuple):
        message["content"] = [_text_part(number, part) for part in message["content"]]
    reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _text_part(number: int, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind not in TEXT_PARTS:
        raise RequestError(
            f"Message {number} has a part of type {kind!r:.40}; the models here read text only, no"
            ' images, audio or files. Give {"type": "text", "text": "…"}.'
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f'Message {number} has a text part without a string as its "text".')
    return {**part, "type": "text"}


def _plain(value: Any) -> Any:
    """Rebuild a value from JSON's types, as transformers does: no method is left to be abused."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    # Of a subclass (an enum, a NumPy number) only the plain value is kept.
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, "__str__" if kind is str else f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (
            type(value)(map(_plain, value))
            if type(value) in (list, tuple)
            else list(map(_plain, value))
        )
    if (
        type(value).__module__ == "numpy"
        and hasattr(value, "item")
        and not getattr(value, "shape", ())
    ):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic's models
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


# --- continuing the last message (transformers' way) ----------------------------------------------


def _open_final_message(
    messages: list[dict[str, Any]], conversation: Conversation, source: TemplateSource
) -> str:
    """Mark the end of the last message in `messages`. Returns the text of that message."""
    if conversation.add_generation_prompt:
        raise RequestError(
            "continue_final_message continues the last message, and add_generation_prompt begins a"
            " new one; ask for one of them (add_generation_prompt=False)."
        )
    name = conversation.continue_final_message
    name = name if isinstance(name, str) else "content"
    if not messages or messages[-1].get(name) is None:
        raise RequestError(
            f"continue_final_message: the last message has no {name!r} to go on with."
        )
    last, final = messages[-1], messages[-1][name]
    names = [name]
    if name in REASONING_FIELDS:
        names = [n for n in REASONING_FIELDS if last.get(n) == final]
    if not any(n in source.text for n in names):
        raise RequestError(f"continue_final_message: the chat template does not read {name!r}.")
    if isinstance(final, list):
        if not final:
            raise RequestError(
                "continue_final_message: the last message has no text to go on with."
            )
        text = final[-1]["text"]
        final[-1]["text"] = text + CONTINUE_TAG
        return text
    if not isinstance(final, str):
        raise RequestError(f"continue_final_message: {name!r} of the last message is not text.")
    for n in names:
        last[n] = final + CONTINUE_TAG
    return final


def _cut_after(text: str, final: str) -> str:
    """Cut the prompt after the last message."""
    tag = CONTINUE_TAG.strip()
    if tag not in text or final.strip() not in text:
        raise RequestError(
            "continue_final_message: the chat template does not write the last message as it is, so"
            " its end cannot be found. Render the prompt yourself and use generate()."
        )
    position = text.rindex(tag)
    kept = text[:position]
    # Some templates strip messages. Then the text before the mark is stripped, too.
    return kept if text[position:].startswith(CONTINUE_TAG) else kept.rstrip()


# --- the process that renders --------------------------------------------------------------------


class TemplateWorker:
    """The process that renders templates. It starts when needed, and again after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize | None = None
        # The process that started the worker: a fork must not use its parent's pipes.
        self._owner = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return TemplateWorker, ()

    def close(self) -> None:
        """End the process, if there is one. The next rendering starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def render(self, source: TemplateSource, variables: dict[str, Any]) -> str:
        """Render the template with these variables, which are plain data."""
        try:
            num_chars = len(source.text) + _num_chars(variables)
            request = {"source": source.text, "variables": variables, "num_chars": num_chars}
            body = marshal.dumps(request)
        except ValueError as error:
            raise RequestError(
                f"The messages cannot be handed to the chat template: {error}."
            ) from error
        with self._lock:
            try:
                answer = self._ask(body)
            except BaseException:
                # After an interrupt, a late answer would be read as that of the next request.
                self.close()
                raise
        return _text_of(answer, source)

    def _ask(self, body: bytes) -> dict[str, Any]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._start()
        start = time.monotonic()
        answer = self._exchange(body, TIME_LIMIT)
        if answer is None:
            late = time.monotonic() - start >= TIME_LIMIT
            self.close()
            answer = {"error": "time" if late else "memory", "message": "", "line": None}
        return answer

    def _start(self) -> None:
        paths = [*sys.path, str(Path(__file__).resolve().parents[1])]
        code = (
            "import sys; sys.path += sys.argv[1:]; from minivllm import template_worker as w; "
            f"w.main({MEMORY_LIMIT}, {TIME_LIMIT + 1})"
        )
        # -I and -S make the start fast. The process gets its own session (or group), because the
        # parent handles Ctrl-C.
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code, *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                **group,
            )
        except (OSError, TypeError) as error:
            # TypeError: an embedded Python has no executable.
            raise RequestError(
                f"The process that renders chat templates cannot be started ({error}); render the"
                " prompt yourself and use generate()."
            ) from error
        self.close()
        self._finalizer = weakref.finalize(self, _end, process, os.getpid())
        self._process, self._owner = process, os.getpid()
        if (ready := self._exchange(b"", START_LIMIT)) is None:
            self.close()
            raise RequestError(
                f"The process that renders chat templates does not start ({sys.executable} -c …);"
                " is jinja2 installed?"
            )
        if not ready["limits_memory"]:
            logger.info("This system cannot limit a chat template's memory, only its time.")

    def _exchange(self, body: bytes, seconds: float) -> dict[str, Any] | None:
        """Send a request (none if empty) and wait for the answer; None if the process ended."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            if body:
                write_frame(process.stdin, body)
            answer = read_frame(process.stdout)
        except OSError:
            # The process is gone.
            return None
        finally:
            timer.cancel()
        return None if answer is None else json.loads(answer)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    # After a fork the process belongs to the parent.
    if os.getpid() != owner:
        return
    process.kill()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
    process.wait()


def _num_chars(value: Any) -> int:
    """The number of characters in plain data."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_num_chars(key) + _num_chars(item) for key, item in value.items())
    return sum(map(_num_chars, value)) if isinstance(value, list | tuple) else 1


def _text_of(answer: dict[str, Any], source: TemplateSource) -> str:
    """Return the rendered text, or raise the error that the answer reports."""
    if "text" in answer:
        return answer["text"]
    kind, message = answer["error"], clean(answer["message"])
    line = "" if answer["line"] is None else f", line {answer['line']}"
    if kind == "syntax":
        if source.file is None:
            raise RequestError(
                f"The chat_template that was passed is not valid Jinja{line}: {message}"
            )
        raise ConfigError(
            f"The chat template of {clean(str(source.file))} is not valid Jinja{line}: {message}"
            " Repair it, or pass another as chat_template."
        )
    reasons = {
        "time": f"did not end within {TIME_LIMIT} s",
        "memory": f"needs more memory than the {MEMORY_LIMIT >> 20} MiB that it may have",
        "output": "writes far more text than the conversation has",
    }
    if kind in reasons:
        raise RequestError(
            f"The chat template {reasons[kind]} on these messages. Shorten them, or pass another"
            " template as chat_template."
        )
    raise RequestError(f"The chat template does not accept these messages{line}: {message}")
