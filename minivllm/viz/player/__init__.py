"""The player: a run of the engine, replayed block by block in any browser.

`page` makes one self-contained HTML page of a trace: no network, no kernel, no build step. In a
notebook, `play` puts the same player into the output, where it works without a kernel.
"""

from minivllm.viz.player.page import Player, page, play, write_page

__all__ = ["Player", "page", "play", "write_page"]
