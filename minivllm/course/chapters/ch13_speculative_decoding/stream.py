"""Texts that come token by token, for exercise 13.5: an engine without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from minivllm.course.grading.compare import show
from minivllm.course.grading.errors import Mistake
from minivllm.engine.sequence import Sequence, SequenceStatus, num_equal
from minivllm.engine.speculation import Proposer
from minivllm.sampling_params import SamplingParams


class Watched(list):
    """A list that counts the items that are read from it."""

    num_read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_read += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.num_read += 1
            yield item

    def _read_all(name: str) -> Callable:  # type: ignore[misc]
        def method(self: Watched, *args: Any) -> Any:
            self.num_read += len(self)
            return getattr(list, name)(self, *args)

        return method

    copy, index, count = _read_all("copy"), _read_all("index"), _read_all("count")
    __add__, __mul__, __contains__ = (
        _read_all("__add__"),
        _read_all("__mul__"),
        _read_all("__contains__"),
    )
    __eq__, __reversed__ = _read_all("__eq__"), _read_all("__reversed__")
    __hash__ = None  # type: ignore[assignment]


@dataclass
class Text:
    """A prompt, and what the target will write. seed: which of two engines it belongs to."""

    seq_id: int
    prompt: list[int]
    rest: list[int]
    seed: int = 0


@dataclass
class Scene:
    """Texts in an engine.

    name: the mistake of an answer that fails here, and would not if it kept nothing. what: the
    scene, in words. rests: the share of calls that leave a text out. restarts: whether each text
    is interrupted by a restart, after which the next one comes.
    """

    name: str
    what: str
    texts: list[Text]
    at_once: int = 1
    rests: float = 0.0
    restarts: bool = False
    k: int = 5


@dataclass(frozen=True)
class Asked:
    """One sequence in a call: the known text, how many guesses were asked for, what came of it."""

    text: list[int]
    num_prompt: int
    k: int
    guesses: list[int]
    come: list[int]


@dataclass
class Played:
    """What a proposer did. log: an entry for each sequence of each call."""

    num_accepted: int = 0
    num_read: int = 0
    num_free: int = 0  # tokens that may be read
    log: list[Asked] = field(default_factory=list)


_LOOKED_AT = (
    "token_ids",
    "seed",
    "params",
    "status",
    "num_computed_tokens",
    "num_prompt_tokens",
    "max_num_tokens",
    "proposed_token_ids",
    "block_table",
    "slot",
)
#: Tokens at the end of a text that may be read in each call.
LAST = 64


class _Live:
    """A text that runs."""

    def __init__(self, text: Text) -> None:
        self.text, self.num_out = text, 0
        self.tokens = Watched(text.prompt)
        self.seq = Sequence(
            text.seq_id,
            self.tokens,
            SamplingParams(temperature=0),
            seed=text.seed,
            max_num_tokens=len(text.prompt) + len(text.rest),
            status=SequenceStatus.RUNNING,
            num_computed_tokens=len(text.prompt) - 1,
        )
        self.num_free = len(text.prompt)

    @property
    def known(self) -> list[int]:
        return self.text.prompt + self.text.rest[: self.num_out]

    def advance(self, count: int) -> None:
        new = self.text.rest[self.num_out : self.num_out + count]
        self.num_out += len(new)
        self.num_free += len(new)
        self.tokens.extend(new)
        self.seq.num_computed_tokens = len(self.tokens) - 1
        if self.num_out >= len(self.text.rest):
            self.seq.status = SequenceStatus.FINISHED

    def snapshot(self) -> list[Any]:
        values = [getattr(self.seq, name) for name in _LOOKED_AT]
        return [list.copy(value) if isinstance(value, list) else value for value in values]


def play(proposer: Proposer, scene: Scene, seed: int = 5) -> Played:
    """Let a proposer guess the texts of a scene. Raises Mistake for what is no list of guesses."""
    rng, played = Random(seed), Played()
    waiting, live = [*reversed(scene.texts)], []
    while waiting or live:
        while waiting and len(live) < scene.at_once:
            if scene.restarts:
                proposer.restart()
            live.append(_Live(waiting.pop()))
        calling = [one for one in live if rng.random() >= scene.rests]
        if scene.at_once > 1:
            rng.shuffle(calling)
        _call(proposer, calling, scene.k, rng, played)
        for one in live:
            if one not in calling:
                one.advance(rng.randint(5, 25))
                # Whoever forgets what is left out reads it again.
                one.num_free += len(one.known)
        if scene.restarts and waiting and live[0].num_out > len(live[0].text.rest) / 2:
            # An interrupt: nobody says that this text has ended.
            live.clear()
        for one in [one for one in live if one.seq.is_finished]:
            live.remove(one)
            played.num_read += one.tokens.num_read
            played.num_free += one.num_free
    return played


def _call(proposer: Proposer, calling: list[_Live], k: int, rng: Random, played: Played) -> None:
    if not calling:
        return
    counts = [rng.randint(max(1, k - 2), k) for _ in calling]
    before = [one.snapshot() for one in calling]
    sequences, wanted = [one.seq for one in calling], list(counts)
    found = proposer.propose(sequences, wanted)
    if wanted != counts or any(a is not b.seq for a, b in zip(sequences, calling, strict=False)):
        raise Mistake(
            "changed-input",
            "Your proposer changed the lists that `propose` got.\nThey belong to the engine, which"
            " still needs them: work on a copy.",
        )
    expect_form(found, counts)
    for one, then in zip(calling, before, strict=True):
        _expect_unchanged(one, then)
    for one, count, guesses in zip(calling, counts, found, strict=True):
        come = one.text.rest[one.num_out : one.num_out + count]
        played.log.append(Asked(one.known, len(one.text.prompt), count, list(guesses), come))
        accepted = num_equal(guesses, come)
        played.num_accepted += accepted
        one.num_free += LAST
        one.advance(accepted + 1)


def _expect_unchanged(one: _Live, before: list[Any]) -> None:
    for name, now, then in zip(_LOOKED_AT, one.snapshot(), before, strict=True):
        if now is not then and now != then:
            raise Mistake(
                "changed-input",
                f"Your proposer changed {name} of a sequence: {show(now)}, before {show(then)}.\nA"
                " sequence belongs to the engine. Keep what you need in your own object.",
            )


def expect_form(found: Any, counts: list[int]) -> None:
    """Judge what `propose` has returned for sequences that want so many tokens."""
    if not isinstance(found, list | tuple) or len(found) != len(counts):
        raise Mistake(
            "wrong-form",
            f"For {len(counts)} sequences `propose` returned {show(found)}.\nReturn a list with one"
            " list of token ids per sequence, in their order. An empty list is no guess.",
        )
    for guesses, count in zip(found, counts, strict=True):
        good = isinstance(guesses, list | tuple)
        # NumPy's and torch's integers are numbers, too.
        if not good or not all(hasattr(g, "__index__") and int(g) >= 0 for g in guesses):
            raise Mistake(
                "wrong-form",
                f"`propose` returned {show(guesses)} for a sequence.\nGuesses are a list of token"
                " ids: integers, 0 or more.",
            )
        if len(guesses) > count:
            sizes = zip(sorted(map(len, found)), sorted(counts), strict=True)
            raise Mistake(
                "other-order" if all(size <= most for size, most in sizes) else "too-many",
                f"At most {count} guesses were asked for a sequence, and {len(guesses)} came.\n"
                "`num_tokens` has a number for each sequence, and it changes from call to call.",
            )
