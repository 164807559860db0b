"""The small trained Qwen3 checkpoint that ships with minivllm, and the code that made it.

The package exposes only the path, so importing it costs nothing:

    >>> from minivllm.bundled import BUNDLED_MODEL_PATH
    >>> BUNDLED_MODEL_PATH.name
    'bundled'

The training code, from bottom to top: `grammar` (random text from templates), `stories` and
`glossary` (the templates), `corpus` (documents and their mixture), `train`, `evaluate`. README.md
is the model card.
"""

from pathlib import Path

BUNDLED_MODEL_PATH = Path(__file__).resolve().parent

__all__ = ["BUNDLED_MODEL_PATH"]
