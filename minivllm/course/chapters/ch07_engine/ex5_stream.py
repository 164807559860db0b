"""07.5: text while it comes."""

from __future__ import annotations

import functools
import re
from collections import abc
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from minivllm.course.grading.diagnose import diagnose
from minivllm.course.grading.errors import Mistake
from minivllm.course.grading.exercise import Exercise, Known
from minivllm.course.grading.judges import expect

if TYPE_CHECKING:
    from minivllm.tokenizer import Tokenizer


class _Stream:
    """`TextStream`, right by default, and wrong in the ways that mistakes name."""

    def __init__(self, decode: Callable, stops: abc.Sequence[str] = (), mistakes: str = "") -> None:
        self.decode, self.stops, self.mistakes = decode, list(stops), mistakes.split()
        self.token_ids: list[int] = []
        self.alone = self.shown = ""
        self.stopped: str | None = None

    def append(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        self.alone += self.decode([token_id])
        return self._show(last=False)

    def finish(self) -> str:
        if "lost-end" in self.mistakes:
            return ""
        if "whole-at-end" in self.mistakes and self.stopped is None:
            return self.decode(self.token_ids)
        before = self.shown
        new = self._show(last=True)
        if "finish-again" in self.mistakes:
            self.shown = before
        return new

    def _show(self, last: bool) -> str:
        if self.stopped is not None and not {"goes-on", "searches-on"} & {*self.mistakes}:
            return ""
        text = self._text()
        again = "searches-on" in self.mistakes
        found = None if self.stopped is not None and not again else self._stop_in(text)
        if found:
            end, self.stopped = found
            end += len(self.stopped) if "shows-stop" in self.mistakes else 0
            end = len(text) if "whole-text" in self.mistakes else end
            end = 0 if "lost-piece" in self.mistakes else end
        elif last:
            end = len(text.rstrip("\ufffd")) if "drops-broken" in self.mistakes else len(text)
        else:
            end = max(self._end_of_safe(text), len(self.shown))
        new = text[len(self.shown) : max(end, len(self.shown))]
        self.shown += new
        return self.shown if "whole-again" in self.mistakes else new

    def _text(self) -> str:
        text = self.alone if "alone" in self.mistakes else self.decode(self.token_ids)
        if "strips" in self.mistakes:
            text = text.strip()
        if "cuts-stops" in self.mistakes:
            for stop in self.stops:
                text = text.replace(stop, "")
        return text.replace("\ufffd", "") if "no-broken" in self.mistakes else text

    def _stop_in(self, text: str) -> tuple[int, str] | None:
        """(where it begins, the stop string)"""
        begin = len(self.shown) if "across" in self.mistakes else 0
        stops = self.stops[:1] if "first-stop" in self.mistakes else self.stops
        if "hold-first" in self.mistakes:
            text = text[: self._end_of_safe(text)]
        find = text.rfind if "rfind" in self.mistakes else text.find
        found = [(find(stop, begin), stop) for stop in stops if find(stop, begin) >= 0]
        if "pattern" in self.mistakes:
            hits = [(re.search(stop, text), stop) for stop in stops]
            found = [(hit.start(), stop) for hit, stop in hits if hit]
        if "list-order" in self.mistakes:
            return found[0] if found else None
        if "longest" in self.mistakes:
            return max(found, key=lambda one: len(one[1]), default=None)
        return min(found, default=None)

    def _end_of_safe(self, text: str) -> int:
        """How much of the text may be shown now."""
        whole = text
        if "from-broken" in self.mistakes:
            text = text.partition("\ufffd")[0]
        elif "one-broken" in self.mistakes:
            text = text.removesuffix("\ufffd")
        elif "three-broken" in self.mistakes:
            text = text[:-3] + text[-3:].rstrip("\ufffd")
        elif "half" not in self.mistakes:
            text = text.rstrip("\ufffd")
        stops = self.stops[:1] if "first-stop" in self.mistakes else self.stops
        if "hold-behind" in self.mistakes:
            lengths = [k for s in stops for k in range(1, len(s)) if whole.endswith(s[:k])]
            return min(len(text), len(whole) - max(lengths, default=0))
        lengths = [k for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
        held = max(lengths, default=0)
        if "no-hold" in self.mistakes:
            held = 0
        elif "hold-all" in self.mistakes:
            held = max((len(stop) - 1 for stop in stops), default=0)
        elif "hold-one" in self.mistakes:
            held = max((1 for stop in stops if text.endswith(stop[0])), default=0)
        elif "hold-first-stop" in self.mistakes:
            of_each = (
                max((k for k in range(1, len(s)) if text.endswith(s[:k])), default=0) for s in stops
            )
            held = next(filter(None, of_each), 0)
        elif "hold-shortest" in self.mistakes:
            held = min(lengths, default=0)
        elif "hold-less" in self.mistakes:
            held = max(
                (k for stop in stops for k in range(1, len(stop) - 1) if text.endswith(stop[:k])),
                default=0,
            )
        elif "word" in self.mistakes and not stops:
            held = len(text) - (text.rfind(" ") + 1)
        return len(text) - held


@functools.cache
def _tokenizer() -> Tokenizer:
    from minivllm.bundled import BUNDLED_MODEL_PATH
    from minivllm.tokenizer import Tokenizer as Bundled

    return Bundled(BUNDLED_MODEL_PATH)


#: A tokenizer as Llama's: ▁ stands for a space, and the one at the beginning of a text is dropped.
_PIECES = (
    *("▁Once", "▁upon", "▁a", "▁time", ",", "▁END", "s", "▁", "E", "N", "D", "N"),
    *(".", "x", "▁(x)", "▁stop", "▁that▁END▁is▁no▁END,", "\ufffd\ufffd"),
)


def _pieces(text: str) -> list[int]:
    """The pieces of a text that is made of single characters among `_PIECES`."""
    return [_PIECES.index(character) for character in text]


def _decode_pieces(token_ids: abc.Sequence[int]) -> str:
    return "".join(_PIECES[token] for token in token_ids).replace("▁", " ").removeprefix(" ")


def _stream_cases() -> list[tuple]:
    encode = _tokenizer().encode
    lines = ["Zoë owns a café. Crème brûlée!", "🦊🦉 and a 🌙", "plain words"]
    cases = [("bundled", encode(text), ()) for text in lines]
    half_a_moon = encode("a 🌙")[:-1]
    story = encode("The café was open all night. 🦊 Zoë drank tea, and the owl told a tale.\n" * 14)
    many = (*(f"No. {i}" for i in range(7)), "Finis.")
    far = "A stop string may well be longer than thirty characters."
    cases += [
        ("bundled", encode("🦊🦉 at night")[:6], ()),
        ("bundled", half_a_moon, (" a", "🌙")),
        # Broken bytes may stay, with text behind them.
        ("bundled", half_a_moon + encode(" fox, and") + half_a_moon + encode(" END."), ("END",)),
        ("bundled", half_a_moon + encode(" fox"), ()),
        ("bundled", encode("The owl says 🦊🌙, no more"), ("🦊🦊", "🌙, ")),
        ("bundled", [*story, *encode("Finis. Or not.")], many),
        ("bundled", encode("It is so. A stop string may be. " + far + " It was."), (far, "zz")),
        ("pieces", [0, 1, 2, 3, 4, 7, 1], ()),
        ("pieces", [0, 1, 5, 6], ("upon",)),
        ("pieces", [0, 8, 9, 10, 1], ("END",)),
        ("pieces", [0, 8, 9, 8, 9, 6, 2], ("END",)),
        ("pieces", [0, 8, 9], ("END", "xyz")),
        ("pieces", [0, 8, 8, 9, 9, 10, 2, 3], ("END",)),
        ("pieces", [0, 1, 2, 3, 4, 1], ("time", "on a")),
        ("pieces", [0, 1, 2], ("on", "upon")),
        # One piece brings both: the first of them in the text counts, not the longer one.
        ("pieces", [0, 1, 14, 2], ("x)", "(")),
        ("pieces", [2, 3, 4, 1, 2, 3, 4, 2], (", upon a time,", "zzzz")),
        # The beginning of a stop string within another beginning of it.
        ("pieces", _pieces("xENENxENENENDx"), ("ENEND",)),
        ("pieces", _pieces("xENEN"), ("ENEND", "ENxx")),
        ("pieces", _pieces("xxENExEE"), ("ENE", "zzz")),
        # The longest beginning is not that of the first stop string.
        ("pieces", _pieces("xDExDEsx"), ("EN", "DEs")),
        # After the stop, a longer one is completed that begins before it.
        ("pieces", _pieces("xEN.x"), ("N", "EN.")),
        # Two broken characters at the end, which stay; and many.
        ("pieces", [0, 17, 1, 17], ()),
        ("pieces", [0, 17, 17, 17, 17, 17, 1, 8, 17, 17, 17, 17], ("END",)),
        # A long text, without stop strings and with one.
        ("pieces", [0, 1, 2, 3, 4] * 60, ()),
        ("pieces", [0, 1, 2, 3, 4] * 250 + [8, 9, 10, 1], ("END",)),
        # Twice in one piece; and what only looks like a pattern.
        ("pieces", [0, 16, 1, 1], ("END",)),
        ("pieces", [0, 14, 4, 12, 12, 2, 14], ("(x).", "..")),
        ("pieces", [0, 1, 13, 1, 14], ("x", "nowhere")),
        # Broken bytes in a stop string.
        ("pieces", [*_pieces("xE"), 17, *_pieces("xx")], ("E\ufffd\ufffdx",)),
        ("bundled", encode("One fish, two fish. The end. More."), (". The", "fish, t", "nowhere")),
        ("bundled", encode("The café is open.\n\nUser: hello"), ("\n\nUser:", "é is not")),
        ("bundled", encode("A: yes\nB: no"), ("\n",)),
    ]
    return cases


_DECODERS = {"bundled": lambda ids: _tokenizer().decode(list(ids)), "pieces": _decode_pieces}


def _stream_run(cls: Callable) -> Callable:
    """A function that follows a stream of this class to the end, and beyond."""

    def follow(tokenizer: str, token_ids: list[int], stops: tuple[str, ...]) -> dict[str, Any]:
        return _follow(cls(_DECODERS[tokenizer], stops), token_ids)

    return follow


def _follow(stream: Any, token_ids: abc.Sequence[int]) -> dict[str, Any]:
    # The engine would end at a stop string; whoever streams late may not.
    shown = [stream.append(token) for token in token_ids]
    ends = {"finish": stream.finish(), "finish again": stream.finish()}
    return {"shown": shown, **ends, "stopped": stream.stopped}


def _wrong(mistakes: str) -> Callable:
    return _stream_run(partial(_Stream, mistakes=mistakes))


def check_stream(answer: Callable) -> str:
    _expect_own_tokens(answer)
    cases = _stream_cases()
    try:
        number = diagnose(_stream_run(answer), cases, _stream_run(_Stream), EXERCISE.suspects)
    except Mistake as mistake:
        message = f"{mistake.message}\n{_first_wrong_piece(answer, cases)}"
        raise Mistake(mistake.name, message.strip()) from mistake.__cause__
    return (
        f"{number} texts, piece by piece; no half character, no part of a stop string, and nothing"
        " late"
    )


def _decode_letters(token_ids: abc.Sequence[int]) -> str:
    """Every token has a text: one from another stream, too, as the notebook's picture's."""
    return "".join(chr(ord("a") + token % 26) for token in token_ids)


def _expect_own_tokens(answer: Callable) -> None:
    """Streams are made for each request, and many are read at the same time."""
    texts = [[ord(letter) - ord("a") for letter in text] for text in ("oqzqzjx", "xotqzsu")]
    pieces: list[list[str]] = [[], []]
    try:
        alone = [_follow(answer(_decode_letters, ("qzj",)), text)["shown"] for text in texts]
        streams = [answer(_decode_letters, ("qzj",)) for _ in texts]
        for tokens in zip(*texts, strict=True):
            for stream, token, shown in zip(streams, tokens, pieces, strict=True):
                shown.append(stream.append(token))
    except Exception:
        # The cases show the learner what raises.
        return
    for shown, expected in zip(pieces, alone, strict=True):
        expect(
            shown == expected,
            "shared-between-streams",
            "Two streams are read in turn, a token of one, then a token of the other, and one gives"
            f" {shown}; read alone it gives {expected}.\nEach stream has tokens and text of its"
            " own: make them in `__init__`, not in the class, and not as a default argument.",
        )


def _first_wrong_piece(answer: Callable, cases: list[tuple]) -> str:
    """Where the answer first leaves the right one, in words; "" where it raises."""
    for tokenizer, token_ids, stops in cases:
        right = _stream_run(_Stream)(tokenizer, token_ids, stops)
        try:
            mine = _stream_run(answer)(tokenizer, list(token_ids), stops)
        except Exception:
            return ""
        for i, (one, other) in enumerate(zip(mine["shown"], right["shown"], strict=True)):
            if one != other:
                text = _DECODERS[tokenizer](token_ids[: i + 1])[-60:]
                return (
                    f"The first difference: after {i + 1} tokens the text is {text!r} (its end),"
                    f" stops are {stops[-2:]!r}, and `append` gives {one!r}, expected {other!r}."
                )
        for key in ("finish", "finish again", "stopped"):
            if mine[key] != right[key]:
                what = {"finish again": "A second `finish()`"}.get(key, f"`{key}`")
                text = _DECODERS[tokenizer](token_ids)[-60:]
                return (
                    f"The first difference: the text is {text!r} (its end), stops are"
                    f" {stops[-2:]!r}: {what} gives {mine[key]!r}, expected {right[key]!r}."
                )
    return ""


MISTAKES = (
    Known(
        "tokens-decoded-alone",
        message=(
            "You decode each token by itself. A character may be spread over several tokens, and"
            " the pieces of é or 🦊 are no characters; a space may depend on what stands"
            " before.\nDecode the tokens *together*, and show what is new."
        ),
        suspects=(
            _wrong("alone"),
            _wrong("alone half"),
            _wrong("alone no-hold"),
            _wrong("alone half no-hold"),
        ),
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
        message=(
            "You show a character before all of its bytes are there: the reader sees �, and nothing"
            " can take it back.\nWhile the text ends in �, hold that end back: the next token may"
            " complete it."
        ),
        suspects=(
            _wrong("half"),
            _wrong("half no-hold"),
            _wrong("one-broken"),
            _wrong("three-broken"),
        ),
        answers=r"""
# %% shows what is not a character yet
@@
-            text = text.rstrip("\ufffd")

# %% a character has four bytes at most, so three may be missing
@@
-            text = text.rstrip("\ufffd")
+            text = text[:-3] + text[-3:].rstrip("\ufffd")
""",
    ),
    Known(
        "stop-in-one-piece-only",
        message=(
            "You look for the stop string in the new text alone. It may begin in one token and end"
            " in the next.\nLook in the whole text, or at least from so far back as a stop string"
            " is long."
        ),
        suspects=(
            _wrong("across"),
            _wrong("across no-hold"),
        ),
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
        message=("The stop string itself is shown. The text ends *before* it."),
        suspects=(
            _wrong("shows-stop"),
            _wrong("shows-stop no-hold"),
            _wrong("whole-text"),
            _wrong("whole-text no-hold"),
        ),
        answers=r"""
# %% ends behind the stop string
@@
             end, self.stopped = min(found)
+            end += len(self.stopped)
""",
    ),
    Known(
        "shows-half-a-stop",
        message=(
            "You show the beginning of a stop string before you know whether the rest follows; when"
            " it does, the reader has seen what they should not.\nHold the text's end back as long"
            " as it is the beginning of a stop string."
        ),
        suspects=(
            _wrong("no-hold"),
            _wrong("no-hold drops-broken"),
        ),
        answers=r"""
# %% holds nothing back
@@
-            end = len(text) - max(held, default=0)
+            end = len(text)
""",
    ),
    Known(
        "holds-one-character",
        message=(
            "You hold back one character that could begin a stop string. But of “END” two may have"
            " come: hold back all that could be a beginning, “E” as well as “EN”."
        ),
        suspects=(_wrong("hold-one"),),
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
    Known(
        "holds-too-much",
        message=(
            "You always hold back as many characters as the longest stop string has, less one. The"
            " reader lags behind by that much, for nothing.\nHold back only an end that *is* the"
            " beginning of a stop string."
        ),
        suspects=(_wrong("hold-all"),),
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
        "waits-for-a-space",
        message=(
            "You show whole words only. The reader could have had the letters that are there; and"
            " some languages have no spaces."
        ),
        suspects=(_wrong("word"),),
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
        "loses-the-end",
        message=(
            "`finish` shows nothing. What was held back, because it could have become a stop"
            " string, did not: it belongs to the text."
        ),
        suspects=(_wrong("lost-end"),),
        answers=r"""
# %% nothing to show at the end
@@
-        return self.show(last=True)
+        return ""
""",
    ),
    Known(
        "drops-broken-bytes",
        message=(
            "`finish` drops a � at the end. No more tokens will come, so the bytes stay broken; but"
            " they were written, and decoding all tokens at once shows them, too."
        ),
        suspects=(_wrong("drops-broken"),),
        answers=r"""
# %% strips what no token completed
@@
-            end = len(text)
+            end = len(text.rstrip("\ufffd"))
""",
    ),
    Known(
        "first-in-the-list",
        message=(
            "Several stop strings are in the text, and you take another than the first, such as the"
            " first in the list, the longest, or the last in the alphabet.\nThe one that begins"
            " first in the *text* ends it."
        ),
        suspects=(_wrong("list-order"), _wrong("longest")),
        answers=r"""
# %% the list's order decides
@@
-            end, self.stopped = min(found)
+            end, self.stopped = found[0]

# %% the longest
@@
-            end, self.stopped = min(found)
+            end, self.stopped = max(found, key=lambda one: len(one[1]))
""",
    ),
    Known(
        "goes-on-after-the-stop",
        message=(
            "After a stop string the stream goes on: more text is shown, or `stopped` becomes"
            " another stop string.\nOnce `stopped` is set, the text has ended: `append` and"
            ' `finish` return "" and change nothing.'
        ),
        suspects=(_wrong("goes-on"), _wrong("searches-on")),
        answers=r"""
# %% looks for stop strings again
@@
-        if self.stopped is not None:
-            return ""
""",
    ),
    Known(
        "looks-behind-broken-bytes",
        message=(
            "The text ends in �, and before it stands the beginning of a stop string, which you"
            " show. The � is held back, for it may become anything: so the end of what *can* be"
            " shown lies before it.\nTake the � away first, then ask whether the rest ends in a"
            " beginning."
        ),
        suspects=(_wrong("hold-behind"),),
        answers=r"""
# %% asks the whole text for its end
@@
-            text = text.rstrip("\ufffd")
+            whole, text = text, text.rstrip("\ufffd")
@@
-                if text.endswith(stop[:k])
+                if whole.endswith(stop[:k])
@@
-            end = len(text) - max(held, default=0)
+            end = min(len(text), len(whole) - max(held, default=0))
""",
    ),
    Known(
        "last-stop-in-the-text",
        message=(
            "A stop string is in the text twice, and you end the text before the last one.\nThe"
            " first ends it: `find` looks from the left, `rfind` from the right."
        ),
        suspects=(_wrong("rfind"), _wrong("rfind across")),
        answers=r"""
# %% looks from the right
@@
-        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
+        found = [(text.rfind(stop), stop) for stop in self.stops if stop in text]
""",
    ),
    Known(
        "stop-as-a-pattern",
        message=(
            "You take a stop string for a pattern: a point in it then fits every character.\nStop"
            " strings are plain text: `find` and `in` look for that; `re` needs `re.escape`."
        ),
        suspects=(_wrong("pattern"),),
        answers=r"""
# %% searches with re
@@
-        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
+        import re
+
+        hits = [(re.search(stop, text), stop) for stop in self.stops]
+        found = [(hit.start(), stop) for hit, stop in hits if hit]
""",
    ),
    Known(
        "cuts-the-stop-out",
        message=(
            "You take the stop string out of the text, and show what comes behind it.\nThe text"
            " *ends* before a stop string, and `stopped` says which one it was."
        ),
        suspects=(_wrong("cuts-stops"), _wrong("cuts-stops no-hold")),
        answers=r"""
# %% takes the stops out
@@
         text = self.decode(self.token_ids)
+        for stop in self.stops:
+            text = text.replace(stop, "")
""",
    ),
    Known(
        "broken-in-the-middle",
        message=(
            "A � in the middle of the text is treated as one at the end. There a broken character"
            " stays for good, and the text behind it can be shown.\nHold back only a � at the"
            " *end*: `rstrip` does that; `replace`, `find` and `split` do not."
        ),
        suspects=(_wrong("no-broken"), _wrong("from-broken")),
        answers=r"""
# %% every broken character vanishes
@@
         text = self.decode(self.token_ids)
+        text = text.replace("\ufffd", "")

# %% nothing is shown from the first broken character on
@@
-            text = text.rstrip("\ufffd")
+            text = text.split("\ufffd")[0]
""",
    ),
    Known(
        "text-before-the-stop-lost",
        message=(
            "The piece in which a stop string ends has text before the stop string, too, and yours"
            " is lost.\nWhere you find a stop string, show what is new *before* it."
        ),
        suspects=(_wrong("lost-piece"),),
        answers=r"""
# %% returns at once
@@
             end, self.stopped = min(found)
+            return ""
""",
    ),
    Known(
        "first-stop-only",
        message=(
            "You look at one of the stop strings only.\nThere may be many: look for each of them,"
            " and hold back what could become any of them."
        ),
        suspects=(_wrong("first-stop"),),
        answers=r"""
# %% one stop string
@@
-        self.decode, self.stops = decode, stops
+        self.decode, self.stops = decode, stops[:1]
""",
    ),
    Known(
        "shortest-beginning-held",
        message=(
            "The text ends in two beginnings of stop strings, a short one within a longer one, and"
            " you hold back the short one.\nHold back the longest, over all stop strings."
        ),
        suspects=(_wrong("hold-shortest"), _wrong("hold-first-stop")),
        answers=r"""
# %% the longest beginning of the first stop string that has one
@@
-            held = [
-                k
-                for stop in self.stops
-                for k in range(1, len(stop))
-                if text.endswith(stop[:k])
-            ]
+            held = []
+            for stop in self.stops:
+                held = held or [k for k in range(1, len(stop)) if text.endswith(stop[:k])]

# %% the shortest end that could begin a stop
@@
-            end = len(text) - max(held, default=0)
+            end = max(len(text) - min(held, default=0), self.num_shown)
""",
    ),
    Known(
        "almost-all-of-a-stop-shown",
        message=(
            "When all of a stop string but its last character has come, you show its beginning.\n"
            "Hold back every beginning, up to `len(stop) - 1` characters: `range` leaves its end"
            " out."
        ),
        suspects=(_wrong("hold-less"),),
        answers=r"""
# %% range ends one too early
@@
-                for k in range(1, len(stop))
+                for k in range(1, len(stop) - 1)
@@
-            end = len(text) - max(held, default=0)
+            end = max(len(text) - max(held, default=0), self.num_shown)
""",
    ),
    Known(
        "held-back-before-searched",
        message=(
            "A stop string is complete, and you do not see it: you took away the end of the text"
            " first, as something that could become a stop string.\nLook for stop strings in the"
            " whole text; hold back only where there is none."
        ),
        suspects=(_wrong("hold-first"),),
        answers=r"""
# %% holds back, then looks
@@
-        found = [(text.find(stop), stop) for stop in self.stops if stop in text]
+        short = max(
+            [
+                k
+                for s in self.stops
+                for k in range(1, len(s))
+                if text.rstrip("\ufffd").endswith(s[:k])
+            ],
+            default=0,
+        )
+        seen = text.rstrip("\ufffd")
+        seen = seen[: len(seen) - short]
+        found = [(seen.find(stop), stop) for stop in self.stops if stop in seen]
""",
    ),
    Known(
        "whole-text-again",
        message=(
            "You return the whole text that can be shown, at each call again.\n`append` and"
            " `finish` return what is *new*; the reader has the rest. Note how much was shown."
        ),
        suspects=(_wrong("whole-again"), _wrong("whole-at-end")),
        answers=r"""
# %% all of it, each time
@@
-        new = text[self.num_shown : end]
+        new = text[:end]
""",
    ),
    Known(
        "finish-repeats",
        message=(
            "A second `finish()` returns the same text again.\nWhat it has returned was shown: note"
            " that, as in `append`."
        ),
        suspects=(_wrong("finish-again"),),
        answers=r"""
# %% forgets that it was shown
@@
-        return self.show(last=True)
+        before = self.num_shown
+        new = self.show(last=True)
+        self.num_shown = before
+        return new
""",
    ),
    Known(
        "strips-spaces",
        message=(
            "Spaces or line ends at the end of the text are missing, or late.\nThey belong to the"
            ' text: take away �, with `rstrip("\\ufffd")`, and nothing else.'
        ),
        suspects=(_wrong("strips"),),
        answers=r"""
# %% strips the text
@@
         text = self.decode(self.token_ids)
+        text = text.strip()
@@
-        new = text[self.num_shown : end]
+        end = max(end, self.num_shown)
+        new = text[self.num_shown : end]
""",
    ),
    Known(
        "shared-between-streams",
        answers=r"""
# %% the tokens belong to the class
@@
+    token_ids: list[int] = []
+
     def __init__(
         self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()
@@
-        self.token_ids: list[int] = []
+        self.token_ids.clear()

# %% the tokens belong to the class, and nobody empties them
@@
+    token_ids: list[int] = []
+
     def __init__(
         self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()
@@
-        self.token_ids: list[int] = []
""",
    ),
    Known(
        "wrong-values",
        answers=r"""
# %% decodes the first 512 tokens of a long text
@@
-        text = self.decode(self.token_ids)
+        text = self.decode(self.token_ids[:512])
""",
    ),
)

EXERCISE = Exercise(
    id="07.5",
    title="Text while it comes",
    check=check_stream,
    mistakes=MISTAKES,
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
