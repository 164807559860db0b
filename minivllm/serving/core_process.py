"""The process of an engine's core: reads messages from stdin, writes messages to stdout.

Started by `ProcessCore` (core_client.py). It ends when its stdin ends, so it never outlives the
process that started it.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
from queue import SimpleQueue
from typing import IO, Any

from minivllm.pipes import read_frame, write_frame
from minivllm.serving import wire


def main() -> int:
    """Serve one engine. Returns the exit code: 0 after `Close`, 1 after an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    # What a library prints must not get between the messages.
    os.dup2(2, 1)
    # Not `sys.stdin`: Python would wait for the reading thread when it ends.
    requests = os.fdopen(os.dup(0), "rb")
    outbox: SimpleQueue[Any] = SimpleQueue()
    writer = threading.Thread(target=_write, args=(outbox, replies))
    writer.start()
    try:
        return _serve(requests, outbox)
    finally:
        outbox.put(None)
        writer.join()


def _serve(requests: IO[bytes], outbox: SimpleQueue[Any]) -> int:
    from minivllm.serving.core_client import describe

    first = read_frame(requests)
    if first is None:
        return 0
    try:
        from minivllm.engine.llm_engine import LLMEngine
        from minivllm.serving.core_loop import CoreLoop

        model, config = pickle.loads(first)
        engine = LLMEngine(model, config=config)
        # As in `serve` (server.py): no step waits while Python looks through what stays anyway.
        gc.collect()
        gc.freeze()
        inbox: SimpleQueue[Any] = SimpleQueue()
        loop = CoreLoop(engine, inbox, outbox.put)
        outbox.put(loop.started())
        threading.Thread(target=_read, args=(requests, inbox), daemon=True).start()
        try:
            loop.run()
        finally:
            engine.close()
    except BaseException as error:
        outbox.put(describe(error))
        return 1
    return 0


def _read(requests: IO[bytes], inbox: SimpleQueue[Any]) -> None:
    while (frame := read_frame(requests)) is not None:
        inbox.put(pickle.loads(frame))
    inbox.put(wire.Close())


def _write(outbox: SimpleQueue[Any], replies: IO[bytes]) -> None:
    """Send in a thread, so that a step never waits for the reader."""
    try:
        while (message := outbox.get()) is not None:
            write_frame(replies, pickle.dumps(message))
    except OSError:
        # The reader is gone, and with it our stdin: `_read` closes the loop.
        return


if __name__ == "__main__":
    sys.exit(main())
