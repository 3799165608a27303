"""From typed errors to OpenAI's error envelope: one table, one shape, stable codes."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from hotswap_lib import AdapterRefused, HotswapError

from .controller import FleetNotReady, NoSuchRollout, NothingToUndo, PlanImpossible
from .engine import DeadlineExceeded, EngineStopped, GenerationFailed, RevisionNotServed
from .lanes import LanesTaken
from .openai import RequestRefused
from .rollout.state import GenerationMismatch, IllegalEvent
from .tenants import (
    AdapterAlreadyLoaded,
    AdapterLoadFailed,
    AdapterLoadTimeout,
    AdapterNotLoaded,
)
from .views import ErrorBody, ErrorDetail

logger = logging.getLogger("ray.serve")


class NotAuthorized(Exception):
    code = "not_authorized"

    def __str__(self) -> str:
        return "the admin routes need the bearer token of the settings"


_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (AdapterRefused, 400),
    (PlanImpossible, 400),
    (NotAuthorized, 401),
    (NoSuchRollout, 404),
    (RevisionNotServed, 404),
    (AdapterNotLoaded, 404),
    (NothingToUndo, 409),
    (IllegalEvent, 409),
    (AdapterAlreadyLoaded, 409),
    (GenerationMismatch, 409),
    (LanesTaken, 429),
    (HotswapError, 500),
    (AdapterLoadFailed, 500),
    (GenerationFailed, 500),
    (FleetNotReady, 503),
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
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "what went wrong, in OpenAI's envelope"}
}


def install_error_handlers(app: FastAPI) -> None:
    kinds = [RayError, RequestRefused, RequestValidationError, HTTPException]
    kinds += [BackPressureError, DeploymentUnavailableError]
    for kind in [*kinds, *(kind for kind, _ in _STATUS)]:
        app.add_exception_handler(kind, _respond)
    app.add_exception_handler(Exception, _respond)


async def _respond(request: Request, error: Exception) -> JSONResponse:
    status, detail = describe(error)
    if status >= 500:
        logger.warning(f"{request.method} {request.url.path}: {status} {detail.message}")
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    headers |= {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(ErrorBody(error=detail).model_dump(), status_code=status, headers=headers)


def describe(error: Exception) -> tuple[int, ErrorDetail]:
    """The HTTP status and the envelope's object for any error."""
    cause = getattr(error, "cause", None)
    error = cause if isinstance(cause, Exception) else error  # what the handle's far side raised
    match error:
        case RequestRefused():
            return error.status, _detail(error.code, str(error), param=error.param)
        case RequestValidationError():
            return 400, _validation(error)
        case HTTPException():
            code = _ROUTE_CODES.get(error.status_code, "http_error")
            return error.status_code, _detail(code, f"{error.detail}")
        case BackPressureError():
            return 429, _detail("too_many_requests", "the queue is full", kind="rate_limit_error")
        case ActorUnavailableError() | DeploymentUnavailableError():
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
        return _detail("unsupported_parameter", f"{where} is not supported here", param=where)
    if first["type"] == "json_invalid":
        return _detail("invalid_json", "the body is not valid JSON")
    return _detail("invalid_parameter", f"{where}: {first['msg'].lower()}", param=where or None)


def _detail(
    code: str, message: str, *, param: str | None = None, kind: str = "invalid_request_error"
) -> ErrorDetail:
    return ErrorDetail(message=message.splitlines()[0], type=kind, param=param, code=code)
