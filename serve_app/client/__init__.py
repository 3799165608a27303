"""The Python client and the `hotswap` command: a fleet from outside, over HTTP.

Runs in a user's script, trainer, CI job or shell; never in the cluster, and without Ray or torch
(`hotswap inspect` alone reads adapters, with torch).
In: a plan, a rollout's id or an adapter from the user; `wire.admin` views from the gateway.
Out: HTTP requests to `/admin/*` and `/v1/*lora_adapter*`; text or JSON, and an exit code.

Scripts import from here:

    from serve_app.client import HotswapClient, RequestRejected, ServerUnreachable

Other code of this repository may also use `http`, `errors`, and `terminal*`, which draw a fleet.
This package alone re-exports names, because users' scripts have imported these four from here
since it was one module. They are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connection import DEFAULT_URL
    from .errors import RequestRejected, ServerUnreachable
    from .http import HotswapClient

    RequestRefused = RequestRejected

__all__ = ["DEFAULT_URL", "HotswapClient", "RequestRejected", "ServerUnreachable"]

# public name → where it is defined
_HOMES = {
    "DEFAULT_URL": ("connection", "DEFAULT_URL"),
    "HotswapClient": ("http", "HotswapClient"),
    "RequestRefused": ("errors", "RequestRejected"),  # its former name, in users' scripts
    "RequestRejected": ("errors", "RequestRejected"),
    "ServerUnreachable": ("errors", "ServerUnreachable"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, defined = _HOMES[name]
    value = getattr(import_module(f".{module}", __name__), defined)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
