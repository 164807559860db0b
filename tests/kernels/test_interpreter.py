"""Triton's interpreter does less, and still replaces all names, and computes the same."""

from __future__ import annotations

import os

import pytest
import torch

from minivllm.kernels._interpreter import quicken
from minivllm.kernels.online_softmax import softmax

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here"
)


def test_all_names_are_replaced_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a launch no builtin of triton.language is left as it was; after it all are there again."""
    softmax(torch.randn(2, 5))  # loads Triton
    tl = pytest.importorskip("triton.language")
    from triton.runtime import interpreter

    def builtins() -> set[str]:
        return {name for name in dir(tl) if tl.core.is_builtin(getattr(tl, name))}

    before, seen = builtins(), []
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "_init_args_hst",
        _noting(interpreter.GridExecutor._init_args_hst, lambda: seen.append(builtins())),
    )
    patched = interpreter._patch_lang

    def patch_lang(function: object) -> object:
        scope = patched(function)
        seen.append(builtins())
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
    softmax(torch.randn(2, 5))
    assert len(before) > 50
    assert seen[0] == before
    assert seen[1:]
    assert not any(seen[1:])
    assert builtins() == before


def _noting(function, note):
    def noted(*args, **kwargs):
        note()
        return function(*args, **kwargs)

    return noted


def test_a_second_call_changes_nothing() -> None:
    softmax(torch.randn(1, 3))
    from triton.runtime import interpreter

    def changed() -> list:
        builder = interpreter.interpreter_builder
        return [interpreter._patch_builtin, interpreter._patch_lang, builder.options]

    first = changed()
    assert first[0].remembers
    assert first[1].looks_first
    assert first[2].sanitize_overflow is False
    quicken()
    assert [*map(id, changed())] == [*map(id, first)]


def test_the_check_that_is_left_out_has_never_said_anything() -> None:
    """The interpreter drops the result of its checks for overflow where debug is not set."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    assert interpreter.InterpreterOptions().debug is False
    assert interpreter.interpreter_semantic.device_assert(False, "an overflow", None) is None
