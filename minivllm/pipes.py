"""Messages over a pipe between two processes: the length in 8 bytes, then the content."""

from typing import IO

MAX_FRAME = 1 << 30  # bytes; minivllm sends no longer message


def read_frame(stream: IO[bytes]) -> bytes | None:
    """Read the next message. None if the other end is gone, or sends something else."""
    head = stream.read(8)
    size = int.from_bytes(head, "little")
    if len(head) < 8 or size > MAX_FRAME:
        return None
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: IO[bytes], body: bytes) -> None:
    stream.write(len(body).to_bytes(8, "little"))
    stream.write(body)
    stream.flush()
