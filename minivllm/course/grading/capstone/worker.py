"""The worker: a process that runs a learner's answers and says what it saw, one line per event."""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from minivllm.course.grading.capstone.engine import answer
from minivllm.course.grading.capstone.examine import Finding, not_written
from minivllm.course.grading.capstone.pieces import PIECES
from minivllm.course.grading.capstone.requests import QUESTION, ROUNDS, Round
from minivllm.course.grading.capstone.run import Run, difference, package_run, run_with
from minivllm.course.grading.capstone.speed import measure


def main() -> None:
    """Do the job that stands on the standard input, and print each result as one line."""
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    job = json.loads(sys.stdin.read())

    def say(**event: Any) -> None:
        print(json.dumps(event), file=said, flush=True)

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        say(begins="")
        answers, problems = load(job["cells"], job["found"])
        if problems:
            for finding in problems:
                say(problem=vars(finding))
        elif job["task"] == "together":
            Together(answers, job["found"], say).run(job["rounds"])
        elif job["task"] == "reward":
            _reward(answers, say)
        else:
            right = package_run(ROUNDS[job["round"]])
            for name in job["pieces"]:
                say(begins=name)
                task = _alone if job["task"] == "alone" else _without
                for finding in task(name, answers, job["found"], right):
                    say(problem=vars(finding))
    say(done=True)


def load(cells: dict[str, list], found: dict[str, str]) -> tuple[dict[str, Any], list[Finding]]:
    """Run the answers. Returns what they define, by name, and what is wrong with them.

    Each chapter runs in its own namespace.
    """
    from minivllm.course.grading.errors import raised
    from minivllm.course.grading.exercise import unattempted

    answers: dict[str, Any] = {}
    problems: list[Finding] = []
    for chapter, sources in cells.items():
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for number, (id, kind, source) in enumerate(sources):
            pieces = [
                p.answer for p in PIECES if p.chapter == chapter and found.get(p.answer) == id
            ]
            try:
                execute(source, f"<{id or chapter}, cell {number}>", namespace)
            except Exception as error:
                if kind == "answer":
                    problems += [Finding(name, "raised", raised(error).message) for name in pieces]
                elif kind == "given":
                    raise
            # Keep the value now: a later exercise may use the name for something else.
            if kind == "answer":
                answers |= {name: namespace[name] for name in pieces if name in namespace}
    for piece in PIECES:
        id = found.get(piece.answer)
        if id is None or any(finding.piece == piece.answer for finding in problems):
            continue
        if piece.answer not in answers:
            problems.append(
                Finding(piece.answer, "missing", f"The answer to {id} defines no {piece.answer}.")
            )
        elif unattempted(answers[piece.answer]):
            problems.append(not_written(piece, id))
    return answers, problems


def execute(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Execute a cell, and register its lines with `linecache`.

    Triton reads the lines of a function again to compile it as a kernel.
    """
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


def _reward(answers: dict[str, Any], say: Callable[..., None]) -> None:
    """Measure the speeds, and answer a question, piece by piece of its text."""
    say(speed=vars(measure(answers, lambda: say(alive=True))))
    for text in answer(answers, QUESTION):
        say(text=text)


class Together:
    """All pieces in one engine: are the tokens right?"""

    def __init__(
        self, answers: dict[str, Any], found: dict[str, str], say: Callable[..., None]
    ) -> None:
        self.answers, self.found, self.say = answers, found, say
        self.calls: Counter[str] = Counter()

    def run(self, rounds: int) -> None:
        """Serve the first rounds of `ROUNDS`, until one is wrong."""
        num_tokens, stats = 0, {}
        for number, round in enumerate(ROUNDS[:rounds]):
            self.say(round=number)
            right = package_run(round)
            run = self._round(round, right)
            if run is None:
                return
            num_tokens += sum(map(len, run.tokens))
            stats = {name: stats.get(name, 0) + count for name, count in run.stats.items()}
            if not self._call_the_others(right):
                return
        self.say(begins="")
        self.say(calls=self.calls)
        self.say(result={"num_tokens": num_tokens, "stats": stats})

    def _round(self, round: Round, right: Run) -> Run | None:
        """The run of a round; None where something is wrong with it, which has been said."""
        from minivllm.course.grading.errors import raised

        try:
            run = run_with(self.answers, self.answers, round)
        except Exception as error:
            self.say(problem=vars(Finding("", "raised", raised(error).message)))
            return None
        problems = _packages_own(run.own, self.found)
        why = difference(run, right)
        if why and not problems:
            message = f"With all of your pieces together, in {round.name}, {why}."
            problems = [Finding("", "together", message)]
        for finding in problems:
            self.say(problem=vars(finding))
        self.calls += run.calls
        return None if problems else run

    def _call_the_others(self, right: Run) -> bool:
        """Run the pieces alone that the others have not called. Whether they are right."""
        problems = []
        for name in self.answers:
            if not self.calls[name] and not problems:
                self.say(begins=name)
                problems += _alone(name, self.answers, self.found, right, self.calls)
                others = "your other pieces did not call it, so it ran alone in the package's"
                if not problems:
                    self.say(note=f"{name} ({self.found[name]}): {others} engine.")
        for finding in problems:
            self.say(problem=vars(finding))
        return not problems


def _packages_own(own: dict[str, str], found: dict[str, str]) -> list[Finding]:
    return [
        Finding(
            piece,
            "packages-own",
            f"The package's own `{name}` ran instead of {piece} ({found[piece]}): your answer is"
            " the package's code, inherits from it, or calls it. The capstone needs your own"
            " code.",
        )
        for piece, name in own.items()
    ]


def _alone(
    name: str,
    answers: dict[str, Any],
    found: dict[str, str],
    right: Run,
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """Run one piece alone in the package's engine, and return its fault, if there is one.

    Its calls are added to `calls`.
    """
    from minivllm.course.grading.errors import raised

    closer = f"`minivllm check {found[name]}` checks it in more detail."
    try:
        run = run_with({name: answers[name]}, [name], right.round)
    except Exception as error:
        return [
            Finding(
                name, "raised", f"Alone in the package's engine: {raised(error).message}\n{closer}"
            )
        ]
    if problems := _packages_own(run.own, found):
        return problems
    if why := difference(run, right):
        return [
            Finding(
                name,
                "wrong",
                f"With {name} ({found[name]}) alone in the package's engine, {why}.\n{closer}",
            )
        ]
    if not run.calls[name]:
        return [
            Finding(name, "not-used", f"The engine never called {name} ({found[name]}).\n{closer}")
        ]
    if calls is not None:
        calls[name] += run.calls[name]
    return []


def _without(
    name: str, answers: dict[str, Any], found: dict[str, str], right: Run
) -> list[Finding]:
    """Whether the engine works with the package's implementation in place of this piece.

    If it does, this piece does not fit together with the others.
    """
    others = {other: answer for other, answer in answers.items() if other != name}
    try:
        heals = not difference(run_with(others, [], right.round), right)
    except Exception:
        return []
    why = (
        f"Each piece is right alone. With the package's own code instead of {name} ({found[name]}),"
        f" the other pieces are right together. So {name} and another piece of yours disagree about"
        " the data that they pass to each other."
    )
    return [Finding(name, "disagrees", why)] if heals else []


if __name__ == "__main__":
    main()
