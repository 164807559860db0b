"""From logits to tokens, for the whole batch at once. Taught in notebooks/07_engine.ipynb.

Order, as in vLLM: log-probabilities of the raw logits; logit_bias and min_tokens; penalties; then the kernel `sample`:
temperature, top-k, top-p, min-p, and one keyed uniform number a row inverted through what is left.
Each running sequence has a slot; what the sampler knows of it is written once, when it is admitted."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from minivllm.engine.sequence import ScheduledSequence, Sequence
from minivllm.kernels import Kernels


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at R positions: of the token there, with its rank, and of the k likeliest tokens."""

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
    return TokenLogprobs(token_ids, chosen[:, 0], (logprobs > chosen).sum(-1) + 1, top.indices, top.values)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy without waiting: from pageable memory the copy would first wait for all that the GPU has to do."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Sampler:
    """Samples for sequences in slots. V is the vocabulary size."""

    def __init__(self, num_slots: int, vocab_size: int, kernels: Kernels, device: torch.device) -> None:
        self.kernels, self.device, self.vocab_size = kernels, device, vocab_size
        self._temperature = np.zeros(num_slots, np.float32)
        self._top_k = np.zeros(num_slots, np.int32)
        self._top_p = np.ones(num_slots, np.float32)
        self._min_p = np.zeros(num_slots, np.float32)
        self._seed = np.zeros(num_slots, np.int64)
        self._has_filter = np.zeros(num_slots, bool)
        self._has_penalty = np.zeros(num_slots, bool)
        self._needs_edit = np.zeros(num_slots, bool)  # whether the sequence asks for anything but a temperature
        #: The same two on the device, for recorded graphs; the last entry is the spare slot's.
        self._device_temperature = torch.zeros(num_slots + 1, device=device)
        self._device_seed = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        #: [num_slots, V] times a token was generated, and whether it stood in the prompt; made when first needed.
        self._output_counts: torch.Tensor | None = None
        self._in_prompt: torch.Tensor | None = None

    def admit(self, sequences: SequenceOf[Sequence]) -> None:
        """Take note of sequences that have just been given their slots."""
        for seq in sequences:
            self._admit(seq)
        if sequences and self.device.type == "cuda":
            slots = np.array([seq.slot for seq in sequences])
            self._device_temperature[self._tensor(slots)] = self._tensor(self._temperature[slots])
            self._device_seed[self._tensor(slots)] = self._tensor(self._seed[slots])

    def needs_edit(self, slots: SequenceOf[int]) -> bool:
        """Whether `sample_by_temperature` would be wrong for any of these."""
        return bool(self._needs_edit[slots].any())

    def sample_by_temperature(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What a recorded graph can do: no filter, no edit. logits: [B, V]; slots, positions: [B] int64 on the GPU."""
        temperature, seeds = self._device_temperature[slots], self._device_seed[slots]
        return self.kernels.sample(logits, temperature, None, None, None, seeds, positions)

    def _admit(self, seq: Sequence) -> None:
        slot, params = seq.slot, seq.params
        self._temperature[slot] = params.temperature
        self._top_k[slot] = min(max(params.top_k, 0), self.vocab_size)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = seq.seed
        self._has_filter[slot] = params.has_filter and not params.is_greedy
        self._has_penalty[slot] = params.has_penalty
        edits = params.has_penalty or params.logit_bias or params.min_tokens or params.logprobs is not None
        self._needs_edit[slot] = bool(edits) or self._has_filter[slot]
        if params.has_penalty:
            self._admit_penalties(seq)

    def __call__(self, logits: torch.Tensor,
                 items: SequenceOf[ScheduledSequence]) -> tuple[torch.Tensor, TokenLogprobs | None]:  # fmt: skip
        """logits: [R, V], one row an item. Returns token ids [R] int64, and log-probabilities if anyone asked."""
        slots = np.fromiter((item.sequence.slot for item in items), np.int64, count=len(items))
        raw_logits = logits
        logits = self._edit(logits, items, slots)
        token_ids = self.kernels.sample(logits, **self._arguments(items, slots))
        wanted = [item.sequence.params.logprobs for item in items if item.sequence.params.logprobs is not None]
        if not wanted and not self._has_penalty[slots].any():
            return token_ids, None
        known = token_ids & 0xFFFFFFFF  # a valid index for `NOT_A_TOKEN`, too
        if self._has_penalty[slots].any():
            rows = np.flatnonzero(self._has_penalty[slots])
            self._output_counts[self._tensor(slots[rows]), known[self._tensor(rows)]] += 1
        return token_ids, token_logprobs(raw_logits, known, max(wanted)) if wanted else None

    def _arguments(self, items: SequenceOf[ScheduledSequence], slots: np.ndarray) -> dict[str, torch.Tensor | None]:
        """Keyword arguments of the kernel; None for what no row asks for, so that nothing is computed for it."""
        temperature = self._temperature[slots]
        names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
        if not temperature.any():
            return dict.fromkeys(names)
        filtered = self._has_filter[slots].any()
        positions = np.fromiter((item.sample_position for item in items), np.int64, count=len(items))
        filters = (self._top_k[slots], self._top_p[slots], self._min_p[slots]) if filtered else (None, None, None)
        values = (temperature, *filters, self._seed[slots], positions)
        return {n: None if v is None else self._tensor(v) for n, v in zip(names, values, strict=True)}

    def _edit(self, logits: torch.Tensor, items: SequenceOf[ScheduledSequence], slots: np.ndarray) -> torch.Tensor:
        """Apply logit_bias, min_tokens and penalties; a copy in float32 if any row has one, else logits itself."""
        edited = None
        for row, item in enumerate(items):
            seq, params = item.sequence, item.sequence.params
            too_short = item.sample_position - seq.num_prompt_tokens < params.min_tokens
            if params.logit_bias or (too_short and seq.stop_ids):
                edited = logits.float().clone() if edited is None else edited
                if params.logit_bias:
                    ids = torch.tensor(list(params.logit_bias), device=self.device)
                    edited[row, ids] += torch.tensor(list(params.logit_bias.values()), device=self.device)
                if too_short and seq.stop_ids:
                    edited[row, list(seq.stop_ids)] = -torch.inf
        if self._has_penalty[slots].any():
            edited = logits.float().clone() if edited is None else edited
            rows = np.flatnonzero(self._has_penalty[slots])
            params = [items[row].sequence.params for row in rows]
            edited[self._tensor(rows)] = self._penalise(edited[self._tensor(rows)], self._tensor(slots[rows]), params)
        return logits if edited is None else edited

    def _penalise(self, logits: torch.Tensor, slots: torch.Tensor, params: list) -> torch.Tensor:
        """Repetition (Keskar et al., CTRL, 2019), then frequency and presence (OpenAI's API). logits: [rows, V]."""

        def column(name: str) -> torch.Tensor:
            return torch.tensor([getattr(p, name) for p in params], device=self.device, dtype=torch.float32)[:, None]

        counts = self._output_counts[slots].float()
        repetition = torch.where((counts > 0) | self._in_prompt[slots], column("repetition_penalty"), 1.0)
        logits = torch.where(logits > 0, logits / repetition, logits * repetition)
        return logits - column("frequency_penalty") * counts - column("presence_penalty") * (counts > 0)

    def _admit_penalties(self, seq: Sequence) -> None:
        if self._output_counts is None:
            shape = (len(self._seed), self.vocab_size)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        output = torch.tensor(seq.output_token_ids, dtype=torch.int64, device=self.device)
        # A sequence comes back from preemption with output of its own; `sample` may have appended a pending token.
        output = output[output >= 0]
        self._output_counts[seq.slot] = torch.bincount(output, minlength=self.vocab_size).int()
        self._in_prompt[seq.slot] = False
        prompt = torch.tensor(seq.token_ids[: seq.num_prompt_tokens], dtype=torch.int64, device=self.device)
        self._in_prompt[seq.slot, prompt] = True

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self.device)
