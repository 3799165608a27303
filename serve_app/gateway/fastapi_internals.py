"""Undocumented attributes of FastAPI, each behind a function.

`tests/serve_app/gateway/test_fastapi_internals.py` says which one changed when FastAPI is upgraded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute


def takes_body(route: APIRoute) -> bool:
    """Returns True if the route's function has a parameter that is read from the request body."""
    return route.body_field is not None


def edit_openapi(app: FastAPI, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Passes the OpenAPI document of the application through `edit`, once, when it is first read.

    `FastAPI.openapi` caches the document in `app.openapi_schema`.
    """
    make = app.openapi
    app.openapi = lambda: app.openapi_schema or edit(make())  # type: ignore[method-assign]
