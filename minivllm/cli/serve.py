"""`minivllm serve`: an OpenAI-compatible server over one engine."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from minivllm.cli import options
from minivllm.errors import ConfigError

Host = Annotated[
    str, typer.Option(help="The address to listen on. 0.0.0.0: all, for other machines.")
]
Port = Annotated[int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)]
ServedModelName = Annotated[
    str | None,
    typer.Option(help="The model's name in the API.", show_default="the model's directory"),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        help="The key that clients must send. MINIVLLM_API_KEY sets it, too, and keeps it out of"
        " the list of processes.",
        envvar="MINIVLLM_API_KEY",
        show_envvar=False,
    ),
]
MaxQueue = Annotated[int, typer.Option(help="Requests that may wait; more get a 429.", min=0)]
MaxBody = Annotated[int, typer.Option(help="The largest body of a request, in MiB.", min=1)]
Drain = Annotated[
    float, typer.Option(help="Seconds that requests may run on after SIGTERM.", min=0.0)
]
ShowText = Annotated[
    bool, typer.Option("--show-text", help="Let the live page show prompts and answers.")
]
LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")]
Demo = Annotated[
    bool,
    typer.Option("--demo", help="Ask for stories now and then, to have something to look at."),
]
Core = Annotated[
    str, typer.Option(help='Where the engine runs: in a "process" of its own, or in a "thread".')
]
CertFile = Annotated[
    Path | None, typer.Option("--ssl-certfile", help="The certificate, for HTTPS.")
]
KeyFile = Annotated[Path | None, typer.Option("--ssl-keyfile", help="The certificate's key.")]
Replicas = Annotated[
    int | None,
    typer.Option(
        help="Serve with so many engines, each a replica of Ray Serve's (needs the extra ray).",
        min=1,
        show_default="one engine, without Ray",
    ),
]
MaxReplicas = Annotated[
    int | None,
    typer.Option(help="Let their number grow to this under load, and fall to --replicas.", min=1),
]
Router = Annotated[
    str,
    typer.Option(
        help='Where a request goes: by "prefix" (most of its blocks are there), by "load", or at'
        ' "random".'
    ),
]
Balance = Annotated[
    int,
    typer.Option(
        help="By prefix: how much longer than the shortest queue that of the chosen replica may"
        " be, in requests.",
        min=0,
    ),
]


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model directory, or a Hugging Face id such as Qwen/Qwen3-0.6B.",
            show_default="bundled",
        ),
    ] = None,
    model_option: options.Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: ServedModelName = None,
    api_key: ApiKey = None,
    max_queue: MaxQueue = 1024,
    max_body: MaxBody = 4,
    drain_seconds: Drain = 30.0,
    show_text: ShowText = False,
    log_prompts: LogPrompts = False,
    demo: Demo = False,
    core: Core = "process",
    ssl_certfile: CertFile = None,
    ssl_keyfile: KeyFile = None,
    replicas: Replicas = None,
    max_replicas: MaxReplicas = None,
    router: Router = "prefix",
    balance: Balance = 4,
    engine: options.Engine = None,
) -> None:
    """Serve a model to any OpenAI client, on loopback and port 8000 unless told otherwise."""
    options.require_number(drain_seconds, "--drain-seconds")
    if model is not None and model_option is not None and model != model_option:
        raise ConfigError("Name the model once: minivllm serve MODEL.")
    if api_key == "":
        raise ConfigError("The API key is empty; leave it out to let everyone in.")
    if (ssl_certfile is None) != (ssl_keyfile is None):
        raise ConfigError("HTTPS needs both --ssl-certfile and --ssl-keyfile.")
    for file in (ssl_certfile, ssl_keyfile):
        if file is not None and not file.is_file():
            raise ConfigError(f"{file} is not a file.")
    tls: dict[str, Any] = {"ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile}
    if replicas is not None:
        if show_text or demo:
            raise ConfigError("The live page shows one engine: leave out --demo and --show-text.")
        fleet = {
            "model": model or model_option,
            "engine": options.engine_options(engine),
            "core": core,
            "min_replicas": replicas,
            "max_replicas": max_replicas,
            "router": router,
            "balance": balance,
            "served_model_name": served_model_name,
            "api_key": api_key,
            "max_queue": max_queue,
            "max_body_bytes": max_body << 20,
            "log_prompts": log_prompts,
            "drain_seconds": drain_seconds,
        }
        raise typer.Exit(_serve_fleet(fleet, host, port, tls))
    if max_replicas is not None:
        raise ConfigError(
            "--max-replicas needs --replicas, which says how many there are at least."
        )
    try:
        from minivllm.serving.async_llm import AsyncLLM
        from minivllm.serving.server import serve as run
        from minivllm.serving.state import ServerOptions
    except ImportError as error:
        raise ConfigError(
            f"{error}. Install what the server needs: pip install 'minivllm[serve]'."
        ) from error
    _log_to_stderr()
    chosen = ServerOptions(
        served_model_name,
        api_key,
        max_queue,
        max_body << 20,
        show_text=show_text or demo,
        demo=demo,
        log_prompts=log_prompts,
        drain_seconds=drain_seconds,
    )
    llm = AsyncLLM(model or model_option, core=core, **options.engine_options(engine))
    raise typer.Exit(run(llm, chosen, host=host, port=port, **tls))


def _serve_fleet(options: dict[str, Any], host: str, port: int, tls: dict[str, Any]) -> int:
    """Serve with Ray. Returns the exit code. Raises `ConfigError` for wrong options."""
    try:
        from minivllm.serving.replicas.local import checked, run
    except ImportError as error:
        raise ConfigError(
            f"{error}. Install what replicas need: pip install 'minivllm[ray]'."
        ) from error
    fleet = checked(options)
    _log_to_stderr()
    return run(fleet, host, port, tls)


def _log_to_stderr() -> None:
    level = os.environ.get("MINIVLLM_LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"MINIVLLM_LOG_LEVEL is {level!r}; use INFO, WARNING, or ERROR.")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("minivllm", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
