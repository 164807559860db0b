"""The small trained Qwen3 checkpoint that ships with minivllm, and the code that made it.

The package exposes only the path, so importing it costs nothing:

    >>> from minivllm.bundled import BUNDLED_MODEL_PATH
    >>> BUNDLED_MODEL_PATH.name
    'bundled'

The folder `draft` holds a smaller checkpoint that proposes its tokens. The training code, from
bottom to top: `grammar` (random text from templates), `stories` and
`glossary` (the templates), `corpus` (documents and their mixture), `train`, `evaluate`,
`distill`. README.md
is the model card.
"""

from pathlib import Path

BUNDLED_MODEL_PATH = Path(__file__).resolve().parent
#: A draft of the bundled model, for speculative decoding: ``"model": "draft"``.
BUNDLED_DRAFT_PATH = BUNDLED_MODEL_PATH / "draft"

__all__ = ["BUNDLED_DRAFT_PATH", "BUNDLED_MODEL_PATH"]
