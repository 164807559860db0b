"""Structured outputs: a grammar says which tokens may come next, and the sampler draws from these.

A grammar is compiled once (`GrammarCompiler`), and each sequence walks through it with a state of
its own (`GrammarState`): a function of the sequence's output tokens alone. Before a token is drawn,
the state gives one bit per token of the vocabulary, and `GrammarMasks` sets the logits of all other
tokens to -inf. The idea is that of Willard and Louf (Efficient Guided Generation, 2023).

The library is llguidance, as in vLLM's backend "guidance". Compared with xgrammar, vLLM's default,
on a JSON schema of nested objects and the bundled model's 2,048 tokens, on one busy EPYC core:
llguidance 1.9 compiled in 0.7 ms and made a mask in 8 µs (32 µs on average, 12 ms for the first
one); xgrammar 0.2 compiled in 15 ms and made a mask in 2 µs. A mask is short beside a step either
way, and requests bring grammars that nobody has seen before. llguidance (MIT) needs no other
package, and has one wheel for each system and for all Pythons from 3.9 on; xgrammar (Apache 2.0)
requires transformers and pydantic. llguidance also counts its work and gives up at a limit, so a
grammar cannot stop a server. It is optional: `pip install 'minivllm[serve]'`.

One step ahead: when a step is launched, the CPU may not know the token of the step before. The
masks need it. So the forward pass is launched first; then `GrammarMasks` waits for the copy of the
earlier token, and makes the masks while the GPU computes. Nothing is planned otherwise than without
a grammar, and a step without such a sequence never waits.

Preemption, interrupts and speculation need no care either. A sequence that gets a slot again starts
its grammar anew with the tokens that it has. A step that verifies proposals samples only tokens
that count, so no token has to be taken back. Each rank compiles and masks for itself, with equal
results. Shown in notebooks/11_using_minivllm.ipynb.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict, abc
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivllm.config import ModelConfig
from minivllm.engine.batch import to_device
from minivllm.engine.sequence import Sequence
from minivllm.errors import MissingPackageError, RequestError, SamplingParamsError
from minivllm.sampling_params import StructuredOutputsParams
from minivllm.text import one_line
from minivllm.tokenizer import Tokenizer

#: Characters of a grammar. The slowest ones found of this length took 0.8 s of one busy EPYC core.
MAX_GRAMMAR_CHARS = 1 << 16
#: Bytes of the compiling thread's stack. The library follows rules by recursion: a chain of 4,800
#: rules ended the process with a stack of 8 MiB. The memory is taken only where it is used.
STACK_BYTES = 256 << 20
#: Compiled grammars that are kept.
MAX_GRAMMARS = 128
#: Space between the parts of a JSON text: a space, or a new line with its indentation. It is
#: bounded, because a model may write spaces for ever where nothing stops it.
JSON_SPACE = r"( |\n[ \t]{0,32})"
#: Characters of the library's messages that are shown; they quote the grammar.
MESSAGE_CHARS = 300


def end_ids(model_config: ModelConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """End-of-sequence tokens, by vLLM's rule: those of the model's configs, and the tokenizer's."""
    ids = (*model_config.eos_token_ids, tokenizer.eos_token_id if tokenizer else None)
    return frozenset(i for i in ids if i is not None and 0 <= i < model_config.vocab_size)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingPackageError(
            "structured_outputs needs the package llguidance: pip install 'minivllm[serve]'."
        ) from error
    return llguidance


def _in_one_line(message: str) -> str:
    """A message of the library, without the lines of the grammar that it quotes at its end."""
    return one_line(re.split(r"\n\s*\d+ \|", message)[0], MESSAGE_CHARS)


class GrammarState:
    """Where the output of one sequence stands in its grammar."""

    def __init__(self, matcher: Any, num_words: int) -> None:
        #: num_words: the length of a mask, in words of 32 bits.
        self.matcher, self.num_words = matcher, num_words
        #: The number of output tokens that the state has taken in.
        self.num_tokens = 0
        #: Why the grammar cannot go on: a limit of the library, or a token that does not fit.
        self.failure: str | None = None

    def advance(self, token_ids: abc.Iterable[int]) -> None:
        """Take in the next output tokens."""
        for token_id in token_ids:
            self.num_tokens += 1
            # What is computed after the end, or after a failed step, is thrown away.
            is_token = 0 <= token_id < 1 << 32
            if self.failure is None and is_token and not self.matcher.consume_token(token_id):
                self._fail()

    def check(self) -> None:
        """Note whether the last mask could not be made."""
        if self.failure is None and self.matcher.is_error():
            self._fail()

    def _fail(self) -> None:
        self.failure = _in_one_line(self.matcher.get_error()) or "the grammar cannot go on"


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar."""

    matcher: Any
    num_words: int

    def start(self) -> GrammarState:
        """The state before the first output token."""
        return GrammarState(self.matcher.deep_copy(), self.num_words)


class GrammarCompiler:
    """Compile grammars for one model, in a thread of its own, and keep them.

    May be used by several threads.
    """

    def __init__(
        self, path: Path, model_config: ModelConfig, tokenizer: Tokenizer | None = None
    ) -> None:
        self._path, self._model_config = path, model_config
        #: None: read it when the first grammar comes.
        self.tokenizer = tokenizer
        self._lock = threading.Lock()
        self._grammars: OrderedDict[tuple, Future[Grammar]] = OrderedDict()

    def begin(self, wanted: StructuredOutputsParams) -> Future[Grammar]:
        """Compile a grammar in the background, unless it is there already.

        The result raises a `RequestError` that names what is wrong with the grammar.
        """
        with self._lock:
            future = self._grammars.get(wanted.key)
            if future is None or (future.done() and future.exception() is not None):
                future = self._grammars[wanted.key] = self._thread.submit(self._compile, wanted)
            self._grammars.move_to_end(wanted.key)
            while len(self._grammars) > MAX_GRAMMARS:
                self._grammars.popitem(last=False)
            return future

    def compile(self, wanted: StructuredOutputsParams) -> Grammar:
        """Compile a grammar, and wait for it."""
        return self.begin(wanted).result()

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        before = threading.stack_size(STACK_BYTES)
        try:
            pool.submit(int).result()  # starts the thread
        finally:
            threading.stack_size(before)
        return pool

    @cached_property
    def _tokens(self) -> Any:
        """The library's view of the vocabulary."""
        library, tokenizer = _library(), self.tokenizer or Tokenizer(self._path)
        ends = end_ids(self._model_config, tokenizer)
        if not ends:
            raise SamplingParamsError(
                "structured_outputs: this model has no end-of-sequence token, so no output could"
                " end."
            )
        # Ids beyond the tokenizer's own stand for no text, and are never allowed.
        size = max(self._model_config.vocab_size, tokenizer.size)
        try:
            return library.LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=sorted(ends))
        except ValueError as error:
            raise SamplingParamsError(
                f"structured_outputs: llguidance cannot use this model's tokenizer:"
                f" {_in_one_line(str(error))}."
            ) from error

    def _compile(self, wanted: StructuredOutputsParams) -> Grammar:
        kind, text = wanted.kind, wanted.text
        if len(text) > MAX_GRAMMAR_CHARS:
            raise SamplingParamsError(
                f"structured_outputs: {kind} has {len(text)} characters; at most"
                f" {MAX_GRAMMAR_CHARS} are compiled."
            )
        library = _library()
        try:
            matcher = library.LLMatcher(self._tokens, _source(library, wanted), log_level=0)
            problem = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:
            problem = str(error) or "it cannot be read"
        if problem:
            raise SamplingParamsError(
                f"structured_outputs: {kind} cannot be used: {_in_one_line(problem)}"
            )
        return Grammar(matcher, -(-self._tokens.vocab_size // 32))


def _source(library: Any, wanted: StructuredOutputsParams) -> str:
    """A grammar in the library's own language."""
    if wanted.kind in ("json", "json_object"):
        space = wanted.whitespace_pattern or JSON_SPACE
        options = (
            {"whitespace_flexible": False}
            if wanted.disable_any_whitespace
            else {"whitespace_pattern": space}
        )
        return library.LLMatcher.grammar_from_json_schema(wanted.text, defaults=options)
    if wanted.kind == "choice":
        words = (json.dumps(word, ensure_ascii=False) for word in json.loads(wanted.text))
        return library.LLMatcher.grammar_from_lark("start: " + " | ".join(words))
    return library.grammar_from(wanted.kind, wanted.text)


class _Arriving:
    """Sampled tokens, perhaps still on their way to the CPU."""

    def __init__(self, token_ids: torch.Tensor, arrived: torch.cuda.Event | None) -> None:
        self._token_ids, self._arrived = token_ids, arrived

    @cached_property
    def known(self) -> list[int]:
        """The tokens. Waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._token_ids.tolist()


class GrammarMasks:
    """The grammars of the sequences in slots, and what they do to logits.

    compiler: None if no sequence has a grammar.
    """

    def __init__(
        self, num_slots: int, compiler: GrammarCompiler | None, device: torch.device
    ) -> None:
        self.device, self._compiler = device, compiler
        #: Whether the sequence in a slot has a grammar.
        self.is_used = np.zeros(num_slots, bool)
        #: For each of these slots, its sequence, and the state before the newest token. None: the
        #: grammar could not be compiled.
        self._states: dict[int, tuple[Sequence, GrammarState | None]] = {}
        #: The newest token of a slot, which its state has not taken in.
        self._newest: dict[int, tuple[_Arriving, int]] = {}

    @cached_property
    def _executor(self) -> Any:
        """The library's threads, which make the masks of a step."""
        return _library().LLExecutor()

    def admit(self, seq: Sequence) -> None:
        """Start the grammar of a sequence that has just got its slot, if it has one."""
        slot, wanted = seq.slot, seq.params.structured_outputs
        assert slot is not None
        self.is_used[slot] = wanted is not None
        self._states.pop(slot, None)
        self._newest.pop(slot, None)
        if wanted is None:
            return
        state = None
        try:
            if self._compiler is None:
                raise SamplingParamsError("This sampler was made without a GrammarCompiler.")
            state = self._compiler.compile(wanted).start()
            # A sequence that was preempted comes back with output.
            state.advance(token_id for token_id in seq.output_token_ids if token_id >= 0)
        except RequestError as error:
            # A request that no InputProcessor has checked. It ends in its first step, alone.
            seq.failure = str(error)
        self._states[slot] = seq, state

    def apply(self, logits: torch.Tensor, slots: np.ndarray) -> None:
        """Set the logits of all tokens to -inf that the grammars of these slots do not allow.

        logits: [R, V] float32, one row for each of slots [R]; edited in place. If a grammar has
        failed, its whole row becomes -inf, which ends its sequence with an error.
        """
        rows: list[tuple[int, Sequence, GrammarState]] = []
        for row, slot in enumerate(slots.tolist()):
            seq, state = self._states[slot]
            if slot in self._newest:
                tokens, place = self._newest.pop(slot)
                if state is not None:
                    state.advance(tokens.known[place : place + 1])
            if state is not None:
                rows.append((row, seq, state))
        # One bit per token, in words of 32 bits.
        num_words = max([-(-logits.shape[1] // 32), *(state.num_words for *_, state in rows)])
        words = np.zeros((len(slots), num_words), np.uint32)
        going = [(state.matcher, row) for row, _, state in rows if state.failure is None]
        if going:
            self._executor.unsafe_compute_mask_ptr(
                going, words.ctypes.data, 4 * num_words, len(slots)
            )
        for row, seq, state in rows:
            state.check()
            if state.failure is not None:
                seq.failure, words[row] = state.failure, 0
        packed = to_device(torch.from_numpy(words.view(np.uint8)), self.device)
        bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=self.device) & 1
        logits.masked_fill_(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)

    def note(self, token_ids: torch.Tensor, slots: np.ndarray) -> None:
        """Keep the tokens [R] int64 that were sampled for these slots [R], for the next masks."""
        host, arrived = token_ids, None
        if self.device.type != "cpu":
            host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
            host.copy_(token_ids, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        tokens = _Arriving(host, arrived)
        self._newest.update((slot, (tokens, place)) for place, slot in enumerate(slots.tolist()))
