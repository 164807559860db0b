"""How ranks start, and what they say to each other: JSON with a signature, by a key that only they
have.
"""

from __future__ import annotations

import json
import signal

import pytest
import torch

from minivllm.errors import RankFailedError
from minivllm.parallel.group import TensorParallelGroup
from minivllm.parallel.launch import _sigint_blocked


def test_what_rank_0_says_is_json_with_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that comes over the wire is unpickled, and a message of somebody else's is
    refused.
    """
    key = b"k" * 32
    sent: list[torch.Tensor] = []
    sender, receiver = (TensorParallelGroup(rank, 2, None, None, key) for rank in (0, 1))

    def send(name: str, group: object, tensor: torch.Tensor, root: int) -> None:
        sent.append(tensor.clone())

    def receive(name: str, group: object, tensor: torch.Tensor, root: int) -> None:
        tensor.copy_(sent.pop(0))

    monkeypatch.setattr(sender, "_run", send)
    monkeypatch.setattr(receiver, "_run", receive)
    calls = [["add_described", [{"token_ids": [1, 2], "text": "\ud83d é"}]]]
    assert sender.broadcast(5, calls) == (5, calls)
    message = sent[1].numpy().tobytes()
    assert json.loads(message[32:]) == calls
    assert receiver.broadcast(0) == (5, calls)
    sender.broadcast(5, calls)
    sent[1][40] ^= 1
    with pytest.raises(RankFailedError, match="signature"):
        receiver.broadcast(0)
    stranger = TensorParallelGroup(0, 2, None, None, b"another")
    monkeypatch.setattr(stranger, "_run", send)
    sent.clear()
    stranger.broadcast(5, calls)
    with pytest.raises(RankFailedError, match="signature"):
        receiver.broadcast(0)


def test_ranks_start_deaf_to_ctrl_c_where_a_signal_can_be_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows has no signal.pthread_sigmask; ranks start there too."""

    def blocked() -> bool:
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    assert not blocked()
    with _sigint_blocked():
        assert blocked()
    assert not blocked()
    monkeypatch.delattr(signal, "pthread_sigmask")
    with _sigint_blocked():
        started = True
    assert started
