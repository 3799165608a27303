"""FastAPI still has each undocumented attribute that `fastapi_internals` uses."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel

from serve_app.gateway.fastapi_internals import edit_openapi, takes_body


class Body(BaseModel):
    x: int


def test_a_route_says_if_it_takes_a_body() -> None:
    async def with_body(body: Body) -> None: ...
    async def without_body(request: Request, x: int = 0) -> None: ...

    assert takes_body(APIRoute("/", with_body)), "APIRoute.body_field is something else now"
    assert not takes_body(APIRoute("/", without_body)), "APIRoute.body_field is set always now"


def test_the_openapi_document_is_edited_once_and_served() -> None:
    edits: list[dict[str, Any]] = []

    def edit(document: dict[str, Any]) -> dict[str, Any]:
        edits.append(document)
        document["info"]["title"] = "edited"
        return document

    app = FastAPI()
    edit_openapi(app, edit)
    assert app.openapi()["info"]["title"] == "edited", "FastAPI.openapi cannot be replaced any more"
    assert app.openapi()["info"]["title"] == "edited", "FastAPI forgets its document now"
    assert len(edits) == 1, "FastAPI keeps its document elsewhere than in `openapi_schema` now"
