"""The data routes over fake handles: calls of the Model, responses, streams, errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import ray.exceptions
from fastapi.responses import PlainTextResponse
from ray.serve.exceptions import BackPressureError

from serve_app.wire.errors import (
    DeadlineExceeded,
    EngineStopped,
    GenerationFailed,
    InvalidRequest,
    LanesTaken,
    RevisionNotServed,
)
from tests.serve_app.gateway.fakes import (
    ASKED,
    CHAT,
    FLEET,
    LOADED,
    REVISION,
    TEXT,
    Door,
    FakeController,
    FakeModel,
    code_of,
    events,
)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/chat/completions", CHAT, "chat.completion"),
        ("/v1/completions", TEXT, "text_completion"),
    ],
)
def test_an_answer_names_its_revision_and_its_replica_in_the_headers(
    path: str, body: dict[str, Any], kind: str
) -> None:
    response = Door()("POST", path, json=body | {"model": "tiny", "max_tokens": 3})
    assert response.status_code == 200
    assert (response.headers["x-adapter-revision"], response.headers["x-replica-id"]) == (
        REVISION,
        "r1",
    )
    document = response.json()
    assert (document["object"], document["system_fingerprint"]) == (kind, REVISION)


def test_the_model_gets_the_request_as_it_was_asked() -> None:
    door = Door()
    door("POST", "/v1/chat/completions", json=CHAT | {"temperature": 0, "max_tokens": 3})
    [[request, pin, session]] = door.model.chat.asked
    assert (pin, session) == (None, None)
    assert (request.temperature, request.wanted_tokens) == (0.0, 3)
    assert request.messages[0].text == "hello"


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]
)
def test_a_stream_is_one_event_for_each_chunk_and_then_done(
    path: str, body: dict[str, Any]
) -> None:
    response = Door()("POST", path, json=body | {"stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-adapter-revision"] == REVISION
    assert response.headers["x-replica-id"] == "r1"
    *documents, done = events(response)
    assert done == "[DONE]"
    fingerprints = {json.loads(document)["system_fingerprint"] for document in documents}
    assert (len(documents), fingerprints) == (3, {REVISION})


def test_a_stream_that_fails_ends_with_an_error_event_and_without_done() -> None:
    model = FakeModel()
    model.stream.breaks_after = 2
    response = Door(model)("POST", "/v1/completions", json=TEXT | {"stream": True})
    *documents, last = events(response)
    assert len(documents) == 2
    assert json.loads(last)["error"]["code"] == "stream_broken"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeadlineExceeded(1.0), "deadline_exceeded"),
        (ray.exceptions.ActorDiedError(), "replica_died"),
        (GenerationFailed("no"), "stream_broken"),
    ],
)
def test_the_error_event_of_a_stream_names_a_cause_that_the_client_can_act_on(
    error: Exception, code: str
) -> None:
    model = FakeModel()
    model.stream.breaks_after, model.stream.breaks_with = 1, error
    response = Door(model)("POST", "/v1/completions", json=TEXT | {"stream": True})
    assert json.loads(events(response)[-1])["error"]["code"] == code


def test_a_stream_that_is_refused_before_its_first_chunk_has_the_status_of_the_refusal() -> None:
    model = FakeModel(InvalidRequest(400, "context_length_exceeded", "too long"))
    response = Door(model)("POST", "/v1/completions", json=TEXT | {"stream": True})
    assert (response.status_code, code_of(response)) == (400, "context_length_exceeded")


def test_models_lists_the_base_and_every_revision_that_serves() -> None:
    document = Door()("GET", "/v1/models").json()
    assert [entry["id"] for entry in document["data"]] == [
        "tiny",
        f"tiny:{REVISION}",
        f"tiny:{LOADED}",
    ]
    assert document["object"] == "list"
    assert document["data"][1]["parent"] == "tiny"


def test_openais_client_reads_the_list_of_models() -> None:
    from openai.types import Model

    for entry in Door()("GET", "/v1/models").json()["data"]:
        assert Model.model_validate(entry, strict=True).object == "model"


def test_health_is_200_while_a_replica_serves_and_else_503() -> None:
    assert Door()("GET", "/health").json() == {"status": "ok"}
    fleet = FLEET.model_copy(update={"ready": False})
    response = Door(controller=FakeController(fleet=fleet))("GET", "/health")
    assert (response.status_code, code_of(response)) == (503, "not_ready")
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (CHAT | {"tools": [{}]}, 400, "unsupported_parameter"),
        (CHAT | {"temperature": 9}, 400, "invalid_parameter"),
        ({}, 400, "invalid_parameter"),
    ],
)
def test_a_request_that_cannot_be_run_never_reaches_the_model(
    body: dict[str, Any], status: int, code: str
) -> None:
    door = Door()
    for more in ({}, {"stream": True}):
        response = door("POST", "/v1/chat/completions", json=body | more)
        assert (response.status_code, code_of(response)) == (status, code)
    assert (door.model.chat.asked, door.model.stream.asked) == ([], [])


def test_a_name_that_is_no_unicode_comes_back_as_what_can_be_sent() -> None:
    fault = RevisionNotServed("x", ("\ud800@1",))
    response = Door(FakeModel(fault))("POST", "/v1/completions", json=TEXT)
    assert (response.status_code, code_of(response)) == (404, "model_not_found")


# ---- revisions and sessions --------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body", "method"), ASKED)
def test_the_pin_of_the_header_reaches_the_model(
    path: str, body: dict[str, Any], method: str
) -> None:
    door = Door()
    pinned = {"x-adapter-revision": REVISION}
    response = door("POST", path, json=body | {"model": "tiny"}, headers=pinned)
    assert response.status_code == 200
    assert response.headers["x-adapter-revision"] == REVISION
    [[request, pin, _]] = getattr(door.model, method).asked
    assert (request.model, pin) == ("tiny", REVISION)


@pytest.mark.parametrize(("path", "body", "method"), ASKED)
def test_the_session_of_the_header_reaches_the_model(
    path: str, body: dict[str, Any], method: str
) -> None:
    door = Door()
    assert door("POST", path, json=body, headers={"x-session-id": "s-1"}).status_code == 200
    [[_, _, session]] = getattr(door.model, method).asked
    assert session == "s-1"
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = CHAT if "chat" in path else TEXT
        door("POST", path, json=body | {"stream": True}, headers={"x-session-id": "s-2"})
    assert [session for _, _, session in door.model.stream.asked] == ["s-2", "s-2"]


def test_a_session_of_over_1024_characters_is_refused() -> None:
    response = Door()("POST", "/v1/completions", json=TEXT, headers={"x-session-id": "s" * 1025})
    assert (response.status_code, code_of(response)) == (400, "invalid_parameter")


@pytest.mark.parametrize("more", [{}, {"stream": True}])
@pytest.mark.parametrize("name", ["пират@11111111", "50%25@11111111", "é%@11111111"])
def test_a_revision_of_any_name_survives_the_response_header_and_the_request_header(
    name: str, more: dict[str, Any]
) -> None:
    door = Door(FakeModel(revision=name))
    response = door("POST", "/v1/completions", json=TEXT | more)
    sent = response.headers["x-adapter-revision"]
    assert sent.isascii()
    door("POST", "/v1/completions", json=TEXT | more, headers={"x-adapter-revision": sent})
    asked = door.model.stream.asked if more else door.model.complete.asked
    assert asked[1][1] == name


def test_a_header_that_is_not_ascii_is_only_a_revision_that_no_replica_serves() -> None:
    door = Door()
    headers = {b"x-adapter-revision": b"\xff\xfe"}
    assert door("POST", "/v1/completions", json=TEXT, headers=headers).status_code == 200
    assert door.model.complete.asked[0][1] == "\xff\xfe"


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/admin/fleet", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/completions/", 404, "route_not_found"),
        ("GET", "/admin/rollouts/a/b", 404, "route_not_found"),
    ],
)
def test_a_wrong_address_has_the_same_kind_of_error(
    method: str, path: str, status: int, code: str
) -> None:
    response = Door()(method, path)
    assert (response.status_code, code_of(response)) == (status, code)
    assert ("allow" in response.headers) == (status == 405)


def test_a_405_names_every_method_of_the_path() -> None:
    door = Door()
    assert door("PUT", "/admin/rollouts").headers["allow"] == "GET, POST"
    assert door("GET", "/v1/completions").headers["allow"] == "POST"
    assert door("POST", "/admin/rollouts/x").headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (
            InvalidRequest(400, "context_length_exceeded", "too long"),
            400,
            "context_length_exceeded",
        ),
        (GenerationFailed("no"), 500, "generation_failed"),
        (EngineStopped(), 503, "engine_stopped"),
        (RevisionNotServed("x", (REVISION,)), 404, "model_not_found"),
        (LanesTaken(REVISION, 2), 429, "lanes_taken"),
        (DeadlineExceeded(3.0), 504, "deadline_exceeded"),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 429, "too_many_requests"),
        (KeyError("x"), 500, "internal_error"),
    ],
)
def test_an_error_of_the_model_keeps_its_code(fault: Exception, status: int, code: str) -> None:
    response = Door(FakeModel(fault))("POST", "/v1/completions", json=TEXT)
    assert (response.status_code, code_of(response)) == (status, code)
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_serves_own_handler_of_a_full_queue_is_not_used() -> None:
    full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    door = Door(FakeModel(full), admin_token="for an application of its own")
    door.app.add_exception_handler(BackPressureError, lambda *_: PlainTextResponse("no", 503))
    for more in ({}, {"stream": True}):
        response = door("POST", "/v1/completions", json=TEXT | more)
        assert (response.status_code, code_of(response)) == (429, "too_many_requests")
