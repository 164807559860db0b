"""The capstone: all pieces that a learner wrote in chapters 01 to 07, run as one engine.

`command.check`, which is ``minivllm check capstone``, collects the answers from the exercises
(`examine`) and sends them to a worker. The worker (`worker`) is a Python process of its own,
because an answer may hang or crash. It runs the bundled model with all of the pieces (`engine`),
counts their calls, and notices when one of the package's own implementations (`pieces`) is called
instead of a piece.

If that run fails, every piece runs alone in the package's engine, to find the piece that is wrong.
If it succeeds, the exercise checks of the pieces that have not passed them yet run, too: they find
more than a run does. Then the speeds are measured (`speed`), the learner's engine answers a
question, and a page to keep is written (`page`). `mine` opens that engine for ``minivllm chat
--mine`` and ``minivllm demo --mine``.
"""
