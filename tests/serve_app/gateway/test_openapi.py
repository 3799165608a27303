"""The OpenAPI document is true: every response has its documented schema."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from serve_app.openai import response_schemas as documents
from tests.serve_app.gateway.fakes import (
    ASKED,
    CHAT,
    TEXT,
    Door,
    events,
)


def test_every_document_has_the_documented_schema() -> None:
    door = Door()
    kinds: list[Any] = [
        documents.ChatDocument,
        documents.TextDocument,
        documents.EmbeddingList,
        documents.ClassificationList,
    ]
    wishes: list[dict[str, Any]] = [
        {"logprobs": True, "return_token_ids": True},
        {"logprobs": 1, "return_token_ids": True},
        {},
        {},
    ]
    for (path, body, _), kind, wish in zip(ASKED, kinds, wishes, strict=True):
        for more in ({}, wish):
            TypeAdapter(kind).validate_json(door("POST", path, json=body | more).text, strict=True)
    TypeAdapter(documents.ModelList).validate_json(door("GET", "/v1/models").text, strict=True)


def test_every_chunk_has_the_documented_schema() -> None:
    door = Door()
    more = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    cases: list[tuple[str, dict[str, Any], Any]] = [
        ("/v1/chat/completions", CHAT | {"logprobs": True}, documents.ChatChunk),
        ("/v1/completions", TEXT | {"logprobs": 1}, documents.TextChunk),
    ]
    for path, body, kind in cases:
        *chunks, _ = events(door("POST", path, json=body | more))
        for chunk in chunks:
            TypeAdapter(kind).validate_json(chunk, strict=True)


def test_the_documentation_promises_no_422_and_closed_routes_only_where_there_is_a_token() -> None:
    both: list[dict[str, Any]] = [{}, {"admin_token": "secret"}]
    for settings in both:
        document = Door(**settings)("GET", "/openapi.json").json()
        for path, methods in document["paths"].items():
            for operation in methods.values():
                assert "422" not in operation["responses"]
                assert "default" in operation["responses"]
                closed = bool(settings) and (path.startswith("/admin") or "lora" in path)
                assert ("security" in operation) == closed
        chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
        assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
        assert {"ChatChunk", "TextChunk"} <= document["components"]["schemas"].keys()
        assert "HTTPValidationError" not in json.dumps(document)
