"""The program that renders chat templates: a separate process with limits.

chat_template.py starts this program. A template comes with a checkpoint and is not trusted. Jinja's
sandbox keeps a template from reaching Python, but not from looping for ever, or from doubling a
string until the memory is full. No list of forbidden operations would be complete, but limits that
the operating system enforces are. So templates run here, in a process that can be ended without
harm to the engine.

The program reads requests from stdin and writes answers to stdout. Requests are in marshal's format
(the parent is trusted), answers are in JSON (this process is not).
"""

from __future__ import annotations

import json
import marshal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minivllm.pipes import read_frame, write_frame

#: Most characters of a prompt. Each character of the input allows `OUTPUT_FACTOR` more.
MAX_OUTPUT = 1_000_000
OUTPUT_FACTOR = 4
#: Characters of an error's text that the answer holds.
MAX_MESSAGE = 2000


class OutputTooLongError(Exception):
    """The template writes far more text than its input has."""


@dataclass(frozen=True)
class Template:
    """A compiled template. takes_parts: whether it loops over a message's content (parts)."""

    compiled: jinja2.Template
    takes_parts: bool


class GenerationExtension(jinja2.ext.Extension):
    """``{% generation %}`` marks the model's words for training. Here it only renders them."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return caller()


# --- compiling ----------------------------------------------------------------------------------


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment for which templates on the Hugging Face hub are written (transformers')."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationExtension, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON. Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=8)
def compile_template(source: str) -> Template:
    environment = make_environment()
    return Template(environment.from_string(source), takes_parts(environment.parse(source)))


def takes_parts(tree: nodes.Template) -> bool:
    """Whether a loop of the template goes over something named "content"."""
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _is_content(node.node, names)
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name in names


# --- rendering ----------------------------------------------------------------------------------


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Render {"source": …, "variables": …}. Returns {"text"}, or {"error", "message", "line"}."""
    try:
        template = compile_template(request["source"])
    except MemoryError:
        return _failure("memory")
    except jinja2.TemplateSyntaxError as error:
        return _failure("syntax", error.message or "", error.lineno)
    except Exception as error:
        # Python's compiler refuses the template, for example because it is nested too deeply.
        return _failure("syntax", str(error) or type(error).__name__)
    variables = request["variables"]
    if not template.takes_parts:
        variables["messages"] = [_flatten(message) for message in variables["messages"]]
    try:
        most = MAX_OUTPUT + OUTPUT_FACTOR * request["num_chars"]
        return {"text": "".join(_pieces(template, variables, most))}
    except MemoryError:
        return _failure("memory")
    except OutputTooLongError:
        return _failure("output")
    except Exception as error:
        # A template is an untrusted program, and may fail in any way.
        return _failure("render", str(error) or type(error).__name__, _line_of(error))


def _failure(kind: str, message: str = "", line: int | None = None) -> dict[str, Any]:
    return {"error": kind, "message": message[:MAX_MESSAGE], "line": line}


def _pieces(template: Template, variables: dict[str, Any], most: int) -> Iterator[str]:
    length = 0
    for piece in template.compiled.generate(**variables):
        length += len(piece)
        if length > most:
            raise OutputTooLongError
        yield piece


def _flatten(message: dict[str, Any]) -> dict[str, Any]:
    """Join text parts, for a template that expects a string (as vLLM does)."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _line_of(error: BaseException) -> int | None:
    """The template's line that failed, from the traceback that Jinja has rewritten."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line


# --- the process --------------------------------------------------------------------------------


def limit_memory(num_bytes: int) -> bool:
    """Limit this process's memory. Returns False where this is impossible (Windows, macOS)."""
    if sys.platform != "linux":
        return False
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return True


def set_alarm(seconds: int) -> None:
    """End this process after so many seconds (0: never), in case the parent cannot end it."""
    if sys.platform != "win32":
        import signal

        signal.alarm(seconds)


def main(memory_limit: int, time_limit: int) -> None:
    """Answer requests until the parent closes the pipe."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    write_frame(answers, json.dumps({"limits_memory": limit_memory(memory_limit)}).encode())
    while (request := read_frame(requests)) is not None:
        set_alarm(time_limit)
        body = json.dumps(answer(marshal.loads(request))).encode()
        set_alarm(0)
        write_frame(answers, body)
