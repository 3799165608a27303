"""A Ray Serve application that swaps LoRA adapters on a live fleet.

    client ──HTTP──▶ gateway          client: in a shell or script; gateway: one process
                     │      │
               replica ◀──▶ controller    one process for each replica; one controller
                  │            │
               engine       rollout       runs requests; decides, without I/O

    wire      the values and errors that cross a process
    openai    OpenAI's request and response formats, for gateway and replica
    app       builds the application from `settings`: `serve run serve_app.app:build`
    probes    checks that a canary's plan names

Imports go down: `app`, then `client`, `gateway`, `replica` and `controller`, then `openai` and
`engine`, then `wire`, `rollout` and `settings`. The names below are imported on first use, so
`import serve_app` loads neither torch nor ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import build
    from .client import HotswapClient, RequestRejected, ServerUnreachable
    from .rollout.plan import Plan

__all__ = ["HotswapClient", "Plan", "RequestRejected", "ServerUnreachable", "build"]

# public name → its module
_HOME_OF = {
    "HotswapClient": "client",
    "Plan": "rollout.plan",
    "RequestRejected": "client",
    "ServerUnreachable": "client",
    "build": "app",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
