"""The text form of wrong answers: sections, whole or as edits of the solution's answer."""

from __future__ import annotations

import pytest

from minivllm.course.grading.wrong_answers import EditError, sections, source_of

SOLUTION = """def total(numbers):
    result = 0
    for number in numbers:
        result += number

    return result"""


def test_sections() -> None:
    text = """
        # %% starts at one
        @@
        -    result = 0
        +    result = 1

        # %% gives the largest
        def total(numbers):

            return max(numbers)
    """
    assert sections(text) == [
        ("starts at one", "@@\n-    result = 0\n+    result = 1"),
        ("gives the largest", "def total(numbers):\n\n    return max(numbers)"),
    ]


@pytest.mark.parametrize("text", ["x = 1\n# %% late", "# %%\nx = 1", "# %% nothing follows\n\n"])
def test_bad_sections(text: str) -> None:
    with pytest.raises(EditError):
        sections(text)


def test_a_whole_answer_stays_as_it_is() -> None:
    assert source_of("x = 1", SOLUTION) == "x = 1"


def test_hunks_apply_in_order() -> None:
    edit = """@@
-    result = 0
+    result = 1
@@
     for number in numbers:
-        result += number
+        result *= number

     return result
"""
    expected = SOLUTION.replace("result = 0", "result = 1").replace("+=", "*=")
    assert source_of(edit, SOLUTION) == expected


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("@@\n-    result = 5\n+    result = 1", "0 times"),
        ("@@\n-    result = 0\n-    return result\n", "0 times"),
        ("@@\n+    result = 1", "needs a line"),
        ("@@\nresult = 1", "begins with ' ', '-' or"),
    ],
)
def test_an_edit_whose_place_is_gone_fails_loudly(edit: str, said: str) -> None:
    with pytest.raises(EditError, match=said):
        source_of(edit, SOLUTION)


def test_an_edit_that_fits_twice_fails() -> None:
    with pytest.raises(EditError, match="2 times"):
        source_of("@@\n-x = 1\n+x = 2", "x = 1\ny = 1\nx = 1")
