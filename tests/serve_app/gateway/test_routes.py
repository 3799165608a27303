"""Every route over fake handles: what it asks of whom, what it answers, and every refusal."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import ray.exceptions
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import _DeploymentResponseBase

from hotswap_lib import AdapterNotFound
from serve_app.gateway.json_body import MOST_NAMES
from serve_app.gateway.readiness import Readiness
from serve_app.gateway.routes import Gateway
from serve_app.openai import response_schemas as documents
from serve_app.openai.requests import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from serve_app.openai.responses import (
    NamedToken,
    Piece,
    Responses,
    TokenScore,
    classification_document,
    embedding_document,
)
from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.rollout.plan import Plan
from serve_app.settings import Settings
from serve_app.wire.admin import (
    AdapterList,
    AdapterView,
    ErrorBody,
    FleetView,
    ReplicaView,
    RolloutList,
    RolloutView,
)
from serve_app.wire.errors import (
    AdapterAlreadyLoaded,
    AdapterNotLoaded,
    DeadlineExceeded,
    EngineStopped,
    Fenced,
    FleetNotReady,
    GenerationFailed,
    InvalidRequest,
    KeyReused,
    LanesTaken,
    NothingToUndo,
    PlanImpossible,
    ProbeInvalid,
    RevisionNotServed,
    RolloutNotFound,
)

REVISION = "pirate@11111111"
BESIDE = "terse@33333333"
FLEET = FleetView(
    ready=True,
    epoch=1,
    generation=4,
    stable=REVISION,
    journal_uri="/j",
    replicas=[
        ReplicaView(
            id="r1", revision=REVISION, serves=[REVISION, BESIDE], assigned=REVISION, serving=True
        ),
        ReplicaView(id="r2", revision=REVISION, serves=[REVISION], assigned=REVISION, serving=True),
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
ADAPTER = AdapterView(
    lora_name="terse", lora_path="/terse", revision=BESIDE, generation=4, ready=1, total=2
)
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
TEXT = {"prompt": "hello"}


class Call:
    """What a handle's call gives: awaited, or read chunk by chunk. `taken`: a replica has it."""

    def __init__(self, coroutine: Any, *, taken: bool = True) -> None:
        self._coroutine = coroutine
        self._replica_result_future: asyncio.Future[None] = asyncio.Future()
        if taken:
            self._replica_result_future.set_result(None)

    def __await__(self) -> Any:
        return self._coroutine.__await__()

    def __aiter__(self) -> Any:
        return self._coroutine


class Method:
    """One method of a handle: answers, or raises what it was told to, or waits for `gate`."""

    def __init__(self, answer: Callable[..., Any], fault: Exception | None = None) -> None:
        self.answer, self.fault = answer, fault
        self.asked: list[tuple[Any, ...]] = []
        self.named: list[dict[str, Any]] = []
        self.seconds: float = 0.0
        self.taken = True
        self.cancelled = 0

    def remote(self, *arguments: Any, **named: Any) -> Call:
        self.asked.append(arguments)
        self.named.append(named)
        return Call(self._result(*arguments), taken=self.taken)

    async def _result(self, *arguments: Any) -> Any:
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fault is not None:
            raise self.fault
        return self.answer(*arguments)


class StreamMethod:
    """Chunks one by one; `breaks_after`: so many, then it raises `breaks_with`."""

    def __init__(self, answer: Callable[..., Any], fault: Exception | None = None) -> None:
        self.answer, self.fault = answer, fault
        self.asked: list[tuple[Any, ...]] = []
        self.breaks_after: int | None = None
        self.breaks_with: Exception = ConnectionError("gone")

    def remote(self, *arguments: Any) -> Call:
        self.asked.append(arguments)
        return Call(self._chunks(arguments[0]))

    async def _chunks(self, request: Any) -> AsyncIterator[dict[str, Any]]:
        if self.fault is not None:
            raise self.fault
        for chunk in self.answer(request)[: self.breaks_after]:
            yield chunk
        if self.breaks_after is not None:
            raise self.breaks_with


class FakeModel:
    def __init__(self, fault: Exception | None = None, *, revision: str = REVISION) -> None:
        self.revision = revision
        self.chat = Method(self.whole, fault)
        self.complete = Method(self.whole, fault)
        self.embeddings = Method(embedded, fault)
        self.classify = Method(classified, fault)
        self.stream = StreamMethod(self.chunks, fault)

    def options(self, *, stream: bool) -> FakeModel:
        assert stream
        return self

    def responses(self, request: ChatRequest | CompletionRequest) -> Responses:
        return Responses(request, [[1]], model="tiny", revision=self.revision, replica="r1")

    def whole(
        self,
        request: ChatRequest | CompletionRequest,
        _pin: str | None = None,
        _session: str | None = None,
    ) -> dict[str, Any]:
        piece = Piece(index=0, text="hi", token_ids=[2], scores=SCORES, reason="stop")
        return self.responses(request).whole([piece])

    def chunks(self, request: ChatRequest | CompletionRequest) -> list[dict[str, Any]]:
        maker = self.responses(request)
        return [
            maker.first(0),
            maker.piece(Piece(index=0, text="hé\n\ndata: x", token_ids=[2], scores=SCORES)),
            maker.piece(Piece(index=0, reason="stop")),
        ]


SCORES = [TokenScore(NamedToken("h", b"h", -0.5), [NamedToken("h", b"h", -0.5)], 0)]
NAMES = {"model": "tiny", "revision": REVISION, "replica": "r1"}


def embedded(request: EmbeddingRequest, *_: str | None) -> dict[str, Any]:
    return embedding_document(request, [[0.5]] * len(request.input), tokens=3, **NAMES)


def classified(request: ClassifyRequest, *_: str | None) -> dict[str, Any]:
    probs = [[0.25, 0.75]] * len(request.input)
    return classification_document(request, probs, ["bad", "good"], tokens=3, **NAMES)


class FakeController:
    def __init__(self, fault: Exception | None = None, fleet: FleetView = FLEET) -> None:
        self.fleet = Method(lambda: fleet, fault)
        self.rollouts = Method(lambda: [ROLLOUT], fault)
        self.rollout = Method(lambda _id: ROLLOUT, fault)
        self.start_rollout = Method(lambda _plan: ROLLOUT, fault)
        self.promote = Method(lambda _id: ROLLOUT, fault)
        self.abort = Method(lambda _id: ROLLOUT, fault)
        self.pause = Method(lambda _id: ROLLOUT, fault)
        self.resume = Method(lambda _id: ROLLOUT, fault)
        self.retry = Method(lambda _id: ROLLOUT, fault)
        self.undo = Method(lambda: ROLLOUT, fault)
        self.load_adapter = Method(lambda _name, _path: ADAPTER, fault)
        self.unload_adapter = Method(lambda _name: ADAPTER, fault)
        self.adapters = Method(lambda: [ADAPTER], fault)


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
        readiness = Readiness(both[1], patience_s=0.01, look_s=0.01)
        self.app = Gateway(
            Settings(served_model_name="tiny", **settings), *both, readiness=readiness
        ).app()

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
    [[request, pin, session]] = door.model.chat.asked
    assert (pin, session) == (None, None)
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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeadlineExceeded(1.0), "deadline_exceeded"),
        (ray.exceptions.ActorDiedError(), "replica_died"),
        (GenerationFailed("no"), "stream_broken"),
    ],
)
def test_a_stream_that_breaks_says_why_where_the_client_can_do_something(
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
        f"tiny:{BESIDE}",
    ]
    assert document["object"] == "list"
    assert document["data"][1]["parent"] == "tiny"


def test_openais_client_reads_the_list_of_models() -> None:
    from openai.types import Model

    for entry in Door()("GET", "/v1/models").json()["data"]:
        assert Model.model_validate(entry, strict=True).object == "model"


def test_health_is_whether_anybody_serves() -> None:
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


def test_a_body_that_is_not_json_is_400() -> None:
    response = Door()("POST", "/v1/completions", content=b"{", headers=JSON)
    assert (response.status_code, code_of(response)) == (400, "invalid_json")


JSON = {"content-type": "application/json"}
MALFORMED = {
    "nothing": b"",
    "nan": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": -Infinity}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a name twice": b'{"prompt": "x", "prompt": "y"}',
    "too deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too deep in objects": b'{"a": ' * 100_000,
    "too many digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "too many names": json.dumps({str(i): 0 for i in range(MOST_NAMES + 1)}).encode(),
    "two documents": b"{}{}",
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("path", ["/v1/completions", "/admin/rollouts", "/v1/load_lora_adapter"])
def test_a_malformed_body_is_400_and_reaches_nobody(path: str, kind: str) -> None:
    door = Door()
    response = door("POST", path, content=MALFORMED[kind], headers=JSON)
    assert (response.status_code, code_of(response)) == (400, "invalid_json")
    assert (door.model.complete.asked, door.controller.start_rollout.asked) == ([], [])


def test_a_body_may_begin_with_a_byte_order_mark() -> None:
    content = b"\xef\xbb\xbf" + json.dumps(TEXT).encode()
    assert Door()("POST", "/v1/completions", content=content, headers=JSON).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
def test_a_body_of_another_type_is_415(kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    content = json.dumps(TEXT).encode()
    response = Door()("POST", "/v1/completions", content=content, headers=headers)
    assert (response.status_code, code_of(response)) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_written_in_many_ways(kind: str) -> None:
    content = json.dumps(TEXT).encode()
    response = Door()("POST", "/v1/completions", content=content, headers={"content-type": kind})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        [],
        "text",
        None,
        7,
        TEXT | {"\ud800": 1},
        TEXT | {"": 1},
        TEXT | {"\n": 1},
        TEXT | {"x" * 100_000: 1},
        TEXT | {"stop": ["\ud800"]},
        TEXT | {"max_tokens": 10.5},
        {"prompt": "\ud800"},
        {"prompt": ""},
        {"prompt": {}},
        {"prompt": [[1], [-1]]},
    ],
    ids=ascii,
)
def test_a_body_that_makes_no_sense_is_400_in_one_short_sentence(body: Any) -> None:
    content = json.dumps(body).encode()
    response = Door()("POST", "/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    message = ErrorBody.model_validate_json(response.text).error.message
    assert message.strip()
    assert len(message) <= 1000


def test_a_million_mistakes_are_one_error() -> None:
    door = Door()
    for body in (
        {"messages": [1] * 10**6},
        {"messages": [{"role": "user", "content": [0] * 10**6}]},
    ):
        response = door("POST", "/v1/chat/completions", json=body)
        assert (response.status_code, code_of(response)) == (400, "invalid_parameter")


def test_a_name_that_is_no_unicode_comes_back_as_what_can_be_sent() -> None:
    fault = RevisionNotServed("x", ("\ud800@1",))
    response = Door(FakeModel(fault))("POST", "/v1/completions", json=TEXT)
    assert (response.status_code, code_of(response)) == (404, "model_not_found")


# ---- revisions ----------------------------------------------------------------------------------

ASKED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", CHAT, "chat"),
    ("/v1/completions", TEXT, "complete"),
    ("/v1/embeddings", {"input": "hello"}, "embeddings"),
    ("/v1/classify", {"input": ["hello"]}, "classify"),
]


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


def test_a_session_as_long_as_a_novel_is_refused() -> None:
    response = Door()("POST", "/v1/completions", json=TEXT, headers={"x-session-id": "s" * 1025})
    assert (response.status_code, code_of(response)) == (400, "invalid_parameter")


@pytest.mark.parametrize("more", [{}, {"stream": True}])
@pytest.mark.parametrize("name", ["пират@11111111", "50%25@11111111", "é%@11111111"])
def test_a_revision_of_any_name_goes_through_the_headers_there_and_back(
    name: str, more: dict[str, Any]
) -> None:
    door = Door(FakeModel(revision=name))
    response = door("POST", "/v1/completions", json=TEXT | more)
    sent = response.headers["x-adapter-revision"]
    assert sent.isascii()
    door("POST", "/v1/completions", json=TEXT | more, headers={"x-adapter-revision": sent})
    asked = door.model.stream.asked if more else door.model.complete.asked
    assert asked[1][1] == name


def test_a_header_that_is_not_ascii_is_only_a_revision_that_nobody_serves() -> None:
    door = Door()
    headers = {b"x-adapter-revision": b"\xff\xfe"}
    assert door("POST", "/v1/completions", json=TEXT, headers=headers).status_code == 200
    assert door.model.complete.asked[0][1] == "\xff\xfe"


# ---- nobody there -------------------------------------------------------------------------------

NOBODY = FLEET.model_copy(update={"ready": False, "replicas": []})


@pytest.mark.parametrize(("path", "body", "method"), ASKED)
def test_while_a_fleet_starts_requests_are_refused_at_once(
    path: str, body: dict[str, Any], method: str
) -> None:
    door = Door(controller=FakeController(fleet=NOBODY))
    response = door("POST", path, json=body)
    assert (response.status_code, code_of(response)) == (503, "not_ready")
    assert response.headers["retry-after"] == "1"
    assert getattr(door.model, method).asked == []


def test_nobody_asks_the_controller_while_replicas_answer() -> None:
    door = Door()
    for _ in range(3):
        door("POST", "/v1/completions", json=TEXT)
    assert len(door.controller.fleet.asked) == 1


def test_a_request_that_waits_is_refused_once_nobody_is_left() -> None:
    model = FakeModel()
    model.complete.seconds, model.complete.taken = 60, False
    fleets = iter([FLEET, FLEET, FLEET])
    controller = FakeController()
    controller.fleet.answer = lambda: next(fleets, NOBODY)
    response = Door(model, controller)("POST", "/v1/completions", json=TEXT)
    assert (response.status_code, code_of(response)) == (503, "not_ready")
    assert model.complete.cancelled == 1
    assert len(controller.fleet.asked) >= 3


def test_a_request_waits_for_a_replica_that_drains() -> None:
    model = FakeModel()
    model.complete.seconds, model.complete.taken = 0.2, False
    assert Door(model)("POST", "/v1/completions", json=TEXT).status_code == 200


def test_what_a_replica_runs_is_left_alone_whatever_the_controller_hears() -> None:
    model = FakeModel()
    model.complete.seconds = 0.2
    fleets = iter([FLEET])
    controller = FakeController()
    controller.fleet.answer = lambda: next(fleets, NOBODY)
    assert Door(model, controller)("POST", "/v1/completions", json=TEXT).status_code == 200


def test_a_controller_that_is_gone_keeps_nobody_from_asking() -> None:
    controller = FakeController(ray.exceptions.ActorDiedError())
    door = Door(controller=controller)
    assert door("POST", "/v1/completions", json=TEXT).status_code == 200


# ---- replicas that die --------------------------------------------------------------------------

DIED = [
    ray.exceptions.ActorDiedError(),
    ray.exceptions.ActorUnavailableError("gone for now", None),
    EngineStopped(),
]


class Dying:
    """A method of a handle whose first calls end with their replica."""

    def __init__(self, method: Any, *deaths: Exception) -> None:
        self.method, self.deaths = method, list(deaths)
        self.asked = method.asked

    def remote(self, *arguments: Any) -> Call:
        self.method.fault = self.deaths.pop(0) if self.deaths else None
        call: Call = self.method.remote(*arguments)
        return call


@pytest.mark.parametrize("death", DIED, ids=lambda death: type(death).__name__)
@pytest.mark.parametrize(("path", "body", "method"), ASKED)
def test_a_request_whose_replica_died_is_asked_again(
    path: str, body: dict[str, Any], method: str, death: Exception
) -> None:
    door = Door()
    dying = Dying(getattr(door.model, method), death, death)
    setattr(door.model, method, dying)
    headers = {"x-adapter-revision": REVISION, "x-session-id": "s-1"}
    assert door("POST", path, json=body, headers=headers).status_code == 200
    assert [(pin, session) for _, pin, session in dying.asked] == [(REVISION, "s-1")] * 3


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_a_request_that_has_cost_three_replicas_is_not_asked_again(more: dict[str, Any]) -> None:
    door = Door()
    door.model.complete.fault = door.model.stream.fault = ray.exceptions.ActorDiedError()
    response = door("POST", "/v1/completions", json=TEXT | more)
    assert (response.status_code, code_of(response)) == (503, "replica_died")
    assert len(door.model.complete.asked) + len(door.model.stream.asked) == 3


class DyingStream(StreamMethod):
    """`deaths`: for each call, after how many chunks its replica dies; then none does."""

    def __init__(self, answer: Callable[..., Any], *deaths: int) -> None:
        super().__init__(answer)
        self.deaths = list(deaths)
        self.breaks_with = ray.exceptions.ActorDiedError()

    def remote(self, *arguments: Any) -> Call:
        self.asked.append(arguments)
        return Call(self._until_death(arguments[0], self.deaths.pop(0) if self.deaths else None))

    async def _until_death(self, request: Any, death: int | None) -> AsyncIterator[dict[str, Any]]:
        for chunk in self.answer(request)[:death]:
            yield chunk
        if death is not None:
            raise self.breaks_with


def test_a_stream_whose_replica_died_before_its_first_chunk_begins_on_another() -> None:
    door = Door()
    stream: Any = DyingStream(door.model.chunks, 0, 0)
    door.model.stream = stream
    response = door("POST", "/v1/completions", json=TEXT | {"stream": True})
    assert events(response)[-1] == "[DONE]"
    assert (len(events(response)), len(stream.asked)) == (4, 3)


def test_a_stream_whose_replica_died_after_its_first_chunk_is_not_begun_again() -> None:
    door = Door()
    stream: Any = DyingStream(door.model.chunks, 1)
    door.model.stream = stream
    response = door("POST", "/v1/completions", json=TEXT | {"stream": True})
    first, last = events(response)
    assert "error" not in json.loads(first)
    assert json.loads(last)["error"]["code"] == "replica_died"
    assert len(stream.asked) == 1


@pytest.mark.parametrize(
    "fault",
    [
        GenerationFailed("no"),
        DeadlineExceeded(3.0),
        RevisionNotServed("x", (REVISION,)),
        InvalidRequest(400, "context_length_exceeded", "too long"),
        BackPressureError(num_queued_requests=1, max_queued_requests=1),
    ],
    ids=lambda fault: type(fault).__name__,
)
@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_what_would_fail_again_is_asked_once(fault: Exception, more: dict[str, Any]) -> None:
    door = Door(FakeModel(fault))
    assert not door("POST", "/v1/completions", json=TEXT | more).is_success
    assert len(door.model.complete.asked) + len(door.model.stream.asked) == 1


def test_a_request_whose_last_replica_died_is_told_that_nobody_is_there() -> None:
    model = FakeModel(ray.exceptions.ActorDiedError())
    fleets = iter([FLEET])
    controller = FakeController()
    controller.fleet.answer = lambda: next(fleets, NOBODY)
    door = Door(model, controller)
    door("POST", "/v1/completions", json=TEXT)
    response = door("POST", "/v1/completions", json=TEXT)
    assert response.status_code == 503


# ---- wrong addresses and refusals ---------------------------------------------------------------


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


def test_a_wrong_method_is_told_all_the_right_ones() -> None:
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
def test_what_the_model_refuses_keeps_its_code(fault: Exception, status: int, code: str) -> None:
    response = Door(FakeModel(fault))("POST", "/v1/completions", json=TEXT)
    assert (response.status_code, code_of(response)) == (status, code)
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_what_serve_does_with_a_full_queue_in_any_fastapi_changes_nothing() -> None:
    full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    door = Door(FakeModel(full))
    door.app.add_exception_handler(BackPressureError, lambda *_: PlainTextResponse("no", 503))
    for more in ({}, {"stream": True}):
        response = door("POST", "/v1/completions", json=TEXT | more)
        assert (response.status_code, code_of(response)) == (429, "too_many_requests")


# ---- admin --------------------------------------------------------------------------------------

ADMIN: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/admin/fleet", {}),
    ("GET", "/admin/rollouts", {}),
    ("GET", "/admin/rollouts/rollout-1", {}),
    ("POST", "/admin/rollouts", {"json": {"adapter": "org/pirate"}}),
    *(
        ("POST", f"/admin/rollouts/rollout-1/{verb}", {})
        for verb in ("promote", "abort", "pause", "resume", "retry")
    ),
    ("POST", "/admin/undo", {}),
    ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "terse", "lora_path": "/terse"}}),
    ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": "terse"}}),
    ("GET", "/v1/lora_adapters", {}),
]


def test_every_admin_route_is_in_the_table_above() -> None:
    paths = Door().app.openapi()["paths"]
    routes = {
        (method.upper(), path)
        for path, methods in paths.items()
        for method in methods
        if path.startswith("/admin") or "lora" in path
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
    guards = {"expected_generation": None, "key": None}
    assert door.controller.start_rollout.named == [guards]
    path, headers = "/admin/rollouts?expected_generation=0", {"idempotency-key": "k"}
    assert door("POST", path, json=plan, headers=headers).status_code == 201
    assert door.controller.start_rollout.named[1] == {"expected_generation": 0, "key": "k"}


CONTROL = [
    ("/admin/rollouts/rollout-1/promote", "promote", ("rollout-1",), {"full": False}),
    ("/admin/rollouts/rollout-1/abort", "abort", ("rollout-1",), {}),
    ("/admin/rollouts/rollout-1/pause", "pause", ("rollout-1",), {}),
    ("/admin/rollouts/rollout-1/resume", "resume", ("rollout-1",), {}),
    ("/admin/rollouts/rollout-1/retry", "retry", ("rollout-1",), {}),
    ("/admin/undo", "undo", (), {"to": None}),
]


@pytest.mark.parametrize(("path", "verb", "arguments", "more"), CONTROL)
def test_a_verb_reaches_the_controller_with_its_key_and_the_generation_that_was_seen(
    path: str, verb: str, arguments: tuple[str, ...], more: dict[str, Any]
) -> None:
    door = Door()
    assert door("POST", path).is_success
    headers = {"idempotency-key": "nightly 7"}
    assert door("POST", f"{path}?expected_generation=4", headers=headers).is_success
    method = getattr(door.controller, verb)
    assert method.asked == [arguments, arguments]
    assert method.named == [
        more | {"expected_generation": None, "key": None},
        more | {"expected_generation": 4, "key": "nightly 7"},
    ]


def test_a_full_promotion_and_an_undo_to_a_revision_say_so_in_the_query() -> None:
    door = Door()
    assert door("POST", "/admin/rollouts/rollout-1/promote?full=true").status_code == 200
    assert door.controller.promote.named[0]["full"] is True
    assert door("POST", "/admin/undo", params={"to": "pirate@11111111"}).status_code == 201
    assert door.controller.undo.named[0]["to"] == "pirate@11111111"


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?expected_generation=new", {}),
        ("?expected_generation=", {}),
        ("", {"idempotency-key": ""}),
        ("", {"idempotency-key": "k" * 257}),
    ],
)
def test_a_guard_that_makes_no_sense_is_refused_and_not_ignored(
    query: str, headers: dict[str, str]
) -> None:
    door = Door()
    for path, verb, *_ in CONTROL:
        response = door("POST", f"{path}{query}", headers=headers)
        assert (response.status_code, code_of(response)) == (400, "invalid_parameter")
        assert getattr(door.controller, verb).asked == []


def test_loading_and_unloading_reach_the_controller_with_everything_that_was_said() -> None:
    door = Door()
    load = {"lora_name": "terse", "lora_path": "/terse", "load_inplace": True}
    response = door("POST", "/v1/load_lora_adapter", json=load | {"expected_generation": 4})
    assert AdapterView.model_validate_json(response.text) == ADAPTER
    assert door.controller.load_adapter.asked == [("terse", "/terse")]
    named = [{"load_inplace": True, "expected_generation": 4}]
    assert door.controller.load_adapter.named == named
    assert door("POST", "/v1/unload_lora_adapter", json={"lora_name": "terse"}).is_success
    assert door.controller.unload_adapter.asked == [("terse",)]
    assert door.controller.unload_adapter.named == [{"expected_generation": None}]


def test_the_loaded_adapters_come_with_the_generation_of_the_fleet() -> None:
    listed = AdapterList.model_validate_json(Door()("GET", "/v1/lora_adapters").text)
    assert (listed.data, listed.generation) == ([ADAPTER], 4)


def test_a_plan_with_an_unknown_field_never_reaches_the_controller() -> None:
    door = Door()
    response = door("POST", "/admin/rollouts", json={"adapter": "x", "weight": 5})
    assert (response.status_code, code_of(response)) == (400, "unsupported_parameter")
    assert door.controller.start_rollout.asked == []


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (AdapterNotFound("x", None, "gone"), 400, "adapter_not_found"),
        (RolloutNotFound("rollout-1"), 404, "rollout_not_found"),
        (NothingToUndo(), 409, "nothing_to_undo"),
        (IllegalEvent("a rollout", "no"), 409, "illegal_event"),
        (GenerationMismatch(3, 4), 409, "generation_mismatch"),
        (AdapterAlreadyLoaded("terse", "terse@1", "terse@2"), 409, "adapter_already_loaded"),
        (AdapterNotLoaded("terse"), 404, "adapter_not_loaded"),
        (FleetNotReady(), 503, "fleet_not_ready"),
        (Fenced(3, 4), 503, "controller_replaced"),
        (PlanImpossible("no"), 400, "plan_impossible"),
        (ProbeInvalid("a:b", "is not there"), 400, "probe_invalid"),
        (KeyReused("k"), 409, "idempotency_key_reused"),
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


# ---- documentation ------------------------------------------------------------------------------


def test_every_answer_is_what_the_documentation_says() -> None:
    door = Door()
    kinds: list[type[BaseModel]] = [
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
            kind.model_validate_json(door("POST", path, json=body | more).text, strict=True)
    documents.ModelList.model_validate_json(door("GET", "/v1/models").text, strict=True)


def test_every_chunk_is_what_the_documentation_says() -> None:
    door = Door()
    more = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    cases: list[tuple[str, dict[str, Any], type[BaseModel]]] = [
        ("/v1/chat/completions", CHAT | {"logprobs": True}, documents.ChatChunk),
        ("/v1/completions", TEXT | {"logprobs": 1}, documents.TextChunk),
    ]
    for path, body, kind in cases:
        *chunks, _ = events(door("POST", path, json=body | more))
        for chunk in chunks:
            kind.model_validate_json(chunk, strict=True)


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


def test_ray_still_says_when_a_replica_has_taken_a_call() -> None:
    made = inspect.getsource(_DeploymentResponseBase.__init__)
    assert "self._replica_result_future" in made, "a handle's call keeps that elsewhere now"
