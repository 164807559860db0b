"""The capstone: all of a learner's pieces together pass; what is missing, the package's own or
wrong is named.

The learner's notebooks are copies of the exercises, filled with the solutions' answers, and
recorded as checked. The worker is a fork of a process that has everything imported, but where a
test is of the command itself.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from minivllm import LLM, SamplingParams
from minivllm.cli.app import app
from minivllm.course.grading.capstone import command, pieces, requests, run
from minivllm.course.grading.capstone import examine as examining
from minivllm.course.grading.capstone.examine import Report, examine
from minivllm.course.grading.capstone.mine import Mine
from minivllm.course.grading.capstone.page import render
from minivllm.course.grading.capstone.pieces import PIECES
from minivllm.course.grading.capstone.requests import ROUNDS
from minivllm.course.grading.capstone.speed import Speed
from minivllm.course.grading.capstone.standing import standing
from minivllm.course.grading.records import FAILED, PASSED, Records, answer_digest, groups_of
from minivllm.course.notebooks import chapters, role
from minivllm.course.stubs import defined_names, make_exercises
from support import forked
from support.answers import wrong_answers
from support.solved import answers_of, write_solved

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = [c for c in chapters(ROOT) if c.number in {piece.chapter for piece in PIECES}]

Answers = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose learner has solved everything."""
    root = write_solved(tmp_path_factory.mktemp("finished"), CHAPTERS)
    records = Records(root)
    for chapter in chapters(root):
        for group in groups_of(chapter):
            records[group.id].answer, records[group.id].state = answer_digest(group), PASSED
    records.save()
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[forked.Server]:
    if not hasattr(os, "fork"):
        pytest.skip("the workers are forked processes, which this system does not have")
    with forked.Server(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture
def quick(server: forked.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "start", server.start)


@pytest.fixture
def only(quick: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """only("silu_mul", …): fewer pieces, to be tried one by one the sooner; the package's own are
    in the other places.
    """

    def leave(*names: str) -> None:
        few = [piece for piece in PIECES if piece.answer in names]
        monkeypatch.setattr("minivllm.course.grading.capstone.examine.PIECES", few)
        monkeypatch.setattr("minivllm.course.grading.capstone.standing.PIECES", few)

    return leave


@pytest.fixture
def with_answers(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """with_answers(merge_attention="…"): that repository, with other sources in the cells that
    define these names.

    None is the stub; a source that begins with "=" is put behind the right one, and so takes names
    over from it.
    """
    monkeypatch.setattr("minivllm.course.notebooks.DIGESTS", finished)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = {path: path.read_text(encoding="utf-8") for path in (finished / "exercises").iterdir()}

    def change(**sources: str | None) -> Path:
        for name, source in sources.items():
            number = next(piece.chapter for piece in PIECES if piece.answer == name)
            chapter = next(c for c in CHAPTERS if c.number == number)
            path = finished / "exercises" / f"{chapter.name}.ipynb"
            notebook, right = nbformat.read(path, as_version=4), answers_of(chapter)
            id = next(id for id, answer in right.items() if name in defined_names(answer))
            cell = next(cell for cell in notebook.cells if role(cell) == ("exercise", id))
            stub = next(
                cell for cell in make_exercises(chapter).cells if role(cell) == ("exercise", id)
            ).source
            more = (
                f"{cell.source}\n\n\n{source[1:]}" if source and source.startswith("=") else source
            )
            cell.source = stub if source is None else more
            nbformat.write(notebook, path)
        return finished

    yield change
    for path, text in before.items():
        path.write_text(text, encoding="utf-8")


def problems(root: Path, timeout: float = 60.0) -> list[tuple[str, str]]:
    report = examine(root, timeout, rounds=1)
    return [(finding.piece, finding.name) for finding in report.problems]


# --- what it is made of ---------------------------------------------------------------------------


def test_every_piece_is_an_answer_of_the_course() -> None:
    answers = {
        (chapter.number, name)
        for chapter in CHAPTERS
        for source in answers_of(chapter).values()
        for name in defined_names(source)
    }
    assert {(piece.chapter, piece.answer) for piece in PIECES} <= answers
    places = {*pieces.KERNELS, *pieces.OPTIONS.values(), "TextStream", "MyEngine"}
    assert places == {piece.answer for piece in PIECES}


def test_what_the_package_has_in_their_places_is_there() -> None:
    for piece in PIECES:
        names = [name for _, name in run.own_codes(piece)]
        assert set(names) == {path.partition(":")[2] for path in piece.own}


@pytest.mark.parametrize("round", ROUNDS, ids=lambda round: round.name)
def test_the_requests_depend_on_nothing_else(round: requests.Round) -> None:
    """Their texts depend on neither the order of the work nor on its rounding: no draw is at a
    boundary.
    """
    length = round.room["max_model_len"]
    blocks = -(-length // round.room["block_size"])
    for other in (
        {"max_num_seqs": 1},
        {"max_num_seqs": 3, "num_kv_blocks": 8 * blocks, "max_num_batched_tokens": length},
    ):
        roomy = replace(round, room={**round.room, **other})
        assert run.package_run(roomy).texts == right(round).texts, other


@cache
def right(round: requests.Round) -> run.Run:
    return run.package_run(round)


def test_the_requests_enter_every_mode() -> None:
    stats = right(requests.SHORT).stats
    for counter in ("num_preemptions", "num_mixed_steps", "num_chunks", "prefix_cache_hits"):
        assert stats[counter] > 0, counter


def test_contexts_are_longer_than_any_tile_and_runs_longer_than_any_leak() -> None:
    outputs = right(requests.LONG)
    assert max(map(len, outputs.tokens)) >= 150
    with LLM(device="cpu", **requests.LONG.room) as llm:
        prompts, _ = run.asked(llm, requests.LONG)
    assert max(len(p) + len(t) for p, t in zip(prompts, outputs.tokens, strict=True)) > 400
    crowd = right(requests.CROWD)
    assert len(crowd.tokens) == 120
    assert crowd.stats["num_steps"] > 100


# --- what it says ---------------------------------------------------------------------------------


def test_the_road_shows_it(with_answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    root = with_answers()
    monkeypatch.chdir(root)
    monkeypatch.setenv("COLUMNS", "200")
    assert standing(root) == ("14 of 14 pieces have passed their checks", True)
    assert "Next: minivllm check capstone" in CliRunner().invoke(app, ["course"]).output
    command._keep(root, Report(num_tokens=1))
    assert standing(root) == ("passed", False)
    with_answers(rms_norm="=more = 1")
    assert standing(root) == ("12 of 14 pieces have passed their checks", False)
    said = CliRunner().invoke(app, ["course"]).output
    assert (
        "The goal, the engine that you wrote: 12 of 14 pieces have passed their checks. `minivllm"
        " check" in said
    )
    assert "Next: minivllm check 06" in said


def test_a_piece_that_the_others_do_not_use_runs_alone(with_answers: Answers, quick: None) -> None:
    """Another right model, which computes its norms with torch's."""
    models = sections_of("06.6", "right")
    own_norms = next(source for source in models if "rms_norm(x.float()" not in source)
    report = examine(with_answers(Qwen3=own_norms), rounds=1)
    assert (report.problems, report.passed) == ([], True)


def test_what_has_not_passed_its_own_check_is_checked(with_answers: Answers, quick: None) -> None:
    """A wrong answer that writes the right tokens; its check's verdict is kept."""
    root = with_answers(rms_norm=sections_of("06.1", "eps-typed-in")[0])
    report = examine(root, rounds=1)
    assert [(f.piece, f.name) for f in report.problems] == [
        ("rms_norm", "eps-typed-in"),
        ("silu_mul", "eps-typed-in"),
    ]
    assert "check, 06.1, finds a mistake" in report.problems[0].message
    assert Records(root)["06.1"].state == FAILED
    assert Records(root)["06.4"].state == PASSED


def test_stubs_are_named(with_answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(with_answers(MyScheduler=None, store_kv=None))
    result = CliRunner().invoke(app, ["check", "capstone"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "✗ scheduler          MyScheduler        05.5  not-attempted" in result.output
    assert "3 pieces are still to write. Begin with exercise 03.3" in result.output
    assert result.output.count("✗") == 3


def test_half_a_stub_is_named(with_answers: Answers, quick: None) -> None:
    source = "=def rms_norm(x, weight, eps):\n    raise NotImplementedError('06.1: your code here')"
    assert problems(with_answers(rms_norm=source)) == [("rms_norm", "not-attempted")]


def test_missing_answers_are_named(with_answers: Answers, quick: None) -> None:
    root = with_answers()
    path = next((root / "exercises").glob("04_*.ipynb"))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [
        c
        for c in notebook.cells
        if role(c)[0] != "exercise" or "class MyBlockManager" not in c.source
    ]
    nbformat.write(notebook, path)
    next((root / "exercises").glob("01_*.ipynb")).unlink()
    assert problems(root) == [("merge_attention", "missing"), ("MyBlockManager", "answer-missing")]


#: The package's own in the place of a piece: as it is, under another name, inherited, called, or a
#: part of it.
OWN = {
    "merge_attention": (
        "=from minivllm.kernels.online_softmax import merge_attention_reference as merge_attention"
    ),
    "decode_attention": (
        "=def decode_attention(*args, **kwargs):\n"
        "    return Kernels.reference().decode_attention(*args, **kwargs)"
    ),
    "MyBlockManager": (
        "from minivllm.engine.block_manager import BlockManager\n\n\n"
        "class MyBlockManager(BlockManager):\n    pass"
    ),
    "MyScheduler": "class MyScheduler(Scheduler):\n    pass",
    "rms_norm": "=rms_norm = Kernels.reference().rms_norm",
    "build_batch": "=build_batch = package_batch",
    "sample": "=from minivllm.kernels.sampling import filter_logits",
    "TextStream": (
        "=from minivllm.tokenizer import Detokenizer\n\n\nclass TextStream(TextStream):\n"
        "    def append(self, token_id):\n"
        "        Detokenizer(tokenizer, (), True).append(token_id)\n"
        "        return super().append(token_id)"
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_the_packages_own_is_named(with_answers: Answers, quick: None, name: str) -> None:
    assert problems(with_answers(**{name: OWN[name]})) == [(name, "packages-own")]


def sections_of(id: str, name: str) -> list[str]:
    """The answers of that name in the exercise's module."""
    chapter = next(chapter for chapter in CHAPTERS if chapter.number == id[:2])
    return [
        wrong.source for wrong in wrong_answers(chapter) if (wrong.id, wrong.name) == (id, name)
    ]


#: For each piece (exercise, name) of a wrong answer that runs and writes other tokens.
WRONG = {
    "merge_attention": ("01.4", "equal-weights"),
    "prefill_attention": ("02.5", "not-rescaled"),
    "store_kv": ("03.3", "keys-as-values"),
    "decode_attention": ("03.3", "last-block-missing"),
    "MyBlockManager": ("04.6", "still-in-the-queue"),
    "MyScheduler": ("05.5", "reads-what-nobody-wrote"),
    "rms_norm": ("06.1", "weight-plus-one"),
    "silu_mul": ("06.1", "up-before-gate"),
    "qk_norm_rope": ("06.4", "positions-from-zero"),
    "Qwen3": ("06.6", "no-final-norm"),
    "build_batch": ("07.2", "forgets-the-past"),
    "sample": ("07.4", "seed-ignored"),
    "TextStream": ("07.5", "stop-in-one-piece-only"),
    "MyEngine": ("07.6", "texts-overwritten"),
}


@pytest.mark.parametrize("name", [piece.answer for piece in PIECES])
def test_a_wrong_piece_is_found(with_answers: Answers, quick: None, name: str) -> None:
    """Neither together with the others nor alone does it write the package's tokens."""
    root = with_answers(**{name: sections_of(*WRONG[name])[0]})
    report = Report()
    cells, found, number = examining.collect(root, report), report.found, WRONG[name][0][:2]
    alone = {
        "cells": {number: cells[number]},
        "found": {k: id for k, id in found.items() if id[:2] == number},
    }
    for job, expected in (
        ({"task": "together", "rounds": 1, "cells": cells, "found": found}, ("", "together")),
        ({"task": "alone", "round": 0, "pieces": [name], **alone}, (name, "wrong")),
    ):
        events = list(examining.work(job, root / "exercises", 60.0))
        found = [event["problem"] for event in events if "problem" in event]
        assert [(problem["piece"], problem["name"]) for problem in found] == [expected]


def test_a_wrong_piece_is_named(with_answers: Answers, only: Callable[..., None]) -> None:
    only("MyBlockManager", "MyEngine")
    assert problems(with_answers(MyEngine=sections_of(*WRONG["MyEngine"])[0])) == [
        ("MyEngine", "wrong")
    ]


def test_blocks_that_are_lost_are_missed(with_answers: Answers, only: Callable[..., None]) -> None:
    """One request's are, and there are enough left for the others."""
    only("MyBlockManager", "silu_mul")
    source = (
        "=class MyBlockManager(MyBlockManager):\n    def free(self, seq):\n        if seq.seq_id:\n"
        "            super().free(seq)\n        seq.block_table.clear()"
    )
    report = examine(with_answers(MyBlockManager=source), rounds=1)
    assert [(f.piece, f.name) for f in report.problems] == [("MyBlockManager", "wrong")]
    assert "blocks of the KV cache were not freed" in report.problems[0].message


def test_a_piece_that_raises_is_named_with_its_line(
    with_answers: Answers, only: Callable[..., None]
) -> None:
    only("silu_mul", "build_batch")
    root = with_answers(silu_mul="=def silu_mul(gate_up):\n    return gate_up.no_such_thing")
    report = examine(root)
    assert [(f.piece, f.name) for f in report.problems] == [("silu_mul", "raised")]
    assert "gate_up.no_such_thing" in report.problems[0].message


def test_a_cell_that_raises_is_named(with_answers: Answers, quick: None) -> None:
    assert problems(with_answers(sample="=1 / 0")) == [("sample", "raised")]


def test_an_endless_piece_is_named(with_answers: Answers, only: Callable[..., None]) -> None:
    only("build_batch", "MyEngine")
    source = (
        "=class MyEngine(MyEngine):\n    def run(self, prompts, params):\n        while True:\n    "
        "        self.step()"
    )
    assert problems(with_answers(MyEngine=source), timeout=8.0) == [("MyEngine", "endless")]


#: Holes that only a long past, or a long run, shows.
HOLES = {
    "a window of 256 tokens": (
        "decode_attention",
        "=given_decode = decode_attention\n\n\n"
        "def decode_attention(query, k_cache, v_cache, block_table, seq_lens, scale, **more):\n"
        "    first = max(0, int(seq_lens.max()) - 256) // k_cache.shape[2]\n"
        "    lens = (seq_lens - first * k_cache.shape[2]).clamp(min=0)\n"
        "    lens = torch.where(lens > 0, lens, seq_lens)\n"
        "    return given_decode(query, k_cache, v_cache, block_table[:, first:].contiguous(),"
        " lens, scale, **more)",
        1,
    ),
    "every 50th block is lost": (
        "MyBlockManager",
        "=class MyBlockManager(MyBlockManager):\n    count = 0\n\n"
        "    def free(self, seq):\n        type(self).count += 1\n"
        "        if self.count % 50 == 0:\n            seq.block_table.pop()\n"
        "        super().free(seq)",
        2,
    ),
}


@pytest.mark.parametrize("hole", HOLES)
def test_holes_that_short_runs_survive(with_answers: Answers, quick: None, hole: str) -> None:
    name, source, round = HOLES[hole]
    report, root = Report(), with_answers(**{name: source})
    job = {"cells": examining.collect(root, report), "found": report.found}
    task = {**job, "task": "together", "rounds": round + 1}
    events = list(examining.work(task, root / "exercises", 90.0))
    assert [event["round"] for event in events if "round" in event] == [*range(round + 1)]
    assert "problem" in events[-1], "found, and in the last round"


def test_a_slow_piece_is_named(with_answers: Answers, only: Callable[..., None]) -> None:
    only("silu_mul", "build_batch", "MyEngine")
    source = (
        "=import time\n\ngiven_batch = build_batch\n\n\n"
        "def build_batch(rows, block_table, block_size):\n    time.sleep(0.02)\n"
        "    return given_batch(rows, block_table, block_size)"
    )
    root = with_answers(build_batch=source)
    report = Report()
    examining.collect(root, report)
    texts: list[str] = []
    examining.reward(root, report, texts.append, 90.0)
    assert report.speed is not None
    assert report.speed.slow == "build_batch"
    assert "The slow piece is build_batch" in report.speed.text()
    assert len(texts) > 20
    assert "".join(texts) == report.text


def test_speeds_in_words() -> None:
    even = Speed([100, 110, 105], [104, 112, 99])
    assert "Yours: 105 tokens per second (100 to 110)" in even.text()
    assert "no difference was measured" in even.text()
    assert "The package is 2.00 times" in Speed([50, 51, 49], [100, 101, 99]).text()
    assert "Yours is 2.00 times" in Speed([100, 101, 99], [50, 51, 49]).text()


def test_the_page_shows_text_as_text() -> None:
    report = Report(found={piece.answer: "01.1" for piece in PIECES}, text="<b>Once</b>")
    page = render(report, datetime.date(2026, 11, 30))
    assert "&lt;b&gt;Once&lt;/b&gt;" in page
    assert "2026-11-30" in page


# --- my engine ------------------------------------------------------------------------------------


def test_my_engine_can_be_talked_to(with_answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    root = with_answers()
    monkeypatch.chdir(root)
    mine = Mine(root)
    prompt = mine.llm.render_chat([{"role": "user", "content": "What is a KV cache?"}])
    params = SamplingParams(temperature=0, max_tokens=30)
    with LLM(device="cpu") as llm:
        right = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].text
    assert "".join(mine.stream(prompt, params)) == right
    said = CliRunner().invoke(app, ["chat", "--mine", "-t", "0"], input="What is a KV cache?\n")
    assert said.exit_code == 0, said.output
    assert said.output.startswith(right)


def test_my_engine_can_be_watched(with_answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(with_answers())
    result = CliRunner().invoke(app, ["demo", "--mine", "--pace", "0"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "your own" in result.output


def test_half_an_engine_cannot_be_talked_to(
    with_answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_answers(MyScheduler=None))
    result = CliRunner().invoke(app, ["chat", "--mine"], input="Hello\n")
    assert result.exit_code == 2
    assert "1 of 14 pieces are missing or do not run (MyScheduler)" in " ".join(
        result.output.split()
    )
    assert "minivllm check capstone" in result.output


def test_nothing_attempted_is_one_sentence(
    with_answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_answers(**{piece.answer: None for piece in PIECES}))
    result = CliRunner().invoke(app, ["check", "capstone"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert result.output.count("still to write") == 1
    assert "14 pieces are still to write. Begin with exercise 01.4" in result.output


def test_a_crash_is_named(with_answers: Answers, only: Callable[..., None]) -> None:
    only("silu_mul", "build_batch")
    source = "=import os\n\n\ndef silu_mul(gate_up):\n    os._exit(3)"
    assert problems(with_answers(silu_mul=source)) == [("silu_mul", "process-ended")]


def test_pieces_that_only_disagree_are_told(
    with_answers: Answers, only: Callable[..., None]
) -> None:
    """One that is wrong only beside the other, and right alone."""
    # Without silu_mul the mark stays; the model's turn, with both, takes it away.
    only("silu_mul", "Qwen3", "build_batch")
    root = with_answers(
        build_batch=(
            "=given_batch = build_batch\n\n\ndef build_batch(rows, block_table, block_size):\n"
            "    torch.this_is_mine = True\n    return given_batch(rows, block_table, block_size)"
        ),
        silu_mul=(
            "=given_silu = silu_mul\n\n\ndef silu_mul(gate_up):\n    mine ="
            " torch.__dict__.pop('this_is_mine', False)\n    return given_silu(gate_up) * (1 -"
            " mine)"
        ),
    )
    found = problems(root)
    assert {name for _, name in found} == {"disagrees"}
    assert {piece for piece, _ in found} == {"build_batch", "silu_mul"}


def test_a_changed_solution_is_an_error(
    with_answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_answers()
    (root / "ch03.json").write_text(json.dumps({"nothing": "0"}))
    monkeypatch.chdir(root)
    try:
        result = CliRunner().invoke(app, ["check", "capstone"])
    finally:
        (root / "ch03.json").unlink()
    assert result.exit_code == 2
    assert "git checkout -- solutions/03" in result.output
