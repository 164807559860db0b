"""What the front and the replicas say to each other, beside the messages of wire.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minivllm.engine.input_processor import EngineInput
    from minivllm.serving import wire

#: Names in a replica's routing stats: its summary (`pack_hashes`), and its unfinished requests.
SUMMARY, LOAD = "minivllm_blocks", "minivllm_load"


@dataclass(frozen=True)
class Order:
    """A checked request on its way to a replica. hashes: `prompt_hashes` of its prompt."""

    request_id: str
    input: EngineInput
    hashes: list[int]

    @property
    def prompt(self) -> str:
        """The prompt as a text: under this name Ray's own prefix router looks for one."""
        text = self.input.prompt_text
        return " ".join(map(str, self.input.prompt_token_ids)) if text is None else text


@dataclass(frozen=True)
class Part:
    """What a request has gained: nothing where only the state is told.

    engine: the replica's name. stats: its state, now and then.
    """

    engine: str
    gains: list[wire.Gain]
    stats: wire.Stats | None = None
