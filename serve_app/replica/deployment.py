"""The Model deployment: one replica for each GPU, a prepared and compiled model in each.

A replica loads, compiles, warms up, asks the controller what to hold, commits and verifies that,
and only then is ready: Serve routes nothing to it before `__init__` returns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import torch
from ray.serve.handle import DeploymentHandle

from hotswap_lib import Layout
from serve_app.engine.causal import CausalEngine
from serve_app.engine.encoder import EncoderEngine
from serve_app.engine.engine import Engine
from serve_app.engine.seq2seq import Seq2SeqEngine
from serve_app.openai.model_name import find_pin
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
from serve_app.replica.compile_cache import open_compile_cache
from serve_app.replica.control_loop import ControlLoop
from serve_app.replica.loading import Loaded, load
from serve_app.replica.model_task import Task
from serve_app.replica.serving_encode import EncoderServing
from serve_app.replica.serving_generate import GenerationServing
from serve_app.settings import Settings
from serve_app.wire.admin import StartView
from serve_app.wire.errors import EngineStopped, InvalidRequest
from serve_app.wire.ray_internals import this_replica_id
from serve_app.wire.reports import Answer, Report
from serve_app.wire.text_score import TextScore

logger = logging.getLogger(__name__)
_GENERATES: tuple[Task, ...] = ("causal", "seq2seq")


class StartTimeout(Exception):
    """The controller named no revision in time."""

    code = "start_timeout"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        return f"the replica held no revision after {self.timeout_s:g} s"


class _Remote:
    """The controller behind its handle, as the control lane wants to call it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def join(self, replica: str, layout: Layout) -> None:
        await self._handle.join.remote(replica, layout)

    async def report(self, report: Report) -> Answer:
        answer: Answer = await self._handle.report.remote(report)
        return answer

    async def leave(self, replica: str) -> None:
        await self._handle.leave.remote(replica)


class Model:
    """Handle methods: `chat`, `complete`, `embeddings`, `classify` (a document each), and `stream`.

    Each takes OpenAI's request, as the pydantic model or as a dict, and optionally the revision to
    run on, which otherwise is what the request's `model` names after the colon, or the default, or
    a canary that has a share of the requests; those with the same `session`, or else `user`, are on
    the same side of that.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, controller: DeploymentHandle
    ) -> None:
        began = time.monotonic()
        if settings.torch_threads is not None:
            torch.set_num_threads(settings.torch_threads)
        self._settings = settings
        replica = this_replica_id()
        loaded = await asyncio.to_thread(load, settings)
        self._task = loaded.task
        cache = await asyncio.to_thread(open_compile_cache, loaded.slot, settings)
        self._engine = _engine(loaded, settings)
        self._engine.start()
        loaded_s = time.monotonic() - began
        warm_s = await self._engine.warm_up()
        await asyncio.to_thread(cache.publish)
        self._answers, self._encoder_answers = _answers(self._engine, loaded, settings, replica)
        start = StartView(
            load_s=round(loaded_s, 3),
            warm_up_s=round(warm_s, 3),
            compiled_regions=self._engine.compiled_regions,
            compile_cache=cache.state,
        )
        self._lane = ControlLoop(self._engine, _Remote(controller), replica=replica, start=start)
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                await asyncio.shield(self._lane.ready)
        except TimeoutError:
            raise StartTimeout(settings.start_timeout_s) from None
        logger.info(f"ready on {self._engine.default}: {start}")

    async def chat(
        self,
        request: ChatRequest | dict[str, Any],
        pin: str | None = None,
        session: str | None = None,
    ) -> GenerationDocument:
        """Answer a chat: OpenAI's request in, OpenAI's `chat.completion` document out."""
        checked = ChatRequest.model_validate(request)
        return await self._generating.whole(
            checked, self._pin(checked.model, pin), session or checked.user
        )

    async def complete(
        self,
        request: CompletionRequest | dict[str, Any],
        pin: str | None = None,
        session: str | None = None,
    ) -> GenerationDocument:
        """Continue a text: OpenAI's request in, OpenAI's `text_completion` document out."""
        checked = CompletionRequest.model_validate(request)
        return await self._generating.whole(
            checked, self._pin(checked.model, pin), session or checked.user
        )

    async def stream(
        self,
        request: ChatRequest | CompletionRequest,
        pin: str | None = None,
        session: str | None = None,
    ) -> AsyncIterator[GenerationChunk]:
        """The same answer in chunks. Use `handle.options(stream=True).stream.remote(request)`."""
        chunks = self._generating.stream(
            request, self._pin(request.model, pin), session or request.user
        )
        async with aclosing(chunks):  # at once, when the client goes away
            async for chunk in chunks:
                yield chunk

    async def score(self, texts: list[str], pin: str | None = None) -> list[TextScore]:
        """How likely the model finds each text, after its first token."""
        return await self._generating.score(texts, self._pin(None, pin))

    async def embeddings(
        self,
        request: EmbeddingRequest | dict[str, Any],
        pin: str | None = None,
        session: str | None = None,
    ) -> EmbeddingList:
        """OpenAI's embeddings request in, its list of embeddings out."""
        checked = EmbeddingRequest.model_validate(request)
        return await self._encoding("embed").embeddings(
            checked, self._pin(checked.model, pin), session or checked.user
        )

    async def classify(
        self,
        request: ClassifyRequest | dict[str, Any],
        pin: str | None = None,
        session: str | None = None,
    ) -> ClassificationList:
        """vLLM's classification request in, a list of probabilities for each text out."""
        checked = ClassifyRequest.model_validate(request)
        return await self._encoding("classify").classify(
            checked, self._pin(checked.model, pin), session or checked.user
        )

    def record_routing_stats(self) -> Mapping[str, object]:
        """What Serve hands to every `serve_app.gateway.router.RevisionRouter`."""
        return self._lane.routing_stats() if hasattr(self, "_lane") else {}

    async def check_health(self) -> None:
        if not self._engine.alive:
            raise EngineStopped

    async def __del__(self) -> None:
        if hasattr(self, "_lane"):
            await self._lane.close()
        if hasattr(self, "_engine"):
            await asyncio.to_thread(self._engine.stop)

    @property
    def _generating(self) -> GenerationServing:
        if self._answers is None:
            raise self._other_task()
        return self._answers

    def _encoding(self, task: Task) -> EncoderServing:
        if self._encoder_answers is None or self._task != task:
            raise self._other_task()
        return self._encoder_answers

    def _other_task(self) -> InvalidRequest:
        route = {"embed": "/v1/embeddings", "classify": "/v1/classify"}.get(
            self._task, "/v1/completions"
        )
        message = f"{self._settings.model_name} is not served for this; it answers on {route}"
        return InvalidRequest(400, "task_not_served", message)

    def _pin(self, model: str | None, given: str | None) -> str | None:
        return find_pin(model, given, served=self._settings.model_name)


def _engine(loaded: Loaded, settings: Settings) -> Engine:
    match loaded.task:
        case "causal":
            return CausalEngine(loaded.slot, settings, eos_token_ids=loaded.eos_token_ids)
        case "seq2seq":
            return Seq2SeqEngine(loaded.slot, settings, eos_token_ids=loaded.eos_token_ids)
        case "embed" | "classify":
            return EncoderEngine(loaded.slot, settings, pooling=loaded.pooling)


def _answers(
    engine: Engine, loaded: Loaded, settings: Settings, replica: str
) -> tuple[GenerationServing | None, EncoderServing | None]:
    if isinstance(engine, EncoderEngine):
        return None, EncoderServing(
            engine, loaded.tokenizer, settings, replica=replica, labels=loaded.labels
        )
    config = loaded.slot.model.base_model.model.config.get_text_config()
    return GenerationServing(
        engine, loaded.tokenizer, settings, replica=replica, vocabulary=config.vocab_size
    ), None
