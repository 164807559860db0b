"""Several engines behind one address, on Ray Serve: ``pip install 'minivllm[ray]'``.

    minivllm serve --replicas 3                                    on this machine
    serve run minivllm.serving.replicas:app min_replicas=3         on a Ray cluster
    serve deploy fleet.yaml                                        example.yaml shows such a file

Ray starts, watches, scales and replaces the replicas. A replica is one engine. `prefixes` and
`routing` decide where a request goes; they import nothing of Ray, so that a simulator can use them.

    front      the OpenAI application: checks and encodes requests, sends them on
    fleet      its core: speaks to the replicas instead of to one engine
    router     which replica gets a request, in Ray's interface
    replica    one engine as a deployment
    build      all of it as a Serve application; local: on this machine
"""

from typing import Any


def __getattr__(name: str) -> Any:
    # Not imported above: who wants only the pure modules need not have Ray.
    if name == "app":
        from minivllm.serving.replicas.build import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
