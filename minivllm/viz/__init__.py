"""Pictures of a trace or of plain numbers.

matplotlib is imported with the first picture, ipywidgets with the first slider.

    from minivllm.viz import draw_block_table, draw_kv_memory, scrub

    draw_block_table(llm.trace, step=3)  # which request owns which block
    draw_kv_memory(llm.trace)            # the use of the cache's memory
    play(llm.trace)                      # the whole run, to be played in the page; needs no kernel
    scrub(llm.trace)                     # the first picture with a slider; needs a live kernel
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minivllm.viz.block_table import block_tables, draw_block_table
    from minivllm.viz.composition import draw_composition
    from minivllm.viz.memory import draw_kv_memory, kv_memory
    from minivllm.viz.player import play
    from minivllm.viz.prefix import draw_prefix_tree
    from minivllm.viz.roofline import draw_floor, draw_roofline
    from minivllm.viz.softmax import draw_online_softmax
    from minivllm.viz.tiles import draw_attention_tiles
    from minivllm.viz.timeline import draw_places, draw_timeline, draw_token_gaps
    from minivllm.viz.widgets import scrub

_HOMES = {
    "block_tables": "minivllm.viz.block_table",
    "draw_block_table": "minivllm.viz.block_table",
    "kv_memory": "minivllm.viz.memory",
    "draw_kv_memory": "minivllm.viz.memory",
    "scrub": "minivllm.viz.widgets",
    "play": "minivllm.viz.player",
    "draw_timeline": "minivllm.viz.timeline",
    "draw_places": "minivllm.viz.timeline",
    "draw_token_gaps": "minivllm.viz.timeline",
    "draw_composition": "minivllm.viz.composition",
    "draw_attention_tiles": "minivllm.viz.tiles",
    "draw_online_softmax": "minivllm.viz.softmax",
    "draw_prefix_tree": "minivllm.viz.prefix",
    "draw_roofline": "minivllm.viz.roofline",
    "draw_floor": "minivllm.viz.roofline",
}
__all__ = [
    "block_tables",
    "draw_attention_tiles",
    "draw_block_table",
    "draw_composition",
    "draw_floor",
    "draw_kv_memory",
    "draw_online_softmax",
    "draw_places",
    "draw_prefix_tree",
    "draw_roofline",
    "draw_timeline",
    "draw_token_gaps",
    "kv_memory",
    "play",
    "scrub",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minivllm.viz' has no attribute {name!r}")
