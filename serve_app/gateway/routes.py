"""The HTTP front door: OpenAI's routes for clients, admin routes for operators.

Thin on purpose: it checks the shape of a request, calls the Model or the RolloutController through
its handle, and weight_lock typed errors into OpenAI's envelope. It holds no state.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, unquote

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.handle import DeploymentHandle

from serve_app.gateway.body_limit import BodyLimit
from serve_app.gateway.http_errors import ERRORS, describe, documented, install_error_handlers
from serve_app.gateway.json_body import JsonRoute
from serve_app.gateway.readiness import Readiness
from serve_app.openai.requests import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from serve_app.openai.response_schemas import (
    ChatChunk,
    ChatDocument,
    ClassificationList,
    EmbeddingList,
    Health,
    ModelList,
    TextChunk,
    TextDocument,
    answered,
    with_chunks,
)
from serve_app.rollout.plan import Plan
from serve_app.settings import Settings
from serve_app.wire.admin import (
    AdapterList,
    AdapterView,
    FleetView,
    LoadAdapter,
    RolloutList,
    RolloutView,
    UnloadAdapter,
)
from serve_app.wire.errors import EngineStopped, NoReplicaReady, NotAuthorized

logger = logging.getLogger(__name__)
_BEARER = HTTPBearer(auto_error=False)
Pin = Annotated[
    str | None,
    Header(
        alias="x-adapter-revision",
        min_length=1,
        description="the revision to run on; percent-encoded where it is not ASCII",
    ),
]
Session = Annotated[
    str | None,
    Header(
        alias="x-session-id",
        min_length=1,
        max_length=1024,
        description="requests of one session stay on one side of a canary; else `user` is taken",
    ),
]
Expected = Annotated[
    int | None,
    Query(
        alias="expected_generation",
        description="refuse with 409 when the fleet's generation is another one",
    ),
]
Key = Annotated[
    str | None,
    Header(
        alias="idempotency-key",
        min_length=1,
        max_length=256,
        description="your own name for this request; a second one with it changes nothing",
    ),
]
_PLAIN = "!\"#$&'()*+,/:;<=>?@[\\]^`{|}"  # stays as it is in a header; % does not
_HEALTH_S = 5.0
_ATTEMPTS = 3  # replicas that die with the same request may do so because of it
_REPLICA_DIED = (RayActorError, ActorUnavailableError, EngineStopped)
T = TypeVar("T")
_Request = ChatRequest | CompletionRequest | EmbeddingRequest | ClassifyRequest
_STREAM = {"x-accel-buffering": "no", "cache-control": "no-cache"}


class Gateway:
    """The routes over two handles. `app()` builds the FastAPI application."""

    def __init__(
        self,
        settings: Settings,
        model: DeploymentHandle,
        controller: DeploymentHandle,
        *,
        readiness: Readiness | None = None,
    ) -> None:
        self._settings = settings
        self._model = model
        self._controller = controller
        self._readiness = readiness or Readiness(controller)

    def app(self) -> FastAPI:
        # slashes are not made up for: the redirect would not be in OpenAI's shapes
        app = FastAPI(
            title="hotswap",
            summary="Live LoRA adapters on a fleet",
            responses=ERRORS,
            redirect_slashes=False,
        )
        install_error_handlers(app)
        app.add_middleware(BodyLimit, limit=self._settings.max_body_bytes)
        app.include_router(self._data_routes())
        app.include_router(self._admin_routes())
        app.include_router(self._adapter_routes())
        app.openapi = _documentation(app)  # type: ignore[method-assign]
        return app

    def _data_routes(self) -> APIRouter:
        router = APIRouter(tags=["inference"], route_class=JsonRoute)
        router.get("/health", response_model=Health, responses=documented(503))(self.health)
        router.get("/v1/models", response_model=ModelList, response_model_exclude_none=True)(
            self.models
        )
        for path, answer, ok in (
            ("/v1/chat/completions", self.chat, answered(ChatDocument, ChatChunk)),
            ("/v1/completions", self.complete, answered(TextDocument, TextChunk)),
            ("/v1/embeddings", self.embeddings, answered(EmbeddingList)),
            ("/v1/classify", self.classify, answered(ClassificationList)),
        ):
            # the document is made by the replica, so nothing is left for FastAPI to serialize
            responses = {200: ok} | documented(400, 404, 408, 413, 415, 429, 503, 504)
            router.post(path, response_model=None, responses=responses)(answer)
        return router

    def _adapter_routes(self) -> APIRouter:
        """vLLM's routes for adapters beside the default."""
        router = self._operators_router("/v1", tag="adapters")
        body = documented(400, 404, 408, 409, 413, 415, 503, 504)
        router.post("/load_lora_adapter", responses=body)(self.load_adapter)
        router.post("/unload_lora_adapter", responses=body)(self.unload_adapter)
        router.get("/lora_adapters")(self.adapters)
        return router

    def _admin_routes(self) -> APIRouter:
        router = self._operators_router("/admin", tag="admin")
        body = documented(400, 408, 409, 413, 415, 503)
        router.get("/fleet")(self.fleet)
        router.get("/rollouts")(self.rollouts)
        router.get("/rollouts/{id}", responses=documented(404))(self.rollout)
        router.post("/rollouts", status_code=201, responses=body)(self.start)
        for verb in (self.promote, self.abort, self.pause, self.resume, self.retry):
            path = f"/rollouts/{{id}}/{verb.__name__}"
            router.post(path, responses=documented(404, 409))(verb)
        router.post("/undo", status_code=201, responses=documented(409))(self.undo)
        return router

    def _operators_router(self, prefix: str, *, tag: str) -> APIRouter:
        """Routes behind the token, where there is one."""
        closed = self._settings.admin_token is not None
        return APIRouter(
            prefix=prefix,
            tags=[tag],
            route_class=JsonRoute,
            dependencies=[Depends(self._authorize)] if closed else [],
            responses=documented(401) if closed else {},
        )

    # ---- inference --------------------------------------------------------------------------

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

    async def models(self) -> dict[str, Any]:
        """The base model's name, and every revision that is live now, as a name to ask for."""
        fleet: FleetView = await self._controller.fleet.remote()
        name = self._settings.model_name
        live = sorted({each for r in fleet.replicas if r.serving for each in r.serves})
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "hotswap"}]
        entries += [
            {"id": f"{name}:{revision}", "object": "model", "created": 0, "owned_by": "hotswap"}
            | {"parent": name, "root": revision}
            for revision in live
        ]
        return {"object": "list", "data": entries}

    async def health(self) -> Health:
        """200 while at least one replica serves, else 503."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_HEALTH_S):
                fleet: FleetView = await self._controller.fleet.remote()
                if fleet.ready:
                    return Health(status="ok")
        raise NoReplicaReady

    # ---- admin ------------------------------------------------------------------------------

    async def fleet(self) -> FleetView:
        return await self._controller.fleet.remote()  # type: ignore[no-any-return]

    async def rollouts(self) -> RolloutList:
        return RolloutList(data=await self._controller.rollouts.remote())

    async def rollout(self, id: str) -> RolloutView:
        return await self._controller.rollout.remote(id)  # type: ignore[no-any-return]

    async def start(self, plan: Plan, expected: Expected = None, key: Key = None) -> RolloutView:
        return await self._controller.start_rollout.remote(  # type: ignore[no-any-return]
            plan, expected_generation=expected, key=key
        )

    async def promote(
        self,
        id: str,
        full: Annotated[bool, Query(description="every step that is left, not one")] = False,
        expected: Expected = None,
        key: Key = None,
    ) -> RolloutView:
        return await self._controller.promote.remote(  # type: ignore[no-any-return]
            id, full=full, expected_generation=expected, key=key
        )

    async def abort(self, id: str, expected: Expected = None, key: Key = None) -> RolloutView:
        return await self._controller.abort.remote(  # type: ignore[no-any-return]
            id, expected_generation=expected, key=key
        )

    async def pause(self, id: str, expected: Expected = None, key: Key = None) -> RolloutView:
        return await self._controller.pause.remote(  # type: ignore[no-any-return]
            id, expected_generation=expected, key=key
        )

    async def resume(self, id: str, expected: Expected = None, key: Key = None) -> RolloutView:
        return await self._controller.resume.remote(  # type: ignore[no-any-return]
            id, expected_generation=expected, key=key
        )

    async def retry(self, id: str, expected: Expected = None, key: Key = None) -> RolloutView:
        return await self._controller.retry.remote(  # type: ignore[no-any-return]
            id, expected_generation=expected, key=key
        )

    async def undo(
        self,
        to: Annotated[
            str | None, Query(min_length=1, description="an earlier revision; else the last one")
        ] = None,
        expected: Expected = None,
        key: Key = None,
    ) -> RolloutView:
        return await self._controller.undo.remote(  # type: ignore[no-any-return]
            to=to, expected_generation=expected, key=key
        )

    async def load_adapter(self, body: LoadAdapter) -> AdapterView:
        return await self._controller.load_adapter.remote(  # type: ignore[no-any-return]
            body.lora_name,
            body.lora_path,
            load_inplace=body.load_inplace,
            expected_generation=body.expected_generation,
        )

    async def unload_adapter(self, body: UnloadAdapter) -> AdapterView:
        return await self._controller.unload_adapter.remote(  # type: ignore[no-any-return]
            body.lora_name, expected_generation=body.expected_generation
        )

    async def adapters(self) -> AdapterList:
        fleet: FleetView = await self._controller.fleet.remote()
        data: list[AdapterView] = await self._controller.adapters.remote()
        return AdapterList(data=data, generation=fleet.generation)

    # ---- inside -----------------------------------------------------------------------------

    async def _authorize(
        self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
    ) -> None:
        word = given.credentials if given else ""
        token = self._settings.admin_token or ""
        if not secrets.compare_digest(word.encode(), token.encode()):
            raise NotAuthorized

    async def _whole(
        self, method: Any, request: _Request, pin: str | None, session: str | None
    ) -> Response:
        async def ask() -> dict[str, Any]:
            call = method.remote(request, _decoded(pin), session)
            document: dict[str, Any] = await self._readiness.wait(call, call)
            return document

        document = await self._survived(ask)
        return JSONResponse(document, headers=_headers(document))

    async def _stream(
        self, request: ChatRequest | CompletionRequest, pin: str | None, session: str | None
    ) -> Response:
        async def ask() -> tuple[dict[str, Any], Any]:
            chunks = self._model.options(stream=True).stream.remote(request, _decoded(pin), session)
            return await self._readiness.wait(chunks, anext(aiter(chunks))), chunks

        # the first chunk before the first header: a refusal still gets its own status
        first, chunks = await self._survived(ask)
        return StreamingResponse(
            _events(first, chunks),
            media_type="text/event-stream",
            headers=_headers(first) | _STREAM,
        )

    async def _survived(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` gives; asked again when the replica died with it, for nothing was sent yet."""
        for attempt in range(_ATTEMPTS):
            await self._readiness.expect()
            try:
                return await ask()
            except _REPLICA_DIED as died:
                if attempt == _ATTEMPTS - 1:
                    raise
                logger.warning(f"a replica died with a request ({type(died).__name__}); again")
        raise AssertionError("the last attempt returns or raises")


def _documentation(app: FastAPI) -> Callable[[], dict[str, Any]]:
    made = app.openapi
    return lambda: app.openapi_schema or with_chunks(made())


def _headers(document: dict[str, Any]) -> dict[str, str]:
    return {
        "x-adapter-revision": quote(document["system_fingerprint"], safe=_PLAIN),
        "x-replica-id": document["replica_id"],
    }


def _decoded(pin: str | None) -> str | None:
    return None if pin is None else unquote(pin)


async def _events(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events. An error after the first chunk is an event: the status is long sent."""
    yield _event(first)
    try:
        async for chunk in rest:
            yield _event(chunk)
    except Exception as error:
        logger.warning(f"a stream broke: {type(error).__name__}")
        yield _event({"error": _broken(error)})
        return
    yield "data: [DONE]\n\n"


def _broken(error: Exception) -> dict[str, Any]:
    status, detail = describe(error)
    if status == 500:
        detail = detail.model_copy(
            update={"message": "the stream broke off", "code": "stream_broken"}
        )
    return detail.model_dump()


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"
