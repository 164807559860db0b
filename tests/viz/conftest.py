"""The texts of the pictures that the tests draw can be read on light and on dark pages.

The last picture of each test is looked at. DUMP names a folder to keep these pictures in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

#: On the bare page, a text has a contrast of 4 and more; over a veil of colour, a bit less.
LEAST = 3.3


@pytest.fixture(autouse=True)
def _texts_are_readable(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    pytest.importorskip("matplotlib")
    from minivllm.viz import themes
    from minivllm.viz.figure import Figure

    figures: list[Figure] = []
    made = Figure.__init__

    def remember(self: Figure, *arguments, **more) -> None:
        made(self, *arguments, **more)
        figures.append(self)

    monkeypatch.setattr(Figure, "__init__", remember)
    yield
    if figures and figures[-1].axes:
        themes.adapt(figures[-1])
        found = themes.text_contrasts(figures[-1])
        if os.environ.get("DUMP"):
            name = request.node.name.replace("/", "_")[:80]
            Path(os.environ["DUMP"], f"{request.node.path.stem}-{name}.png").write_bytes(
                figures[-1].to_png()
            )
        assert not {text: round(ratio, 2) for text, ratio in found.items() if ratio < LEAST}
