"""A command as a process: exit codes, errors in one line, streams that may be closed or full."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import traceback
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperGroup

from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.files import reason
from minivllm.text import printable

#: Exit codes: a bug or unread output; what the caller can put right; Ctrl-C (128 + SIGINT).
FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130
EXIT_CODES = (
    "Exit codes: 0 is success, 2 an error that you can put right, 130 Ctrl-C, and 1 any other"
    " failure."
)

#: The root of what typer raises for a wrong command line. Its home depends on typer's version.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


class OutputError(Exception):
    """Standard output cannot be written to."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(reason(cause))
        # Windows reports a closed pipe as an invalid argument.
        self.reader_is_gone = cause.errno == errno.EPIPE or (
            os.name == "nt" and cause.errno == errno.EINVAL
        )


class Commands(TyperGroup):
    """Shows errors that minivllm raises on purpose as one line, without a traceback."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _SafeUsageErrors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _SafeUsageErrors():
                return super().invoke(ctx)
        except MiniVLLMError as error:
            complain(f"Error: {error}")
            raise typer.Exit(USER_ERROR) from error
        except MemoryError as error:
            complain("Error: not enough memory. Lower num_kv_blocks, or take a smaller model.")
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error


class App(typer.Typer):
    """The whole command. A call of it always ends with an exit code."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        streams = sys.stdin, sys.stdout, sys.stderr
        _open_streams()
        try:
            try:
                return super().__call__(*args, **options)
            finally:
                # here, and not when the interpreter ends, where it would fail again
                sys.stdout.flush()
        except OutputError as error:
            _discard_output(streams[1])
            if error.reader_is_gone:  # as after `| head`: there is nobody to tell
                raise SystemExit(FAILED) from None
            complain(f"Error: standard output cannot be written to: {error}.")
            raise SystemExit(USER_ERROR) from None
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except Exception as error:
            _report(error)
            raise SystemExit(FAILED) from None
        finally:
            sys.stdin, sys.stdout, sys.stderr = streams


def prepare_streams() -> None:
    """Make the streams read and write any text without an error of encoding; send log lines to
    stderr, made safe.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "replace"),
        (sys.stderr, "replace"),
    ):
        if hasattr(stream, "reconfigure"):
            with suppress(io.UnsupportedOperation):  # something has been read from it already
                stream.reconfigure(errors=errors)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_LogLines()])


def write(text: str) -> None:
    """Write text of a model or a user to standard output, at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def note(text: str, newline: bool = True) -> None:
    """Say something about the output, in dim letters: on standard output if that is a terminal,
    else on stderr.
    """
    typer.secho(printable(text), dim=True, err=not sys.stdout.isatty(), nl=newline)


def complain(text: str) -> None:
    """Write a red line to stderr; if stderr cannot be written to, do nothing."""
    with suppress(OSError, ValueError):
        typer.secho(printable(text), fg=typer.colors.RED, err=True)


def read_all() -> str:
    """Standard input as text, "" for a terminal. Raises `ConfigError`."""
    try:
        return "" if sys.stdin.isatty() else sys.stdin.read()
    except OSError as error:
        raise ConfigError(f"Standard input cannot be read: {reason(error)}.") from error


def _report(error: Exception) -> None:
    """Print an unexpected error with its traceback, so that it can be reported."""
    lines = "".join(traceback.format_exception(error))
    with suppress(OSError, ValueError):
        typer.echo(
            printable(
                f"{lines}\nThis is a bug in minivllm. Please report it with the lines above."
            ),
            err=True,
        )


class _SafeUsageErrors:
    """Makes the messages about a wrong command line safe: they quote it."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _UsageError):
            error.message = printable(error.message)  # type: ignore[attr-defined]


class _LogLines(logging.Handler):
    """Log lines on stderr: they quote prompts."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            typer.echo(printable(self.format(record)), err=True)


class _Output:
    """A standard stream. Its failures raise `OutputError`, so that they are not taken for those of
    a file.
    """

    def __init__(self, stream: Any, is_needed: bool) -> None:
        self._stream, self._is_needed = stream, is_needed

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self._is_needed:
            raise OutputError(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_streams() -> None:
    """Replace streams that are closed. Exits if standard output is."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        complain("Error: standard output is closed. To throw the output away, use >/dev/null.")
        raise SystemExit(USER_ERROR)
    prepare_streams()
    sys.stdout, sys.stderr = _Output(sys.stdout, True), _Output(sys.stderr, False)


def _discard_output(stream: Any) -> None:
    """Send what could not be written to the null device: the interpreter flushes it at its end."""
    if stream is not None and stream is sys.__stdout__:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
