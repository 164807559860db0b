"""The model runner: owns the model, the KV cache and per-slot state, and runs planned steps.

Taught in notebooks/07_engine.ipynb.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minivllm.config import ModelConfig, ResolvedConfig, kv_bytes_per_token
from minivllm.engine.batch import BatchInputs, BatchRow, build_batch, to_device
from minivllm.engine.cuda_graphs import NO_PROPOSAL, DecodeGraphs, DecodeState, graph_sizes
from minivllm.engine.memory import check_memory, typed_start_errors
from minivllm.engine.mixed_graphs import MixedGraphs, StepShape, step_shapes
from minivllm.engine.sampler import Sampler, TokenLogprobs, token_logprobs
from minivllm.engine.sequence import (
    PENDING,
    ScheduledBatch,
    ScheduledSequence,
    num_equal,
    slots_of,
)
from minivllm.engine.structured_outputs import GrammarCompiler
from minivllm.engine.warm_up import Row, kinds_of_steps
from minivllm.errors import ConfigError, OutOfMemoryError
from minivllm.kernels import Kernels
from minivllm.kernels.kv_cache import FP8_MAX, Cache, QuantizedCache, untouched_zeros
from minivllm.layers.attention import AttentionMetadata, KVCache
from minivllm.models.loader import LoadOptions, load_model
from minivllm.parallel.group import SINGLE, TensorParallelGroup

logger = logging.getLogger(__name__)

#: On a CPU the cache has a modest fixed size; a share of the machine's memory would be too much.
CPU_KV_CACHE_BYTES = 256 << 20
#: Rows of logits that prompt_logprobs holds at a time. The logits of a whole prompt would take
#: gigabytes with a large vocabulary.
LOGIT_ROWS = 256
#: Random tokens on which the scales of an fp8 cache are measured.
SCALE_TOKENS = 512


def _is_long(item: ScheduledSequence) -> bool:
    return item.num_new_tokens > 1


@dataclass(frozen=True)
class Sampled:
    """The tokens that a step sampled, in the runner's own order: R rows, one or more per item."""

    #: For each item, its index in `batch.sampled`.
    order: list[int]
    token_ids: torch.Tensor  # [R] int64
    logprobs: TokenLogprobs | None = None  # of all R rows
    #: Number of tokens per item, in the runner's order; None: one token per item.
    counts: list[int] | None = None


@dataclass(frozen=True)
class StepResult:
    """The results of a step. With a GPU they may still be on their way."""

    sampled: Sampled
    #: On the CPU. Tokens from a GPU are there when the event `arrived` has passed.
    token_ids: torch.Tensor
    arrived: torch.cuda.Event | None
    #: (item, its logprobs at positions item.start + 1 ...), for each item that asked for them.
    prompt_logprobs: list[tuple[ScheduledSequence, TokenLogprobs]]

    @property
    def logprobs(self) -> TokenLogprobs | None:
        return self.sampled.logprobs

    def wait(self) -> list[list[int]]:
        """Wait for the results, and return the verified tokens for each of `batch.sampled`.

        The verified tokens are the accepted proposals, and one more token.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.sampled.counts is None:
            found = self.token_ids[:, None].tolist()
        else:
            rows = iter(self.token_ids.tolist())
            found = [list(itertools.islice(rows, count)) for count in self.sampled.counts]
        in_order = list(found)
        for place, tokens in zip(self.sampled.order, found, strict=True):
            in_order[place] = tokens
        return in_order

    def first_rows(self) -> list[int]:
        """Return the first row of logprobs for each of `batch.sampled`."""
        counts = self.sampled.counts or [1] * len(self.sampled.order)
        rows = [0] * len(counts)
        row = 0
        for place, count in zip(self.sampled.order, counts, strict=True):
            rows[place] = row
            row += count
        return rows


class ModelRunner:
    """Run steps of one model on one device.

    config: num_kv_blocks may be 0; then the runner allocates as many blocks as fit.
    """

    def __init__(
        self,
        path: Path,
        model_config: ModelConfig,
        config: ResolvedConfig,
        kernels: Kernels,
        *,
        model_cls: Callable[..., nn.Module] | None = None,
        build_batch: Callable[..., BatchInputs] = build_batch,
        group: TensorParallelGroup = SINGLE,
    ) -> None:
        self.model_config = model_config
        self.config = config
        self.build_batch = build_batch
        self.group = group
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        # KV heads of this rank.
        self.num_kv_heads = len(group.part(model_config.num_key_value_heads))
        self.graphs: DecodeGraphs | None = None
        self.mixed_graphs: MixedGraphs | None = None
        self._can_record_prompts = True
        # Of steps that verify proposals, if the engine speculates.
        self.verifying: DecodeGraphs | None = None
        self.kv_caches: list[KVCache] = []
        # An nn.Module with `compute_logits`; None after `release`.
        self.model: Any = None
        with self._released_on_failure(), typed_start_errors(self.device.type):
            self._check_fp8()
            check_memory(model_config, config, group.size, self._cpu_cache_bytes())
            options = LoadOptions(
                dtype=self.dtype,
                device=self.device,
                max_position=config.max_model_len,
                load_format=config.load_format,
                seed=config.seed,
                quantization=config.quantization,
                model_cls=model_cls,
            )
            self.model = load_model(path, model_config, kernels, options, group)
            if not config.disable_custom_all_reduce:
                rows, width = config.max_num_batched_tokens, model_config.hidden_size
                group.share_memory(rows, width, self.dtype)
            num_slots = config.max_num_seqs
            max_blocks = -(-config.max_model_len // config.block_size)
            #: Per slot: block ids; the number of them that the device has already (a step sends
            #: only the new ones); and whether the device's state belongs to the slot's sequence.
            self._block_table = np.zeros((num_slots, max_blocks), np.int32)
            self._num_blocks = np.zeros(num_slots, np.int64)
            self._is_ready = np.zeros(num_slots, bool)
            self._state = DecodeState.empty(num_slots, max_blocks, self.device)
            self.grammars = GrammarCompiler(path, model_config)
            self.sampler = Sampler(
                config.max_num_seqs, model_config.vocab_size, kernels, self.device, self.grammars
            )
            #: Of fp8: the scales that were measured; None: all are 1.
            self._kv_scales: torch.Tensor | None = None
            if config.calculate_kv_scales:
                self._kv_scales = self._measure_kv_scales()
            self.num_kv_blocks = min(
                group.exchange(config.num_kv_blocks or self._default_num_kv_blocks())
            )
            self.kv_caches = self._allocate_kv_caches(self.num_kv_blocks)
            if not config.enforce_eager:
                self.graphs = self._capture_graphs(graph_sizes(config.max_num_seqs))
                self.mixed_graphs = self._capture_mixed_graphs(self._step_shapes())
                self.verifying = self._capture_verifying(graph_sizes(self._most_verified()))
            if self.device.type == "cuda" and kernels.can_be_recorded:
                self._warm_up()

    def _check_fp8(self) -> None:
        """Raise `ConfigError` if this GPU's kernels cannot convert e4m3."""
        config = self.config
        if config.kv_cache_dtype != "fp8" or self.device.type != "cuda":
            return
        capability = torch.cuda.get_device_capability(self.device)
        if config.attention_backend == "triton" and capability < (8, 9):
            raise ConfigError(
                "kv_cache_dtype='fp8' needs a GPU of compute capability 8.9 (Ada, Hopper) or newer,"
                f" and this one has {'.'.join(map(str, capability))}. Use kv_cache_dtype='int8'."
            )

    @contextmanager
    def _released_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release_graphs(self) -> None:
        """Destroy the recorded graphs. Later steps launch their kernels one by one."""
        recorded = (self.graphs, self.verifying, self.mixed_graphs)
        self.graphs = self.verifying = self.mixed_graphs = None
        for graphs in recorded:
            if graphs is not None:
                graphs.release()

    def release(self) -> None:
        """Free graphs, caches and model. No step can run afterwards. May be called twice."""
        self.release_graphs()
        self.kv_caches, self.model = [], None

    def forget_sequences(self) -> None:
        """Empty all slots. Sequences that get a slot later are admitted with their state."""
        self._num_blocks[:] = 0
        self._is_ready[:] = False

    def take_back(self, slots: list[int]) -> None:
        """Forget the newest tokens of these slots. Their next step brings its tokens itself.

        For a driver that changes what it has been given, as a draft model's does with its guesses.
        """
        self._is_ready[slots] = False

    def expect(self, slots: list[int], token_ids: list[int], positions: list[int]) -> None:
        """State which token each of these slots computes next, and its position.

        For the same kind of driver. All tokens before are computed, so a recorded graph can run.
        """
        on_device = self._tensor(slots)
        self._state.set_last_token(on_device, self._tensor(token_ids))
        self._state.position[on_device] = self._tensor(positions)
        self._is_ready[slots] = True

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes per token of this rank's cache, over all layers."""
        dtypes = self.config.dtype, self.config.kv_cache_dtype
        return kv_bytes_per_token(self.model_config, *dtypes, self.num_kv_heads)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Run one step. Does not change the batch; the runner sorts the rows in its own order."""
        for seq in batch.admitted:
            self._num_blocks[seq.slot] = 0
            self._is_ready[seq.slot] = False
        self.sampler.admit(batch.admitted)
        self._write_new_blocks(batch.items)
        if self.graphs is not None and self._is_ready[slots_of(batch.items)].all():
            if not batch.has_proposals:
                return self._replay(self.graphs, batch.items)
            if self._can_replay_proposals(batch.items):
                return self._replay_proposals(batch.items)
        # Rows of one token come first, so that decode and prefill attention each get one part.
        items = sorted(batch.items, key=_is_long)
        hidden, logits_indices = self._forward(items)
        to_sample = batch.sampled
        order = sorted(range(len(to_sample)), key=lambda place: _is_long(to_sample[place]))
        rows = [to_sample[place] for place in order]
        sampled = Sampled(order, logits_indices[:0])
        if rows and batch.has_proposals:
            logits = self.model.compute_logits(hidden[self._verified_rows(items)])
            sampled = replace(self._verify(rows, logits), order=order)
        elif rows:
            logits = self.model.compute_logits(hidden[logits_indices])
            sampled = Sampled(order, *self.sampler(logits, rows))
            self._note_sampled(rows, sampled.token_ids, [item.end for item in rows])
        return self._result(sampled, self._prompt_logprobs(items, hidden))

    def _verified_rows(self, items: list[ScheduledSequence]) -> torch.Tensor:
        """The rows of the hidden states from which the step samples, [R] int64.

        For each item that samples: the row of its last known token, and the rows of its proposals.
        """
        ends = itertools.accumulate(item.num_new_tokens for item in items)
        rows = [
            row
            for item, end in zip(items, ends, strict=True)
            for row in range(end - len(item.sample_positions), end)
        ]
        return self._tensor(rows)

    def _verify(self, items: list[ScheduledSequence], logits: torch.Tensor) -> Sampled:
        """Sample after the known tokens, and after each proposal while the proposals are right.

        Each token is sampled with the key of its seed and position, so it equals the token that a
        separate step would sample. A proposal is accepted if it equals the sampled token. This is
        the simplest form of speculative decoding (Leviathan et al., 2023).

        logits: [R, V], k + 1 rows for an item with k proposals.
        """
        numbers = [len(item.sample_positions) for item in items]
        firsts = [
            end - number for end, number in zip(itertools.accumulate(numbers), numbers, strict=True)
        ]
        verified: list[list[int]] = [[] for _ in items]
        keeps_state = self.sampler.keeps_state(slots_of(items))
        self._sample_at_once(items, logits, np.flatnonzero(~keeps_state).tolist(), verified, firsts)
        self._sample_in_rounds(
            items, logits, np.flatnonzero(keeps_state).tolist(), verified, firsts
        )
        counts = [len(tokens) for tokens in verified]
        rows = self._tensor([f + j for f, n in zip(firsts, counts, strict=True) for j in range(n)])
        token_ids = self._tensor([token_id for tokens in verified for token_id in tokens])
        logprobs = self.sampler.logprobs(logits[rows], token_ids, items)
        last = self._tensor([tokens[-1] for tokens in verified])
        positions = [
            item.sample_positions[count - 1] for item, count in zip(items, counts, strict=True)
        ]
        self._note_sampled(items, last, positions)
        self._expect_trim(items)
        return Sampled([], token_ids, logprobs, counts)

    def _expect_trim(self, items: list[ScheduledSequence]) -> None:
        """Blocks after the first sampled token may be given back, and other blocks may take their
        place: the device gets them again.
        """
        for item in items:
            if item.proposed_token_ids:
                num_kept = -(-item.sample_positions[0] // self.config.block_size)
                self._num_blocks[item.sequence.slot] = num_kept

    def _sample_at_once(
        self,
        items: list[ScheduledSequence],
        logits: torch.Tensor,
        places: list[int],
        verified: list[list[int]],
        firsts: list[int],
    ) -> None:
        """Sample all rows of the items at `places`, and keep what holds in `verified`.

        firsts: each item's first row of the logits.
        """
        rows = [(i, number) for i in places for number in range(len(items[i].sample_positions))]
        if not rows:
            return
        token_ids = self.sampler.sample(
            logits[self._tensor([firsts[i] + number for i, number in rows])],
            [items[i] for i, _ in rows],
            [number for _, number in rows],
        )
        holds = True
        for (i, number), token_id in zip(rows, token_ids.tolist(), strict=True):
            # A token holds if all proposals before it are right.
            proposals = items[i].proposed_token_ids
            if number == 0:
                holds = True
            elif holds:
                holds = verified[i][-1] == proposals[number - 1]
            if holds:
                verified[i].append(token_id)

    def _sample_in_rounds(
        self,
        items: list[ScheduledSequence],
        logits: torch.Tensor,
        places: list[int],
        verified: list[list[int]],
        firsts: list[int],
    ) -> None:
        """As `_sample_at_once`, for items whose sampling keeps a state, such as penalties.

        Each round samples one row of every item whose proposals are right so far. Then the CPU
        looks at the tokens: those behind a wrong proposal must not be counted.
        """
        going, number = places, 0
        while going:
            rows = self._tensor([firsts[i] + number for i in going])
            token_ids = self.sampler.sample(logits[rows], [items[i] for i in going], number)
            for i, token_id in zip(going, token_ids.tolist(), strict=True):
                verified[i].append(token_id)
            going = [
                i for i in going if verified[i] == list(items[i].proposed_token_ids[: number + 1])
            ]
            number += 1

    def _replay(self, graphs: DecodeGraphs, items: list[ScheduledSequence]) -> StepResult:
        """Run a step as a recorded graph: every sequence decodes the token that it sampled last."""
        # The longest context first. On an H200, attention over 256 contexts of 100 to 2000 tokens
        # took 241 µs in this order and 260 µs in any order: no long program is left for the end.
        starts = [item.start for item in items]
        order = sorted(range(len(items)), key=starts.__getitem__, reverse=True)
        slots = slots_of(items[place] for place in order)
        token_ids, hidden = graphs.replay(slots)
        logprobs = None
        if self.sampler.needs_edit(slots):
            # The graph samples by temperature alone. If a request needs more, sample its logits
            # again.
            logits = self.model.compute_logits(hidden)
            token_ids, logprobs = self.sampler(logits, [items[place] for place in order])
            self._state.set_last_token(self._tensor(slots), token_ids)
        return self._result(Sampled(order, token_ids, logprobs), [])

    def _can_replay_proposals(self, items: list[ScheduledSequence]) -> bool:
        """Whether a recording can run these items: decodes, some with proposals."""
        graphs = self.verifying
        if graphs is None or len(items) > graphs.sizes[-1]:
            return False
        counts = [len(item.proposed_token_ids) for item in items]
        return max(counts) <= graphs.num_proposals and all(
            item.sample_position is not None and item.num_new_tokens == count + 1
            for item, count in zip(items, counts, strict=True)
        )

    def _replay_proposals(self, items: list[ScheduledSequence]) -> StepResult:
        """As `_replay`, with proposals. Waits for the results: a graph cannot shorten them."""
        graphs = self.verifying
        assert graphs is not None
        slots, order = slots_of(items), list(range(len(items)))
        proposals = [list(item.proposed_token_ids) for item in items]
        padding = [graphs.num_proposals - len(tokens) for tokens in proposals]
        sampled, hidden = graphs.replay(
            slots,
            [[NO_PROPOSAL] * n + tokens for n, tokens in zip(padding, proposals, strict=True)],
        )
        if self.sampler.needs_edit(slots):
            # As in `_replay`. What the graph has noted is overwritten.
            starts = range(0, len(hidden), graphs.num_proposals + 1)
            rows = [
                row
                for start, n in zip(starts, padding, strict=True)
                for row in range(start + n, start + graphs.num_proposals + 1)
            ]
            logits = self.model.compute_logits(hidden[self._tensor(rows)])
            return self._result(replace(self._verify(items, logits), order=order), [])
        verified = []
        for row, n, tokens in zip(sampled.tolist(), padding, proposals, strict=True):
            verified.append(row[n : n + num_equal(tokens, row[n:]) + 1])
        self._expect_trim(items)
        token_ids = torch.tensor([token_id for tokens in verified for token_id in tokens])
        found = Sampled(order, token_ids, None, [len(tokens) for tokens in verified])
        return StepResult(found, token_ids, None, [])

    def _verify_step(
        self, slots: torch.Tensor, proposals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The step with proposals that a graph records.

        slots: [B] int64; proposals: [B, k] int64. Returns what the model samples in the place of
        each token [B, k + 1], and hidden states [B (k + 1), hidden_size].
        """
        state, is_padding = self._state, proposals == NO_PROPOSAL
        num_padding = is_padding.sum(1, keepdim=True)
        width = proposals.shape[1] + 1
        place = torch.arange(width, device=slots.device) - num_padding
        metadata = state.verify_metadata(
            slots, place, self.config.block_size, self.config.max_model_len
        )
        # The last known token stands in front of the proposals.
        token_ids = nn.functional.pad(proposals.clamp_min(0), (1, 0))
        token_ids = torch.where(place == 0, state.last_token[slots][:, None], token_ids)
        position = (state.position[slots][:, None] + place).clamp_min(0).flatten()
        hidden = self.model(token_ids.flatten(), position, self.kv_caches, metadata)
        of_tokens = slots[:, None].expand(-1, width).flatten()
        sampled = self.sampler.sample_by_temperature(
            self.model.compute_logits(hidden), of_tokens, position + 1
        ).view(-1, width)
        holds = is_padding | (sampled[:, :-1] == proposals)
        last = holds.long().cumprod(1).sum(1, keepdim=True)
        state.advance(slots, sampled.gather(1, last)[:, 0], (last - num_padding + 1)[:, 0])
        return sampled, hidden

    def _decode_step(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step that a graph records.

        slots: [B] int64. Returns token ids [B] and hidden states [B, hidden_size].
        """
        state = self._state
        metadata = state.decode_metadata(slots, self.config.block_size, self.config.max_model_len)
        position = state.position[slots]
        hidden = self.model(state.last_token[slots], position, self.kv_caches, metadata)
        token_ids = self.sampler.sample_by_temperature(
            self.model.compute_logits(hidden), slots, position + 1
        )
        state.advance(slots, token_ids)
        return token_ids, hidden

    def _capture_graphs(self, sizes: list[int]) -> DecodeGraphs:
        return self._capture(self._decode_step, sizes)

    def _capture_verifying(self, sizes: list[int]) -> DecodeGraphs | None:
        """Record steps with up to `num_speculative_tokens` proposals; None without speculation."""
        wanted = self.config.speculative_config
        if wanted is None or not wanted.num_speculative_tokens:
            return None
        return self._capture(self._verify_step, sizes, wanted.num_speculative_tokens)

    def _most_verified(self) -> int:
        """The most sequences that run while tokens are proposed."""
        wanted, most = self.config.speculative_config, self.config.max_num_seqs
        return most if wanted is None else min(most, wanted.disable_by_batch_size or most)

    @torch.inference_mode()
    def _capture(self, step: Callable, sizes: list[int], num_proposals: int = 0) -> DecodeGraphs:
        spare_slot = self.config.max_num_seqs
        try:
            return DecodeGraphs(step, sizes, spare_slot, self.device, num_proposals)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                "The decode step could not be recorded as a CUDA graph, perhaps because a kernel"
                " of your own waits for the GPU (.item(), .tolist()). Use enforce_eager=True."
                f" ({error})"
            ) from error

    @torch.inference_mode()
    def _capture_mixed_graphs(self, shapes: list[StepShape]) -> MixedGraphs | None:
        """Record steps with prompts, or None where a kernel of the user's cannot be recorded."""

        def step(
            token_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
        ) -> torch.Tensor:
            return self.model(token_ids, positions, self.kv_caches, metadata)

        if not self._can_record_prompts:
            return None
        try:
            return MixedGraphs(step, shapes, self._state, self.config.max_model_len)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning(
                "Steps with prompts could not be recorded as CUDA graphs, perhaps because a kernel"
                " of your own waits for the GPU (.item(), .tolist()). They run without: %s",
                error,
            )
            self._can_record_prompts = False
            return None

    def _step_shapes(self) -> list[StepShape]:
        return step_shapes(self.config.max_num_seqs, self.config.max_num_batched_tokens)

    def _note_sampled(
        self, items: list[ScheduledSequence], token_ids: torch.Tensor, positions: list[int]
    ) -> None:
        """Store on the device what the next decode needs: each newest token and its position."""
        slots = slots_of(items)
        on_device = self._tensor(slots)
        self._state.set_last_token(on_device, token_ids)
        self._state.position[on_device] = self._tensor(positions)
        self._is_ready[slots] = True

    def _result(self, sampled: Sampled, prompt_logprobs: list) -> StepResult:
        token_ids = sampled.token_ids
        if self.device.type == "cpu":
            return StepResult(sampled, token_ids, None, prompt_logprobs)
        # With pinned memory the copy waits in the GPU's queue, and the CPU does not wait.
        host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
        host.copy_(token_ids, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return StepResult(sampled, host, arrived, prompt_logprobs)

    def _write_new_blocks(self, items: list[ScheduledSequence]) -> None:
        new: list[tuple[int, int, int]] = []
        for item, slot in zip(items, slots_of(items), strict=True):
            seq = item.sequence
            known, total = self._num_blocks[slot], len(seq.block_table)
            if known < total:
                self._block_table[slot, known:total] = seq.block_table[known:]
                self._num_blocks[slot] = total
                new += [(slot, index, seq.block_table[index]) for index in range(known, total)]
        if new and self.graphs is not None:
            slots, indices, blocks = self._tensor(new).unbind(1)
            self._state.block_table[slots, indices] = blocks.int()

    def _tensor(self, values: list) -> torch.Tensor:
        return to_device(torch.tensor(values), self.device)

    def _build(self, items: list[ScheduledSequence], slots: list[int]) -> BatchInputs:
        """The inputs of a step, on the CPU. slots: of the items, in their order."""
        rows = [
            BatchRow(item.token_ids, item.start, item.sample_position is not None) for item in items
        ]
        return self.build_batch(rows, self._block_table[slots], self.config.block_size)

    def _forward(self, items: list[ScheduledSequence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model: hidden states [T, hidden_size], and the rows whose logits are needed."""
        slots = slots_of(items)
        inputs = self._build(items, slots)
        if self.mixed_graphs is not None and (shape := self.mixed_graphs.fitting(inputs.attention)):
            hidden = self.mixed_graphs.replay(shape, inputs, slots)
            return hidden, to_device(inputs.logits_indices, self.device)
        # A token that the CPU does not know yet is the last token of its slot, and the only token
        # of its row. Rows of one token come first, so row and token have the same index.
        pending = (inputs.token_ids == PENDING).nonzero()[:, 0].tolist()
        if self.device.type != "cpu":
            inputs = self._to_device(inputs)
        if pending:
            values = self._state.last_token[self._tensor([slots[row] for row in pending])]
            inputs.token_ids[self._tensor(pending)] = values
        hidden = self.model(inputs.token_ids, inputs.positions, self.kv_caches, inputs.attention)
        return hidden, inputs.logits_indices

    def _to_device(self, inputs: BatchInputs) -> BatchInputs:
        def move(obj: object) -> dict[str, Any]:
            tensors = {
                name: value for name, value in vars(obj).items() if isinstance(value, torch.Tensor)
            }
            return {name: to_device(tensor, self.device) for name, tensor in tensors.items()}

        return replace(
            inputs, attention=replace(inputs.attention, **move(inputs.attention)), **move(inputs)
        )

    def _prompt_logprobs(
        self, items: list[ScheduledSequence], hidden: torch.Tensor
    ) -> list[tuple[ScheduledSequence, TokenLogprobs]]:
        """The logprobs of prompt tokens, for each item that asked for them.

        Logits at position p are those of the token at p + 1, so a chunk yields the logprobs of
        positions that are shifted by one.
        """
        found, row = [], 0
        for item in items:
            seq = item.sequence
            end = min(item.end, seq.num_prompt_tokens - 1)
            if seq.params.prompt_logprobs is not None and item.start < end:
                targets = torch.tensor(seq.token_ids[item.start + 1 : end + 1], device=self.device)
                rows = hidden[row : row + end - item.start]
                parts = [
                    token_logprobs(self.model.compute_logits(part), ids, seq.params.prompt_logprobs)
                    for part, ids in zip(
                        rows.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True
                    )
                ]
                found += [
                    (replace(item, start=item.start + i * LOGIT_ROWS), part)
                    for i, part in enumerate(parts)
                ]
            row += item.num_new_tokens
        return found

    # --- KV cache ---------------------------------------------------------------------------------

    def _allocate_kv_caches(self, num_blocks: int, kind: str | None = None) -> list[KVCache]:
        """Allocate caches of zeros, so that every entry is finite.

        Kernels may load rows beyond a context, and mask them afterwards.
        """
        config, kind = self.model_config, kind or self.config.kv_cache_dtype
        shape = (num_blocks, self.num_kv_heads, self.config.block_size, config.head_dim)

        if kind == "auto" and self.device.type == "cpu":
            pages = untouched_zeros((config.num_hidden_layers, 2, *shape), self.dtype)
            return [(k, v) for k, v in pages]

        def cache(layer: int, which: int) -> Cache:
            if kind == "auto":
                return torch.zeros(shape, dtype=self.dtype, device=self.device)
            made = QuantizedCache.zeros(shape, kind, self.device)
            if self._kv_scales is not None:
                made.scales.copy_(self._kv_scales[layer, which])
            return made

        return [(cache(layer, 0), cache(layer, 1)) for layer in range(config.num_hidden_layers)]

    @torch.inference_mode()
    def _measure_kv_scales(self) -> torch.Tensor:
        """Scales of fp8 for each layer, K and V, and head: [num_hidden_layers, 2, num_kv_heads].

        The largest number that random tokens give a head comes to lie between a quarter and half of
        e4m3's largest, so others may be twice as large. The scales are powers of two: dividing by
        them is exact, and rounding elsewhere, such as in the sums of ranks, cannot change them.
        """
        count = min(SCALE_TOKENS, self.config.max_model_len, self.config.max_num_batched_tokens)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(self.model_config.vocab_size, (count,), generator=generator)
        size = self.config.block_size
        table = np.arange(-(-count // size), dtype=np.int32)[None]
        inputs = self.build_batch([BatchRow(drawn.tolist(), 0, True)], table, size)
        if self.device.type != "cpu":
            inputs = self._to_device(inputs)
        caches: Any = self._allocate_kv_caches(table.size, "auto")
        self.model(inputs.token_ids, inputs.positions, caches, inputs.attention)
        largest = torch.stack(
            [torch.stack([x.float().abs().amax(dim=(0, 2, 3)) for x in pair]) for pair in caches]
        )
        # A head without a finite number keeps the scale 1.
        usable = largest.isfinite() & (largest > 0)
        return torch.where(usable, 2.0 * largest / FP8_MAX, 1.0).log2().ceil().exp2()

    def _cpu_cache_bytes(self) -> int:
        on_cpu = self.device.type == "cpu"
        num_blocks = (self.config.num_kv_blocks or self._default_num_kv_blocks()) if on_cpu else 0
        return num_blocks * self.config.block_size * self.kv_bytes_per_token

    def _default_num_kv_blocks(self) -> int:
        block_bytes = self.kv_bytes_per_token * self.config.block_size
        blocks_per_seq = -(-self.config.max_model_len // self.config.block_size)
        if self.device.type == "cpu":
            return max(CPU_KV_CACHE_BYTES // block_bytes, blocks_per_seq)
        free = self._measure_free_memory()
        num_blocks = int(free) // block_bytes
        if num_blocks < blocks_per_seq:
            raise OutOfMemoryError(
                f"gpu_memory_utilization={self.config.gpu_memory_utilization} leaves"
                f" {max(free, 0) / 2**30:.2f} GiB for the KV cache, less than one sequence of"
                f" max_model_len={self.config.max_model_len} needs"
                f" ({blocks_per_seq * block_bytes / 2**30:.2f} GiB). Raise gpu_memory_utilization"
                " or lower max_model_len."
            )
        return num_blocks

    @torch.inference_mode()
    def _measure_free_memory(self) -> float:
        """Bytes left for the cache, measured after the largest step and one recorded graph of each
        kind.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._run_largest_step()
        torch.cuda.synchronize(self.device)
        activations = torch.cuda.max_memory_allocated(self.device) - before
        recorded = 0
        if not self.config.enforce_eager:
            # All sizes share one memory pool, so the largest graph takes as much as all of them
            # (on an H200 104 MiB, for one size or nineteen).
            self.kv_caches = self._allocate_kv_caches(1)
            largest = max(self._step_shapes(), key=lambda shape: shape.num_rows)
            kinds = (
                self._capture_graphs([self.config.max_num_seqs]),
                self._capture_verifying([self._most_verified()]),
                self._capture_mixed_graphs([largest]),
            )
            recorded = sum(graphs.memory_bytes for graphs in kinds if graphs is not None)
            del kinds
            self.kv_caches = []
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return total * self.config.gpu_memory_utilization - (total - free) - activations - recorded

    def _run_largest_step(self) -> None:
        """Run a full token budget over as many sequences as may run."""
        budget = self.config.max_num_batched_tokens
        num_seqs = min(self.config.max_num_seqs, budget)
        lengths = [len(part) for part in np.array_split(np.arange(budget), num_seqs)]
        lengths = sorted((min(n, self.config.max_model_len) for n in lengths), key=lambda n: n > 1)
        logits = self._run_rows([(0, n) for n in lengths], self._allocate_kv_caches(1))
        ones = torch.ones(num_seqs, device=self.device)
        zeros = torch.zeros(num_seqs, dtype=torch.int64, device=self.device)
        self.sampler.kernels.sample(logits.float(), ones, None, ones, None, zeros, zeros)

    def _run_rows(self, rows: list[Row], caches: list[KVCache]) -> torch.Tensor:
        """Run the model on token 0, for its effects on the machine. Returns logits, one row each.

        The step writes nothing to the cache, and reads one block as all of a context.
        """
        table = np.zeros(
            (len(rows), -(-max(start + n for start, n in rows) // self.config.block_size)), np.int32
        )
        batch = [BatchRow([0] * n, start, True) for start, n in rows]
        inputs = self._to_device(self.build_batch(batch, table, self.config.block_size))
        inputs.attention.slot_mapping.fill_(-1)
        hidden = self.model(inputs.token_ids, inputs.positions, caches, inputs.attention)
        return self.model.compute_logits(hidden[inputs.logits_indices])

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Have everything compiled and loaded that steps may need.

        For compiled kernels only: plain torch has nothing to compile, and its attention over a
        whole prompt takes memory that nobody has asked for yet.
        """
        config = self.config
        sizes = (config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len)
        steps = kinds_of_steps(*sizes)
        # The largest step once more, last: it leaves its memory to the first prompts.
        with tqdm(total=len(steps) + 2, desc="Kernels", leave=False) as progress:
            for rows in steps:
                logits = self._run_rows(rows, self.kv_caches)
                progress.update()
            self.sampler.warm_up(logits[:1])
            progress.update()
            self._run_largest_step()
            progress.update()
        torch.cuda.synchronize(self.device)
