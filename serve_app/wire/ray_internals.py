"""Every private or undocumented attribute of Ray that the application uses, behind a function.

`tests/serve_app/wire/test_ray_internals.py` says which one changed when Ray is upgraded.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import context
from ray.serve.request_router import PendingRequest
from ray.serve.schema import ServeInstanceDetails

_EVERY_INTERFACE = {"0.0.0.0", "::"}


def cause_of(error: BaseException) -> BaseException:
    """Returns the exception that a remote call raised in the other process; else `error` itself.

    Ray wraps it in a RayTaskError and keeps it in the undocumented attribute `cause`.
    """
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def this_replica_id() -> str:
    """Returns the id of the Serve replica that runs in this process, unique in its deployment.

    `ReplicaID` is public, its field `unique_id` is undocumented.
    """
    id: str = serve.get_replica_context().replica_id.unique_id
    return id


def is_assigned(call: Any) -> bool:
    """Returns True if a replica has accepted the call of a DeploymentHandle.

    Until then the call waits in the handle's queue: the private future
    `_replica_result_future` of the DeploymentResponse is not done.
    """
    return bool(call._replica_result_future.done())


def request_id(pending: PendingRequest) -> str:
    """Returns the id of a call that a request router places, the same at each attempt."""
    id: str = pending.metadata.internal_request_id
    return id


def call_arguments(pending: PendingRequest) -> tuple[list[Any], dict[str, Any]]:
    """Returns the positional and the keyword arguments of a call that a request router places."""
    return pending.args, pending.kwargs


def back_off_when_full(pending: PendingRequest) -> None:
    """Makes Ray wait before it asks the router again, if all chosen replicas are full.

    Without `routing_context.should_backoff` it asks again at once, in a busy loop.
    """
    pending.routing_context.should_backoff = True


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
