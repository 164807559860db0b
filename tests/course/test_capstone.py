"""The capstone: all of a learner's pieces together pass; what is missing, the package's own or wrong is named.

The learner's notebooks are copies of the exercises, filled with the solutions' answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from minivllm.cli import app
from minivllm.course import capstone
from minivllm.course.capstone import PIECES, examine
from minivllm.course.chapters import Chapter, chapters, role
from minivllm.course.progress import PASSED, Records, _digest, _groups
from minivllm.course.stubs import defined_names, make_exercises

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = [c for c in chapters(ROOT) if c.number in {piece.chapter for piece in PIECES}]

Answers = Callable[..., Path]


def answers_of(chapter: Chapter) -> dict[str, str]:
    """The solution's answers, by exercise."""
    return {role(cell)[1]: cell.source for cell in chapter.solution.cells if role(cell)[0] == "exercise"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose learner has solved everything."""
    root = tmp_path_factory.mktemp("finished")
    for folder in ("notebooks", "solutions", "exercises"):
        (root / folder).mkdir()
    for chapter in CHAPTERS:
        shutil.copy(chapter.solution_path, root / "solutions")
        notebook, right = make_exercises(chapter), answers_of(chapter)
        for cell in notebook.cells:
            if role(cell)[0] == "exercise":
                cell.source = right[role(cell)[1]]
        nbformat.write(notebook, root / "exercises" / f"{chapter.name}.ipynb")
    return root


@pytest.fixture
def with_answers(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """with_answers(merge_attention="…"): that repository, with other sources in the cells that define these names.

    None is the stub; a source that begins with "=" is put behind the right one, and so takes names over from it.
    """
    monkeypatch.setattr("minivllm.course.chapters.DIGESTS", finished)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = {path: path.read_text(encoding="utf-8") for path in (finished / "exercises").glob("*.ipynb")}

    def change(**sources: str | None) -> Path:
        for name, source in sources.items():
            number = next(piece.chapter for piece in PIECES if piece.answer == name)
            chapter = next(c for c in CHAPTERS if c.number == number)
            path = finished / "exercises" / f"{chapter.name}.ipynb"
            notebook, right = nbformat.read(path, as_version=4), answers_of(chapter)
            id = next(id for id, answer in right.items() if name in defined_names(answer))
            cell = next(cell for cell in notebook.cells if role(cell) == ("exercise", id))
            stub = next(cell for cell in make_exercises(chapter).cells if role(cell) == ("exercise", id)).source
            more = f"{cell.source}\n\n\n{source[1:]}" if source and source.startswith("=") else source
            cell.source = stub if source is None else more
            nbformat.write(notebook, path)
        return finished

    yield change
    for path, text in before.items():
        path.write_text(text, encoding="utf-8")
    (finished / "exercises/.progress.json").unlink(missing_ok=True)


def problems(root: Path, timeout: float = 60.0) -> list[tuple[str, str]]:
    report = examine(root, timeout)
    return [(finding.piece, finding.name) for finding in report.problems]


# --- what it is made of -----------------------------------------------------------------------------------------------


def test_every_piece_is_an_answer_of_the_course() -> None:
    answers = {
        (chapter.number, name)
        for chapter in CHAPTERS
        for source in answers_of(chapter).values()
        for name in defined_names(source)
    }
    assert {(piece.chapter, piece.answer) for piece in PIECES} <= answers
    places = {*capstone.KERNELS, *capstone.OPTIONS.values(), "TextStream", "MyEngine"}
    assert places == {piece.answer for piece in PIECES}


def test_what_the_package_has_in_their_places_is_there() -> None:
    for piece in PIECES:
        names = [name for _, name in capstone._own(piece)]
        assert set(names) == {path.partition(":")[2] for path in piece.own}


def test_the_requests_enter_every_mode() -> None:
    stats = capstone._package_run().stats
    for counter in ("num_preemptions", "num_mixed_steps", "num_chunks", "prefix_cache_hits"):
        assert stats[counter] > 0, counter


# --- what it says -----------------------------------------------------------------------------------------------------


def test_everything_right_passes(with_answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(with_answers())
    result = CliRunner().invoke(app, ["check", "capstone"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert result.output.count("✓") == len(PIECES)
    assert "You have built an inference engine." in result.output
    assert "tokens a second" in result.output
    assert "merge_attention (01.4): your other pieces had no use for it" in result.output
    assert "Not yet checked, or changed since: 01.4, 02.5" in result.output


def test_a_note_names_what_has_not_passed_by_itself(with_answers: Answers) -> None:
    root = with_answers()
    found = {"merge_attention": "01.4", "MyEngine": "07.6"}
    assert "01.4, 07.6" in capstone._not_checked(root, found)[0]
    records = Records(root)
    for chapter in chapters(root):
        for group in _groups(chapter):
            records[group.id].answer, records[group.id].state = _digest(group), PASSED
    records.save()
    assert capstone._not_checked(root, found) == []


def test_stubs_are_named(with_answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(with_answers(MyScheduler=None, store_kv=None))
    result = CliRunner().invoke(app, ["check", "capstone"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "✗ scheduler          MyScheduler        05.5  not-attempted" in result.output
    assert "store_kv is still to write" in result.output
    assert "decode_attention is still to write" in result.output, "it is in the same answer"
    assert result.output.count("✗") == 3


def test_half_a_stub_is_named(with_answers: Answers) -> None:
    source = "=def rms_norm(x, weight, eps):\n    raise NotImplementedError('06.1: your code here')"
    assert problems(with_answers(rms_norm=source)) == [("rms_norm", "not-attempted")]


def test_missing_answers_are_named(with_answers: Answers) -> None:
    root = with_answers()
    path = next((root / "exercises").glob("04_*.ipynb"))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [c for c in notebook.cells if role(c)[0] != "exercise" or "class MyBlockManager" not in c.source]
    nbformat.write(notebook, path)
    next((root / "exercises").glob("01_*.ipynb")).unlink()
    assert problems(root) == [("merge_attention", "missing"), ("MyBlockManager", "answer-missing")]


#: The package's own in the place of a piece: as it is, under another name, inherited, called, or a part of it.
OWN = {
    "merge_attention": "=from minivllm.kernels.online_softmax import merge_attention_reference as merge_attention",
    "decode_attention": "=def decode_attention(*args, **kwargs):\n"
    "    return Kernels.reference().decode_attention(*args, **kwargs)",
    "MyBlockManager": "from minivllm.engine.block_manager import BlockManager\n\n\n"
    "class MyBlockManager(BlockManager):\n    pass",
    "MyScheduler": "class MyScheduler(Scheduler):\n    pass",
    "rms_norm": "=rms_norm = Kernels.reference().rms_norm",
    "build_batch": "=build_batch = package_batch",
    "sample": "=from minivllm.kernels.sampling import filter_logits",
    "TextStream": "=class TextStream(TokenText):\n    def __init__(self, decode, stops):\n"
    "        super().__init__(tokenizer, stops)",
}


@pytest.mark.parametrize("name", OWN)
def test_the_packages_own_is_named(with_answers: Answers, name: str) -> None:
    assert problems(with_answers(**{name: OWN[name]})) == [(name, "packages-own")]


#: Right shapes, wrong values.
WRONG = {
    "merge_attention": "=def merge_attention(partial_out, partial_lse):\n    return partial_out.mean(dim=0)",
    "silu_mul": "=def silu_mul(gate_up):\n    up, gate = gate_up.chunk(2, dim=-1)\n"
    "    return gate * torch.sigmoid(gate) * up",
    "sample": "=def philox_uniform(seeds, positions):\n    return torch.full((len(seeds),), 0.5)",
    "MyEngine": "=class MyEngine(MyEngine):\n    def run(self, sequences):\n"
    "        return [text.upper() for text in super().run(sequences)]",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_piece_is_named(with_answers: Answers, name: str) -> None:
    assert problems(with_answers(**{name: WRONG[name]})) == [(name, "wrong")]


def test_a_piece_that_raises_is_named_with_its_line(with_answers: Answers) -> None:
    root = with_answers(rms_norm="=def rms_norm(x, weight, eps):\n    return x / weight.no_such_thing")
    report = examine(root)
    assert [(f.piece, f.name) for f in report.problems] == [("rms_norm", "raised")]
    assert "x / weight.no_such_thing" in report.problems[0].message


def test_a_cell_that_raises_is_named(with_answers: Answers) -> None:
    assert problems(with_answers(sample="=1 / 0")) == [("sample", "raised")]


def test_an_endless_piece_is_named(with_answers: Answers) -> None:
    source = "=class MyEngine(MyEngine):\n    def run(self, sequences):\n        while True:\n            self.step()"
    assert problems(with_answers(MyEngine=source), timeout=10.0) == [("MyEngine", "endless")]


def test_a_crash_is_named(with_answers: Answers) -> None:
    source = "=import os\n\n\ndef silu_mul(gate_up):\n    os._exit(3)"
    assert problems(with_answers(silu_mul=source)) == [("silu_mul", "process-ended")]


def test_pieces_that_only_disagree_are_told(with_answers: Answers) -> None:
    """One that is wrong only beside the other, and right alone."""
    root = with_answers(
        build_batch="=given_batch = build_batch\n\n\ndef build_batch(rows, block_table, block_size):\n"
        "    torch.this_is_mine = True\n    return given_batch(rows, block_table, block_size)",
        silu_mul="=given_silu = silu_mul\n\n\ndef silu_mul(gate_up):\n"
        "    mine = torch.__dict__.pop('this_is_mine', False)\n    return given_silu(gate_up) * (1 - mine)",
    )
    found = problems(root)
    assert {name for _, name in found} == {"disagrees"}
    assert {piece for piece, _ in found} == {"build_batch", "silu_mul"}


def test_a_changed_solution_is_an_error(with_answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    root = with_answers()
    (root / "ch03.json").write_text(json.dumps({"nothing": "0"}))
    monkeypatch.chdir(root)
    try:
        result = CliRunner().invoke(app, ["check", "capstone"])
    finally:
        (root / "ch03.json").unlink()
    assert result.exit_code == 2
    assert "git checkout -- solutions/03" in result.output
