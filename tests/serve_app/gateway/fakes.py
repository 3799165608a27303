"""Fakes of the handles of the Model and the controller, and the application over them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import Any

import httpx
from fastapi import FastAPI

from serve_app.gateway.deployment import build_app
from serve_app.gateway.readiness import Readiness
from serve_app.openai.encoder_responses import classification_document, embedding_document
from serve_app.openai.requests import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from serve_app.openai.response_schemas import (
    ClassificationList,
    EmbeddingList,
    GenerationChunk,
    GenerationDocument,
)
from serve_app.openai.responses import (
    NamedToken,
    Piece,
    Responses,
    TokenScore,
    responses_to,
)
from serve_app.settings import Settings
from serve_app.wire.admin import (
    AdapterView,
    ErrorBody,
    FleetView,
    ReplicaView,
    RolloutView,
)

REVISION = "pirate@11111111"


LOADED = "terse@33333333"


FLEET = FleetView(
    ready=True,
    epoch=1,
    generation=4,
    stable=REVISION,
    journal_uri="/j",
    replicas=[
        ReplicaView(
            id="r1", revision=REVISION, serves=[REVISION, LOADED], assigned=REVISION, serving=True
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
    lora_name="terse", lora_path="/terse", revision=LOADED, generation=4, ready=1, total=2
)


CHAT = {"messages": [{"role": "user", "content": "hello"}]}


TEXT = {"prompt": "hello"}


class Call:
    """The result of a handle's call: awaited, or read chunk by chunk."""

    def __init__(self, coroutine: Any, *, assigned: bool = True) -> None:
        self._coroutine = coroutine
        self._replica_result_future: asyncio.Future[None] = asyncio.Future()
        if assigned:  # a replica has accepted the call
            self._replica_result_future.set_result(None)

    def __await__(self) -> Any:
        return self._coroutine.__await__()

    def __aiter__(self) -> Any:
        return self._coroutine


class Method:
    """One method of a handle: waits `seconds`, then raises `fault` or returns `answer(...)`."""

    def __init__(self, answer: Callable[..., Any], fault: Exception | None = None) -> None:
        self.answer, self.fault = answer, fault
        self.asked: list[tuple[Any, ...]] = []
        self.named: list[dict[str, Any]] = []
        self.seconds: float = 0.0
        self.assigned = True
        self.cancelled = 0

    def remote(self, *arguments: Any, **named: Any) -> Call:
        self.asked.append(arguments)
        self.named.append(named)
        return Call(self._result(*arguments), assigned=self.assigned)

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
    """A streaming method of a handle: raises `breaks_with` after `breaks_after` chunks, if set."""

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
        return responses_to(request, [[1]], model="tiny", revision=self.revision, replica="r1")

    def whole(
        self,
        request: ChatRequest | CompletionRequest,
        _pin: str | None = None,
        _session: str | None = None,
    ) -> GenerationDocument:
        piece = Piece(index=0, text="hi", token_ids=[2], scores=SCORES, reason="stop")
        return self.responses(request).whole([piece])

    def chunks(self, request: ChatRequest | CompletionRequest) -> list[GenerationChunk]:
        maker = self.responses(request)
        return [
            maker.first(0),
            maker.piece(Piece(index=0, text="hé\n\ndata: x", token_ids=[2], scores=SCORES)),
            maker.piece(Piece(index=0, reason="stop")),
        ]


SCORES = [TokenScore(NamedToken("h", b"h", -0.5), [NamedToken("h", b"h", -0.5)], 0)]


NAMES = {"model": "tiny", "revision": REVISION, "replica": "r1"}


def embedded(request: EmbeddingRequest, *_: str | None) -> EmbeddingList:
    return embedding_document(request, [[0.5]] * len(request.input), tokens=3, **NAMES)


def classified(request: ClassifyRequest, *_: str | None) -> ClassificationList:
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


class Forward:
    """Forwards to `target`, which is set before each call: the application is built once."""

    target: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


@cache
def _app(**settings: Any) -> tuple[FastAPI, Forward, Forward, Forward]:
    forwards: Any = Forward(), Forward(), Forward()
    model, controller, readiness = forwards
    app = build_app(
        Settings(served_model_name="tiny", **settings),
        model=model,
        controller=controller,
        readiness=readiness,
    )
    return app, model, controller, readiness


class Door:
    """The application over fakes, called in this process."""

    def __init__(
        self,
        model: FakeModel | None = None,
        controller: FakeController | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.controller = model or FakeModel(), controller or FakeController()
        handle: Any = self.controller
        self.readiness = Readiness(handle, patience_s=0.01, max_age_s=0.01)
        self.app, *self._forwards = _app(**settings)

    def __call__(self, method: str, path: str, **request: Any) -> httpx.Response:
        targets = (self.model, self.controller, self.readiness)
        for forward, target in zip(self._forwards, targets, strict=True):
            forward.target = target

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                return await client.request(method, path, **request)

        return asyncio.run(send())


def code_of(response: httpx.Response) -> str:
    return ErrorBody.model_validate_json(response.text).error.code


def events(response: httpx.Response) -> list[str]:
    *whole_events, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in whole_events)
    return [event.removeprefix("data: ") for event in whole_events]


ASKED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", CHAT, "chat"),
    ("/v1/completions", TEXT, "complete"),
    ("/v1/embeddings", {"input": "hello"}, "embeddings"),
    ("/v1/classify", {"input": ["hello"]}, "classify"),
]
