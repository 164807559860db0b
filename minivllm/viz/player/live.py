"""The page of a running server: the player, fed by steps as they come, beside a chat."""

from __future__ import annotations

import html

from minivllm.viz.player.page import as_script, player_options, source


def live_page(title: str, *, shows_text: bool, needs_key: bool, has_chat: bool) -> str:
    """One page without external files. It reads ``events`` and ``v1/chat/completions`` beside it.

    shows_text: whether the server shows what clients ask and get. needs_key: whether it wants an
    API key, which the page then asks for. has_chat: whether there is a chat box.
    """
    options = player_options(title=f"{title}, live", wholePage=True)
    about = {"showsText": shows_text, "needsKey": needs_key, "hasChat": has_chat, "model": title}
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)} · minivllm</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; background: light-dark(#ffffff, #14171f); }}
{source("player.css")}
{source("live.css")}</style>
</head>
<body>
<div class="live">
<main id="player"><noscript>This page needs JavaScript.</noscript></main>
<aside id="side"></aside>
</div>
<script>
{source("run.js")}
{source("player.js")}
{source("live.js")}
window.live = new LivePage({as_script(options)}, {as_script(about)});
</script>
</body>
</html>
"""
