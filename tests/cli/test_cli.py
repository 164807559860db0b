"""The command line: what it prints, how it fails, how fast it starts."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minivllm.bench.report import RECORDED
from minivllm.cli.app import app
from minivllm.config import EngineConfig
from minivllm.engine.trace import TRACE_VERSION, Trace, TraceError
from minivllm.errors import OutOfMemoryError
from minivllm.outputs import StreamOutput
from minivllm.sampling_params import SamplingParams
from minivllm.viz.terminal import block_table_cells, kv_bar, shared_blocks, step_table, tail
from support.checkpoints import write_checkpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with a tokenizer of bytes and a chat template."""
    import tokenizers

    path = write_checkpoint(
        tmp_path_factory.mktemp("cli") / "tiny", "qwen3", vocab_size=320, num_hidden_layers=2
    )
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return str(path)


def run(*arguments: str, **options) -> str:
    """The command in this process; returns standard output, after checking the exit code (`code`, 0
    unless given).
    """
    code = options.pop("code", 0)
    result = CliRunner().invoke(app, list(arguments), **options)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout if code == 0 else result.output


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_streams_what_it_returns_at_once(checkpoint):
    arguments = ["generate", "-m", checkpoint, "-n", "24", "-t", "0", "Tell me a story."]
    streamed = run(*arguments)
    assert len(streamed) > 10
    assert run(*arguments, "--no-stream") == streamed


@pytest.mark.slow
def test_several_prompts_are_one_batch_printed_in_order(checkpoint):
    prompts = ["one", "two, which is longer", "three"]
    together = run("generate", "-m", checkpoint, "-n", "16", "-t", "0", *prompts)
    heads = [f"--- {prompt}\n" for prompt in prompts]
    assert re.findall(r"^--- .*\n", together, flags=re.MULTILINE) == heads
    for prompt, head in zip(prompts, heads, strict=True):
        alone = run("generate", "-m", checkpoint, "-n", "16", "-t", "0", prompt).rstrip("\n")
        assert head + alone in together


@pytest.mark.slow
def test_chat_template_is_the_default_and_raw_leaves_it_out(checkpoint):
    arguments = ["generate", "-m", checkpoint, "-n", "16", "-t", "0"]
    default, chat, raw = (run(*arguments, *flag, "hello") for flag in ([], ["--chat"], ["--raw"]))
    assert default == chat != raw
    assert run(*arguments, "-s", "Be brief.", "hello") not in (default, raw)
    assert "--system needs a chat" in run(*arguments, "--raw", "-s", "x", "hello", code=2)


@pytest.mark.slow
def test_a_model_without_a_template_continues_the_bare_text(checkpoint, tmp_path):
    for file in Path(checkpoint).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer_config.json").unlink()
    arguments = ["generate", "-m", str(tmp_path), "-n", "16", "-t", "0"]
    assert run(*arguments, "hello") == run(
        "generate", "-m", checkpoint, *arguments[3:], "--raw", "hello"
    )
    assert "no chat template" in run(*arguments, "--chat", "hello", code=2)
    assert "no chat template" in run("chat", "-m", str(tmp_path), code=2)


@pytest.mark.slow
def test_seeds_choose_the_text(checkpoint):
    texts = {
        seed: run("generate", "-m", checkpoint, "-n", "16", "--seed", seed, "hello")
        for seed in ("1", "2")
    }
    assert texts["1"] == run("generate", "-m", checkpoint, "-n", "16", "--seed", "1", "hello")
    assert texts["1"] != texts["2"]


@pytest.mark.slow
def test_the_prompt_may_come_from_standard_input(checkpoint):
    arguments = ["generate", "-m", checkpoint, "-n", "8", "-t", "0"]
    assert run(*arguments, input="hello\n") == run(*arguments, "hello")
    assert "Give a prompt" in run(*arguments, input="", code=2)


@pytest.mark.slow
def test_stats_say_what_it_took(checkpoint):
    result = CliRunner().invoke(app, ["generate", "-m", checkpoint, "-n", "8", "--stats", "hello"])
    assert re.search(r"^8 tokens in [\d.]+ s of 8 steps \(\d+ tokens/s\)", result.stderr)


def test_control_characters_of_a_model_stay_out_of_the_terminal(capsys):
    from minivllm.cli.stdio import write

    write("a\x1b[31mb\x07\tc\nd\x9b é 👩‍🚀")
    assert capsys.readouterr().out == "a[31mb\tc\nd é 👩‍🚀"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "-m", "/nowhere", "hi"], "No model directory"),
        (["generate", "-t", "-1", "hi"], "temperature must be"),
        (["generate", "-n", "0", "hi"], "max_tokens must be"),
        (["generate", "-e", "blocks=3", "hi"], "the options are dtype"),
        (["generate", "-e", "block_size", "hi"], "write OPTION=VALUE"),
        (["generate", "-e", "block_size=0", "hi"], "block_size must be"),
        (["generate", "-e", "dtype=int8", "hi"], "dtype must be one of"),
        (["trace", "--show", "/nowhere.json"], "cannot be read"),
        (["trace", "--show", __file__], "holds no trace"),
        (["trace", "--show", "x.json", "prompt"], "takes no prompts"),
    ],
)
def test_mistakes_are_one_clear_line(checkpoint, arguments, message):
    if "-m" not in arguments and arguments[0] == "generate":
        arguments = [*arguments, "-m", checkpoint]
    output = run(*arguments, code=2)
    assert message in " ".join(output.split())
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_prompt_beyond_the_context_is_refused(checkpoint):
    assert "max_model_len=64" in run(
        "generate", "-m", checkpoint, "-e", "max_model_len=64", "x" * 200, code=2
    )
    output = run(
        "generate",
        "-m",
        checkpoint,
        "-e",
        "max_model_len=64",
        "--no-stream",
        "hi",
        "x" * 200,
        code=2,
    )
    assert "max_model_len=64" in output


TRUTH = {
    True: ["on", "yes", "true", "1", "True", "ON"],
    False: ["off", "no", "false", "0", "False", "Off"],
}


@pytest.mark.parametrize("truth", [True, False])
def test_engine_options_take_every_word_for_on_and_off(truth):
    from minivllm.cli.options import engine_options

    names = [
        field.name
        for field in dataclasses.fields(EngineConfig)
        if field.type in (bool, bool | None)
    ]
    assert {"enable_prefix_caching", "enforce_eager", "async_scheduling", "trace"} <= set(names)
    for word in TRUTH[truth]:
        options = engine_options([f"{name.replace('_', '-')}={word}" for name in names])
        assert all(options[name] is truth for name in names), word


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("block_size=16", 16),
        ("block_size= 16 ", 16),
        ("block_size=none", None),
        ("num_kv_blocks=auto", None),
        ("num_kv_blocks=1", 1),
        ("seed=0", 0),
        ("gpu_memory_utilization=0.5", 0.5),
        ("gpu_memory_utilization=1", 1.0),
        ("dtype=float32", "float32"),
        ("dtype=auto", "auto"),
        ("device=1", "1"),
        ("async_scheduling=none", None),
    ],
)
def test_engine_options_are_read_by_their_type(assignment, value):
    from minivllm.cli.options import engine_options

    [found] = engine_options([assignment]).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("assignment", "wanted"),
    [
        ("enable_prefix_caching=maybe", "on or off"),
        ("enable_prefix_caching=2", "on or off"),
        ("enable_prefix_caching=", "on or off"),
        ("async_scheduling=x", "on or off or none"),
        ("block_size=on", "a whole number or none"),
        ("block_size=16.0", "a whole number"),
        ("block_size=", "a whole number"),
        ("seed=1e3", "a whole number"),
        ("max_num_seqs=none", "a whole number"),
        ("gpu_memory_utilization=much", "a number"),
        ("blok_size=16", "Did you mean block_size?"),
    ],
)
def test_engine_options_of_another_type_are_refused(checkpoint, assignment, wanted):
    output = " ".join(run("generate", "-m", checkpoint, "-e", assignment, "hi", code=2).split())
    assert assignment in output
    assert wanted in output


@pytest.mark.slow
def test_prefix_caching_can_be_turned_off(checkpoint):
    prompt = "a prompt of more than one block of sixteen tokens"
    for word, hits in (("off", 0), ("on", 48)):
        options = [
            "-n",
            "2",
            "--stats",
            "-e",
            "max_num_seqs=1",
            "-e",
            f"enable_prefix_caching={word}",
        ]
        result = CliRunner().invoke(
            app, ["generate", "-m", checkpoint, "--raw", *options, prompt, prompt]
        )
        assert f"{hits} of {2 * len(prompt)} prompt tokens from the prefix cache" in result.stderr


# --- one bad prompt of several --------------------------------------------------------------------


@pytest.fixture(scope="session")
def picky(checkpoint, tmp_path_factory) -> str:
    """The same model with a chat template that refuses a word, and makes nothing of another."""
    path = tmp_path_factory.mktemp("picky") / "model"
    shutil.copytree(checkpoint, path)
    refuses = (
        "{% if 'refuse' in messages[-1].content %}{{ raise_exception('not that') }}{% endif %}"
        "{% if 'nothing' not in messages[-1].content %}"
    )
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": f"{refuses}{TEMPLATE}{{% endif %}}"})
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("bad", ["x" * 400, "refuse", "nothing", "\udcff"])
def test_a_refused_prompt_does_not_lose_the_others(picky, stream, bad):
    """It says so on stderr, in the place of its text, and so does the exit code."""
    arguments = ["generate", "-m", picky, "-n", "8", "-t", "0", "-e", "max_model_len=256", stream]
    result = CliRunner().invoke(app, [*arguments, "one", bad, "three"])
    one, three = (run(*arguments, prompt).rstrip("\n") for prompt in ("one", "three"))
    assert result.exit_code == 2
    heads = [line for line in result.stdout.splitlines() if line.startswith("--- ")]
    assert result.stdout == f"{heads[0]}\n{one}\n\n{heads[1]}\n\n\n{heads[2]}\n{three}\n"
    assert result.stderr.startswith("Error: prompt 2 of 3 was refused: ")
    assert len(result.stderr.splitlines()) == 1
    assert (
        result.output.index(heads[1])
        < result.output.index("Error: prompt 2")
        < result.output.index(heads[2])
    )
    alone = CliRunner().invoke(app, [*arguments, bad])
    assert (alone.exit_code, alone.stdout) == (2, "")
    assert alone.stderr.startswith("Error: ")


@pytest.mark.slow
def test_a_trace_of_several_prompts_outlives_a_refused_one(picky, tmp_path):
    file = tmp_path / "trace.json"
    arguments = ["trace", "-m", picky, "-n", "4", "-o", str(file)]
    assert "prompt 1 of 2 was refused" in run(*arguments, "refuse", "hello", code=2)
    assert len(Trace.load(file).steps) >= 4
    file.unlink()
    assert "not that" in run(*arguments, "refuse", code=2)
    assert not file.exists()


@pytest.mark.slow
def test_statistics_of_nothing(picky):
    output = run("generate", "-m", picky, "--stats", "refuse", "refuse", code=2)
    assert "0 tokens in 0.00 s of 0 steps (0 tokens/s); no text" in output


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_standard_input_that_is_not_text(checkpoint, command):
    assert "not text in UTF-8" in run(command, "-m", checkpoint, input=b"caf\xe9", code=2)


# --- chat -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chat_can_be_piped_and_remembers(checkpoint):
    arguments = ["chat", "-m", checkpoint, "-n", "12", "-t", "0"]
    first, second = run(*arguments, input="hello\nhello\n").splitlines()
    reset_first, reset_second = run(
        *arguments, input="hello\n/reset\nhello\n/exit\nhello\n"
    ).splitlines()
    assert first == reset_first == reset_second
    assert second != first  # it saw the first turn


@pytest.mark.slow
def test_a_long_chat_forgets_its_oldest_turns(checkpoint):
    result = CliRunner().invoke(
        app,
        ["chat", "-m", checkpoint, "-n", "40", "-e", "max_model_len=300"],
        input="tell me more\n" * 6,
    )
    assert result.exit_code == 0, result.output
    assert "oldest turn is forgotten" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"x" * 3000, "makes a prompt of"),
        (b"caf\xe9", "not text in UTF-8"),
        (b"refuse", "not that"),
        (b"nothing", "makes nothing of this line"),
        (b"/what", "/reset begins anew"),
        (b"   ", ""),
    ],
)
def test_a_line_that_is_refused_does_not_end_the_chat(picky, bad, why):
    """Nor is it kept: what follows is answered as if it had not been said."""
    arguments = ["chat", "-m", picky, "-n", "12", "-t", "0", "-e", "max_model_len=1024"]
    whole = run(*arguments, input=b"hello\nand now?\n")
    result = CliRunner().invoke(app, arguments, input=b"hello\n" + bad + b"\nand now?\n")
    assert (result.exit_code, result.stdout) == (0, whole)
    assert why in result.stderr
    assert ("the conversation goes on" in result.stderr) == (bad not in (b"/what", b"   "))


def test_a_line_that_is_too_long_forgets_no_turn(picky):
    """Turns are dropped to make room for an answer, and not in vain."""
    arguments = ["chat", "-m", picky, "-n", "12", "-t", "0", "-e", "max_model_len=256"]
    result = CliRunner().invoke(app, arguments, input="hello\n" + "x" * 300 + "\n")
    assert "The line was left out" in result.stderr
    assert "forgotten" not in result.stderr


class FakeLLM:
    """Answers at once, with what it has been told."""

    class Config:
        max_model_len, num_kv_blocks, block_size = 10_000, 1000, 16

    class Metrics:
        num_generated_tokens = prefix_cache_hits = 0

    class Engine:
        config: Any = None

    def __init__(self):
        self.llm_engine = self.Engine()
        self.llm_engine.config = self.Config()
        self.prompts = []

    def metrics(self):
        return self.Metrics()

    def render_chat(self, messages):
        return [len(message["content"]) for message in messages]

    def stream(self, prompt, params):
        self.prompts.append(prompt)
        for piece in ("a", "b", "c"):
            yield StreamOutput("0", 0, 0, piece, [1])


def talk(monkeypatch: pytest.MonkeyPatch, strikes: set[int]) -> tuple[list[str], int]:
    """A chat of two lines, with Ctrl-C struck before these lines of chat.py; (what was said, how
    many lines of chat.py ran).
    """
    from minivllm.cli import chat

    typed = iter(["first", "second", "/exit"])
    count = 0

    def read(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:  # "/exit" was dropped by a Ctrl-C
            raise EOFError from None

    def at_every_line(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != chat.__file__ or frame.f_code.co_name == "_on_interrupt":
            return None
        if event == "line":
            count += 1
            if count in strikes:
                signal.raise_signal(signal.SIGINT)
        return at_every_line

    monkeypatch.setattr("builtins.input", read)
    conversation = chat.Chat(FakeLLM(), SamplingParams(max_tokens=4), None, True)
    sys.settrace(at_every_line)
    try:
        conversation.run()
    finally:
        sys.settrace(None)
    return [message["content"] for message in conversation._messages], count


def test_control_c_at_any_line_of_the_chat_loses_no_turn(monkeypatch, capsys):
    """Struck once, and twice in a row, at every line that runs in chat.py, while a person types and
    reads.
    """
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        turns, num_lines = talk(monkeypatch, set())
        assert turns == ["first", "abc", "second", "abc"]
        assert num_lines > 60
        for number in range(5, num_lines):  # from the handler's being there to its being taken away
            for strikes in ({number}, {number, number + 1}, {number, number + 2, number + 3}):
                try:
                    found, _ = talk(monkeypatch, strikes)
                except KeyboardInterrupt:
                    assert number < 8 or number > num_lines - 8, (
                        f"line {number} of {num_lines} ended the chat"
                    )
                    continue
                assert found[::2] in ([], ["first"], ["second"], ["first", "second"]), (
                    number,
                    found,
                )
                assert set(found[1::2]) <= {"a", "ab", "abc", ""}
                assert len(found) % 2 == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_control_c_while_a_step_hangs(capsys):
    """The second press comes through; the turns before are kept."""
    from minivllm.cli.chat import Chat

    class Hangs(FakeLLM):
        def stream(self, prompt, params):
            if len(self.prompts) == 1:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("the second press was not heard")
            yield from super().stream(prompt, params)

    llm = Hangs()
    conversation = Chat(llm, SamplingParams(max_tokens=4), None, True)
    with conversation._interrupts:
        conversation._take("first")
        conversation._take("second")
    assert [message["content"] for message in conversation._messages] == ["first", "abc"]
    assert "the line was left out" in capsys.readouterr().err


def test_a_chat_without_readline(monkeypatch, capsys):
    """Python for Windows has none."""
    from minivllm.cli.chat import Chat

    monkeypatch.setitem(sys.modules, "readline", None)
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    Chat(FakeLLM(), SamplingParams(max_tokens=4), None, True).run()
    assert capsys.readouterr().out == "abc\n"


@pytest.mark.slow
def test_control_c_stops_an_answer_and_not_the_chat(checkpoint):
    """In a terminal: interrupt a long answer, drop a typed line, ask again, leave with Ctrl-D."""
    main, child = pty.openpty()
    command = [sys.executable, "-m", "minivllm", "chat", "-m", checkpoint, "-n", "900"]
    process = subprocess.Popen(
        command,
        stdin=child,
        stdout=child,
        stderr=child,
        env={**ENVIRONMENT, "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(child)
    seen = b""

    def read_until(text: bytes, seconds: float = 60) -> bool:
        """Read on until the text comes; what comes after it is left for the next call."""
        nonlocal seen
        deadline = time.monotonic() + seconds
        while text not in seen:
            if time.monotonic() > deadline:
                return False
            if select.select([main], [], [], 0.1)[0]:
                seen += os.read(main, 4096)
        seen = seen.partition(text)[2]
        return True

    try:
        assert read_until(b"> ")
        os.write(main, b"hello\n")
        assert read_until(b"\n")
        while len(seen) < 40:  # some of the answer is there
            seen += os.read(main, 4096)
        os.kill(process.pid, signal.SIGINT)
        assert read_until(b"(stopped)"), seen
        assert read_until(b"prefix cache"), seen
        assert read_until(b"> "), seen
        os.write(main, b"half a line")
        assert read_until(b"half a line"), seen
        for _ in range(
            10
        ):  # pressed again, since readline may miss a signal that comes before it listens
            os.kill(process.pid, signal.SIGINT)
            if read_until(b"Ctrl-C stops an answer", 2):
                break
        assert read_until(b"> "), seen
        os.write(main, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(main)


# --- trace and demo -------------------------------------------------------------------------------


def test_trace_records_saves_and_shows(checkpoint, tmp_path):
    file = tmp_path / "trace.json"
    arguments = [
        "-m",
        checkpoint,
        "-n",
        "8",
        "-e",
        "max_num_batched_tokens=24",
        "-e",
        "num_kv_blocks=16",
    ]
    printed = run("trace", *arguments, "-o", str(file), "Tell me a story about a fox.", "hi", "hi")
    trace = Trace.load(file)
    assert len(trace.steps) >= 8
    assert printed == run("trace", "--show", str(file))
    assert "chunk" in printed
    assert "decodes = " in printed
    assert "request 0 done" in printed
    assert (
        len(run("trace", "--show", str(file), "--every-step").splitlines()) == len(trace.steps) + 2
    )


@pytest.mark.slow
def test_showing_a_trace_needs_no_torch(checkpoint, tmp_path):
    file = tmp_path / "trace.json"
    run("trace", "-m", checkpoint, "-n", "3", "-o", str(file), "hi")
    code = (
        "import sys; from minivllm.cli.app import app\n"
        f"try: app(['trace', '--show', {str(file)!r}])\n"
        "except SystemExit as end: assert end.code in (None, 0), end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, timeout=60)


def spoilt_traces() -> dict[str, Any]:
    """Files that are no trace, by what is wrong with them."""
    item = {
        "request_id": "0",
        "index": 0,
        "kind": "decode",
        "start": 1,
        "num_new_tokens": 1,
        "samples": True,
        "num_cached_tokens": 0,
    }
    step = {
        "step": 0,
        "start_time": 0.0,
        "duration": 0.1,
        "scheduled": [item],
        "block_tables": {"0/0": [1, 0]},
        "num_computed_tokens": {"0/0": 2},
        "running": ["0/0"],
        "waiting": [],
        "preempted": [],
        "num_free_blocks": 2,
        "cached_blocks": [2],
        "registered_blocks": [1],
        "finished": [],
    }
    trace = {
        "model": "tiny",
        "num_blocks": 4,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "kv_bytes_per_token": 1024,
        "max_model_len": 64,
        "steps": [step],
        "version": 1,
    }
    other: tuple[Any, ...] = (
        None,
        -1,
        1.5,
        True,
        "1",
        [],
        {},
        [1],
        ["x"],
        {"x": "y"},
        float("nan"),
        1e400,
        10**30,
    )
    found: dict[str, Any] = {"right": trace}
    for place, fields in (("", trace), ("steps[0].", step), ("scheduled[0].", item)):
        for name, value in fields.items():
            bad = [{key: kept for key, kept in fields.items() if key != name}]
            bad += [
                {**fields, name: strange}
                for strange in other
                if type(strange) is not type(value) or strange != value
            ]
            for number, changed in enumerate(bad):
                if place == "scheduled[0].":
                    changed = {**step, "scheduled": [changed]}
                found[f"{place}{name} {number}"] = (
                    {**trace, "steps": [changed]} if place else changed
                )
        found[f"{place}unknown"] = (
            {**trace, "unknown": 1} if not place else {**trace, "steps": [{**step, "unknown": 1}]}
        )
    for name, change in {
        "lost": {"running": ["0/0", "9/0"]},
        "beyond": {"block_tables": {"0/0": [4]}},
        "cached": {"cached_blocks": [4]},
        "more cached than free": {"num_free_blocks": 0},
        "more free than there are": {"num_free_blocks": 5},
        "kind": {"scheduled": [{**item, "kind": "rest"}]},
    }.items():
        found[name] = {**trace, "steps": [{**step, **change}]}
    found |= {
        "no blocks": {**trace, "num_blocks": 0},
        "size": {**trace, "block_size": 0},
        "version": {**trace, "version": TRACE_VERSION + 1},
    }
    return found | {"list": [], "text": "x", "steps 1": {**trace, "steps": [[]]}, "null": None}


@pytest.mark.slow
def test_a_damaged_trace_is_one_clear_line(tmp_path):
    """Every field missing, or of every other type: what is refused is said, and what is accepted
    can be shown.
    """
    file = tmp_path / "trace.json"
    accepted = []
    for number, (name, content) in enumerate(spoilt_traces().items()):
        file.write_text(json.dumps(content))
        refused = ""
        try:
            Trace.load(file)
            accepted.append(name)
        except TraceError as error:
            refused = str(error)
            assert refused.startswith(
                f"{file} holds no trace that this version of minivllm can read ("
            ), name
            assert "\n" not in refused, name
        if refused and number % 10:
            continue  # the command says of all of them what this error says
        result = CliRunner().invoke(app, ["trace", "--show", str(file)])
        assert isinstance(result.exception, SystemExit | None), (name, result.exception)
        if refused:
            assert (result.exit_code, result.stderr) == (2, f"Error: {refused}\n"), name
        else:
            assert result.exit_code == 0, name
    # Empty lists are lists, 1 is a number of seconds, and what has a default may be missing.
    assert "right" in accepted
    assert all("missing" not in name for name in accepted)
    assert not {
        "lost",
        "beyond",
        "cached",
        "kind",
        "no blocks",
        "size",
        "version",
        "unknown",
        "null",
    } & set(accepted)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"{", b"[" * 100_000, b"9" * 5000, b"\x00" * 100]
)
def test_a_trace_that_is_no_json(tmp_path, content):
    file = tmp_path / "trace.json"
    file.write_bytes(content)
    with pytest.raises(TraceError, match=re.escape(str(file))):
        Trace.load(file)


@pytest.mark.slow
def test_a_trace_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none.json", tmp_path / ("x" * 300), Path("/dev/zero")):
        with pytest.raises(TraceError, match=re.escape(str(path))):
            Trace.load(path)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(TraceError, match="larger than 1024 MiB"):
        Trace.load(huge)


BAD_FILES = [
    ("/nowhere/x.json", "no folder /nowhere"),
    (".", "that is a folder"),
    ("x" * 300, "too long"),
]


@pytest.mark.parametrize(
    "command",
    [
        ["trace", "-o"],
        ["demo", "-o"],
        ["demo", "--picture"],
        ["demo", "--html"],
        ["trace", "--svg"],
    ],
)
@pytest.mark.parametrize(("path", "why"), BAD_FILES)
def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    monkeypatch, tmp_path, command, path, why
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        f"minivllm.cli.{command[0]}.open_llm", lambda *_, **__: pytest.fail("the model was loaded")
    )
    output = " ".join(
        run(*command, path, *(["hi"] if command[0] == "trace" else []), code=2).split()
    )
    assert "cannot be written to" in output
    assert why in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_trace_goes_where_it_is_sent(checkpoint, tmp_path):
    """Over an old file, through a symbolic link, into a pipe; and nothing lies beside it."""
    arguments = ["trace", "-m", checkpoint, "-n", "2", "hi", "-o"]
    old, link = tmp_path / "old.json", tmp_path / "link.json"
    old.write_text("x")
    old.chmod(0o640)
    link.symlink_to(old)
    run(*arguments, str(link))
    assert link.is_symlink()
    assert old.stat().st_mode & 0o777 == 0o640
    assert len(Trace.load(old).steps) == 2
    run(*arguments, "/dev/null")
    assert Path("/dev/null").is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "old.json"]


def test_a_full_disk_does_not_lose_the_trace(checkpoint, monkeypatch, tmp_path):
    """The table is printed, and what was there before is still there."""
    file = tmp_path / "trace.json"
    file.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    output = run("trace", "-m", checkpoint, "-n", "2", "-o", str(file), "hi", code=2)
    assert "No space left on device" in output
    assert "request 0 done" in output
    assert file.read_text() == "old"


def test_a_trace_needs_its_option(checkpoint):
    for command in (["trace", "hi"], ["demo"]):
        assert "records a trace" in run(*command, "-m", checkpoint, "-e", "trace=off", code=2)


@pytest.mark.parametrize(
    "arguments",
    [["demo", "--pace", "nan"], ["demo", "--pace", "inf"], ["check", "--timeout", "nan"]],
)
def test_numbers_that_are_none(arguments):
    assert "--" in run(*arguments, code=2)


def test_block_table_cells_show_ids_sharing_and_fill():
    from minivllm.engine.trace import StepRecord, TracedSequence

    trace = Trace(
        "tiny",
        20,
        4,
        8,
        64,
        1024,
        *([2048] if "max_model_len" in Trace.__dataclass_fields__ else []),
    )
    record = StepRecord(
        step=3,
        start_time=0.0,
        duration=0.001,
        scheduled=[TracedSequence("0", 0, "decode", 9, 1, True)],
        block_tables={"0/0": [7, 3, 12], "1/0": [7, 9]},
        num_computed_tokens={"0/0": 10, "1/0": 8},
        running=["0/0", "1/0"],
        waiting=["2/0"],
        preempted=[],
        num_free_blocks=16,
        cached_blocks=[1, 2],
        registered_blocks=[1, 2, 7],
    )
    trace.steps.append(record)
    shared = shared_blocks(record)
    assert shared == {7}
    cells = block_table_cells(trace, record, "0/0", "#0072B2", shared, 10)
    assert cells.plain == " 7=  3  12▄ "
    assert block_table_cells(trace, record, "0/0", "#0072B2", shared, 2).plain.split() == [
        "+2",
        "12▄",
    ]
    bar = kv_bar(trace, record, 80).plain
    assert bar.startswith("████▒▒··············  ")
    assert "4 used" in bar
    assert "2 cached" in bar
    assert "14 free" in bar
    assert step_table(trace).row_count == 1
    assert tail("a  long\ntext", 6) == "… text"


@pytest.mark.slow
def test_demo_prints_plain_lines_where_there_is_no_terminal(checkpoint, tmp_path):
    file = tmp_path / "trace.json"
    picture = tmp_path / "demo.svg"
    output = run(
        "demo",
        "-m",
        checkpoint,
        "-e",
        "num_kv_blocks=120",
        "-o",
        str(file),
        "--picture",
        str(picture),
    )
    assert "\x1b" not in output
    drawn = picture.read_text(encoding="utf-8")
    assert drawn.startswith("<svg")
    assert "is&#160;shared&#160;by&#160;several&#160;requests" in drawn
    assert "font-face" not in drawn
    assert "from the prefix cache" in output
    assert "13/13 texts" in output
    for name in (
        "tokens per second",
        "time to first token",
        "blocks used",
        "prefix-cache hits",
        "preemptions",
    ):
        assert name in output
    assert Trace.load(file).steps[-1].num_free_blocks > 0


# --- the streams of a process ---------------------------------------------------------------------


class Broken(io.StringIO):
    """Standard output that cannot be written to. late: nothing is noticed before it is flushed."""

    def __init__(self, number: int, late: bool) -> None:
        super().__init__()
        self.number, self.late = number, late

    def write(self, text: str) -> int:
        if not self.late:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def flush(self) -> None:
        if self.getvalue():
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 2), (errno.EIO, 2), (errno.EBADF, 2), (errno.EPIPE, 1)]
)
def test_output_that_cannot_be_written(checkpoint, monkeypatch, capsys, number, code, late):
    """One line says so; where the reader has left, as after `| head`, there is nothing to say."""
    for arguments in (["--help"], ["generate", "-m", checkpoint, "-n", "4", "hi"], ["--version"]):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", Broken(number, late))
            with pytest.raises(SystemExit) as end:
                app(arguments)
        said = capsys.readouterr().err
        assert end.value.code == code, said
        expected = (
            ""
            if code == 1
            else f"Error: standard output cannot be written to: {os.strerror(number)}.\n"
        )
        assert said == expected


def test_a_file_that_fails_is_not_taken_for_standard_output(monkeypatch, capsys):
    """A broken pipe to another process is a bug, and not the end of the reader."""

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("minivllm.cli.trace._load_trace", fails)
    with pytest.raises(SystemExit) as end:
        app(["trace", "--show", "x.json"])
    assert end.value.code == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt, 130), (MemoryError, 2), (OutOfMemoryError("x"), 2)]
)
def test_what_may_happen_is_no_traceback(monkeypatch, capsys, raised, code):
    def fails(*_: object) -> None:
        raise raised

    monkeypatch.setattr("minivllm.cli.trace._load_trace", fails)
    with pytest.raises(SystemExit) as end:
        app(["trace", "--show", "x.json"])
    said = capsys.readouterr().err
    assert end.value.code == code
    assert "Traceback" not in said
    assert (said.count("\n"), said.startswith("Error: ")) == (
        (0, False) if code == 130 else (1, True)
    )


def test_streams_are_put_back(capsys):
    streams = sys.stdin, sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        app(["--version"])
    assert (sys.stdin, sys.stdout, sys.stderr) == streams


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (
            ">/dev/full",
            2,
            "Error: standard output cannot be written to: No space left on device.\n",
        ),
        (">&-", 2, "Error: standard output is closed. To throw the output away, use >/dev/null.\n"),
        ("| true", 1, ""),
        (">/dev/null <&- 2>&-", 0, ""),
    ],
)
def test_streams_that_are_full_or_closed(redirection, code, said):
    """In a real process: nothing fails when the interpreter ends, either."""
    show = "from minivllm.cli.app import app; app(['--help'])"
    command = f'set -o pipefail; sleep 0.2 | {sys.executable} -c "{show}" {redirection}'
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert (result.returncode, result.stderr) == (code, said)


# --- bench, doctor, help --------------------------------------------------------------------------


def test_bench_is_a_group_of_its_own():
    assert "Usage: minivllm bench" in run("bench", "--help")
    assert "No such command" in run("bench", "nonsense", code=2)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["kernels", "--out", "/proc/x/y.json"], "cannot be written"),
        (["throughput", "--out", "."], "a folder"),
        (["roofline", "REPORT", "--picture", "/proc/x.png"], "cannot be written"),
        (["record", "--out", "/dev/null/x"], "Not a directory"),
        (["kernels", "--dtype", "int8"], "none of auto"),
        (["latency", "--device", "tpu"], "device must be"),
        (["throughput", "--prompt-tokens", "9", "3"], "the least"),
        (["throughput", "--output-tokens", "0", "3"], "the least"),
        (["kernels", "--seconds", "nan"], "seconds"),
        (["latency", "--max-seconds", "nan"], "max-seconds"),
        (["roofline", "/nowhere"], "cannot be read"),
        (["roofline", "."], "cannot be read"),
        (["roofline", __file__], "is not JSON"),
        (["roofline", "REPORT", "--read-tb-per-s", "0"], "above 0"),
        (["roofline", "[]"], "no report"),
        (["roofline", '{"benchmark": "throughput", "rates": {}, "cases": []}'], "no report"),
        (["roofline", '{"benchmark": "throughput", "rates": {}, "cases": {}}'], "damaged"),
        (["roofline", '{"benchmark": "throughput", "rates": {}, "cases": {"a": 1}}'], "damaged"),
    ],
)
def test_bench_refuses_before_it_measures(monkeypatch, tmp_path, arguments, why):
    monkeypatch.setattr("minivllm.cli.bench._finish", lambda *_: pytest.fail("it was measured"))
    if "REPORT" in arguments:
        arguments[1] = str(RECORDED / "throughput-h200.json")
    elif arguments[1][0] in "[{":
        (tmp_path / "report.json").write_text(arguments[1])
        arguments = [arguments[0], str(tmp_path / "report.json")]
    output = " ".join(run("bench", *arguments, code=2).replace("│", " ").split())
    assert why in output


@pytest.mark.slow
def test_bench_says_what_its_options_make_impossible(monkeypatch):
    small = [
        "throughput",
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--num-requests",
        "1",
        "--repeats",
        "1",
    ]
    short = [*small, "--max-model-len", "32", "--prompt-tokens"]
    assert "max_model_len=32" in run("bench", *short, "40", "40", code=2)
    assert "max_model_len=32 has no room" in run("bench", *short, "20", "20", code=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"WORLD_SIZE": "2"}, "lacks RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK=2 with WORLD_SIZE=2",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "x"}, "cannot meet"),
    ],
)
def test_half_of_torchrun_is_one_clear_line(checkpoint, environment, why):
    arguments = ["generate", "-m", checkpoint, "-n", "2", "--raw", "hi"]
    output = run(*arguments, "-e", "tensor_parallel_size=2", env=environment, code=2)
    assert why in output
    assert "Start with torchrun, or unset WORLD_SIZE" in output
    assert run(*arguments, env=environment)  # one rank needs none of it


def test_exit_codes_are_documented():
    assert "Exit codes: 0 is success, 2 an error that you can put right, 130 Ctrl-C" in run(
        "--help"
    )


@pytest.mark.slow
def test_python_m_is_the_same_command():
    command = [sys.executable, "-m", "minivllm", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert (result.returncode, result.stdout) == (0, run("--version"))


def test_version_and_help_of_every_command():
    assert re.fullmatch(r"minivllm \d+\.\d+\.\d+\n", run("--version"))
    listed = run("--help")
    for command in ("generate", "chat", "demo", "trace", "bench", "doctor"):
        assert command in listed
        assert "Usage: minivllm" in run(command, "--help", prog_name="minivllm")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["bench", "throughput", "--help"], ["course"]])
def test_what_computes_nothing_needs_no_torch(arguments):
    code = (
        "import sys; from minivllm.cli.app import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: assert end.code in (None, 0), end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, timeout=60)


def findings(monkeypatch, **changes):
    from minivllm.cli import doctor

    for name, value in changes.items():
        monkeypatch.setattr(doctor, name, value)
    return {finding.what: finding for finding in doctor.examine()}


def test_doctor_reports_a_missing_model_with_the_cure(monkeypatch, tmp_path):
    found = findings(monkeypatch, BUNDLED_MODEL_PATH=tmp_path)
    assert found["Python"].status == found["torch"].status == "ok"
    assert found["bundled model"].status == "broken"
    assert "git restore" in found["bundled model"].meaning
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


@pytest.mark.slow
def test_doctor_reports_torch_that_is_missing_or_too_old(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.4.1")
    assert findings(monkeypatch)["torch"].status == "broken"
    monkeypatch.setitem(sys.modules, "torch", None)
    found = findings(monkeypatch)
    assert found["torch"].status == "broken"
    assert "pip install 'torch>=" in found["torch"].meaning


def test_doctor_reports_missing_packages_and_untested_versions(monkeypatch):
    from minivllm.cli import doctor

    true_version = doctor._version
    versions = {"xxhash": None, "rich": "9.0", "numpy": "2.99.0"}
    found = findings(monkeypatch, _version=lambda name: versions.get(name, true_version(name)))
    assert found["packages"].status == "broken"
    assert "xxhash is missing" in found["packages"].found
    assert "rich 9.0 is older" in found["packages"].found
    assert "'xxhash>=" in found["packages"].meaning
    assert found["tested versions"].status == "note"
    assert "numpy 2.99.0" in found["tested versions"].found


@pytest.mark.slow
def test_doctor_says_what_make_lab_brings(monkeypatch):
    from minivllm.cli import doctor

    true_version = doctor._version
    for name in ("nbval", "transformers", "jupyterlab"):
        found = findings(
            monkeypatch, _version=lambda n, m=name: None if n == m else true_version(n)
        )
        assert found["notebooks"].status == found["tests"].status == "note"
        assert name in found["notebooks"].found
        assert "make lab" in found["notebooks"].meaning
    found = findings(
        monkeypatch, _version=lambda name: None if name == "hypothesis" else true_version(name)
    )
    assert found["notebooks"].status == "ok"
    assert "hypothesis" in found["tests"].found
    assert "make test" in found["tests"].meaning


@pytest.mark.slow
def test_doctor_knows_which_numpy_an_older_tritons_interpreter_fails_on(monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    from minivllm.cli import doctor

    true_version = doctor._version
    for numpy, status in (("2.5.2", "note"), ("2.3.5", "ok")):
        versions = {"numpy": numpy}
        found = findings(
            monkeypatch, _version=lambda name, v=versions: v.get(name, true_version(name))
        )
        assert found["triton"].status == status
        assert ("numpy<2.4" in found["triton"].meaning) == (status == "note")


@pytest.mark.slow
def test_a_missing_torch_is_said_by_the_command(checkpoint):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from minivllm.cli.app import app\n"
        f"app(['generate', '-m', {checkpoint!r}, 'hi'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, timeout=60
    )
    assert result.returncode == 2
    assert b"minivllm doctor" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.slow
def test_generate_starts_fast(checkpoint):
    """The first text comes within twice the time of `import torch` plus one second: nothing heavy
    on the way.
    """
    arguments = [
        sys.executable,
        "-m",
        "minivllm",
        "generate",
        "-m",
        checkpoint,
        "-n",
        "32",
        "-t",
        "0",
        "--raw",
        "hi",
    ]

    def seconds_to(command: list[str], read: bool) -> float:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
            if read:
                assert process.stdout.read(1)
                seconds = time.perf_counter() - start
            process.communicate()
        return seconds if read else time.perf_counter() - start

    tries = []
    for _ in range(4):  # other work on this machine may slow one of the two down
        tries.append(
            (seconds_to(arguments, True), seconds_to([sys.executable, "-c", "import torch"], False))
        )
        if tries[-1][0] < 2 * tries[-1][1] + 1:
            return
    pytest.fail(f"(first text, import torch) in seconds: {tries}")
