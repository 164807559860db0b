"""Serving: an engine behind an event loop, and an OpenAI-compatible server on top of it.

The road of a request: `app` (HTTP) -> `protocol` (what a client may ask) -> `async_llm` (an async
iterator of outputs) -> `core_client` (a process or a thread) -> `core_loop` (the engine's steps).
"""
