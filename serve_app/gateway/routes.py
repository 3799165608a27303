"""The data routes: OpenAI's endpoints, vLLM's `/classify`, the list of models and the health check.

FastAPI has checked the shape of a request before a route runs. The route calls the Model through
its handle, and sends the document or the chunks that the replica built.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, unquote

from fastapi import APIRouter, Header, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AfterValidator
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.handle import DeploymentHandle

from serve_app.gateway.http_errors import describe, documented
from serve_app.gateway.readiness import Readiness
from serve_app.gateway.request_body import JsonRoute
from serve_app.openai.requests import (
    ChatOrCompletion,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from serve_app.openai.response_schemas import (
    ChatChunk,
    ChatDocument,
    ClassificationList,
    Document,
    EmbeddingList,
    GenerationChunk,
    Health,
    ModelEntry,
    ModelList,
    TextChunk,
    TextDocument,
    success,
)
from serve_app.settings import Settings
from serve_app.wire.admin import FleetView
from serve_app.wire.errors import EngineStopped, NoReplicaReady

logger = logging.getLogger(__name__)

_REVISION_HEADER = "x-adapter-revision"
_UNQUOTED = "!\"#$&'()*+,/:;<=>?@[\\]^`{|}"  # ASCII that a header may have; '%' is not among it
Pin = Annotated[
    str | None,
    Header(
        alias=_REVISION_HEADER,
        min_length=1,
        description="the revision to run on; percent-encoded where it is not ASCII",
    ),
    AfterValidator(unquote),
]
Session = Annotated[
    str | None,
    Header(
        alias="x-session-id",
        min_length=1,
        max_length=1024,
        description="requests of one session stay on the same side of a canary; default: `user`",
    ),
]
InferenceRequest = ChatOrCompletion | EmbeddingRequest | ClassifyRequest
T = TypeVar("T")

_HEALTH_TIMEOUT_S = 5.0
_MAX_ATTEMPTS = 3  # if so many replicas die with a request, the request may be the cause
_REPLICA_DIED = (RayActorError, ActorUnavailableError, EngineStopped)
_STREAM_HEADERS = {"x-accel-buffering": "no", "cache-control": "no-cache"}


class InferenceRoutes:
    """The routes over the handles of the Model and of the controller."""

    def __init__(
        self,
        settings: Settings,
        model: DeploymentHandle,
        controller: DeploymentHandle,
        readiness: Readiness,
    ) -> None:
        self._model_name = settings.model_name
        self._model = model
        self._controller = controller
        self._readiness = readiness

    def router(self) -> APIRouter:
        router = APIRouter(tags=["inference"], route_class=JsonRoute)
        router.get("/health", response_model=Health, responses=documented(503))(self.health)
        router.get("/v1/models", response_model=ModelList)(self.models)
        for path, route, response in (
            ("/v1/chat/completions", self.chat, success(ChatDocument, ChatChunk)),
            ("/v1/completions", self.complete, success(TextDocument, TextChunk)),
            ("/v1/embeddings", self.embeddings, success(EmbeddingList)),
            ("/v1/classify", self.classify, success(ClassificationList)),
        ):
            # no response_model: the replica has built the document, FastAPI must not check it again
            responses = {200: response} | documented(400, 404, 408, 413, 415, 429, 503, 504)
            router.post(path, response_model=None, responses=responses)(route)
        return router

    async def chat(
        self, request: ChatRequest, pin: Pin = None, session: Session = None
    ) -> Response:
        if request.stream:
            return await self._stream(request, pin, session)
        return await self._whole(self._model.chat, request, pin, session)

    async def complete(
        self, request: CompletionRequest, pin: Pin = None, session: Session = None
    ) -> Response:
        if request.stream:
            return await self._stream(request, pin, session)
        return await self._whole(self._model.complete, request, pin, session)

    async def embeddings(
        self, request: EmbeddingRequest, pin: Pin = None, session: Session = None
    ) -> Response:
        return await self._whole(self._model.embeddings, request, pin, session)

    async def classify(
        self, request: ClassifyRequest, pin: Pin = None, session: Session = None
    ) -> Response:
        return await self._whole(self._model.classify, request, pin, session)

    async def models(self) -> ModelList:
        """The base model and every revision that is served now, as values for `model`."""
        fleet: FleetView = await self._controller.fleet.remote()
        name = self._model_name
        live = sorted({each for r in fleet.replicas if r.serving for each in r.serves})
        base: ModelEntry = {"id": name, "object": "model", "created": 0, "owned_by": "hotswap"}
        revisions: list[ModelEntry] = [
            {**base, "id": f"{name}:{revision}", "parent": name, "root": revision}
            for revision in live
        ]
        return {"object": "list", "data": [base, *revisions]}

    async def health(self) -> Health:
        """200 while at least one replica serves, else 503."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                fleet: FleetView = await self._controller.fleet.remote()
                if fleet.ready:
                    return {"status": "ok"}
        raise NoReplicaReady

    async def _whole(
        self, method: Any, request: InferenceRequest, pin: str | None, session: str | None
    ) -> Response:
        async def ask() -> Document:
            call = method.remote(request, pin, session)
            document: Document = await self._readiness.wait(call, call)
            return document

        document = await self._retried(ask)
        return JSONResponse(document, headers=_headers(document))

    async def _stream(
        self, request: ChatOrCompletion, pin: str | None, session: str | None
    ) -> Response:
        async def ask() -> tuple[GenerationChunk, AsyncIterator[GenerationChunk]]:
            chunks = self._model.options(stream=True).stream.remote(request, pin, session)
            return await self._readiness.wait(chunks, anext(aiter(chunks))), chunks

        # the headers are sent after the first chunk, so that a refused request gets its status
        first, chunks = await self._retried(ask)
        return StreamingResponse(
            _events(first, chunks),
            media_type="text/event-stream",
            headers=_headers(first) | _STREAM_HEADERS,
        )

    async def _retried(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Returns `ask()`; asks again if the replica died, for nothing was sent to the client."""
        for attempt in range(_MAX_ATTEMPTS):
            await self._readiness.check()
            try:
                return await ask()
            except _REPLICA_DIED as died:
                if attempt == _MAX_ATTEMPTS - 1:
                    raise
                logger.warning(f"a replica died with a request ({type(died).__name__}): retrying")
        raise AssertionError("the last attempt returns or raises")


def _headers(document: Document | GenerationChunk) -> dict[str, str]:
    return {
        _REVISION_HEADER: quote(document["system_fingerprint"], safe=_UNQUOTED),
        "x-replica-id": document["replica_id"],
    }


async def _events(
    first: GenerationChunk, rest: AsyncIterator[GenerationChunk]
) -> AsyncIterator[str]:
    """Server-sent events. An error after the first chunk is an event too: the status was sent."""
    yield _event(first)
    try:
        async for chunk in rest:
            yield _event(chunk)
    except Exception as error:
        logger.warning(f"a stream failed: {type(error).__name__}")
        yield _event({"error": _stream_error(error)})
        return
    yield "data: [DONE]\n\n"


def _stream_error(error: Exception) -> dict[str, Any]:
    status, detail = describe(error)
    if status == 500:
        detail = detail.model_copy(
            update={"message": "the stream broke off", "code": "stream_broken"}
        )
    return detail.model_dump()


def _event(document: GenerationChunk | dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"
