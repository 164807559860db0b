"""*Predict first*: a reader commits to a number, and only then sees the result beside it."""

from __future__ import annotations

from typing import Any

from minivllm.course.stubs import NOT_YET


def compare(guess: Any, result: float, unit: str = "", *, near: float = 0.1) -> None:
    """Print the reader's guess beside the result, or, without a guess, that the result waits.

    guess: a number, or `...` as long as there is none. result: what was computed or measured, in
    the same unit. near: the share of the result by which a guess may miss and still count as close.
    """
    if guess is ...:
        print(NOT_YET)
        return
    if isinstance(guess, bool) or not isinstance(guess, int | float):
        print(f"A guess is a number; yours is {guess!r}. Write one, and run both cells again.")
        return
    unit = unit and f" {unit}"
    print(f"your guess: {guess:>14,.6g}{unit}")
    print(f"the result: {result:>14,.6g}{unit}")
    print(_verdict(float(guess), float(result), near))


def _verdict(guess: float, result: float, near: float) -> str:
    if guess == result:
        return "exactly right"
    if abs(guess - result) <= near * abs(result):
        return "close"
    if guess > 0 and result > 0:
        factor = max(guess / result, result / guess)
        return f"{factor:,.3g} times too {'large' if guess > result else 'small'}"
    return f"{abs(guess - result):,.6g} too {'large' if guess > result else 'small'}"
