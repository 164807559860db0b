"""The distillation of a draft: its size, its loss, and how its worth is counted."""

from __future__ import annotations

import pytest
import torch

from minivllm.bundled.training import distill, train

pytestmark = pytest.mark.slow


def test_steps_are_counted_as_an_engine_would_make_them() -> None:
    right = [True] * 11
    # The step that ends the text is left out.
    assert distill.accepted_per_step(right, 4) == [4, 4]
    assert distill.accepted_per_step([False] * 6, 4) == [0, 0]
    mixed = [True, True, False, False, True, False, True, True, True, True]
    assert distill.accepted_per_step(mixed, 2) == [2, 0, 1, 2]


def test_the_draft_is_small_and_learns_from_the_teacher() -> None:
    special = {"pad": 0, "eos": 2}
    student, teacher = (train.new_model(seed, special, distill.ARCHITECTURE) for seed in (0, 1))
    assert 2 * sum(p.numel() for p in student.parameters()) < 1.5e6
    ids = torch.arange(12)[None]
    labels = torch.where(ids < 6, train.IGNORED_LABEL, ids)
    loss = distill.divergence_from(teacher)
    assert loss(teacher, ids, labels).abs().item() < 1e-6
    before = loss(student, ids, labels)
    assert before > 1e-3
    # By hand, over the six trained tokens.
    wanted = teacher(input_ids=ids).logits[0, 5:-1].log_softmax(-1)
    got = student(input_ids=ids).logits[0, 5:-1].log_softmax(-1)
    by_hand = (wanted.exp() * (wanted - got)).sum(-1).mean()
    assert before.item() == pytest.approx(by_hand.item(), rel=1e-4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    before.backward()
    assert all(p.grad is None for p in teacher.parameters())
    optimizer.step()
    assert loss(student, ids, labels) < before


def test_the_same_number_draws_the_same_token() -> None:
    logits, numbers = torch.randn(5, 7), torch.rand(5)
    assert distill.draw(logits, 0.0, numbers).tolist() == logits.argmax(-1).tolist()
    drawn = distill.draw(logits, 0.7, numbers)
    running = (logits / 0.7).softmax(-1).cumsum(-1)
    for row, token in enumerate(drawn.tolist()):
        below = running[row, token - 1] if token else 0.0
        assert below < numbers[row] <= running[row, token]
