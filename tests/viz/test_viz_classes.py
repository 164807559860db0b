"""The tree of a family of classes: who stands below whom, and what is said about them."""

from __future__ import annotations

import inspect

from minivllm import errors
from minivllm.course.authoring.tool import MAX_IMAGE_BYTES
from minivllm.viz.classes import draw_class_tree, family


def test_every_error_has_its_place() -> None:
    members = family(errors.MiniVLLMError)
    kinds = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.MiniVLLMError) and kind.__module__ == errors.__name__
    }
    assert sorted(member.name for member in members) == sorted(kinds), "each of them once"
    parents: dict[int, str] = {}
    for member in members:
        parents[member.depth] = member.name
        if member.depth:
            base = getattr(errors, parents[member.depth - 1])
            assert getattr(errors, member.name).__bases__[0] is base


def test_the_picture_names_them_all_and_stays_small() -> None:
    figure = draw_class_tree(errors.MiniVLLMError, "The errors")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {member.name for member in family(errors.MiniVLLMError)} <= texts
    assert "Another thread is using this engine" in texts
    assert "EmptyPromptError" not in figure.alt
    assert "RequestError" in figure.alt
    assert figure.caption == "What is bold lies directly below MiniVLLMError."
    assert len(figure.to_png()) < MAX_IMAGE_BYTES
