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


def test_drafts_are_small_and_learn_from_the_teacher_together() -> None:
    special = {"pad": 0, "eos": 2}
    teacher = train.new_model(1, special, distill.architecture("1x32"))
    students = torch.nn.ModuleList(
        train.new_model(0, special, distill.architecture(shape)) for shape in ("1x160", "2x128")
    )
    assert all(2 * sum(p.numel() for p in s.parameters()) < 1.4e6 for s in students)
    ids = torch.arange(12)[None]
    labels = torch.where(ids < 6, train.IGNORED_LABEL, ids)
    loss = distill.divergence_from(teacher)
    assert loss([teacher], ids, labels).abs().item() < 1e-6
    before = loss(students, ids, labels)
    assert before.min() > 1e-3
    # By hand, over the six trained tokens.
    for student, found in zip(students, before, strict=True):
        by_hand = 0.0
        for temperature in (1.0, distill.LOW_TEMPERATURE):
            wanted, got = (
                (model(input_ids=ids).logits[0, 5:-1] / temperature).log_softmax(-1)
                for model in (teacher, student)
            )
            by_hand += (wanted.exp() * (wanted - got)).sum(-1).mean().item()
        assert found.item() == pytest.approx(by_hand, rel=1e-4)
    optimizer = torch.optim.SGD(students.parameters(), lr=0.1)
    before.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    optimizer.step()
    assert (loss(students, ids, labels) < before).all()


def test_the_same_number_draws_the_same_token() -> None:
    logits, numbers = torch.randn(5, 7), torch.rand(5)
    temperature = torch.tensor([0.0, 0.7, 0.7, 0.0, 1.5])
    for row, token in enumerate(distill.draw(logits, temperature, numbers).tolist()):
        if temperature[row] == 0:
            assert token == logits[row].argmax()
            continue
        running = (logits[row] / temperature[row]).softmax(-1).cumsum(-1)
        below = running[token - 1] if token else 0.0
        assert below < numbers[row] <= running[token]


def test_texts_that_are_written_together_are_those_that_are_written_alone() -> None:
    teacher = train.new_model(0, {"pad": 0, "eos": 2}, distill.architecture("1x32")).eval()
    starts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
    temperature, numbers = torch.tensor([0.0, 0.7, 1.0]), torch.rand(3, 8)
    ends = frozenset(range(1000))  # About half of the tokens, so that texts end early.
    texts = distill.write(teacher, starts, temperature, numbers, ends)
    assert all(not ends & set(text[:-1]) for text in texts)
    for row, (start, text) in enumerate(zip(starts, texts, strict=True)):
        alone = slice(row, row + 1)
        found = distill.write(teacher, [start], temperature[alone], numbers[alone], ends)
        assert found == [text]
        # A draft that is the teacher proposes every token.
        agrees = distill.agreement(teacher, start, text, temperature[alone], numbers[row])
        assert all(agrees)
    rows = distill.write_rows(teacher, starts, padding=0, seed=0)
    assert rows.shape == (3, distill.PROMPT_TOKENS + distill.TEXT_TOKENS)
    for row, start in zip(rows, starts, strict=True):
        assert row[: len(start)].tolist() == [token | train.NOT_TRAINED for token in start]
        assert (row[len(start)] < train.NOT_TRAINED).all()
