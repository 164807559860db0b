"""Build the tensors of one step: all scheduled tokens of all sequences, end to end.

Taught in notebooks/07_engine.ipynb.

No padding: sequence i owns the tokens from ``query_start_loc[i]`` to ``query_start_loc[i + 1]``.
Sequences with one new token come first (`num_decodes` of them), so that decode and prefill
attention each get a contiguous part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minivllm.layers.attention import AttentionMetadata


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device without waiting.

    The copy goes through pinned memory: a copy from pageable memory first waits for all queued work
    of the GPU.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class BatchInputs:
    """The inputs of the model's forward pass, and the rows of its output that need logits."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    attention: AttentionMetadata
    #: Rows of the hidden states whose logits are needed.
    logits_indices: torch.Tensor  # [R] int64


@dataclass(frozen=True)
class BatchRow:
    """One sequence's part of a step: its new tokens, and the position of the first of them."""

    token_ids: Sequence[int]
    start: int
    #: Whether the last of these tokens gives a logit row to sample from.
    samples: bool


def build_batch(rows: Sequence[BatchRow], block_table: np.ndarray, block_size: int) -> BatchInputs:
    """Flatten the rows of a step into tensors on the CPU.

    rows: B rows, those with one token first. block_table: [B, max_blocks] int32. The tensors that
    are returned lie on the CPU; the runner copies them to the device. Learners write this function
    in chapter 07 and pass it to ``LLM(build_batch=...)``.
    """
    query_lens = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    query_start_loc = np.concatenate(([0], query_lens.cumsum()))

    token_ids = np.fromiter(
        (t for row in rows for t in row.token_ids), np.int64, count=query_start_loc[-1]
    )
    row_of_token = np.repeat(np.arange(len(rows)), query_lens)
    positions = np.arange(len(token_ids)) - query_start_loc[row_of_token] + starts[row_of_token]
    slot_mapping = (
        block_table[row_of_token, positions // block_size] * np.int64(block_size)
        + positions % block_size
    )
    seq_lens = starts + query_lens
    num_decodes = int((query_lens == 1).sum())
    samples = np.array([row.samples for row in rows], dtype=bool)

    used_blocks = -(-int(seq_lens.max()) // block_size)
    attention = AttentionMetadata(
        torch.from_numpy(query_start_loc.astype(np.int32)),
        torch.from_numpy(seq_lens.astype(np.int32)),
        torch.from_numpy(np.ascontiguousarray(block_table[:, :used_blocks])),
        torch.from_numpy(slot_mapping),
        num_decodes=num_decodes,
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        max_decode_seq_len=int(seq_lens[:num_decodes].max(initial=0)),
    )
    logits_indices = torch.from_numpy((query_start_loc[1:] - 1)[samples])
    return BatchInputs(
        torch.from_numpy(token_ids), torch.from_numpy(positions), attention, logits_indices
    )
