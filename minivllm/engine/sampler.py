"""The sampler: from logits to tokens, for the whole batch at once.

The order is vLLM's: log-probabilities of the raw logits; the mask of structured_outputs;
allowed_token_ids, bad_words, min_tokens and logit_bias; penalties; then the kernel `sample`, which
applies temperature, top-k, top-p and min-p and draws with one keyed uniform number per row. Each
running sequence has a slot. The sampler's data about a sequence is written once, when the sequence
is admitted. Taught in notebooks/07_engine.ipynb.
"""

from __future__ import annotations

import functools
from collections import abc
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import torch

from minivllm.engine.batch import to_device
from minivllm.engine.sequence import ScheduledSequence, Sequence, slots_of
from minivllm.engine.structured_outputs import GrammarCompiler, GrammarMasks
from minivllm.kernels import Kernels
from minivllm.sampling_params import FILTERS, SamplingParams

#: Parameters that `sample_by_temperature` obeys, or that do not affect the choice of a token. A
#: recorded graph samples for a sequence only if all its other parameters have their default values.
#: The other parameters are read from the parameters' class, so no list of them can be incomplete: a
#: parameter that is forgotten here costs speed, and is never ignored.
FIT_FOR_GRAPHS = frozenset(
    {
        "n",
        "temperature",
        "seed",
        "max_tokens",
        "ignore_eos",
        "stop",
        "stop_token_ids",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "prompt_logprobs",
        "truncate_prompt_tokens",
    }
)
#: The filters that every sampling kernel takes. A kernel gets another of `FILTERS` only in a step
#: in which a row asks for it: kernels that somebody wrote before it was there go on working.
KERNEL_FILTERS = ("top_k", "top_p", "min_p")


@functools.cache
def _defaults_in_graphs(params_cls: type) -> dict[str, Any]:
    """The parameters that must have their default values for a recorded graph, with the values."""
    # Filters fit a graph where no row is filtered, and a greedy row never is: see `fits_graph`.
    unfit = [f for f in fields(params_cls) if f.name not in FIT_FOR_GRAPHS | FILTERS.keys()]
    # A default factory makes a new value for each object, so the field itself has no default. The
    # value that the factory makes counts as the default.
    return {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in unfit
    }


def fits_graph(params: SamplingParams) -> bool:
    """Whether `Sampler.sample_by_temperature` samples as these parameters demand."""
    if params.has_filter and not params.is_greedy:
        return False
    cls: Any = type(params)
    defaults = _defaults_in_graphs(cls)
    return all(getattr(params, name) == default for name, default in defaults.items())


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at R positions: the token there, its rank, and the k likeliest tokens."""

    token_ids: torch.Tensor  # [R] int64
    logprobs: torch.Tensor  # [R] float32
    ranks: torch.Tensor  # [R] int64; 1 is the likeliest
    top_ids: torch.Tensor  # [R, k] int64
    top_logprobs: torch.Tensor  # [R, k] float32


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> TokenLogprobs:
    """Log-probabilities of tokens, and of the k likeliest tokens per row.

    logits: [R, V]; token_ids: [R]. The results are natural logarithms in float32.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    top = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    return TokenLogprobs(
        token_ids, chosen[:, 0], (logprobs > chosen).sum(-1) + 1, top.indices, top.values
    )


def _valid_ids(token_ids: torch.Tensor) -> torch.Tensor:
    """Map `NOT_A_TOKEN` to a valid id too. The results at that id are used for nothing."""
    return token_ids & 0xFFFFFFFF


class LogitEdits:
    """What one sequence bans, allows and favours, as tensors on the device.

    Made once, when the sequence is admitted.
    """

    def __init__(self, seq: Sequence, device: torch.device) -> None:
        params = seq.params
        ids = params.allowed_token_ids
        self.allowed = None if ids is None else to_device(torch.tensor(ids), device)
        self.min_tokens = params.min_tokens if seq.stop_ids else 0
        self.stop_ids = to_device(torch.tensor(sorted(seq.stop_ids), dtype=torch.int64), device)
        #: The grammar's end-of-sequence tokens that the request ignores.
        ignored = self._ignored_ids(seq)
        self.ignored_ids = (
            to_device(torch.tensor(ignored, dtype=torch.int64), device) if ignored else None
        )
        self.has_grammar = params.structured_outputs is not None
        bias = params.logit_bias or {}
        self.bias_ids = to_device(torch.tensor(list(bias), dtype=torch.int64), device)
        self.bias = to_device(torch.tensor(list(bias.values()), dtype=torch.float32), device)
        self.bad_words = BadWords(seq, device) if seq.bad_words else None

    @staticmethod
    def wanted_by(seq: Sequence) -> bool:
        params = seq.params
        asked = params.allowed_token_ids is not None or params.logit_bias or seq.bad_words
        return bool(asked or (params.min_tokens and seq.stop_ids) or LogitEdits._ignored_ids(seq))

    @staticmethod
    def _ignored_ids(seq: Sequence) -> list[int]:
        """With a grammar, end-of-sequence is among the stop tokens even if it is ignored."""
        params = seq.params
        if params.structured_outputs is None or not params.ignore_eos:
            return []
        return sorted(seq.stop_ids.difference(params.stop_token_ids or ()))

    def apply(self, logits: torch.Tensor, num_output_tokens: int) -> None:
        """Edit logits [V] float32 in place.

        num_output_tokens: the number of output tokens before the token that is sampled now.
        """
        if self.allowed is not None:
            kept = logits[self.allowed]
            logits.fill_(-torch.inf)
            logits[self.allowed] = kept
        if self.bad_words is not None:
            self.bad_words.apply(logits)
        if num_output_tokens < self.min_tokens:
            self._ban(logits, self.stop_ids)
        elif self.ignored_ids is not None:
            self._ban(logits, self.ignored_ids)
        if len(self.bias):
            logits[self.bias_ids] += self.bias

    def _ban(self, logits: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Ban tokens; but where a grammar leaves nothing else, the sequence has to end."""
        if not self.has_grammar:
            logits[token_ids] = -torch.inf
            return
        others = logits.index_fill(0, token_ids, -torch.inf)
        logits.copy_(torch.where(others.amax() > -torch.inf, others, logits))


class BadWords:
    """Token sequences that the output of one sequence must not complete.

    There are W words of at most L + 1 tokens. The last L tokens of output are kept on the device,
    because the CPU may not know the newest token yet.
    """

    #: ANY, in `prefixes`, matches every token. NOTHING, in `recent`, stands for no token.
    ANY, NOTHING = -1, -2

    def __init__(self, seq: Sequence, device: torch.device) -> None:
        width = max(len(word) for word in seq.bad_words) - 1
        rows = [[self.ANY] * (width + 1 - len(word)) + list(word) for word in seq.bad_words]
        words = to_device(torch.tensor(rows), device)
        self.prefixes, self.last = words[:, :-1], words[:, -1]  # [W, L], [W]
        known = [token_id for token_id in seq.output_token_ids if token_id >= 0]
        recent = [*[self.NOTHING] * width, *known][len(known) :]
        self.recent = to_device(torch.tensor(recent, dtype=torch.int64), device)  # [L]

    def apply(self, logits: torch.Tensor) -> None:
        """Ban the last token of each word whose other tokens were just chosen. logits: [V]."""
        begun = ((self.prefixes == self.recent) | (self.prefixes == self.ANY)).all(dim=1)
        # Added, not assigned: several words may end with the same token, and a ban must stay.
        logits.index_add_(0, self.last, torch.where(begun, -torch.inf, 0.0))

    def note(self, token_id: torch.Tensor) -> None:
        """Append the sequence's newest token [1]."""
        self.recent = torch.cat((self.recent, token_id))[1:]


@dataclass(frozen=True)
class SeenTokens:
    """The tokens that penalties count, for each slot."""

    output_counts: torch.Tensor  # [num_slots, V] int32: how often a token was generated
    in_prompt: torch.Tensor  # [num_slots, V] bool: whether a token is in the prompt


class Sampler:
    """Sample tokens for sequences in slots. V is the vocabulary size.

    grammars: compiles the grammars of sequences that have one.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        kernels: Kernels,
        device: torch.device,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.kernels, self.device, self.vocab_size = kernels, device, vocab_size
        self._temperature = np.zeros(num_slots, np.float32)
        #: For each of `FILTERS` a value per slot: int32 or float32.
        self._filters = {
            name: np.full(num_slots, off[0], np.int32 if isinstance(off[0], int) else np.float32)
            for name, off in FILTERS.items()
        }
        self._seed = np.zeros(num_slots, np.int64)
        self._has_filter = np.zeros(num_slots, bool)
        self._has_penalty = np.zeros(num_slots, bool)
        # Whether what is sampled next depends on the sampled tokens by more than the model.
        self._keeps_state = np.zeros(num_slots, bool)
        # Whether the sequence needs more than a recorded graph can do.
        self._needs_edit = np.zeros(num_slots, bool)
        self._edits: list[LogitEdits | None] = [None] * num_slots
        self._has_edits = np.zeros(num_slots, bool)
        self._masks = GrammarMasks(num_slots, grammars, device)
        #: Temperature and seed on the device, for recorded graphs. The last entry belongs to the
        #: spare slot.
        self._device_temperature = torch.zeros(num_slots + 1, device=device)
        self._device_seed = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    @functools.cached_property
    def _penalties(self) -> SeenTokens:
        """Token counts, made when first needed: 190 MB for 256 slots and 150,000 vocabulary ids."""
        shape = (len(self._seed), self.vocab_size)
        return SeenTokens(
            torch.zeros(shape, dtype=torch.int32, device=self.device),
            torch.zeros(shape, dtype=torch.bool, device=self.device),
        )

    def admit(self, sequences: abc.Sequence[Sequence]) -> None:
        """Store the parameters of sequences that have just got their slots."""
        for seq in sequences:
            self._admit(seq)
        if sequences and self.device.type == "cuda":
            slots = np.array([seq.slot for seq in sequences])
            self._device_temperature[self._tensor(slots)] = self._tensor(self._temperature[slots])
            self._device_seed[self._tensor(slots)] = self._tensor(self._seed[slots])

    def warm_up(self, logits: torch.Tensor) -> None:
        """Run once what rows may ask for: greedy, filters, log-probabilities. logits: [1, V]."""
        ones = torch.ones(1, device=self.device)
        seeds = torch.zeros(1, dtype=torch.int64, device=self.device)
        filters = (ones.int() * 8, ones / 2, ones / 8)
        for values in (logits, logits.float()):
            self.kernels.sample(values, None, None, None, None, None, None)
            self.kernels.sample(values, ones, None, None, None, seeds, seeds)
            token_ids = self.kernels.sample(values, ones, *filters, seeds, seeds)
            token_logprobs(values, _valid_ids(token_ids), 2)

    def needs_edit(self, slots: abc.Sequence[int]) -> bool:
        """Whether `sample_by_temperature` would be wrong for any of these slots."""
        return bool(self._needs_edit[slots].any())

    def keeps_state(self, slots: abc.Sequence[int]) -> np.ndarray:
        """For each slot, whether its tokens must be sampled one after another, [N] bool.

        Penalties, bad words and grammars look at the tokens before.
        """
        return self._keeps_state[slots]

    def sample_by_temperature(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Sample as a recorded graph can: with temperature, but no filter and no edit.

        logits: [B, V]; slots, positions: [B] int64 on the GPU.
        """
        temperature, seeds = self._device_temperature[slots], self._device_seed[slots]
        return self.kernels.sample(logits, temperature, None, None, None, seeds, positions)

    def _admit(self, seq: Sequence) -> None:
        slot, params = seq.slot, seq.params
        assert slot is not None
        self._temperature[slot] = params.temperature
        for name, off in FILTERS.items():
            value = getattr(params, name)
            if name == "top_k":  # there are no more tokens than these
                value = min(value, self.vocab_size)
            self._filters[name][slot] = off[0] if value in off else value
        self._seed[slot] = seq.seed
        self._has_filter[slot] = params.has_filter and not params.is_greedy
        self._has_penalty[slot] = params.has_penalty
        self._edits[slot] = LogitEdits(seq, self.device) if LogitEdits.wanted_by(seq) else None
        self._has_edits[slot] = self._edits[slot] is not None
        # Besides its parameters, the sequence's own bad words (as tokens) count.
        self._needs_edit[slot] = not fits_graph(params) or self._has_edits[slot]
        self._masks.admit(seq)
        self._keeps_state[slot] = bool(
            params.has_penalty or params.structured_outputs is not None or seq.bad_words
        )
        if params.has_penalty:
            self._admit_penalties(seq)

    def __call__(
        self, logits: torch.Tensor, items: abc.Sequence[ScheduledSequence]
    ) -> tuple[torch.Tensor, TokenLogprobs | None]:
        """Sample from logits [R, V], one row per item.

        Returns token ids [R] int64, and log-probabilities if any item asks for them.
        """
        token_ids = self.sample(logits, items)
        return token_ids, self.logprobs(logits, token_ids, items)

    def sample(
        self,
        logits: torch.Tensor,
        items: abc.Sequence[ScheduledSequence],
        numbers: abc.Sequence[int] | int = 0,
    ) -> torch.Tensor:
        """Sample from logits [R, V], one row per item, and count the tokens as output.

        numbers: the index of each row's token among those that the step samples for its item, from
        0; one number stands for all rows. The tokens before it have been sampled already, or are
        sampled in this call: items may be in it several times if none of them `keeps_state`.
        Returns token ids [R] int64.
        """
        slots = np.array(slots_of(items), np.int64)
        positions = np.zeros(len(items), np.int64)
        if self._temperature[slots].any() or self._has_edits[slots].any():
            positions[:] = [item.sample_position or 0 for item in items]
            positions += np.asarray(numbers)
        logits = self._edit(logits, items, slots, positions)
        token_ids = self.kernels.sample(logits, **self._arguments(slots, positions))
        for row in np.flatnonzero(self._has_edits[slots]).tolist():
            edits = self._edits[slots[row]]
            if edits is not None and edits.bad_words is not None:
                edits.bad_words.note(token_ids[row : row + 1])
        if self._masks.is_used[slots].any():
            rows = np.flatnonzero(self._masks.is_used[slots])
            self._masks.note(token_ids[self._tensor(rows)], slots[rows])
        if self._has_penalty[slots].any():
            rows = np.flatnonzero(self._has_penalty[slots])
            known = _valid_ids(token_ids[self._tensor(rows)])
            self._penalties.output_counts[self._tensor(slots[rows]), known] += 1
        return token_ids

    def logprobs(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        items: abc.Sequence[ScheduledSequence],
    ) -> TokenLogprobs | None:
        """Log-probabilities of token_ids [R] under the raw logits [R, V]; None if no item asks.

        The number of likeliest tokens is the largest that any item asks for.
        """
        wanted = [
            item.sequence.params.logprobs
            for item in items
            if item.sequence.params.logprobs is not None
        ]
        return token_logprobs(logits, _valid_ids(token_ids), max(wanted)) if wanted else None

    def _arguments(
        self, slots: np.ndarray, positions: np.ndarray
    ) -> dict[str, torch.Tensor | None]:
        """Keyword arguments of the kernel. An argument is None if no row needs it.

        A filter that is not in `KERNEL_FILTERS` is left out then.
        """
        names = ("temperature", *KERNEL_FILTERS, "seeds", "positions")
        arguments: dict[str, torch.Tensor | None] = dict.fromkeys(names)
        temperature = self._temperature[slots]
        if not temperature.any():
            return arguments
        values = {"temperature": temperature, "seeds": self._seed[slots], "positions": positions}
        if self._has_filter[slots].any():
            for name, of_slots in self._filters.items():
                asked = of_slots[slots]
                if name in KERNEL_FILTERS or (asked != FILTERS[name][0]).any():
                    values[name] = asked
        return arguments | {name: self._tensor(value) for name, value in values.items()}

    def _edit(
        self,
        logits: torch.Tensor,
        items: abc.Sequence[ScheduledSequence],
        slots: np.ndarray,
        positions: np.ndarray,
    ) -> torch.Tensor:
        """Apply the edits of the rows, in a float32 copy. Without edits, return logits itself."""
        edited = None
        if self._masks.is_used[slots].any():
            edited = logits.float().clone()
            rows = np.flatnonzero(self._masks.is_used[slots])
            masked = edited[self._tensor(rows)]
            self._masks.apply(masked, slots[rows])
            edited[self._tensor(rows)] = masked
        for row in np.flatnonzero(self._has_edits[slots]).tolist():
            edited = logits.float().clone() if edited is None else edited
            num_output_tokens = int(positions[row]) - items[row].sequence.num_prompt_tokens
            if (edits := self._edits[slots[row]]) is not None:
                edits.apply(edited[row], num_output_tokens)
        if self._has_penalty[slots].any():
            edited = logits.float().clone() if edited is None else edited
            rows = np.flatnonzero(self._has_penalty[slots])
            params = [items[row].sequence.params for row in rows.tolist()]
            edited[self._tensor(rows)] = self._penalise(
                edited[self._tensor(rows)], self._tensor(slots[rows]), params
            )
        return logits if edited is None else edited

    def _penalise(self, logits: torch.Tensor, slots: torch.Tensor, params: list) -> torch.Tensor:
        """Apply penalties to logits [rows, V].

        First repetition (Keskar et al., CTRL, 2019), then frequency and presence (OpenAI's API).
        """

        def column(name: str) -> torch.Tensor:
            return torch.tensor(
                [getattr(p, name) for p in params], device=self.device, dtype=torch.float32
            )[:, None]

        counts = self._penalties.output_counts[slots].float()
        repetition = torch.where(
            (counts > 0) | self._penalties.in_prompt[slots], column("repetition_penalty"), 1.0
        )
        logits = torch.where(logits > 0, logits / repetition, logits * repetition)
        return (
            logits
            - column("frequency_penalty") * counts
            - column("presence_penalty") * (counts > 0)
        )

    def _admit_penalties(self, seq: Sequence) -> None:
        penalties = self._penalties
        output = torch.tensor(seq.output_token_ids, dtype=torch.int64, device=self.device)
        # A sequence that was preempted comes back with output. `sample` may have appended a pending
        # token to it, which is not counted.
        output = output[output >= 0]
        counts = torch.bincount(output, minlength=self.vocab_size)
        penalties.output_counts[seq.slot] = counts.int()
        penalties.in_prompt[seq.slot] = False
        prompt = torch.tensor(
            seq.token_ids[: seq.num_prompt_tokens], dtype=torch.int64, device=self.device
        )
        penalties.in_prompt[seq.slot, prompt] = True

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self.device)
