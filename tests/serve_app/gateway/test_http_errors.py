"""Every error has its HTTP status, its stable code and a message of one sentence."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import ray.exceptions
import ray.serve.exceptions
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import hotswap_lib
from hotswap_lib import AdapterNotFound, AdapterRefused, ImageCorrupted, RankOverEnvelope
from serve_app.gateway.http_errors import describe, error_response
from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.wire.errors import (
    AdapterAlreadyLoaded,
    AdapterLoadFailed,
    AdapterLoadTimeout,
    AdapterNotLoaded,
    DeadlineExceeded,
    EngineStopped,
    Fenced,
    FleetNotReady,
    GenerationFailed,
    InvalidRequest,
    KeyReused,
    LanesTaken,
    NoReplicaReady,
    NotAuthorized,
    NothingToUndo,
    PlanImpossible,
    ProbeInvalid,
    RevisionLost,
    RevisionNotServed,
    RolloutNotFound,
)


def invalid(kind: str, *where: str | int, message: str = "Field required") -> Exception:
    return RequestValidationError([{"type": kind, "loc": ("body", *where), "msg": message}])


ROWS: list[tuple[Exception, int, str]] = [
    (AdapterNotFound("x", None, "gone"), 400, "adapter_not_found"),
    (RankOverEnvelope("x", "t", "rank 32 is over 8"), 400, "rank_over_envelope"),
    (NotAuthorized(), 401, "not_authorized"),
    (InvalidRequest(404, "model_not_found", "not here", "model"), 404, "model_not_found"),
    (RolloutNotFound("rollout-9"), 404, "rollout_not_found"),
    (NothingToUndo(), 409, "nothing_to_undo"),
    (IllegalEvent("a rollout", "no"), 409, "illegal_event"),
    (GenerationFailed("no"), 500, "generation_failed"),
    (ImageCorrupted("x@1", "no"), 500, "image_corrupted"),
    (RevisionLost("x@1", "/there"), 500, "revision_lost"),
    (PlanImpossible("no"), 400, "plan_impossible"),
    (ProbeInvalid("a:b", "cannot be imported"), 400, "probe_invalid"),
    (KeyReused("k"), 409, "idempotency_key_reused"),
    (Fenced(3, 4), 503, "controller_replaced"),
    (RevisionNotServed("x", ("y@1",)), 404, "model_not_found"),
    (AdapterNotLoaded("x"), 404, "adapter_not_loaded"),
    (AdapterAlreadyLoaded("x", "x@1", "x@2"), 409, "adapter_already_loaded"),
    (GenerationMismatch(1, 2), 409, "generation_mismatch"),
    (LanesTaken("x@1", 2), 429, "lanes_taken"),
    (AdapterLoadFailed("x@1", "no"), 500, "adapter_load_failed"),
    (FleetNotReady(), 503, "fleet_not_ready"),
    (NoReplicaReady(), 503, "not_ready"),
    (AdapterLoadTimeout("x@1", ("r1",), 1.0), 504, "adapter_load_timeout"),
    (DeadlineExceeded(1.0), 504, "deadline_exceeded"),
    (EngineStopped(), 503, "engine_stopped"),
    (HTTPException(404), 404, "route_not_found"),
    (HTTPException(405), 405, "method_not_allowed"),
    (HTTPException(418), 418, "http_error"),
    (invalid("extra_forbidden", "tools"), 400, "unsupported_parameter"),
    (invalid("json_invalid", 3), 400, "invalid_json"),
    (invalid("missing", "messages"), 400, "invalid_parameter"),
    (
        ray.serve.exceptions.BackPressureError(num_queued_requests=1, max_queued_requests=1),
        429,
        "too_many_requests",
    ),
    (ray.exceptions.ActorDiedError(), 503, "replica_died"),
    (KeyError("secret"), 500, "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "code"), ROWS, ids=[row[2] for row in ROWS])
def test_an_error_has_its_status_its_code_and_one_sentence(
    error: Exception, status: int, code: str
) -> None:
    got, detail = describe(error)
    assert (got, detail.code) == (status, code)
    assert detail.message
    assert "\n" not in detail.message


@pytest.mark.parametrize(("error", "status", "code"), ROWS, ids=[row[2] for row in ROWS])
def test_an_error_that_a_handle_brings_is_the_same(
    error: Exception, status: int, code: str
) -> None:
    if isinstance(error, ray.exceptions.RayError | ray.serve.exceptions.RayServeException):
        return  # these are raised on this side
    far = ray.exceptions.RayTaskError("chat", "Traceback ...", error)
    for wrapped in (far, far.as_instanceof_cause()):
        got, detail = describe(wrapped)
        assert (got, detail.code) == (status, code)
        assert "Traceback" not in detail.message


@pytest.mark.parametrize(
    "error",
    [
        ray.serve.exceptions.DeploymentUnavailableError("Model"),
        ray.exceptions.ActorUnavailableError("no answer", b"0" * 16),
        ray.serve.exceptions.ReplicaUnavailableError("r1"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_may_pass_is_503(error: Exception) -> None:
    assert describe(error)[0] == 503


def test_the_message_of_an_unexpected_error_is_not_sent() -> None:
    _, detail = describe(KeyError("secret"))
    assert detail.message == "internal error: KeyError"
    assert detail.type == "server_error"


def test_a_refused_parameter_is_named() -> None:
    _, detail = describe(invalid("missing", "messages", 0, "role"))
    assert (detail.param, detail.message) == ("messages.0.role", "messages.0.role: field required")
    _, detail = describe(InvalidRequest(404, "model_not_found", "not here", "model"))
    assert detail.param == "model"


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        (
            "\n\n the first line that says something\nand another",
            " the first line that says something",
        ),
        ("half a \ud800 pair", "half a ? pair"),
        ("x" * 10_000, "x" * 1000),
        ("", "no reason is known"),
        ("\r\n", "no reason is known"),
    ],
    ids=ascii,
)
def test_a_message_is_one_line_that_can_be_sent(message: str, sent: str) -> None:
    _, detail = describe(InvalidRequest(400, "x", message, param="\udfff" * 5))
    assert (detail.message, detail.param) == (sent, "?????")


def test_an_error_that_may_pass_says_when_to_retry() -> None:
    assert error_response(NoReplicaReady()).headers["retry-after"] == "1"
    assert error_response(LanesTaken("x@1", 2)).headers["retry-after"] == "1"
    assert "retry-after" not in error_response(RolloutNotFound("x")).headers
    assert error_response(NotAuthorized()).headers["www-authenticate"] == "Bearer"


def every_error(kind: type[Exception]) -> list[type[Any]]:
    return [
        thing
        for _, thing in inspect.getmembers(hotswap_lib, inspect.isclass)
        if issubclass(thing, kind)
    ]


def test_every_refused_adapter_is_the_clients_fault() -> None:
    for kind in every_error(AdapterRefused):
        status, detail = describe(kind("x", "t", "a rule"))
        assert (status, detail.code, detail.type) == (400, kind.code, "invalid_request_error")
