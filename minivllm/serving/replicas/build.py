"""The fleet as a Ray Serve application: `app` is what ``serve run`` and a config file name.

A replica asks Ray for its CPUs, and for one GPU per rank. The ranks of an engine are processes of
one host (`parallel/launch.py`), so its GPUs are one bundle of a placement group: Ray cannot split a
bundle over hosts, and starts the replica only where all of them are free.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from minivllm.config import EngineConfig
from minivllm.errors import ConfigError
from minivllm.serving.replicas.front import Front
from minivllm.serving.replicas.replica import HEALTH_TIMEOUT, Replica
from minivllm.serving.replicas.router import ROUTERS
from minivllm.serving.replicas.routing import BALANCE

#: The names of the application and of its two deployments.
NAME, FRONT, REPLICA = "minivllm", "Front", "Replica"
#: Seconds between two looks at a process: so long may it take until Ray replaces one that died.
HEALTH_PERIOD = 2.0


class Fleet(BaseModel):
    """What a fleet is made of: the ``args`` of a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    #: A directory that all hosts have, or a Hugging Face id; None: the bundled model.
    model: str | None = None
    #: Options of `EngineConfig`, for each engine.
    engine: dict[str, Any] = {}
    #: Where an engine's core runs: in a child process of the replica, or in a thread.
    core: Literal["process", "thread"] = "process"

    #: With max_replicas, Ray keeps their number between the two; else there are min_replicas.
    min_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    #: Requests per replica that run or wait, which the autoscaler aims at. None: half of
    #: max_ongoing_requests.
    target_ongoing_requests: float | None = Field(None, gt=0)
    #: Seconds for which there must be too many or too few replicas before Ray acts.
    upscale_delay: float = Field(10.0, ge=0)
    downscale_delay: float = Field(300.0, ge=0)
    #: Requests that a replica takes; more wait in the front, from where they can still go anywhere.
    #: None: a quarter more than its engine runs at once (max_num_seqs), so that the next one is
    #: there when one ends.
    max_ongoing_requests: int | None = Field(None, ge=1)
    cpus: float = Field(1.0, ge=0)
    #: GPUs of a replica: none, or one for each rank (tensor_parallel_size).
    gpus: int = Field(0, ge=0)

    #: Fronts encode prompts and write answers; each has a router of its own.
    fronts: int = Field(1, ge=1)
    front_cpus: float = Field(1.0, ge=0)
    router: str = "prefix"
    #: For the router "prefix": how much longer than the shortest queue the best one's may be.
    balance: int = Field(BALANCE, ge=0)
    #: Seconds between two summaries of a replica's cache.
    summary_period: float = Field(1.0, gt=0)
    #: Seconds for which a stream's tokens are gathered after the first one. 0: a message per step.
    interval: float = Field(0.05, ge=0)

    #: As in `ServerOptions`. The key may also be in MINIVLLM_API_KEY, on the front's host.
    served_model_name: str | None = None
    api_key: str | None = None
    max_queue: int = Field(1024, ge=0)
    max_body_bytes: int = Field(4 << 20, ge=1)
    log_prompts: bool = False
    #: Seconds that the requests of a replica may run on when Ray ends it.
    drain_seconds: float = Field(30.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Fleet:
        known = [field.name for field in fields(EngineConfig)]
        if unknown := set(self.engine) - set(known):
            raise ValueError(f"engine has no option {min(unknown)!r}; there are {', '.join(known)}")
        for name in ("tensor_parallel_size", "max_num_seqs"):
            if self.engine.get(name, 1) is None:
                raise ValueError(f"engine: {name} is null; leave it out for the default")
        if self.router not in ROUTERS:
            raise ValueError(f"router is one of {', '.join(ROUTERS)}, not {self.router!r}")
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}"
            )
        if self.gpus not in (0, self.num_ranks):
            raise ValueError(
                f"gpus={self.gpus}, and an engine has {self.num_ranks} ranks"
                " (tensor_parallel_size): give one GPU for each, or none"
            )
        if self.api_key == "":
            raise ValueError("the API key is empty; leave it out to let everyone in")
        return self

    @property
    def num_ranks(self) -> int:
        return int(self.engine.get("tensor_parallel_size", 1))

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.min_replicas

    @property
    def most_ongoing(self) -> int:
        """The requests that a replica takes."""
        at_once = int(self.engine.get("max_num_seqs", EngineConfig().max_num_seqs))
        return self.max_ongoing_requests or at_once + max(1, at_once // 4)

    @property
    def server_options(self) -> dict[str, Any]:
        """For `ServerOptions`."""
        return {
            "served_model_name": self.served_model_name,
            "api_key": self.api_key or os.environ.get("MINIVLLM_API_KEY") or None,
            "max_queue": self.max_queue,
            "max_body_bytes": self.max_body_bytes,
            "log_prompts": self.log_prompts,
            "drain_seconds": self.drain_seconds,
        }


def app(args: Fleet) -> Application:
    """The application of a fleet.

    Raises `pydantic.ValidationError` for wrong arguments, and `ConfigError` where a router's
    package is missing.
    """
    replicas = serve.deployment(name=REPLICA, **replica_options(args))(Replica)
    fronts = serve.deployment(
        name=FRONT,
        num_replicas=args.fronts,
        # Ray's limit is 5; ours is `max_queue`, and a refused client hears when to come again.
        max_ongoing_requests=args.most_replicas * args.most_ongoing + args.max_queue + 64,
        ray_actor_options={"num_cpus": args.front_cpus},
        graceful_shutdown_timeout_s=args.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_PERIOD,
        max_constructor_retry_count=3,
    )(serve.ingress()(Front))
    engines = replicas.bind(args.model, args.core, args.engine, args.interval)
    return fronts.bind(engines, args.model, args.server_options, args.most_replicas)


def replica_options(args: Fleet) -> dict[str, Any]:
    """The options of the replicas' deployment."""
    options: dict[str, Any] = {
        "max_ongoing_requests": args.most_ongoing,
        "ray_actor_options": {"num_cpus": args.cpus, "num_gpus": args.gpus},
        "graceful_shutdown_timeout_s": args.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_PERIOD,
        "health_check_timeout_s": HEALTH_TIMEOUT + 5,
        "max_constructor_retry_count": 3,
        "request_router_config": _router_config(args),
    }
    if args.gpus > 1:
        options["placement_group_bundles"] = [{"CPU": args.cpus, "GPU": args.gpus}]
        options["placement_group_strategy"] = "STRICT_PACK"
    if args.max_replicas is None:
        return {**options, "num_replicas": args.min_replicas}
    scaling = AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        target_ongoing_requests=args.target_ongoing_requests or max(1.0, args.most_ongoing / 2),
        upscale_delay_s=args.upscale_delay,
        downscale_delay_s=args.downscale_delay,
        metrics_interval_s=min(10.0, max(0.5, args.upscale_delay / 2)),
        look_back_period_s=min(30.0, max(1.0, args.upscale_delay)),
    )
    return {**options, "autoscaling_config": scaling}


def _router_config(args: Fleet) -> RequestRouterConfig:
    options: dict[str, Any] = {
        "request_routing_stats_period_s": args.summary_period,
        # A busy replica on a busy host may be slow; what it said last still stands.
        "request_routing_stats_timeout_s": max(10.0, args.summary_period),
    }
    if args.router != "load":
        options["request_router_class"] = ROUTERS[args.router]
    if args.router == "prefix":
        # A summary may be as old as one period, and travels with Ray's next message.
        keep = max(10.0, 3 * args.summary_period)
        options["request_router_kwargs"] = {"balance": args.balance, "keep": keep}
    try:
        return RequestRouterConfig(**options)
    except ImportError as error:
        raise ConfigError(f"The router {args.router!r} needs another package: {error}.") from error
