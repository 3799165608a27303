"""Ray still has each undocumented attribute that `ray_internals` uses, with the same meaning."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import typing
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
from ray import serve
from ray.serve import context, request_router
from ray.serve._private.client import ServeControllerClient
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.serve.schema import ServeInstanceDetails

from serve_app.gateway.router import RevisionRouter
from serve_app.wire import ray_internals


async def pending_request(*args: Any, **kwargs: Any) -> PendingRequest:
    metadata_type = typing.get_type_hints(PendingRequest)["metadata"]
    metadata = metadata_type(request_id="the client's", internal_request_id="Ray's")
    return PendingRequest(args=list(args), kwargs=kwargs, metadata=metadata)


# ---- errors and calls of handles ----------------------------------------------------------------


def test_an_error_of_a_remote_call_has_its_cause() -> None:
    raised = KeyError("x")
    error = ray.exceptions.RayTaskError("chat", "Traceback ...", raised)
    for wrapped in (error, error.as_instanceof_cause()):
        found = ray_internals.cause_of(wrapped)
        assert found is raised, "RayTaskError keeps what was raised elsewhere than in `cause` now"


def test_an_error_that_ray_did_not_wrap_is_its_own_cause() -> None:
    for error in (KeyError("x"), ray.exceptions.ActorDiedError()):
        assert ray_internals.cause_of(error) is error


@pytest.mark.parametrize("kind", [DeploymentResponse, DeploymentResponseGenerator])
def test_a_call_of_a_handle_says_when_a_replica_has_accepted_it(kind: type[Any]) -> None:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    call = kind(future, SimpleNamespace(request_id="r"))
    try:
        assert ray_internals.is_assigned(call) is False
        future.set_result(None)
        assert ray_internals.is_assigned(call) is True
    except AttributeError as missing:
        pytest.fail(f"a call of a handle keeps its replica elsewhere now: {missing}")


def test_a_replica_knows_its_own_id(monkeypatch: pytest.MonkeyPatch) -> None:
    context = inspect.signature(serve.get_replica_context).return_annotation
    hint = typing.get_type_hints(context)["replica_id"]
    assert hint is ReplicaID, f"ReplicaContext.replica_id is a {hint} now"
    here = SimpleNamespace(replica_id=ReplicaID("abc", deployment_id=None))
    monkeypatch.setattr(serve, "get_replica_context", lambda: here)
    assert ray_internals.this_replica_id() == "abc", "ReplicaID.unique_id is something else now"


# ---- request routers ----------------------------------------------------------------------------


def test_a_request_that_a_router_places_has_its_id_and_its_arguments() -> None:
    request = asyncio.run(pending_request("x", pin="y"))
    assert ray_internals.request_id(request) == "Ray's", "a PendingRequest has another id now"
    arguments = ray_internals.call_arguments(request)
    assert arguments == (["x"], {"pin": "y"}), "a PendingRequest has other arguments now"


def test_a_router_can_make_ray_wait_while_all_replicas_are_full() -> None:
    request = asyncio.run(pending_request())
    assert request.routing_context.should_backoff is False, "routing_context changed in Ray"
    ray_internals.back_off_when_full(request)
    assert request.routing_context.should_backoff is True


def test_ray_calls_a_router_with_the_same_arguments() -> None:
    for name in ("choose_replicas", "on_request_routed"):
        theirs = list(inspect.signature(getattr(RequestRouter, name)).parameters)
        ours = list(inspect.signature(getattr(RevisionRouter, name)).parameters)
        assert theirs == ours, f"Ray calls {name} of a router with other arguments now: {theirs}"
    assert callable(RequestRouter.initialize_state), "routers have no initialize_state any more"


def test_ray_exports_the_parts_of_a_router() -> None:
    for name in ("PendingRequest", "ReplicaID", "RequestRouter", "RunningReplica"):
        assert name in request_router.__all__, f"ray.serve.request_router has no {name} any more"


def test_ray_passes_routing_statistics_on_to_routers() -> None:
    assert isinstance(inspect.getattr_static(RunningReplica, "routing_stats", None), property), (
        "RunningReplica has no routing_stats any more"
    )
    fields = RequestRouterConfig.model_fields
    for name in ("request_router_class", "request_router_kwargs", "request_routing_stats_period_s"):
        assert name in fields, f"RequestRouterConfig has no {name} any more"
    assert "request_router_config" in inspect.signature(serve.deployment).parameters


# ---- the address of an application -------------------------------------------------------------


def test_serves_client_knows_the_address() -> None:
    assert hasattr(context, "_get_global_client"), (
        "ray.serve.context._get_global_client is gone: http_url needs another way to the client"
    )
    assert hasattr(ServeControllerClient, "get_serve_details"), (
        "Serve's client has no get_serve_details: http_url needs another source of the address"
    )
    assert {"http_options", "proxies", "applications"} <= ServeInstanceDetails.model_fields.keys()


@pytest.mark.parametrize(
    ("host", "prefix", "proxies", "url"),
    [
        ("127.0.0.1", "/", 1, "http://127.0.0.1:8123"),
        ("0.0.0.0", "/llm", 1, "http://127.0.0.1:8123/llm"),
        ("10.1.2.3", "/", 1, "http://10.1.2.3:8123"),
        ("127.0.0.1", "/", 0, None),
    ],
)
def test_the_address_of_an_application(
    monkeypatch: pytest.MonkeyPatch, host: str, prefix: str, proxies: int, url: str | None
) -> None:
    details: dict[str, Any] = {
        "controller_info": {},
        "http_options": {"host": host, "port": 8123},
        "proxies": {f"node{i}": {"status": "HEALTHY"} for i in range(proxies)},
        "applications": {
            "default": {
                "name": "default",
                "route_prefix": prefix,
                "status": "RUNNING",
                "message": "",
                "last_deployed_time_s": 0.0,
                "deployments": {},
                "source": "declarative",
                "docs_path": None,
                "external_scaler_enabled": False,
            }
        },
        "target_capacity": None,
    }

    class Client:
        def get_serve_details(self) -> dict[str, Any]:
            return details

    monkeypatch.setattr(context, "_get_global_client", Client)
    assert ray_internals.http_url("default") == url
