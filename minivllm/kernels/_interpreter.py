"""Triton's interpreter, with less to look up.

At each launch, and at each call that a kernel makes to another function (`tl.cdiv`, `tl.max`, a
helper), the interpreter looks through all members of triton.language for those that it must
replace. For our kernels that was almost half of its time. Which names they have never changes, so
`quicken` lets it look once.
"""

from __future__ import annotations

import inspect
import os
from typing import Any


def quicken() -> None:
    """Let the interpreter remember the names that it replaces. A second call does nothing.

    It replaces a private function of Triton. Where that function has gone, or where kernels are
    compiled (TRITON_INTERPRET is not set), nothing is changed.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

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
