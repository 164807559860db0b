"""Owns model, KV cache and per-slot state; turns a planned step into tokens. Taught in
notebooks/07_engine.ipynb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minivllm.config import ModelConfig, ResolvedConfig
from minivllm.engine.batch import BatchInputs, BatchRow, build_batch
from minivllm.engine.cuda_graphs import DecodeGraphs, DecodeState, graph_sizes
from minivllm.engine.memory import check_memory, typed_start_errors
from minivllm.engine.sampler import Sampler, TokenLogprobs, to_device, token_logprobs
from minivllm.engine.sequence import PENDING, ScheduledBatch, ScheduledSequence
from minivllm.errors import ConfigError, OutOfMemoryError
from minivllm.kernels import Kernels
from minivllm.layers.attention import KVCache
from minivllm.models.loader import LoadOptions, load_model
from minivllm.parallel.group import SINGLE, TensorParallelGroup

# on a CPU the cache has a modest size, never a share of the machine's memory
CPU_KV_CACHE_BYTES = 256 << 20
#: Rows of logits that prompt_logprobs holds at a time: a whole prompt of a large vocabulary would
#: be gigabytes.
LOGIT_ROWS = 256


@dataclass(frozen=True)
class StepResult:
    """What a step computes. Token ids [R] belong to `batch.sampled`, in order."""

    token_ids: torch.Tensor  # on the CPU; from a GPU they have arrived when the event has passed
    arrived: torch.cuda.Event | None
    logprobs: TokenLogprobs | None
    #: (item, its logprobs at positions item.start + 1 ... ) for each item that asked.
    prompt_logprobs: list[tuple[ScheduledSequence, TokenLogprobs]]

    def wait(self) -> list[int]:
        """The token ids as integers, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.token_ids.tolist()


class ModelRunner:
    """config: its num_kv_blocks may be 0, which means as many as fit."""

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
        self.model_config, self.config, self.build_batch, self.group = (
            model_config,
            config,
            build_batch,
            group,
        )
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        self.num_kv_heads = len(group.part(model_config.num_key_value_heads))  # this rank's
        self.graphs: DecodeGraphs | None = None
        self.kv_caches: list[KVCache] = []
        with self._released_on_failure(), typed_start_errors(self.device.type):
            check_memory(model_config, config, group.size, self._cpu_cache_bytes())
            options = LoadOptions(
                dtype=self.dtype,
                device=self.device,
                max_position=config.max_model_len,
                load_format=config.load_format,
                seed=config.seed,
                model_cls=model_cls,
            )
            self.model = load_model(path, model_config, kernels, options, group)
            num_slots, max_blocks = (
                config.max_num_seqs,
                -(-config.max_model_len // config.block_size),
            )
            #: Per slot: block ids, how many of them have been written (a step writes only the new
            #: ones), and whether the device's state of the slot is that of the sequence in it.
            self._block_table = np.zeros((num_slots, max_blocks), np.int32)
            self._num_blocks = np.zeros(num_slots, np.int64)
            self._is_ready = np.zeros(num_slots, bool)
            self._state = DecodeState.empty(num_slots, max_blocks, self.device)
            self.sampler = Sampler(
                config.max_num_seqs, model_config.vocab_size, kernels, self.device
            )
            self.num_kv_blocks = min(
                group.exchange(config.num_kv_blocks or self._default_num_kv_blocks())
            )
            self.kv_caches = self._allocate_kv_caches(self.num_kv_blocks)
            self.graphs = (
                None
                if config.enforce_eager
                else self._capture_graphs(graph_sizes(config.max_num_seqs))
            )

    @contextmanager
    def _released_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release_graphs(self) -> None:
        """Destroy what was recorded; steps are run kernel by kernel from here on."""
        graphs, self.graphs = self.graphs, None
        if graphs is not None:
            graphs.release()

    def release(self) -> None:
        """Let go of graphs, caches and model; nothing can be run any more. May be called twice."""
        self.release_graphs()
        self.kv_caches, self.model = [], None

    def forget_sequences(self) -> None:
        """No slot is anybody's. Those who get one next are admitted, and bring what is to be known
        of them.
        """
        self._num_blocks[:] = 0
        self._is_ready[:] = False

    @property
    def kv_bytes_per_token(self) -> int:
        """Of this rank's cache, over all layers."""
        config = self.model_config
        return (
            2 * config.num_hidden_layers * self.num_kv_heads * config.head_dim * self.dtype.itemsize
        )

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Run one step. Sorts `batch.items` so that those with a single token come first."""
        batch.items.sort(key=lambda item: item.num_new_tokens > 1)
        for seq in batch.admitted:
            self._num_blocks[seq.slot] = 0
            self._is_ready[seq.slot] = False
        self.sampler.admit(batch.admitted)
        self._write_new_blocks(batch.items)
        if (
            self.graphs is not None
            and self._is_ready[[item.sequence.slot for item in batch.items]].all()
        ):
            # The longest first: on an H200 attention over 256 contexts of 100 to 2000 tokens took
            # 241 µs so, in any order 260, because no long program is left for the end. Results are
            # those of `batch.sampled` as it is now.
            batch.items.sort(key=lambda item: item.start, reverse=True)
            return self._replay(batch.items, [item.sequence.slot for item in batch.items])
        inputs = self._prepare(batch.items)
        hidden = self.model(inputs.token_ids, inputs.positions, self.kv_caches, inputs.attention)
        sampled, logprobs = batch.sampled, None
        token_ids = inputs.token_ids[:0]
        if sampled:
            logits = self.model.compute_logits(hidden[inputs.logits_indices])
            token_ids, logprobs = self.sampler(logits, sampled)
            self._note_sampled(sampled, token_ids)
        return self._result(token_ids, logprobs, self._prompt_logprobs(batch.items, hidden))

    def _replay(self, items: list[ScheduledSequence], slots: list[int]) -> StepResult:
        """A step in which every sequence decodes the token that it sampled last: as a recorded
        graph.
        """
        token_ids, hidden = self.graphs.replay(slots)
        logprobs = None
        if self.sampler.needs_edit(slots):
            # The graph samples by temperature alone; where a request asks for more, sample its
            # logits again.
            token_ids, logprobs = self.sampler(self.model.compute_logits(hidden), items)
            self._state.set_last_token(self._tensor(slots), token_ids)
        return self._result(token_ids, logprobs, [])

    def _decode_step(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a graph records. slots [B] int64 -> token ids [B], hidden states [B,
        hidden_size].
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

    @torch.inference_mode()
    def _capture_graphs(self, sizes: list[int]) -> DecodeGraphs:
        try:
            return DecodeGraphs(self._decode_step, sizes, self.config.max_num_seqs, self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                "The decode step could not be recorded as a CUDA graph, perhaps because a kernel"
                " of your own waits for the GPU (.item(), .tolist()). Use enforce_eager=True."
                f" ({error})"
            ) from error

    def _note_sampled(self, sampled: list[ScheduledSequence], token_ids: torch.Tensor) -> None:
        """Keep on the device what the next decode of these sequences needs."""
        slots = [item.sequence.slot for item in sampled]
        on_device = self._tensor(slots)
        self._state.set_last_token(on_device, token_ids)
        self._state.position[on_device] = self._tensor([item.end for item in sampled])
        self._is_ready[slots] = True

    def _result(
        self, token_ids: torch.Tensor, logprobs: TokenLogprobs | None, prompt_logprobs: list
    ) -> StepResult:
        if self.device.type == "cpu":
            return StepResult(token_ids, None, logprobs, prompt_logprobs)
        # Pinned memory, so that the copy waits in the GPU's queue and not here.
        host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
        host.copy_(token_ids, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return StepResult(host, arrived, logprobs, prompt_logprobs)

    def _write_new_blocks(self, items: list[ScheduledSequence]) -> None:
        new: list[tuple[int, int, int]] = []
        for item in items:
            seq, slot = item.sequence, item.sequence.slot
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

    def _prepare(self, items: list[ScheduledSequence]) -> BatchInputs:
        rows = [
            BatchRow(i.sequence.token_ids[i.start : i.end], i.start, i.sample_position is not None)
            for i in items
        ]
        slots = [item.sequence.slot for item in items]
        inputs = self.build_batch(rows, self._block_table[slots], self.config.block_size)
        if self.device.type != "cpu":
            inputs = self._to_device(inputs)
        # A token that is not known on the CPU yet is the last one of its slot, alone in its row,
        # and the rows of one token come first: row and token have the same index.
        pending = [row for row, item in enumerate(items) if rows[row].token_ids[-1] == PENDING]
        if pending:
            values = self._state.last_token[self._tensor([slots[row] for row in pending])]
            inputs.token_ids[self._tensor(pending)] = values
        return inputs

    def _to_device(self, inputs: BatchInputs) -> BatchInputs:
        def move(obj: object) -> dict[str, torch.Tensor]:
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
        """Logits at position p speak of the token at p + 1, so a chunk covers the prompt's tokens
        one further on.
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

    def _allocate_kv_caches(self, num_blocks: int) -> list[KVCache]:
        """Zeroed once, so that every entry is finite: kernels may load rows past a context and mask
        them afterwards.
        """
        config = self.model_config
        shape = (num_blocks, self.num_kv_heads, self.config.block_size, config.head_dim)

        def cache() -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        return [(cache(), cache()) for _ in range(config.num_hidden_layers)]

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
                f" ({blocks_per_seq * block_bytes / 2**30:.2f} GiB). Raise the first or lower the"
                " second."
            )
        return num_blocks

    @torch.inference_mode()
    def _measure_free_memory(self) -> float:
        """Bytes left for the cache after the largest step that the budget allows and a graph have
        shown their peaks.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._run_largest_step()
        torch.cuda.synchronize(self.device)
        activations = torch.cuda.max_memory_allocated(self.device) - before
        recorded = 0
        if not self.config.enforce_eager:
            # All sizes share one pool: the largest takes what all take (on an H200 104 MiB, one
            # size or nineteen).
            self.kv_caches = self._allocate_kv_caches(1)
            recorded = self._capture_graphs([self.config.max_num_seqs]).memory_bytes
            self.kv_caches = []
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return total * self.config.gpu_memory_utilization - (total - free) - activations - recorded

    def _run_largest_step(self) -> None:
        """A full token budget over as many sequences as may run, writing nowhere and reading one
        block.
        """
        budget, size = self.config.max_num_batched_tokens, self.config.block_size
        num_seqs = min(self.config.max_num_seqs, budget)
        lengths = [len(part) for part in np.array_split(np.arange(budget), num_seqs)]
        lengths = sorted((min(n, self.config.max_model_len) for n in lengths), key=lambda n: n > 1)
        rows = [BatchRow([0] * n, 0, True) for n in lengths]
        table = np.zeros((num_seqs, -(-max(lengths) // size)), np.int32)
        inputs = self._to_device(self.build_batch(rows, table, size))
        inputs.attention.slot_mapping.fill_(-1)
        caches = self._allocate_kv_caches(1)
        hidden = self.model(inputs.token_ids, inputs.positions, caches, inputs.attention)
        logits = self.model.compute_logits(hidden[inputs.logits_indices])
        ones = torch.ones(num_seqs, device=self.device)
        zeros = torch.zeros(num_seqs, dtype=torch.int64, device=self.device)
        self.sampler.kernels.sample(logits.float(), ones, None, ones, None, zeros, zeros)
