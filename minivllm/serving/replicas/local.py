"""A fleet on this machine: Ray is started for it, on loopback, and ended with it.

Nothing of Ray that runs already is used or touched, and nothing is reported to anyone. Ray's parts
listen on loopback and ask for a secret that only they know. (A Serve replica opens one more port,
on all addresses; it asks for the same secret.)
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minivllm.config import EngineConfig
from minivllm.errors import ConfigError, EngineEndedError
from minivllm.models.loader import resolve_model_path

# Ray reads these when it is imported, so a program that starts a fleet imports this module first.
# No figures about this use are sent.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Without a cluster, which Ray has on Linux unless told otherwise, a node's address is loopback.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# How often Ray looks after the HTTP proxy, in seconds: so long may one be missing that died.
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "2")
# Seconds for which Ray's parts look for its head when that is gone. When this process is killed,
# the head ends at once, and the last of the others after this time.
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
# By how much Ray's workers give way to others: Ray's own 15 lets any other program come first.
os.environ.setdefault("RAY_worker_niceness", "0")
# Otherwise Ray writes a secret into the home directory, for all that the user ever starts.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray
import torch
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from minivllm.serving.replicas.build import FRONT, NAME, Fleet, app

logger = logging.getLogger("minivllm.serving")

#: Bytes of Ray's store of objects. Messages are small and hardly touch it.
OBJECT_STORE = 100 << 20
#: How often Ray is started where it is too slow. After the first time its files are in memory.
RAY_TRIES = 3


def checked(options: dict[str, Any]) -> Fleet:
    """A fleet of this machine from the options of `Fleet`; GPUs are taken where there are some.

    Its processes ask Ray for no CPUs: nobody else does, and for each CPU Ray would start a process
    that waits for work.

    Raises `ConfigError` for what cannot work: found here, and not by each replica after a minute.
    """
    engine = options.get("engine", {})
    options = {**options, "cpus": 0, "front_cpus": 0}
    if engine.get("device") != "cpu" and torch.cuda.is_available():
        options = {**options, "gpus": engine.get("tensor_parallel_size", 1)}
    try:
        fleet = Fleet(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ConfigError(f"{where}{first['msg'].removeprefix('Value error, ')}.") from None
    EngineConfig(**fleet.engine)
    needed, there = fleet.gpus * fleet.most_replicas, torch.cuda.device_count()
    if needed > there:
        raise ConfigError(
            f"{fleet.most_replicas} replicas need {needed} GPUs, and this machine has {there}."
        )
    if fleet.model is not None:
        resolve_model_path(fleet.model)
    return fleet


def run(fleet: Fleet, host: str, port: int, tls: dict[str, Path | None]) -> int:
    """Serve until SIGTERM or SIGINT, and let what runs finish. Returns the exit code.

    port: 0 takes a free one. Raises `ConfigError` if the port is taken, and `EngineEndedError` if
    the replicas do not start.
    """
    if not port:
        port = free_port(host)
    elif not is_free(host, port):
        raise ConfigError(f"{host}:{port}: address already in use. Choose another --port.")
    # Ray's own folder would be the place where other programs look for a Ray to join.
    folder = tempfile.mkdtemp(prefix="minivllm-")
    logger.info("Ray's folder is %s", folder)
    with started(fleet, host, port, tls, folder):
        end = threading.Event()
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, lambda *_: end.set())
        scheme = "https" if tls.get("ssl_certfile") else "http"
        count = f"{fleet.min_replicas}" + (
            f" to {fleet.max_replicas}" if fleet.max_replicas else ""
        )
        logger.info("%s replicas, running on %s://%s:%d", count, scheme, host, port)
        logger.info("Ray is at %s", ray.get_runtime_context().gcs_address)
        logger.info("the replicas' logs are in %s/session_latest/logs/serve", folder)
        # Not for ever: Python handles a signal only between two steps of the main thread.
        while not end.wait(0.5):
            continue
        drain(fleet.drain_seconds)
    return 0


@contextlib.contextmanager
def started(
    fleet: Fleet,
    host: str,
    port: int,
    tls: dict[str, Path | None] | None = None,
    folder: str | None = None,
) -> Iterator[DeploymentHandle]:
    """The fleet, and Ray, until the context ends. Yields the handle of the front.

    folder: for Ray's logs and sockets; its path must be short. None: Ray's own.
    """
    cpus = fleet.most_replicas * fleet.cpus + fleet.fronts * fleet.front_cpus
    with ray_here(host, port, tls, folder, cpus):
        yield deploy(fleet)


@contextlib.contextmanager
def ray_here(
    host: str,
    port: int,
    tls: dict[str, Path | None] | None = None,
    folder: str | None = None,
    cpus: float = 0,
) -> Iterator[None]:
    """Ray and its HTTP proxy until the context ends, for fleets that `deploy` starts."""
    _start_ray(folder, max(1, math.ceil(cpus)))
    try:
        logging.getLogger("ray").setLevel(logging.WARNING)
        files: dict[str, Any] = {name: str(path) for name, path in (tls or {}).items() if path}
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port, **files})
        yield
    finally:
        with contextlib.suppress(RayError, RayServeException):
            serve.shutdown()
        ray.shutdown()


def _start_ray(folder: str | None, cpus: int) -> None:
    before = _children()
    for number in range(RAY_TRIES):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                object_store_memory=OBJECT_STORE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                configure_logging=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
            return
        except Exception as error:
            # Ray raises a bare one where one of its processes takes more than 15 seconds.
            ray.shutdown()
            _end(_children() - before)
            if number + 1 == RAY_TRIES:
                raise EngineEndedError(f"Ray did not start: {error}") from error
            logger.warning("Ray did not start, and is started again: %s", error)


def _children() -> set[Any]:
    # Ray brings it along, and only then can it be imported.
    import psutil

    return set(psutil.Process().children(recursive=True))


def _end(processes: set[Any]) -> None:
    """End what a failed start has left, which Ray would keep until this program ends."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def deploy(fleet: Fleet, anew: bool = False) -> DeploymentHandle:
    """Start a fleet in the running Ray, or change the one that is there, replica by replica.

    anew: end the one that is there first. Then all replicas start at the same time, and until they
    are up nobody is served. Returns when it is up. Raises `EngineEndedError` with what Ray says
    where it does not start.
    """
    try:
        if anew:
            serve.delete(NAME)
        serve.run(app(fleet), name=NAME, route_prefix="/")
    except (RuntimeError, TimeoutError) as error:
        raise EngineEndedError(f"The replicas did not start: {error}") from error
    return serve.get_deployment_handle(FRONT, NAME)


def drain(seconds: float) -> None:
    """Take no more requests, let those that run finish for some seconds, and abort the rest."""
    front = serve.get_deployment_handle(FRONT, NAME)
    deadline = time.monotonic() + seconds
    try:
        while unfinished := sum(front.broadcast("drain").results(timeout_s=10)):
            if time.monotonic() >= deadline:
                logger.warning("%d requests are aborted: time is up", unfinished)
                front.broadcast("abort_all").results(timeout_s=10)
                # For the last events to be written.
                time.sleep(1)
                return
            time.sleep(0.1)
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("The front does not answer, and ends as it is: %s", error)


def free_port(host: str) -> int:
    """A port that is free now. Ray takes no 0."""
    with socket.create_server((host, 0)) as found:
        port: int = found.getsockname()[1]
        return port


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    try:
        socket.create_server((host, port)).close()
    except OSError:
        return False
    return True
