"""The tiny models of chapter 13: what is in the cache decides, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest

from minivllm.course.sim.drafts import CachedModel, picker


def test_a_row_depends_on_all_tokens_before_it_and_on_no_call() -> None:
    at_once, one_by_one = CachedModel(7), CachedModel(7)
    rows = at_once.compute([3, 1, 4, 1])
    assert rows == [one_by_one.compute([token])[0] for token in (3, 1, 4, 1)]
    for other in ([2, 1, 4, 1], [3, 4, 1, 1], [1, 4, 1]):
        assert CachedModel(7).compute(other)[-1] != rows[-1]
    assert CachedModel(8).compute([3, 1, 4, 1])[-1] != rows[-1]


def test_what_is_taken_back_leaves_no_trace() -> None:
    model = CachedModel(7)
    model.compute([3, 1, 9, 9])
    model.rewind(2)
    assert (model.cache, model.num_computed) == ([3, 1], 2)
    assert model.compute([4]) == CachedModel(7).compute([3, 1, 4])[-1:]
    model.cache.clear()
    assert model.num_computed == 3
    with pytest.raises(ValueError, match="cannot keep 4"):
        model.rewind(4)


def test_a_draft_is_its_target_with_noise() -> None:
    rows = [CachedModel(7, noise).compute(range(12))[-1] for noise in (0.0, 0.0, 0.1, 2.0)]
    assert rows[0] == rows[1]
    near, far = (sum(abs(a - b) for a, b in zip(rows[0], row, strict=True)) for row in rows[2:])
    assert 0 < near < far


def test_a_pick_is_a_function_of_logits_seed_and_position() -> None:
    logits = [0.0, 1.0, 2.0, -30.0]
    assert [picker(1, 0)(logits, position) for position in range(9)] == [2] * 9
    picks = [picker(1, 1.0)(logits, position) for position in range(4000)]
    assert picks == [picker(1, 1.0)(logits, position) for position in range(4000)]
    assert picks != [picker(2, 1.0)(logits, position) for position in range(4000)]
    shares = [Counter(picks)[token] / 4000 for token in range(4)]
    assert shares == pytest.approx([0.09, 0.245, 0.665, 0.0], abs=0.02)
