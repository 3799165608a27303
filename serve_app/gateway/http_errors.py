"""Maps every error to an HTTP status and OpenAI's error object, and documents both for OpenAPI."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
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
from serve_app.wire.ray_internals import cause_of

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
_HTTP_CODES = {
    404: "route_not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
}
_MAX_CHARS = 1000  # of a message: some quote the request
_DESCRIPTIONS = {
    400: "the request, or something that it names, is invalid",
    401: "the admin routes need the bearer token of the settings",
    404: "there is no such model, revision, adapter, rollout or route",
    408: "the body did not arrive in time",
    409: "this is not possible in the current state",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "there are too many requests; the header Retry-After says when to retry",
    503: "the server cannot answer now; the header Retry-After says when to retry",
    504: "the time limit was exceeded",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "the error, in OpenAI's format"}
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, for its `responses=`."""
    return {status: _documentation(status) for status in statuses}


def _documentation(status: int) -> dict[str, Any]:
    document = {"model": ErrorBody, "description": _DESCRIPTIONS[status]}
    if status not in (429, 503):
        return document
    retry = {"schema": {"type": "string", "pattern": "^[0-9]+$"}, "description": "seconds"}
    return document | {"headers": {"Retry-After": retry}}


def install_error_handlers(app: FastAPI) -> None:
    """Makes the application answer every error with OpenAI's error object."""
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
    """The methods of all routes with this path. Starlette's 405 names those of the first route."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


def error_response(error: Exception) -> JSONResponse:
    """The response to an error, for code that FastAPI's error handlers do not cover."""
    return _response(*describe(error))


def _response(status: int, detail: ErrorDetail) -> JSONResponse:
    headers = {}
    if status in (429, 503):
        headers["retry-after"] = "1"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(ErrorBody(error=detail).model_dump(), status_code=status, headers=headers)


def describe(error: BaseException) -> tuple[int, ErrorDetail]:
    """Returns the HTTP status of any error, and OpenAI's error object for it."""
    error = cause_of(error)
    match error:
        case InvalidRequest():
            return error.status, _detail(error.code, str(error), param=error.param)
        case RequestValidationError():
            return 400, _validation_detail(error)
        case HTTPException():
            code = _HTTP_CODES.get(error.status_code, "http_error")
            return error.status_code, _detail(code, f"{error.detail}")
        case BackPressureError():
            return 429, _detail("too_many_requests", "the queue is full", type="rate_limit_error")
        case ActorUnavailableError() | DeploymentUnavailableError() | ReplicaUnavailableError():
            return 503, _server_error("unavailable", "a part of the server is not available now")
        case RayActorError():
            return 503, _server_error("replica_died", "the replica that ran this request died")
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status, _typed_detail(error, status)
    logger.error("unexpected error", exc_info=error)
    return 500, _server_error("internal_error", f"internal error: {type(error).__name__}")


def _typed_detail(error: BaseException, status: int) -> ErrorDetail:
    error_type = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        error_type = "rate_limit_error"
    return _detail(getattr(error, "code", "error"), str(error), type=error_type)


def _server_error(code: str, message: str) -> ErrorDetail:
    return _detail(code, message, type="server_error")


def _validation_detail(error: RequestValidationError) -> ErrorDetail:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        return _detail("unsupported_parameter", f"{param!r} is not supported here", param=param)
    if first["type"] == "json_invalid":
        return _detail("invalid_json", "the body is not valid JSON")
    ours = first.get("ctx", {}).get("error")  # our message, without pydantic's prefix
    message = f"{param or 'the body'}: {ours or first['msg'].lower()}"
    return _detail("invalid_parameter", message, param=param or None)


def _detail(
    code: str, message: str, *, param: str | None = None, type: str = "invalid_request_error"
) -> ErrorDetail:
    return ErrorDetail(
        message=_first_line(message), type=type, param=param and _sendable(param), code=code
    )


def _first_line(message: str) -> str:
    """The first line that is not blank."""
    lines = (line for line in _sendable(message).splitlines() if line.strip())
    return next(lines, "no reason is known")


def _sendable(text: str) -> str:
    """The text, cut, with '?' for each half of a surrogate pair: JSON allows it, UTF-8 does not."""
    return text[:_MAX_CHARS].encode(errors="replace").decode()
