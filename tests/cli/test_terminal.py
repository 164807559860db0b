"""Text of strangers in a terminal: it is shown, and nothing of it is obeyed, whichever command
shows it.
"""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from minivllm.bundled import BUNDLED_MODEL_PATH
from minivllm.cli import stdio
from minivllm.cli.app import app
from minivllm.engine.trace import StepRecord, Trace, TracedSequence
from minivllm.errors import ConfigError, RequestError
from minivllm.text import is_unicode, one_line, printable
from minivllm.viz.terminal import SafeConsole, engine_view, step_table, tail

#: Sets the title, clears the screen (twice), goes back to the line's start, turns the line around;
#: and rich's markup.
HOSTILE = "\x1b]0;PWN\x07\x1b[2J\x9b2J\r\u202e\u2066[red]bad[/red][link=http://x]:smile:"
SHOWN = "]0;PWN[2J2J[red]bad[/red][link=http://x]:smile:"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
#: The colours that the commands themselves print.
COLOURS = re.compile(r"\x1b\[[\d;]*m")


def assert_harmless(output: str, *, shown: str = "[red]bad") -> None:
    """It holds the hostile text, but no character that a terminal obeys."""
    assert shown in output, output
    assert OBEYED.findall(COLOURS.sub("", output)) == []


def minivllm(*arguments: str, code: int = 0, **options) -> str:
    """All that a command prints, colours included, with its lines joined where the terminal broke
    them.
    """
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, list(arguments), color=True, **options)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


# --- the functions --------------------------------------------------------------------------------


def test_what_a_terminal_obeys_is_taken_out() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("".join(map(chr, range(0x250)))) == "\t\n" + "".join(
        chr(c) for c in range(0x20, 0x250) if not 0x7F <= c <= 0x9F
    )
    assert printable("é 👩‍🚀 שלום ‎ 語") == "é 👩‍🚀 שלום ‎ 語"
    assert printable("a\udcff") == "a\ufffd"
    assert (is_unicode("é👩‍🚀"), is_unicode("a\udcff")) == (True, False)


def test_a_text_in_parts_is_made_safe_alike() -> None:
    assert "".join(map(printable, HOSTILE)) == printable(HOSTILE)


def test_one_line() -> None:
    assert one_line(f" a\n\tb {HOSTILE} ", 12) == "a b ]0;PWN[…"
    assert one_line("x" * 100) == "x" * 100


def test_an_error_cannot_steer_a_terminal_even_uncaught() -> None:
    for error in (ConfigError(HOSTILE), RequestError(HOSTILE)):
        assert str(error) == SHOWN
        assert error.args == (HOSTILE,)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_console_shows_everything_and_obeys_nothing(terminal: bool) -> None:
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=terminal, width=300)
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, style="red"))
    console.print(table, HOSTILE, Text(HOSTILE))
    console.rule(HOSTILE)
    assert_harmless(file.getvalue())
    assert file.getvalue().count(SHOWN) == 8
    assert ("\x1b[31m" in file.getvalue()) == terminal  # its own colours are there


# --- traces ---------------------------------------------------------------------------------------


def hostile_trace() -> Trace:
    label = f"{HOSTILE}/1"
    record = StepRecord(
        step=0,
        start_time=0.0,
        duration=0.5,
        scheduled=[TracedSequence(HOSTILE, 1, "prefill", 0, 4, True, 2)],
        block_tables={label: [0]},
        num_computed_tokens={label: 4},
        running=[label],
        waiting=[label],
        preempted=[label],
        num_free_blocks=1,
        cached_blocks=[],
        registered_blocks=[0],
        finished=[label],
    )
    return Trace(HOSTILE, 2, 4, 8, 64, 1024, 128, [record])


@pytest.mark.parametrize("console", [Console, SafeConsole])
def test_pictures_of_a_hostile_trace(console: type[Console]) -> None:
    """Also on a console that believes in markup."""
    trace, file = hostile_trace(), io.StringIO()
    label = trace.steps[0].running[0]
    shown = console(file=file, width=400)
    shown.print(step_table(trace))
    shown.print(
        engine_view(trace, trace.steps[0], {label: HOSTILE}, width=300, news=printable(HOSTILE))
    )
    assert_harmless(file.getvalue(), shown="[red]bad[/red]")
    assert tail(HOSTILE, 300) == SHOWN


def test_showing_a_hostile_trace(tmp_path: Path) -> None:
    hostile_trace().save(tmp_path / "trace.json")
    for every_step in ([], ["--every-step"]):
        output = minivllm("trace", "--show", str(tmp_path / "trace.json"), *every_step)
        assert_harmless(output)
        assert output.count(SHOWN) == 4  # the model; and the request, admitted, preempted, done
    (tmp_path / "bad.json").write_text(json.dumps({"version": 1, HOSTILE: 1}))
    assert_harmless(minivllm("trace", "--show", str(tmp_path / "bad.json"), code=2))


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a name and a chat template of an enemy."""
    path = tmp_path_factory.mktemp("hostile") / HOSTILE.replace("/", "")
    path.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(BUNDLED_MODEL_PATH / name, path / name)
    template = (
        "{% if 'refuse' in messages[-1].content %}{{ raise_exception(messages[-1].content) }}{%"
        " endif %}{{ messages[-1].content }}"
    )
    config = json.loads((BUNDLED_MODEL_PATH / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return path


@pytest.mark.slow
def test_errors_of_a_checkpoint(checkpoint: Path) -> None:
    model, refused = ["-m", str(checkpoint)], f"refuse {HOSTILE}"
    assert_harmless(minivllm("generate", *model, refused, code=2))
    assert_harmless(minivllm("generate", *model, "-n", "2", refused, refused, code=2))
    # the heads above the texts
    assert_harmless(minivllm("generate", *model, "-n", "2", HOSTILE, HOSTILE))
    assert_harmless(minivllm("chat", *model, "-n", "2", input=f"{HOSTILE} refuse\n"))
    (checkpoint / "config.json").rename(checkpoint / "kept.json")
    assert_harmless(minivllm("generate", *model, "x", code=2).replace("config.json", ""))
    (checkpoint / "kept.json").rename(checkpoint / "config.json")


@pytest.mark.slow
def test_the_names_of_models_and_files(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / HOSTILE.replace("/", "")
    assert_harmless(minivllm("trace", "-m", str(checkpoint), "-n", "2", "-o", str(out), "hello"))
    assert_harmless(minivllm("trace", "--show", str(out)))
    assert_harmless(minivllm("trace", "--show", f"/nowhere/{out.name}", code=2))
    assert_harmless(minivllm("trace", "-o", f"/nowhere/{out.name}", "hello", code=2))
    assert_harmless(minivllm("demo", "--picture", f"/nowhere/{out.name}", code=2))


@pytest.mark.parametrize(
    "arguments",
    [
        [HOSTILE],
        ["generate", f"--{HOSTILE}"],
        ["generate", "-m", f"/nowhere{HOSTILE}", "x"],
        ["generate", "-e", f"{HOSTILE}=1", "x"],
        ["generate", "-e", f"block_size={HOSTILE}", "x"],
        ["check", HOSTILE],
        ["course", "reset", HOSTILE],
        ["bench", HOSTILE],
        ["bench", "kernels", "--only", HOSTILE],
        ["bench", "roofline", HOSTILE],
    ],
)
def test_mistakes_quote_what_was_typed(arguments: list[str]) -> None:
    assert_harmless(minivllm(*arguments, code=2))


def test_what_a_model_writes(capsys: pytest.CaptureFixture[str]) -> None:
    stdio.write(HOSTILE)
    stdio.note(HOSTILE)
    stdio.complain(HOSTILE)
    captured = capsys.readouterr()
    assert captured.out == SHOWN
    assert_harmless(captured.out + captured.err)


def test_log_lines_quote_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    stdio._LogLines().handle(logging.makeLogRecord({"msg": "Prompt %s", "args": (HOSTILE,)}))
    assert capsys.readouterr().err == f"Prompt {SHOWN}\n"


def test_a_bug_keeps_its_traceback_but_not_its_escapes(
    monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError(HOSTILE)

    monkeypatch.setattr("minivllm.cli.trace._load_trace", fails)
    with pytest.raises(SystemExit) as end:
        app(["trace", "--show", "x.json"])
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert "Traceback" in said
    assert "report" in said
    assert_harmless(said)


# --- demo, doctor, course, bench ------------------------------------------------------------------


def test_what_the_demo_shows(checkpoint: Path) -> None:
    from minivllm.cli import demo

    class Run:
        order, texts = ["0/0"], {"0/0": HOSTILE}

        @staticmethod
        def question(label: str) -> str:
            return HOSTILE

    file = io.StringIO()
    console = SafeConsole(file=file, width=300)
    for text in demo._finished_text(Run(), "0/0"):
        console.print(text, soft_wrap=True)
    assert file.getvalue().count(SHOWN) == 2
    assert_harmless(file.getvalue())


def test_what_the_doctor_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    from minivllm.cli import doctor

    finding = doctor.Finding(HOSTILE, doctor.BROKEN, HOSTILE, HOSTILE)
    monkeypatch.setattr(doctor, "examine", lambda: [finding])
    output = minivllm("doctor", code=1)
    assert_harmless(output)
    assert output.count(SHOWN) == 4


def test_what_the_course_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("notebooks", "solutions", "exercises"):
        (tmp_path / folder).mkdir()
    shutil.copytree(
        Path(__file__).parents[2] / "solutions", tmp_path / "solutions", dirs_exist_ok=True
    )
    cells = [nbformat.v4.new_markdown_cell("5 minutes")]
    hostile = HOSTILE.replace("/", "").replace("-", "")
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells), tmp_path / f"notebooks/98_{hostile}.ipynb"
    )
    (tmp_path / "exercises/.progress.json").write_text(json.dumps({HOSTILE: 1}))
    monkeypatch.chdir(tmp_path)
    output = minivllm("course")
    assert_harmless(output)
    assert "98 ]0;PWN" in output
    assert ".progress.damaged-1.json" in output


def test_what_a_benchmark_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from minivllm.bench.report import recorded, say
    from minivllm.bench.tables import show

    say(HOSTILE)
    report = {**recorded("throughput-h200"), "model": HOSTILE}
    failed = {"workload": report["cases"]["decode1"]["workload"], "failed": HOSTILE}
    report["cases"] = {HOSTILE: failed}
    show(report)
    captured = capsys.readouterr()
    assert_harmless(captured.out)
    assert_harmless(captured.err)
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert_harmless(minivllm("bench", "roofline", str(tmp_path / "report.json")))
