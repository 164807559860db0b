"""Steps of every kind, run once before the first request, so that no request waits for a compiler.

Triton compiles a kernel when a launch first needs it, once for each combination of the sizes that
are constants in it. cuBLAS chooses a product's program by the number of rows, and CUDA loads each
program when it is first launched. Recording the decode graphs brings most of this about. What is
left are prompts: how the launchers cut them up depends on the longest query and the longest context
of a step (kernels/flash_attention.py: `_tiles`). So the steps here double these lengths, and pass
every border between two ways, wherever a launcher may have put it.
"""

from __future__ import annotations

#: A row of a step: (tokens that are computed before, new tokens).
Row = tuple[int, int]


def kinds_of_steps(max_num_seqs: int, max_num_batched_tokens: int, max_len: int) -> list[list[Row]]:
    """Steps, as rows with those of one token first, that need all that later steps may need.

    A prompt of 2, 4, 8, ... tokens, alone and beside one that decodes; its end behind a context as
    long as it may be; decodes without a graph, few and many.
    """
    longest = min(max_num_batched_tokens, max_len)
    lengths = [2**power for power in range(1, longest.bit_length()) if 2**power < longest]
    steps: list[list[Row]] = [[(0, length)] for length in (*lengths, longest) if length > 1]
    if max_num_seqs > 1:
        steps += [[(0, 1), (0, length)] for length in lengths if length < max_num_batched_tokens]
    # The same lengths behind each context would be many steps; two stand for short and long.
    for length in sorted({min(16, longest), min(1024, longest)} - {1}):
        starts = [2**power for power in range(8, max_len.bit_length())] + [max_len - length]
        steps += [[(start, length)] for start in starts if 0 < start <= max_len - length]
    most = min(max_num_seqs, max_num_batched_tokens)
    few = min(16, most)
    steps += [[(max_len - 1, 1)] * count for count in sorted({1, few})]
    return [*steps, *([(0, 1)] * count for count in sorted({1, few, most}))]
