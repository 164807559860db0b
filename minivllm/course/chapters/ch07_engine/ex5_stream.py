"""07.5: text while it comes."""

from __future__ import annotations

import functools
from collections import abc
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake

if TYPE_CHECKING:
    from minivllm.tokenizer import Tokenizer
from minivllm.course.grading.exercise import Exercise, Known


class _Stream:
    """`TextStream`, right by default, and wrong in the ways that mistakes name."""

    def __init__(self, decode: Callable, stops: abc.Sequence[str] = (), mistakes: str = "") -> None:
        self.decode, self.stops, self.mistakes = decode, list(stops), mistakes.split()
        self.token_ids: list[int] = []
        self.text = self.shown = ""
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        if "alone" in self.mistakes:
            self.text += self.decode([token_id])
        else:
            self.text = self.decode(self.token_ids)
        return self._show(last=False)

    def finish(self) -> str:
        return "" if "lost-end" in self.mistakes else self._show(last=True)

    def _show(self, last: bool) -> str:
        if self.stopped is not None and "goes-on" not in self.mistakes:
            return ""
        text, begin = self.text, len(self.shown) if "across" in self.mistakes else 0
        found = [
            (text.find(s, begin), i, s)
            for i, s in enumerate(self.stops)
            if text.find(s, begin) >= 0
        ]
        if found and self.stopped is None:
            key = (lambda f: f[1]) if "list-order" in self.mistakes else (lambda f: f[0])
            position, _, self.stopped = min(found, key=key)
            end = position + (len(self.stopped) if "shows-stop" in self.mistakes else 0)
            if "whole-text" in self.mistakes:
                end = len(text)
        elif last:
            end = len(text.rstrip("\ufffd")) if "drops-broken" in self.mistakes else len(text)
        else:
            if "half" not in self.mistakes:
                text = text.rstrip("\ufffd")
            held = max(
                (k for s in self.stops for k in range(1, len(s)) if text.endswith(s[:k])), default=0
            )
            if "no-hold" in self.mistakes:
                held = 0
            if "hold-all" in self.mistakes:
                held = max((len(s) - 1 for s in self.stops), default=0)
            if "hold-one" in self.mistakes:
                held = max((1 for s in self.stops if text.endswith(s[0])), default=0)
            if "word" in self.mistakes and not self.stops:
                held = len(text) - (text.rfind(" ") + 1)
            end = max(len(text) - held, len(self.shown))
        new = text[len(self.shown) : max(end, len(self.shown))]
        self.shown += new
        return new


_STREAM_MISTAKES = {
    "tokens-decoded-alone": (
        (
            "You decode each token by itself. A character may be spread over several tokens, and"
            " the pieces of é or 🦊 are no characters; a space may depend on what stands"
            " before.\nDecode the tokens *together*, and show what is new."
        ),
        "alone",
        "alone half",
        "alone no-hold",
        "alone half no-hold",
    ),
    "half-characters": (
        (
            "You show a character before all of its bytes are there: the reader sees �, and nothing"
            " can take it back.\nWhile the text ends in �, hold that end back: the next token may"
            " complete it."
        ),
        "half",
        "half no-hold",
    ),
    "stop-in-one-piece-only": (
        (
            "You look for the stop string in the new text alone. It may begin in one token and end"
            " in the next.\nLook in the whole text, or at least from so far back as a stop string"
            " is long."
        ),
        "across",
        "across no-hold",
    ),
    "shows-the-stop": (
        "The stop string itself is shown. The text ends *before* it.",
        "shows-stop",
        "shows-stop no-hold",
        "whole-text",
        "whole-text no-hold",
    ),
    "shows-half-a-stop": (
        (
            "You show the beginning of a stop string before you know whether the rest follows; when"
            " it does, the reader has seen what they should not.\nHold the text's end back as long"
            " as it is the beginning of a stop string."
        ),
        "no-hold",
        "no-hold drops-broken",
    ),
    "holds-one-character": (
        (
            "You hold back one character that could begin a stop string. But of “END” two may have"
            " come: hold back all that could be a beginning, “E” as well as “EN”."
        ),
        "hold-one",
    ),
    "holds-too-much": (
        (
            "You always hold back as many characters as the longest stop string has, less one. The"
            " reader lags behind by that much, for nothing.\nHold back only an end that *is* the"
            " beginning of a stop string."
        ),
        "hold-all",
    ),
    "waits-for-a-space": (
        (
            "You show whole words only. The reader could have had the letters that are there; and"
            " some languages have no spaces."
        ),
        "word",
    ),
    "loses-the-end": (
        (
            "`finish` shows nothing. What was held back, because it could have become a stop"
            " string, did not: it belongs to the text."
        ),
        "lost-end",
    ),
    "drops-broken-bytes": (
        (
            "`finish` drops a � at the end. No more tokens will come, so the bytes stay broken; but"
            " they were written, and decoding all tokens at once shows them, too."
        ),
        "drops-broken",
    ),
    "first-in-the-list": (
        (
            "Where two stop strings are in the text, you take the one that comes first in the list."
            " The one that comes first in the *text* ends it."
        ),
        "list-order",
    ),
    "goes-on-after-the-stop": (
        (
            "After a stop string more text is shown.\nOnce `stopped` is set, `append` and `finish`"
            " return nothing."
        ),
        "goes-on",
    ),
}


@functools.cache
def _tokenizer() -> Tokenizer:
    from minivllm.bundled import BUNDLED_MODEL_PATH
    from minivllm.tokenizer import Tokenizer as Bundled

    return Bundled(BUNDLED_MODEL_PATH)


#: A tokenizer as Llama's: ▁ stands for a space, and the one at the beginning of a text is dropped.
_PIECES = ("▁Once", "▁upon", "▁a", "▁time", ",", "▁END", "s", "▁", "E", "N", "D", "N")


def _decode_pieces(token_ids: abc.Sequence[int]) -> str:
    return "".join(_PIECES[token] for token in token_ids).replace("▁", " ").removeprefix(" ")


def _stream_cases() -> list[tuple]:
    encode = _tokenizer().encode
    lines = ["Zoë owns a café. Crème brûlée!", "🦊🦉 and a 🌙", "plain words"]
    cases = [("bundled", encode(text), ()) for text in lines]
    cases += [
        ("bundled", encode("🦊🦉 at night")[:6], ()),
        ("bundled", encode("a 🌙")[:-1], (" a", "🌙")),
    ]
    cases += [
        ("pieces", [0, 1, 2, 3, 4, 7, 1], ()),
        ("pieces", [0, 1, 5, 6], ("upon",)),
        ("pieces", [0, 8, 9, 10, 1], ("END",)),
        ("pieces", [0, 8, 9, 8, 9, 6, 2], ("END",)),
        ("pieces", [0, 8, 9], ("END", "xyz")),
        ("pieces", [0, 8, 8, 9, 9, 10, 2, 3], ("END",)),
        ("pieces", [0, 1, 2, 3, 4, 1], ("time", "on a")),
        ("pieces", [0, 1, 2], ("on", "upon")),
        ("pieces", [2, 3, 4, 1, 2, 3, 4, 2], (", upon a time,", "zzzz")),
        ("bundled", encode("One fish, two fish. The end. More."), (". The", "fish, t", "nowhere")),
        ("bundled", encode("The café is open.\n\nUser: hello"), ("\n\nUser:", "é is not")),
        ("bundled", encode("A: yes\nB: no"), ("\n",)),
    ]
    return cases


def _stream_run(cls: Callable) -> Callable:
    decoders = {"bundled": lambda ids: _tokenizer().decode(list(ids)), "pieces": _decode_pieces}

    def follow(tokenizer: str, token_ids: list[int], stops: tuple[str, ...]) -> dict:
        stream = cls(decoders[tokenizer], stops)
        shown = [
            stream.append(token) for token in token_ids
        ]  # the engine would stop; whoever streams late may not
        return {"shown": shown, "finish": stream.finish(), "stopped": stream.stopped}

    return follow


def check_stream(answer: Callable) -> str:
    named = {
        f"{name} {i}": (why, _stream_run(partial(_Stream, mistakes=mistakes)))
        for name, (why, *variants) in _STREAM_MISTAKES.items()
        for i, mistakes in enumerate(variants)
    }
    cases = _stream_cases()
    try:
        number = diagnose(_stream_run(answer), cases, _stream_run(_Stream), named)
    except Mistake as mistake:
        name, message = mistake.name.split()[0], mistake.message
        if name in ("wrong-values", "wrong-type"):
            message = f"{message}\n{_first_wrong_piece(answer, cases)}"
        raise Mistake(name, message) from mistake.__cause__
    return (
        f"{number} texts, piece by piece; no half character, no part of a stop string, and nothing"
        " late"
    )


def _first_wrong_piece(answer: Callable, cases: list[tuple]) -> str:
    for case in cases:
        mine, right = _stream_run(answer)(*case), _stream_run(_Stream)(*case)
        for i, (one, other) in enumerate(zip(mine["shown"], right["shown"], strict=True)):
            if one != other:
                return (
                    f"After {i + 1} tokens `append` returns {one!r}, expected {other!r}; stops are"
                    f" {case[2]}."
                )
        for key in ("finish", "stopped"):
            if mine[key] != right[key]:
                return f"`{key}` gives {mine[key]!r}, expected {right[key]!r}; stops are {case[2]}."
    return ""


EXERCISE = Exercise(
    id="07.5",
    title="Text while it comes",
    check=check_stream,
    mistakes=(
        Known(
            "tokens-decoded-alone",
            answers=r"""
# %% each token by itself
@@
-        self.token_ids.append(token_id)
+        self.text = getattr(self, "text", "") + self.decode([token_id])
@@
-        text = self.decode(self.token_ids)
+        text = getattr(self, "text", "")
""",
        ),
        Known(
            "half-characters",
            answers=r"""
# %% shows what is not a character yet
@@
-            text = text.rstrip("\ufffd")
""",
        ),
        Known(
            "stop-in-one-piece-only",
            answers=r"""
# %% looks for the stop string in what is new
@@
-        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
+        found = [
+            (text.find(stop, self.num_shown), stop)
+            for stop in self.stops
+            if stop in text[self.num_shown :]
+        ]
@@
-            held = [
-                k
-                for stop in self.stops
-                for k in range(1, len(stop))
-                if text.endswith(stop[:k])
-            ]
-            end = len(text) - max(held, default=0)
+            end = len(text)
+        end = max(end, self.num_shown)
""",
        ),
        Known(
            "shows-the-stop",
            answers=r"""
# %% ends behind the stop string
@@
             end, self.stopped = min(found)
+            end += len(self.stopped)
""",
        ),
        Known(
            "shows-half-a-stop",
            answers=r"""
# %% holds nothing back
@@
-            end = len(text) - max(held, default=0)
+            end = len(text)
""",
        ),
        Known(
            "holds-too-much",
            answers=r"""
# %% always holds back the longest stop
@@
-            end = len(text) - max(held, default=0)
+            end = max(
+                len(text) - max(map(len, self.stops), default=1) + 1, self.num_shown
+            )
""",
        ),
        Known(
            "loses-the-end",
            answers=r"""
# %% nothing to show at the end
@@
-        return self.show(last=True)
+        return ""
""",
        ),
        Known(
            "first-in-the-list",
            answers=r"""
# %% the list's order decides
@@
-            end, self.stopped = min(found)
+            end, self.stopped = found[0]
""",
        ),
        Known(
            "drops-broken-bytes",
            answers=r"""
# %% strips what no token completed
@@
-            end = len(text)
+            end = len(text.rstrip("\ufffd"))
""",
        ),
        Known(
            "waits-for-a-space",
            answers=r"""
# %% words only
@@
-            end = len(text) - max(held, default=0)
+            end = (
+                len(text) - max(held, default=0) if self.stops else text.rfind(" ") + 1
+            )
+            end = max(end, self.num_shown)
""",
        ),
        Known(
            "holds-one-character",
            answers=r"""
# %% one character could begin a stop
@@
-            held = [
-                k
-                for stop in self.stops
-                for k in range(1, len(stop))
-                if text.endswith(stop[:k])
-            ]
+            held = [k for stop in self.stops for k in (1,) if text.endswith(stop[:k])]
""",
        ),
    ),
    right=r"""
# %% decodes the last tokens only
class TextStream:
    def __init__(self, decode, stops=()):
        self.decode, self.stops, self.stopped = decode, stops, None
        self.tokens, self.prefix, self.read = [], 0, 0
        self.text, self.shown = "", ""

    def append(self, token_id):
        self.tokens.append(token_id)
        new = self.fresh()
        if new.endswith("\ufffd"):
            return self.out(new.rstrip("\ufffd"), keep=True)
        return self.out(new)

    def fresh(self):
        known = self.decode(self.tokens[self.prefix : self.read])
        return self.decode(self.tokens[self.prefix :])[len(known) :]

    def finish(self):
        return self.out(self.fresh(), last=True)

    def out(self, new, keep=False, last=False):
        if self.stopped is not None:
            return ""
        whole = self.text + new
        if not keep:
            self.text, self.prefix, self.read = whole, self.read, len(self.tokens)
        end = len(whole)
        places = {whole.find(s): s for s in self.stops if s in whole}
        if places:
            end = min(places)
            self.stopped = places[end]
        elif not last:
            while end > 0 and any(s.startswith(whole[end - 1 :]) for s in self.stops):
                end -= 1
            for start in range(len(whole)):
                if any(s.startswith(whole[start:]) for s in self.stops):
                    end = start
                    break
            else:
                end = len(whole)
        piece = whole[len(self.shown) : end]
        self.shown += piece
        return piece
""",
)
