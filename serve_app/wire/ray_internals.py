"""Everything of Ray that is private or undocumented, in one place. Each use has a test.

tests/serve_app/wire/test_ray_internals.py fails with the name of what changed in Ray.
"""

from __future__ import annotations

from ray.serve import context
from ray.serve.schema import ServeInstanceDetails

_EVERY_INTERFACE = {"0.0.0.0", "::"}


def cause_of(error: BaseException) -> BaseException:
    """The exception that a remote call raised on the other side, as it was raised there.

    Ray wraps it in a RayTaskError and keeps it in an undocumented attribute, `cause`.
    """
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def http_url(app: str) -> str | None:
    """Returns the address of a Serve application, or None where Serve runs no HTTP proxy.

    Serve has this in its REST API alone, and a replica does not know the address of that. The
    client behind `serve.status()` is private. Blocks; to be called in a process of Serve.
    """
    details = ServeInstanceDetails(**context._get_global_client().get_serve_details())
    http, prefix = details.http_options, details.applications[app].route_prefix
    if http is None or prefix is None or not details.proxies:
        return None
    host = "127.0.0.1" if http.host in _EVERY_INTERFACE else http.host
    return f"http://{host}:{http.port}{http.root_path}{prefix}".rstrip("/")
