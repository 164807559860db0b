"""CUDA graphs of steps with prompts in them: chunks of prompts, alone or beside decodes.

A server computes a new prompt in nearly every step. Launched one by one from Python, the kernels of
such a step take longer to start than to run: on an H200, 20 to 40 ms for a step of which the GPU
needs 5 (see bench/recorded/steps-h200.json). So the model's part of these steps is recorded, too,
for a few shapes.

A shape has D rows for decodes, and T rows for the tokens of at most C chunks. A step takes the
smallest shape that it fits into; a step that fits into none launches its kernels one by one. Unused
rows write their K and V nowhere (slot_mapping -1), and belong to no sequence or to one with a
context of 0 tokens, so they cannot change the other rows:

    rows     0 … decodes      … D        … D + tokens      … D + T
             decodes, unused    tokens of chunks, unused

The CPU sends all that changes from step to step as one array. Block tables are on the GPU already
(`DecodeState`). Sampling is not recorded: which rows are sampled differs from step to step. Taught
in notebooks/08_cuda_graphs.ipynb.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from minivllm.engine.batch import BatchInputs
from minivllm.engine.cuda_graphs import DecodeState, recording
from minivllm.engine.sequence import PENDING
from minivllm.layers.attention import AttentionMetadata

#: With longer contexts, attention to a chunk takes the GPU long enough to hide the launches, and
#: its kernel has larger tiles.
MAX_CONTEXT = 8192
#: Tokens of chunks to record. Larger steps keep the GPU busy without a graph.
CHUNK_TOKENS = (128, 256, 384, 512, 768, 1024, 1536, 2048)
DECODES = (32, 128, 256, 512, 1024)


#: (token ids [R], positions [R], metadata) -> hidden states [R, hidden_size]
Step = Callable[[torch.Tensor, torch.Tensor, AttentionMetadata], torch.Tensor]


@dataclass(frozen=True, order=True)
class StepShape:
    """How many rows a recorded step has."""

    num_decodes: int
    num_tokens: int  # of chunks

    @property
    def num_chunks(self) -> int:
        """How many chunks there may be. Each costs programs that end at once where it is unused."""
        return max(4, self.num_tokens // 128)

    @property
    def num_rows(self) -> int:
        return self.num_decodes + self.num_tokens

    @property
    def num_seqs(self) -> int:
        return self.num_decodes + self.num_chunks

    @property
    def sections(self) -> list[int]:
        """Sizes of the parts of the array that the CPU sends: see `RecordedInputs`."""
        return (
            [self.num_rows, self.num_rows, self.num_rows]
            + [self.num_seqs] * 2
            + [self.num_seqs + 1]
        )


def step_shapes(max_num_seqs: int, max_num_batched_tokens: int) -> list[StepShape]:
    """The shapes to record. With many decodes, a few tokens more or less make no difference."""
    decodes = [n for n in DECODES if n < max_num_seqs] + [max_num_seqs]
    largest = min(max_num_batched_tokens, CHUNK_TOKENS[-1])
    tokens = [n for n in CHUNK_TOKENS if n < largest] + [largest]
    return [StepShape(rows, n) for rows in decodes for n in tokens if 2 * n >= rows or n == largest]


@dataclass(frozen=True)
class RecordedInputs:
    """What a recorded step reads. R rows and S sequences: decodes first, then chunks."""

    token_ids: torch.Tensor  # [R] int64; PENDING: the token that the slot sampled last
    positions: torch.Tensor  # [R] int64
    slot_mapping: torch.Tensor  # [R] int64
    slots: torch.Tensor  # [S] int64
    seq_lens: torch.Tensor  # [S] int64
    query_start_loc: torch.Tensor  # [S + 1] int64

    def clear(self, shape: StepShape, spare_slot: int) -> None:
        """Write a step without a sequence. Works on a CPU only."""
        self.token_ids.zero_()
        self.positions.zero_()
        self.slot_mapping.fill_(-1)
        self.slots.fill_(spare_slot)
        self.seq_lens.zero_()
        torch.arange(shape.num_seqs + 1, out=self.query_start_loc)
        self.query_start_loc.clamp_(max=shape.num_decodes)

    def write(self, shape: StepShape, inputs: BatchInputs, slots: Sequence[int]) -> None:
        """Write a step, with the decodes at the start and the chunks behind all rows of decodes.

        inputs: on the CPU. slots: of its sequences, in its order.
        """
        metadata, behind = inputs.attention, shape.num_decodes
        decodes = metadata.num_decodes
        for to, values in (
            (self.token_ids, inputs.token_ids),
            (self.positions, inputs.positions),
            (self.slot_mapping, metadata.slot_mapping),
            (self.slots, torch.tensor(slots)),
            (self.seq_lens, metadata.seq_lens),
        ):
            to[:decodes] = values[:decodes]
            to[behind : behind + len(values) - decodes] = values[decodes:]
        starts = metadata.query_start_loc[decodes:] + (behind - decodes)
        self.query_start_loc[behind : behind + len(starts)] = starts
        self.query_start_loc[behind + len(starts) :] = starts[-1]


class MixedGraphs:
    """Recorded steps.

    step: the function to record, from (token ids [R], positions [R], `AttentionMetadata`), all on
    the GPU, to hidden states [R, hidden_size]. max_model_len bounds the contexts.
    """

    def __init__(
        self,
        step: Step,
        shapes: Sequence[StepShape],
        state: DecodeState,
        max_model_len: int,
    ) -> None:
        self.shapes = sorted(shapes)
        self._state, self._max_model_len = state, max_model_len
        self._spare_slot = len(state.position) - 1
        device = state.position.device
        longest = max(sum(shape.sections) for shape in shapes)
        self._inputs = torch.zeros(longest, dtype=torch.int64, device=device)
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        torch.cuda.empty_cache()  # a recording does it, too, which would hide what it takes
        before = torch.cuda.mem_get_info(device)[0]
        #: Hidden states [rows of the largest shape, hidden_size]: the result of every graph.
        self._hidden: torch.Tensor | None = None
        try:
            with recording() as record:
                in_order = sorted(shapes, key=lambda shape: shape.num_rows, reverse=True)
                for shape in tqdm(in_order, desc="CUDA graphs of prompts", leave=False):
                    self._send(shape, None, [])
                    # `step` is not kept: it is its runner's, and the runner keeps these graphs.
                    self._graphs[shape], _ = record(functools.partial(self._run, step, shape))
        except BaseException:
            self.release()
            raise
        torch.cuda.synchronize(device)
        # GPU memory that the recordings take.
        self.memory_bytes = max(0, before - torch.cuda.mem_get_info(device)[0])

    def release(self) -> None:
        """Destroy the recordings."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def fitting(self, metadata: AttentionMetadata) -> StepShape | None:
        """The smallest recorded shape that a step fits into. metadata: on the CPU."""
        decodes, num_seqs = metadata.num_decodes, len(metadata.seq_lens)
        if num_seqs > decodes and int(metadata.seq_lens[decodes:].max()) > MAX_CONTEXT:
            return None
        tokens, chunks = len(metadata.slot_mapping) - decodes, num_seqs - decodes
        fits = (
            shape
            for shape in self.shapes
            if decodes <= shape.num_decodes
            and tokens <= shape.num_tokens
            and chunks <= shape.num_chunks
        )
        return min(fits, key=lambda shape: shape.num_rows, default=None)

    def replay(self, shape: StepShape, inputs: BatchInputs, slots: Sequence[int]) -> torch.Tensor:
        """Run a step -> hidden states [T, hidden_size], which the next replay may overwrite.

        inputs: on the CPU, T tokens. slots: of its sequences, in its order. Their block tables are
        those of the `DecodeState`.
        """
        assert self._hidden is not None
        self._send(shape, inputs, slots)
        self._graphs[shape].replay()
        decodes, num_rows = inputs.attention.num_decodes, len(inputs.token_ids)
        behind = shape.num_decodes
        chunks = self._hidden[behind : behind + num_rows - decodes]
        return torch.cat((self._hidden[:decodes], chunks)) if decodes else chunks

    def _send(self, shape: StepShape, inputs: BatchInputs | None, slots: Sequence[int]) -> None:
        """Bring a step to the GPU; None: a step without a sequence."""
        # New for each step: the copy of the last one may not have been made yet. Pinned memory: a
        # copy from pageable memory first waits for all queued work of the GPU.
        host = torch.empty(sum(shape.sections), dtype=torch.int64, pin_memory=True)
        recorded = RecordedInputs(*host.split(shape.sections))
        recorded.clear(shape, self._spare_slot)
        if inputs is not None:
            recorded.write(shape, inputs, slots)
        self._inputs[: len(host)].copy_(host, non_blocking=True)

    def _run(self, step: Step, shape: StepShape) -> None:
        """The step that a graph records."""
        inputs = RecordedInputs(*self._inputs[: sum(shape.sections)].split(shape.sections))
        metadata = AttentionMetadata(
            query_start_loc=inputs.query_start_loc.int(),
            seq_lens=inputs.seq_lens.int(),
            block_table=self._state.block_table[inputs.slots],
            slot_mapping=inputs.slot_mapping,
            num_decodes=shape.num_decodes,
            max_query_len=shape.num_tokens,
            max_seq_len=min(self._max_model_len, MAX_CONTEXT),
            max_decode_seq_len=self._max_model_len,
        )
        token_ids, decodes = inputs.token_ids.clone(), shape.num_decodes
        newest = self._state.last_token[inputs.slots[:decodes]]
        token_ids[:decodes] = torch.where(
            token_ids[:decodes] == PENDING, newest, token_ids[:decodes]
        )
        hidden = step(token_ids, inputs.positions, metadata)
        if self._hidden is None:  # the first shape is the largest
            self._hidden = torch.empty_like(hidden)
        self._hidden[: shape.num_rows].copy_(hidden)
