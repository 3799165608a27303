"""From typed errors to OpenAI's error envelope: one table, one shape, stable codes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from starlette.exceptions import HTTPException
from starlette.routing import Match

from hotswap_lib import AdapterRefused, HotswapError
from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.wire.admin import ErrorBody, ErrorDetail
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
    RevisionNotServed,
    RolloutNotFound,
)

logger = logging.getLogger(__name__)


_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (AdapterRefused, 400),
    (PlanImpossible, 400),
    (ProbeInvalid, 400),
    (NotAuthorized, 401),
    (RolloutNotFound, 404),
    (RevisionNotServed, 404),
    (AdapterNotLoaded, 404),
    (NothingToUndo, 409),
    (IllegalEvent, 409),
    (AdapterAlreadyLoaded, 409),
    (GenerationMismatch, 409),
    (KeyReused, 409),
    (LanesTaken, 429),
    (HotswapError, 500),
    (AdapterLoadFailed, 500),
    (GenerationFailed, 500),
    (FleetNotReady, 503),
    (Fenced, 503),
    (NoReplicaReady, 503),
    (EngineStopped, 503),
    (AdapterLoadTimeout, 504),
    (DeadlineExceeded, 504),
)
_ROUTE_CODES = {
    404: "route_not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
}
_MOST_CHARS = 1000  # of a message: some repeat what the client sent
_RETRY = {"retry-after": "1"}
_WHEN = {
    400: "the request, or what it names, is not acceptable",
    401: "the admin routes need the bearer token of the settings",
    404: "there is no such model, revision, adapter, rollout or route",
    408: "the body did not arrive in time",
    409: "this cannot be done now",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "there are too many requests; Retry-After says when to come back",
    503: "nobody can answer at the moment; Retry-After says when to come back",
    504: "it took too long",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "what went wrong, in OpenAI's envelope"}
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses=` of a route: what it answers beside its success."""
    return {status: _documented(status) for status in statuses}


def _documented(status: int) -> dict[str, Any]:
    document = {"model": ErrorBody, "description": _WHEN[status]}
    if status not in (429, 503):
        return document
    retry = {"schema": {"type": "string", "pattern": "^[0-9]+$"}, "description": "seconds"}
    return document | {"headers": {"Retry-After": retry}}


def install_error_handlers(app: FastAPI) -> None:
    kinds = [
        RayError,
        InvalidRequest,
        RequestValidationError,
        HTTPException,
        ReplicaUnavailableError,
    ]
    for kind in [*kinds, *(kind for kind, _ in _STATUS)]:
        app.add_exception_handler(kind, _respond)
    app.add_exception_handler(Exception, _respond)


async def _respond(request: Request, error: Exception) -> JSONResponse:
    status, detail = describe(error)
    if status >= 500:
        logger.warning(f"{request.method} {request.url.path}: {status} {detail.message}")
    response = _response(status, detail)
    if status == 405:
        response.headers["allow"] = ", ".join(_methods(request))
    return response


def _methods(request: Request) -> list[str]:
    """Of all routes of this path; Starlette knows those of the first one."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


def respond(error: Exception) -> JSONResponse:
    """The answer to an error, where FastAPI's handlers do not reach."""
    return _response(*describe(error))


def _response(status: int, detail: ErrorDetail) -> JSONResponse:
    headers = dict(_RETRY) if status in (429, 503) else {}
    headers |= {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(ErrorBody(error=detail).model_dump(), status_code=status, headers=headers)


class EnvelopeRoute(APIRoute):
    """GenerationServing itself what Serve would: it puts handlers of its own for these into any FastAPI."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_and_answer(request: Request) -> Response:
            try:
                return await handle(request)
            except (BackPressureError, DeploymentUnavailableError) as error:
                return respond(error)

        return handle_and_answer


def describe(error: Exception) -> tuple[int, ErrorDetail]:
    """The HTTP status and the envelope's object for any error."""
    cause = getattr(error, "cause", None)
    error = cause if isinstance(cause, Exception) else error  # what the handle's far side raised
    match error:
        case InvalidRequest():
            return error.status, _detail(error.code, str(error), param=error.param)
        case RequestValidationError():
            return 400, _validation(error)
        case HTTPException():
            code = _ROUTE_CODES.get(error.status_code, "http_error")
            return error.status_code, _detail(code, f"{error.detail}")
        case BackPressureError():
            return 429, _detail("too_many_requests", "the queue is full", kind="rate_limit_error")
        case ActorUnavailableError() | DeploymentUnavailableError() | ReplicaUnavailableError():
            message = "what should answer this is not there at the moment"
            return 503, _detail("unavailable", message, kind="server_error")
        case RayActorError():
            message = "the replica that ran this request died"
            return 503, _detail("replica_died", message, kind="server_error")
    for kind, status in _STATUS:
        if isinstance(error, kind):
            kind_name = "invalid_request_error" if status < 500 else "server_error"
            kind_name = "rate_limit_error" if status == 429 else kind_name
            return status, _detail(getattr(error, "code", "error"), str(error), kind=kind_name)
    logger.error("unexpected error", exc_info=error)
    return 500, _detail(
        "internal_error", f"internal error: {type(error).__name__}", kind="server_error"
    )


def _validation(error: RequestValidationError) -> ErrorDetail:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        return _detail("unsupported_parameter", f"{where!r} is not supported here", param=where)
    if first["type"] == "json_invalid":
        return _detail("invalid_json", "the body is not valid JSON")
    said = first.get("ctx", {}).get("error")  # our own words, without pydantic's in front
    message = f"{where or 'the body'}: {said or first['msg'].lower()}"
    return _detail("invalid_parameter", message, param=where or None)


def _detail(
    code: str, message: str, *, param: str | None = None, kind: str = "invalid_request_error"
) -> ErrorDetail:
    return ErrorDetail(
        message=_sentence(message), type=kind, param=param and _text(param), code=code
    )


def _sentence(message: str) -> str:
    """The first line that says something."""
    lines = (line for line in _text(message).splitlines() if line.strip())
    return next(lines, "no reason is known")


def _text(given: str) -> str:
    """As far as it can be sent: half of a surrogate pair, which JSON may have, is no UTF-8."""
    return given[:_MOST_CHARS].encode(errors="replace").decode()
