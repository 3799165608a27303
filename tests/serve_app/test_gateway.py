"""Every route over fake handles: what it asks of whom, what it answers, and every refusal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from hotswap_lib import AdapterNotFound
from serve_app.controller import FleetNotReady, NoSuchRollout, NothingToUndo
from serve_app.engine import EngineStopped, GenerationFailed
from serve_app.gateway import Gateway
from serve_app.openai import ChatRequest, CompletionRequest, RequestRefused, Responses
from serve_app.rollout.plan import Plan
from serve_app.rollout.state import IllegalEvent
from serve_app.settings import Settings
from serve_app.views import ErrorBody, FleetView, ReplicaView, RolloutList, RolloutView

REVISION = "pirate@11111111"
FLEET = FleetView(
    ready=True,
    epoch=1,
    generation=4,
    stable=REVISION,
    journal_uri="/j",
    replicas=[
        ReplicaView(id="r1", revision=REVISION, assigned=REVISION, serving=True),
        ReplicaView(id="r2", revision=REVISION, assigned=REVISION, serving=True),
        ReplicaView(id="r3", revision="old@22222222", assigned=REVISION, serving=False),
        ReplicaView(id="r4", revision=None, assigned=REVISION),
    ],
)
ROLLOUT = RolloutView(
    id="rollout-1",
    target=REVISION,
    previous="old@22222222",
    strategy="rolling",
    max_unavailable=1,
    state="staging",
    created_at=1.0,
)
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
TEXT = {"prompt": "hello"}


class Method:
    """One method of a handle: answers, or raises what it was told to."""

    def __init__(self, answer: Callable[..., Any], fault: Exception | None = None) -> None:
        self.answer, self.fault = answer, fault
        self.asked: list[tuple[Any, ...]] = []

    async def remote(self, *arguments: Any) -> Any:
        self.asked.append(arguments)
        if self.fault is not None:
            raise self.fault
        return self.answer(*arguments)


class StreamMethod:
    """Chunks one by one; `breaks_after`: so many, then the replica is gone."""

    def __init__(self, answer: Callable[..., Any], fault: Exception | None = None) -> None:
        self.answer, self.fault = answer, fault
        self.asked: list[tuple[Any, ...]] = []
        self.breaks_after: int | None = None

    async def remote(self, request: Any) -> AsyncIterator[dict[str, Any]]:
        self.asked.append((request,))
        if self.fault is not None:
            raise self.fault
        for chunk in self.answer(request)[: self.breaks_after]:
            yield chunk
        if self.breaks_after is not None:
            raise ConnectionError("gone")


class FakeModel:
    def __init__(self, fault: Exception | None = None) -> None:
        self.chat = Method(whole, fault)
        self.complete = Method(whole, fault)
        self.stream = StreamMethod(chunks, fault)

    def options(self, *, stream: bool) -> FakeModel:
        assert stream
        return self


class FakeController:
    def __init__(self, fault: Exception | None = None, fleet: FleetView = FLEET) -> None:
        self.fleet = Method(lambda: fleet, fault)
        self.rollouts = Method(lambda: [ROLLOUT], fault)
        self.rollout = Method(lambda _id: ROLLOUT, fault)
        self.start_rollout = Method(lambda _plan: ROLLOUT, fault)
        self.abort = Method(lambda _id: ROLLOUT, fault)
        self.undo = Method(lambda: ROLLOUT, fault)


def responses(request: ChatRequest | CompletionRequest) -> Responses:
    return Responses(request, model="tiny", replica="r1")


def whole(request: ChatRequest | CompletionRequest) -> dict[str, Any]:
    return responses(request).whole(
        text="hi", revision=REVISION, reason="stop", prompt_ids=[1], token_ids=[2]
    )


def chunks(request: ChatRequest | CompletionRequest) -> list[dict[str, Any]]:
    maker = responses(request)
    return [
        maker.first(revision=REVISION, prompt_ids=[1]),
        maker.piece(text="hé\n\ndata: x", revision=REVISION),
        maker.piece(text="", revision=REVISION, reason="stop"),
    ]


class Door:
    """The application over fakes, and a way to knock."""

    def __init__(
        self,
        model: FakeModel | None = None,
        controller: FakeController | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.controller = model or FakeModel(), controller or FakeController()
        both: Any = (self.model, self.controller)
        self.app = Gateway(Settings(served_model_name="tiny", **settings), *both).app()

    def __call__(self, method: str, path: str, **request: Any) -> httpx.Response:
        async def knock() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                return await client.request(method, path, **request)

        return asyncio.run(knock())


def code_of(response: httpx.Response) -> str:
    return ErrorBody.model_validate_json(response.text).error.code


# ---- inference ----------------------------------------------------------------------------------


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
    [[request]] = door.model.chat.asked
    assert (request.temperature, request.wanted_tokens) == (0.0, 3)
    assert request.messages[0].text == "hello"


def events(response: httpx.Response) -> list[str]:
    *whole_events, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in whole_events)
    return [event.removeprefix("data: ") for event in whole_events]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]
)
def test_a_stream_is_one_event_for_each_chunk_and_the_word_done(
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


def test_a_stream_that_breaks_says_so_and_never_says_done() -> None:
    model = FakeModel()
    model.stream.breaks_after = 2
    response = Door(model)("POST", "/v1/completions", json=TEXT | {"stream": True})
    *documents, last = events(response)
    assert len(documents) == 2
    assert json.loads(last)["error"]["code"] == "stream_broken"


def test_a_stream_that_is_refused_before_its_first_chunk_has_the_status_of_the_refusal() -> None:
    model = FakeModel(RequestRefused(400, "context_length_exceeded", "too long"))
    response = Door(model)("POST", "/v1/completions", json=TEXT | {"stream": True})
    assert (response.status_code, code_of(response)) == (400, "context_length_exceeded")


def test_models_lists_the_base_and_every_revision_that_serves() -> None:
    document = Door()("GET", "/v1/models").json()
    assert [entry["id"] for entry in document["data"]] == ["tiny", f"tiny:{REVISION}"]
    assert document["object"] == "list"
    assert document["data"][1]["parent"] == "tiny"


def test_openais_client_reads_the_list_of_models() -> None:
    from openai.types import Model

    for entry in Door()("GET", "/v1/models").json()["data"]:
        assert Model.model_validate(entry, strict=True).object == "model"


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
def test_health_is_whether_anybody_serves(ready: bool, status: int) -> None:
    fleet = FLEET.model_copy(update={"ready": ready})
    assert Door(controller=FakeController(fleet=fleet))("GET", "/health").status_code == status


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (CHAT | {"model": "other"}, 404, "model_not_found"),
        (CHAT | {"tools": []}, 400, "unsupported_parameter"),
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


def test_a_body_that_is_not_json_is_400() -> None:
    response = Door()("POST", "/v1/completions", content=b"{", headers=JSON)
    assert (response.status_code, code_of(response)) == (400, "invalid_json")


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/admin/fleet", 405, "method_not_allowed"),
    ],
)
def test_a_wrong_address_has_the_same_kind_of_error(
    method: str, path: str, status: int, code: str
) -> None:
    response = Door()(method, path)
    assert (response.status_code, code_of(response)) == (status, code)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (
            RequestRefused(400, "context_length_exceeded", "too long"),
            400,
            "context_length_exceeded",
        ),
        (GenerationFailed("no"), 500, "generation_failed"),
        (EngineStopped(), 503, "engine_stopped"),
        (KeyError("x"), 500, "internal_error"),
    ],
)
def test_what_the_model_refuses_keeps_its_code(fault: Exception, status: int, code: str) -> None:
    response = Door(FakeModel(fault))("POST", "/v1/completions", json=TEXT)
    assert (response.status_code, code_of(response)) == (status, code)
    assert ("retry-after" in response.headers) == (status == 503)


# ---- admin --------------------------------------------------------------------------------------

ADMIN: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/admin/fleet", {}),
    ("GET", "/admin/rollouts", {}),
    ("GET", "/admin/rollouts/rollout-1", {}),
    ("POST", "/admin/rollouts", {"json": {"adapter": "org/pirate"}}),
    ("POST", "/admin/rollouts/rollout-1/abort", {}),
    ("POST", "/admin/undo", {}),
]


def test_every_admin_route_is_in_the_table_above() -> None:
    paths = Door().app.openapi()["paths"]
    routes = {
        (method.upper(), path)
        for path, methods in paths.items()
        for method in methods
        if path.startswith("/admin")
    }
    assert routes == {(m, p.replace("rollout-1", "{id}")) for m, p, _ in ADMIN}


def test_the_fleet_and_the_rollouts_are_what_the_controller_says() -> None:
    door = Door()
    assert FleetView.model_validate_json(door("GET", "/admin/fleet").text) == FLEET
    assert RolloutList.model_validate_json(door("GET", "/admin/rollouts").text).data == [ROLLOUT]
    assert RolloutView.model_validate_json(door("GET", "/admin/rollouts/x").text) == ROLLOUT
    assert door.controller.rollout.asked == [("x",)]


def test_starting_a_rollout_hands_the_plan_to_the_controller() -> None:
    door = Door()
    plan = {"adapter": "org/pirate", "strategy": "all_at_once", "max_unavailable": 2}
    response = door("POST", "/admin/rollouts", json=plan)
    assert response.status_code == 201
    assert RolloutView.model_validate_json(response.text) == ROLLOUT
    assert door.controller.start_rollout.asked == [(Plan.model_validate(plan),)]


def test_abort_and_undo_reach_the_controller() -> None:
    door = Door()
    assert door("POST", "/admin/rollouts/rollout-1/abort").status_code == 200
    assert door("POST", "/admin/undo").status_code == 201
    assert (door.controller.abort.asked, door.controller.undo.asked) == ([("rollout-1",)], [()])


def test_a_plan_with_an_unknown_field_never_reaches_the_controller() -> None:
    door = Door()
    response = door("POST", "/admin/rollouts", json={"adapter": "x", "weight": 5})
    assert (response.status_code, code_of(response)) == (400, "unsupported_parameter")
    assert door.controller.start_rollout.asked == []


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (AdapterNotFound("x", None, "gone"), 400, "adapter_not_found"),
        (NoSuchRollout("rollout-1"), 404, "rollout_not_found"),
        (NothingToUndo(), 409, "nothing_to_undo"),
        (IllegalEvent("a rollout", "no"), 409, "illegal_event"),
        (FleetNotReady(), 503, "fleet_not_ready"),
    ],
)
def test_what_the_controller_refuses_keeps_its_code(
    fault: Exception, status: int, code: str
) -> None:
    door = Door(controller=FakeController(fault))
    for method, path, more in ADMIN:
        response = door(method, path, **more)
        assert (response.status_code, code_of(response)) == (status, code)


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "Basic secret", "Bearer secre"]
)
@pytest.mark.parametrize(("method", "path", "more"), ADMIN)
def test_admin_routes_are_closed_without_the_token(
    method: str, path: str, more: dict[str, Any], header: str | None
) -> None:
    door = Door(admin_token="secret")
    headers = {} if header is None else {"authorization": header}
    response = door(method, path, headers=headers, **more)
    assert (response.status_code, code_of(response)) == (401, "not_authorized")
    assert response.headers["www-authenticate"] == "Bearer"
    asked = [one.asked for one in vars(door.controller).values()]
    assert asked == [[]] * len(asked)


@pytest.mark.parametrize(("method", "path", "more"), ADMIN)
def test_admin_routes_are_open_with_the_token_or_when_there_is_none(
    method: str, path: str, more: dict[str, Any]
) -> None:
    headers = {"authorization": "Bearer secret"}
    assert Door(admin_token="secret")(method, path, headers=headers, **more).is_success
    assert Door()(method, path, **more).is_success


def test_the_token_alone_without_its_scheme_is_not_enough() -> None:
    response = Door(admin_token="secret")(
        "GET", "/admin/fleet", headers={"authorization": "secret"}
    )
    assert response.status_code == 401


def test_the_scheme_may_be_written_in_any_case() -> None:
    headers = {"authorization": "bearer secret"}  # RFC 9110, 11.1
    assert Door(admin_token="secret")("GET", "/admin/fleet", headers=headers).is_success


def test_inference_needs_no_token() -> None:
    assert Door(admin_token="secret")("POST", "/v1/completions", json=TEXT).status_code == 200
