"""Messages over a pipe between two processes: each is its length in 8 bytes, then its bytes."""

from typing import BinaryIO


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next message; None when the other end is gone."""
    head = stream.read(8)
    body = stream.read(int.from_bytes(head, "little"))
    return body if len(head) == 8 and len(body) == int.from_bytes(head, "little") else None


def write_frame(stream: BinaryIO, body: bytes) -> None:
    stream.write(len(body).to_bytes(8, "little"))
    stream.write(body)
    stream.flush()
