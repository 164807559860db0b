"""Triton's interpreter, with less to do.

At each launch, and at each call that a kernel makes to another function (`tl.cdiv`, `tl.max`, a
helper), the interpreter looks through all members of triton.language for those that it must
replace. For our kernels that was almost half of its time. Which names they have never changes, so
`quicken` lets it look once. And inside a launch all of them are replaced already, so that a call
has nothing to replace.

Of the rest 40 % was a check of integers for overflow, whose result the interpreter throws away.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from typing import Any


def quicken() -> None:
    """Spare the interpreter work that changes nothing. A second call does nothing.

    It replaces private functions of Triton. Where they have gone, or where kernels are compiled
    (TRITON_INTERPRET is not set), nothing is changed.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    _remember_names(interpreter)
    _replace_once(interpreter)
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    # The interpreter only says that an integer overflows where debug is set.
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        interpreter.interpreter_builder.options = dataclasses.replace(
            options, sanitize_overflow=False
        )


def _remember_names(interpreter: Any) -> None:
    import triton.language as tl

    original = getattr(interpreter, "_patch_builtin", None)
    replace_one = getattr(interpreter, "_patch_attr", None)
    if original is None or replace_one is None or getattr(original, "remembers", False):
        return
    names: dict[Any, list[str]] = {}

    def is_known(member: Any) -> bool:
        """Whether this is a builtin, or what the interpreter has put in the place of one."""
        return tl.core.is_builtin(member) or (
            getattr(member, "__module__", None) == interpreter.__name__
        )

    def patch_builtin(package: Any, *more: Any) -> None:
        if package not in names:
            names[package] = [
                name for name, member in inspect.getmembers(package) if is_known(member)
            ]
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                replace_one(package, name, member, *more)

    patch_builtin.remembers = True  # type: ignore[attr-defined]
    interpreter._patch_builtin = patch_builtin


def _replace_once(interpreter: Any) -> None:
    """Let a function that a kernel calls find out that everything it needs is replaced."""
    import triton.language as tl

    original = getattr(interpreter, "_patch_lang", None)
    new_scope = getattr(interpreter, "_LangPatchScope", None)
    if original is None or new_scope is None or getattr(original, "looks_first", False):
        return
    modules: dict[Callable, list[Any]] = {}

    def is_replaced(module: Any) -> bool:
        members = (module.program_id, module.tensor.__add__)
        return all(member.__module__ == interpreter.__name__ for member in members)

    def patch_lang(function: Callable) -> Any:
        if function not in modules:
            seen = function.__globals__.values()
            modules[function] = [m for m in seen if inspect.ismodule(m) and m in (tl, tl.core)]
        if modules[function] and all(map(is_replaced, modules[function])):
            return new_scope()
        return original(function)

    patch_lang.looks_first = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang
