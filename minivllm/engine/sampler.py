"""From logits to tokens, for the whole batch at once. Taught in notebooks/07_engine.ipynb.

Order, as in vLLM: log-probabilities of the raw logits; allowed_token_ids, bad_words, min_tokens and
logit_bias; penalties; then the kernel `sample`: temperature, top-k, top-p, min-p, and one keyed
uniform number per row inverted through what is left. Each running sequence has a slot; what the
sampler knows of it is written once, when it is admitted.
"""

from __future__ import annotations

import functools
from collections import abc
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
import torch

from minivllm.engine.sequence import ScheduledSequence, Sequence, slots_of
from minivllm.kernels import Kernels
from minivllm.sampling_params import SamplingParams

#: Parameters that `sample_by_temperature` obeys, or that do not bear on the choice of a token. A
#: recorded graph samples for a sequence only if all its other parameters have their default values;
#: so a parameter that nobody thought of here costs speed, and is never ignored. There is no list of
#: those others to keep: they are read off the parameters' class.
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
#: Fit for a graph where no row is filtered: a greedy row never is.
_FILTERS = frozenset({"top_k", "top_p", "min_p"})


@functools.cache
def _defaults_in_graphs(params_cls: type) -> dict[str, Any]:
    """The fields of a class of parameters that must have these values, their defaults, for a
    recorded graph to sample.
    """
    unfit = [f for f in fields(params_cls) if f.name not in FIT_FOR_GRAPHS | _FILTERS]
    # A field whose default is made anew for each object has none here; it counts as changed unless
    # it equals what is made.
    return {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in unfit
    }


def fits_graph(params: SamplingParams) -> bool:
    """Whether `Sampler.sample_by_temperature` samples as these parameters ask."""
    if params.has_filter and not params.is_greedy:
        return False
    cls: Any = type(params)
    defaults = _defaults_in_graphs(cls)
    return all(getattr(params, name) == default for name, default in defaults.items())


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at R positions: of the token there, with its rank, and of the k likeliest
    tokens.
    """

    token_ids: torch.Tensor  # [R] int64
    logprobs: torch.Tensor  # [R] float32
    ranks: torch.Tensor  # [R] int64; 1 is the likeliest
    top_ids: torch.Tensor  # [R, k] int64
    top_logprobs: torch.Tensor  # [R, k] float32


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> TokenLogprobs:
    """logits: [R, V]; token_ids: [R]. Natural logarithms, in float32."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    top = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    return TokenLogprobs(
        token_ids, chosen[:, 0], (logprobs > chosen).sum(-1) + 1, top.indices, top.values
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy without waiting: from pageable memory the copy would first wait for all that the GPU has
    to do.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _valid_ids(token_ids: torch.Tensor) -> torch.Tensor:
    """`NOT_A_TOKEN` as a valid id, too; what stands there is used for nothing."""
    return token_ids & 0xFFFFFFFF


class LogitEdits:
    """What one sequence bans, allows and favours, in tensors on the device: made once, when it is
    admitted.
    """

    def __init__(self, seq: Sequence, device: torch.device) -> None:
        params = seq.params
        ids = params.allowed_token_ids
        self.allowed = None if ids is None else to_device(torch.tensor(ids), device)
        self.min_tokens = params.min_tokens if seq.stop_ids else 0
        self.stop_ids = to_device(torch.tensor(sorted(seq.stop_ids), dtype=torch.int64), device)
        bias = params.logit_bias or {}
        self.bias_ids = to_device(torch.tensor(list(bias), dtype=torch.int64), device)
        self.bias = to_device(torch.tensor(list(bias.values()), dtype=torch.float32), device)
        self.bad_words = BadWords(seq, device) if seq.bad_words else None

    @staticmethod
    def wanted_by(seq: Sequence) -> bool:
        params = seq.params
        asked = params.allowed_token_ids is not None or params.logit_bias or seq.bad_words
        return bool(asked or (params.min_tokens and seq.stop_ids))

    def apply(self, logits: torch.Tensor, num_output_tokens: int) -> None:
        """Edit logits [V] float32 in place, before the token that follows so many of output."""
        if self.allowed is not None:
            kept = logits[self.allowed]
            logits.fill_(-torch.inf)
            logits[self.allowed] = kept
        if self.bad_words is not None:
            self.bad_words.apply(logits)
        if num_output_tokens < self.min_tokens:
            logits[self.stop_ids] = -torch.inf
        if len(self.bias):
            logits[self.bias_ids] += self.bias


class BadWords:
    """Token sequences that the output of one sequence may not complete. W words, of at most L + 1
    tokens.

    The last L tokens of output are followed on the device: the CPU may not know the newest yet.
    """

    #: In `prefixes`, matches whatever stands there; in `recent`, stands for no token at all.
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
        """Ban the last token of each word whose other tokens have just been chosen. logits: [V]."""
        begun = ((self.prefixes == self.recent) | (self.prefixes == self.ANY)).all(dim=1)
        # Added, not assigned: several words may end alike, and one that has begun decides.
        logits.index_add_(0, self.last, torch.where(begun, -torch.inf, 0.0))

    def note(self, token_id: torch.Tensor) -> None:
        """The sequence has got this token [1]."""
        self.recent = torch.cat((self.recent, token_id))[1:]


@dataclass(frozen=True)
class SeenTokens:
    """What penalties count, for each slot."""

    output_counts: torch.Tensor  # [num_slots, V] int32: times a token was generated
    in_prompt: torch.Tensor  # [num_slots, V] bool: whether it stood in the prompt


class Sampler:
    """Samples for sequences in slots. V is the vocabulary size."""

    def __init__(
        self, num_slots: int, vocab_size: int, kernels: Kernels, device: torch.device
    ) -> None:
        self.kernels, self.device, self.vocab_size = kernels, device, vocab_size
        self._temperature = np.zeros(num_slots, np.float32)
        self._top_k = np.zeros(num_slots, np.int32)
        self._top_p = np.ones(num_slots, np.float32)
        self._min_p = np.zeros(num_slots, np.float32)
        self._seed = np.zeros(num_slots, np.int64)
        self._has_filter = np.zeros(num_slots, bool)
        self._has_penalty = np.zeros(num_slots, bool)
        # whether the sequence asks for more than a recorded graph can do
        self._needs_edit = np.zeros(num_slots, bool)
        self._edits: list[LogitEdits | None] = [None] * num_slots
        self._has_edits = np.zeros(num_slots, bool)
        #: The same two on the device, for recorded graphs; the last entry is the spare slot's.
        self._device_temperature = torch.zeros(num_slots + 1, device=device)
        self._device_seed = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    @functools.cached_property
    def _penalties(self) -> SeenTokens:
        """Made when first needed: for 256 slots and a vocabulary of 150,000 it takes 190 MB."""
        shape = (len(self._seed), self.vocab_size)
        return SeenTokens(
            torch.zeros(shape, dtype=torch.int32, device=self.device),
            torch.zeros(shape, dtype=torch.bool, device=self.device),
        )

    def admit(self, sequences: abc.Sequence[Sequence]) -> None:
        """Take note of sequences that have just been given their slots."""
        for seq in sequences:
            self._admit(seq)
        if sequences and self.device.type == "cuda":
            slots = np.array([seq.slot for seq in sequences])
            self._device_temperature[self._tensor(slots)] = self._tensor(self._temperature[slots])
            self._device_seed[self._tensor(slots)] = self._tensor(self._seed[slots])

    def needs_edit(self, slots: abc.Sequence[int]) -> bool:
        """Whether `sample_by_temperature` would be wrong for any of these."""
        return bool(self._needs_edit[slots].any())

    def sample_by_temperature(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """What a recorded graph can do: no filter, no edit. logits: [B, V]; slots, positions: [B]
        int64 on the GPU.
        """
        temperature, seeds = self._device_temperature[slots], self._device_seed[slots]
        return self.kernels.sample(logits, temperature, None, None, None, seeds, positions)

    def _admit(self, seq: Sequence) -> None:
        slot, params = seq.slot, seq.params
        assert slot is not None
        self._temperature[slot] = params.temperature
        self._top_k[slot] = min(max(params.top_k, 0), self.vocab_size)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = seq.seed
        self._has_filter[slot] = params.has_filter and not params.is_greedy
        self._has_penalty[slot] = params.has_penalty
        self._edits[slot] = LogitEdits(seq, self.device) if LogitEdits.wanted_by(seq) else None
        self._has_edits[slot] = self._edits[slot] is not None
        # what the sequence itself brings (its bad words as tokens) counts besides its parameters
        self._needs_edit[slot] = not fits_graph(params) or self._has_edits[slot]
        if params.has_penalty:
            self._admit_penalties(seq)

    def __call__(
        self, logits: torch.Tensor, items: abc.Sequence[ScheduledSequence]
    ) -> tuple[torch.Tensor, TokenLogprobs | None]:
        """logits: [R, V], one row an item. Returns token ids [R] int64, and log-probabilities if
        anyone asked.
        """
        token_ids = self.sample(logits, items)
        return token_ids, self.logprobs(logits, token_ids, items)

    def sample(
        self, logits: torch.Tensor, items: abc.Sequence[ScheduledSequence], number: int = 0
    ) -> torch.Tensor:
        """logits: [R, V], one row an item. Returns token ids [R] int64, and counts them as output
        of their sequences.

        number: of the token among those that the step samples for each item, from 0; the ones
        before it have been sampled.
        """
        slots = np.array(slots_of(items), np.int64)
        positions = np.zeros(len(items), np.int64)
        if self._temperature[slots].any() or self._has_edits[slots].any():
            positions[:] = [item.sample_position or 0 for item in items]
            positions += number
        logits = self._edit(logits, items, slots, positions)
        token_ids = self.kernels.sample(logits, **self._arguments(slots, positions))
        for row in np.flatnonzero(self._has_edits[slots]).tolist():
            edits = self._edits[slots[row]]
            if edits is not None and edits.bad_words is not None:
                edits.bad_words.note(token_ids[row : row + 1])
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
        """Of token_ids [R] under the raw logits [R, V], as many likeliest as any of items wants;
        None if none does.
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
        """Keyword arguments of the kernel; None for what no row asks for, so that nothing is
        computed for it.
        """
        temperature = self._temperature[slots]
        names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
        if not temperature.any():
            return dict.fromkeys(names)
        filtered = self._has_filter[slots].any()
        filters = (
            (self._top_k[slots], self._top_p[slots], self._min_p[slots])
            if filtered
            else (None, None, None)
        )
        values = (temperature, *filters, self._seed[slots], positions)
        return {
            n: None if v is None else self._tensor(v) for n, v in zip(names, values, strict=True)
        }

    def _edit(
        self,
        logits: torch.Tensor,
        items: abc.Sequence[ScheduledSequence],
        slots: np.ndarray,
        positions: np.ndarray,
    ) -> torch.Tensor:
        """Apply what the rows ask for; a copy in float32 if any does, else logits itself."""
        edited = None
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
        """Repetition (Keskar et al., CTRL, 2019), then frequency and presence (OpenAI's API).
        logits: [rows, V].
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
        # A sequence comes back from preemption with output of its own; `sample` may have appended a
        # pending token.
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
