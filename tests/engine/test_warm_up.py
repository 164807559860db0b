"""What start-up runs once: every way in which a launcher may cut up a later step."""

import random

import pytest

from minivllm.engine.warm_up import kinds_of_steps
from minivllm.kernels.flash_attention import _tiles


def _ways(rows: list[tuple[int, int]]) -> tuple[int, int, int, int]:
    longest = max(length for _, length in rows)
    return _tiles(256, longest, max(start + length for start, length in rows))


@pytest.mark.parametrize(("budget", "max_len"), [(8192, 40960), (512, 16384), (64, 300), (8, 8)])
def test_every_tile_of_a_prompt_is_compiled(budget: int, max_len: int) -> None:
    warmed = {_ways(rows) for rows in kinds_of_steps(256, budget, max_len) if rows[-1][1] > 1}
    rng = random.Random(0)
    for _ in range(2000):
        length = rng.randint(2, min(budget, max_len))
        start = rng.choice((0, rng.randint(0, max_len - length)))
        assert _ways([(start, length)]) in warmed, (start, length)


@pytest.mark.parametrize("sizes", [(256, 8192, 40960), (1, 16, 64), (4, 3, 9), (2, 1, 4)])
def test_no_step_exceeds_what_the_engine_may_run(sizes: tuple[int, int, int]) -> None:
    max_num_seqs, budget, max_len = sizes
    steps = kinds_of_steps(*sizes)
    assert steps
    for rows in steps:
        lengths = [length for _, length in rows]
        assert len(rows) <= max_num_seqs
        assert sum(lengths) <= budget
        assert all(start + length <= max_len for start, length in rows)
        # As `build_batch` has them: rows of one token first.
        assert lengths == sorted(lengths, key=lambda length: length > 1)
