"""The HTTP front door: OpenAI's routes for clients, admin routes for operators.

Thin on purpose: it checks the shape of a request, calls the Model or the RolloutController through
its handle, and turns typed errors into OpenAI's envelope. It holds no state.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from ray.serve.handle import DeploymentHandle

from .body_limit import BodyLimit
from .http_errors import ERRORS, NotAuthorized, install_error_handlers
from .openai import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest
from .rollout.plan import Plan
from .settings import Settings
from .views import (
    AdapterList,
    AdapterView,
    FleetView,
    LoadAdapter,
    RolloutList,
    RolloutView,
    UnloadAdapter,
)

logger = logging.getLogger("ray.serve")
_BEARER = HTTPBearer(auto_error=False)
Pin = Annotated[
    str | None,
    Header(alias="x-adapter-revision", min_length=1, description="the revision to run on"),
]
_STREAM = {"x-accel-buffering": "no", "cache-control": "no-cache"}


class Gateway:
    """The routes over two handles. `app()` builds the FastAPI application."""

    def __init__(
        self, settings: Settings, model: DeploymentHandle, controller: DeploymentHandle
    ) -> None:
        self._settings = settings
        self._model = model
        self._controller = controller

    def app(self) -> FastAPI:
        app = FastAPI(title="hotswap", summary="Live LoRA adapters on a fleet", responses=ERRORS)
        install_error_handlers(app)
        app.add_middleware(BodyLimit, limit=self._settings.max_body_bytes)
        app.include_router(self._data_routes())
        app.include_router(self._admin_routes())
        app.include_router(self._adapter_routes())
        return app

    def _data_routes(self) -> APIRouter:
        router = APIRouter(tags=["inference"])
        router.get("/health", responses={503: {"description": "no replica serves"}})(self.health)
        router.get("/v1/models")(self.models)
        # the body is a document or a stream of them, so no response model fits both
        router.post("/v1/chat/completions", response_model=None)(self.chat)
        router.post("/v1/completions", response_model=None)(self.complete)
        router.post("/v1/embeddings", response_model=None)(self.embeddings)
        router.post("/v1/classify", response_model=None)(self.classify)
        return router

    def _adapter_routes(self) -> APIRouter:
        """vLLM's routes for adapters beside the default."""
        router = APIRouter(prefix="/v1", tags=["adapters"], dependencies=[Depends(self._authorize)])
        router.post("/load_lora_adapter")(self.load_adapter)
        router.post("/unload_lora_adapter")(self.unload_adapter)
        router.get("/lora_adapters")(self.adapters)
        return router

    def _admin_routes(self) -> APIRouter:
        router = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(self._authorize)])
        router.get("/fleet")(self.fleet)
        router.get("/rollouts")(self.rollouts)
        router.get("/rollouts/{id}")(self.rollout)
        router.post("/rollouts", status_code=201)(self.start)
        router.post("/rollouts/{id}/abort")(self.abort)
        router.post("/undo", status_code=201)(self.undo)
        return router

    # ---- inference --------------------------------------------------------------------------

    async def chat(self, request: ChatRequest, pin: Pin = None) -> Response:
        if request.stream:
            return await self._stream(request, pin)
        return _document(await self._model.chat.remote(request, pin))

    async def complete(self, request: CompletionRequest, pin: Pin = None) -> Response:
        if request.stream:
            return await self._stream(request, pin)
        return _document(await self._model.complete.remote(request, pin))

    async def embeddings(self, request: EmbeddingRequest, pin: Pin = None) -> Response:
        return _document(await self._model.embeddings.remote(request, pin))

    async def classify(self, request: ClassifyRequest, pin: Pin = None) -> Response:
        return _document(await self._model.classify.remote(request, pin))

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

    async def health(self) -> Response:
        """200 while at least one replica serves, else 503."""
        fleet: FleetView = await self._controller.fleet.remote()
        status = "ok" if fleet.ready else "not ready"
        return JSONResponse({"status": status}, status_code=200 if fleet.ready else 503)

    # ---- admin ------------------------------------------------------------------------------

    async def fleet(self) -> FleetView:
        return await self._controller.fleet.remote()  # type: ignore[no-any-return]

    async def rollouts(self) -> RolloutList:
        return RolloutList(data=await self._controller.rollouts.remote())

    async def rollout(self, id: str) -> RolloutView:
        return await self._controller.rollout.remote(id)  # type: ignore[no-any-return]

    async def start(self, plan: Plan) -> RolloutView:
        return await self._controller.start_rollout.remote(plan)  # type: ignore[no-any-return]

    async def abort(self, id: str) -> RolloutView:
        return await self._controller.abort.remote(id)  # type: ignore[no-any-return]

    async def undo(self) -> RolloutView:
        return await self._controller.undo.remote()  # type: ignore[no-any-return]

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
        self,
        given: Annotated[
            HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))
        ],
    ) -> None:
        token = self._settings.admin_token
        word = given.credentials if given else ""
        if token is not None and not secrets.compare_digest(word.encode(), token.encode()):
            raise NotAuthorized

    async def _stream(self, request: ChatRequest | CompletionRequest, pin: str | None) -> Response:
        chunks = self._model.options(stream=True).stream.remote(request, pin)
        # the first chunk before the first header: a refusal still gets its own status
        first = await anext(aiter(chunks))
        return StreamingResponse(
            _events(first, chunks),
            media_type="text/event-stream",
            headers=_headers(first) | _STREAM,
        )


def _headers(document: dict[str, Any]) -> dict[str, str]:
    return {
        "x-adapter-revision": document["system_fingerprint"],
        "x-replica-id": document["replica_id"],
    }


def _document(document: dict[str, Any]) -> Response:
    return JSONResponse(document, headers=_headers(document))


async def _events(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events. An error after the first chunk is an event: the status is long sent."""
    yield _event(first)
    try:
        async for chunk in rest:
            yield _event(chunk)
    except Exception as error:
        logger.warning(f"a stream broke: {type(error).__name__}")
        yield _event({"error": {"message": "the stream broke off", "code": "stream_broken"}})
        return
    yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"
