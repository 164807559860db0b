"""Routing in Ray Serve's own interface: its `RequestRouter` asks which replicas come first.

Ray keeps the rest: queues, backoff, replicas that refuse, die or come. Ray copies this module by
value into the processes that route, so it holds no state of its own.
"""

from __future__ import annotations

import random
import time
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from minivllm.serving.replicas.messages import LOAD, SUMMARY, Order
from minivllm.serving.replicas.routing import BALANCE, Candidate, PrefixTable, rank

#: The name of each router -> where its class is; "load" is Ray's power of two choices.
ROUTERS = {
    "prefix": "minivllm.serving.replicas.router.PrefixRouter",
    "load": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
    "random": "minivllm.serving.replicas.router.RandomRouter",
    "ray-prefix": (
        "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router"
        ".PrefixCacheAffinityRouter"
    ),
}


class PrefixRouter(RequestRouter):
    """To the replica with most of the prompt's blocks, as `routing.rank` says."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Of kwargs, balance: of `rank`; keep: of `PrefixTable`, in seconds."""
        self._balance: int = kwargs.get("balance", BALANCE)
        self._table = PrefixTable(kwargs.get("keep", 10.0))
        #: Requests that have a replica and are not sent yet: Ray does not count them so far.
        self._picked: list[tuple[PendingRequest, str]] = []

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take in who is there, and what they say they have."""
        super().update_replicas(replicas)
        self._table.keep_only([_name(replica.replica_id) for replica in replicas])
        for replica in replicas:
            if SUMMARY in replica.routing_stats:
                self._table.publish(_name(replica.replica_id), replica.routing_stats[SUMMARY])

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The candidates one by one, the best first."""
        hashes: list[int] = []
        if pending_request is not None:
            # When all have refused, wait before they are asked again.
            pending_request.routing_context.should_backoff = True
            hashes = _hashes(pending_request)
        self._picked = [pick for pick in self._picked if not pick[0].future.done()]
        now = time.monotonic()
        by_name = {_name(replica.replica_id): replica for replica in candidate_replicas}
        candidates = [
            Candidate(name, self._load(replica), self._table.num_cached(name, hashes, now))
            for name, replica in by_name.items()
        ]
        ranked = rank(candidates, self._balance)
        if pending_request is not None and ranked:
            self._picked = [pick for pick in self._picked if pick[0] is not pending_request]
            self._picked.append((pending_request, ranked[0].name))
        return [[by_name[candidate.name]] for candidate in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """A replica has accepted a request: its blocks will be there."""
        self._table.note_sent(_name(replica_id), _hashes(pending_request), time.monotonic())

    def _load(self, replica: RunningReplica) -> int:
        name = _name(replica.replica_id)
        known = self.replica_queue_len_cache.get(replica.replica_id)
        load = replica.routing_stats.get(LOAD, 0) if known is None else known
        return int(load) + sum(picked == name for _, picked in self._picked)


class RandomRouter(RequestRouter):
    """To any replica, whatever it has and does: what the others are compared with."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The candidates one by one, in any order."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        return [[replica] for replica in random.sample(candidate_replicas, len(candidate_replicas))]


def _name(replica_id: ReplicaID) -> str:
    return str(replica_id.unique_id)


def _hashes(request: PendingRequest) -> list[int]:
    order = request.args[0] if request.args else None
    return order.hashes if isinstance(order, Order) else []
