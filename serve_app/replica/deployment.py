"""The Model deployment: one replica for each GPU, a prepared and compiled model in each.

A replica loads the model, compiles it, warms up, receives its desired state from the controller,
and serves that revision. Only then is it ready: Serve routes no request to it before `__init__`
returns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers.utils.logging import disable_progress_bar

from hotswap_lib import Layout
from serve_app import logs
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
from serve_app.replica.prompts import ChatOrCompletion
from serve_app.replica.serving_encode import EncoderServing
from serve_app.replica.serving_generate import GenerationServing
from serve_app.settings import Settings
from serve_app.wire.admin import StartView
from serve_app.wire.errors import EngineStopped, InvalidRequest
from serve_app.wire.ray_internals import this_replica_id
from serve_app.wire.reports import Answer, Report
from serve_app.wire.text_score import TextScore

logger = logging.getLogger(__name__)
# Ray's console shows a line of several processes once, and compares lines without the words that
# have digits in them, such as ids. An ordinal keeps the lines of the replicas apart.
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


class StartTimeout(Exception):
    """The replica served no revision within `start_timeout_s`."""

    code = "start_timeout"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        return f"the replica served no revision after {self.timeout_s:g} s"


class _RemoteController:
    """`ControllerCalls` over the controller's deployment handle."""

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
    """The deployment class. `chat`, `complete`, `embeddings` and `classify` return one document.

    Each takes an OpenAI request, as a pydantic model or as a dict. `pin` is the revision to run on.
    Without it, that is the revision after the colon in the request's `model`, or else the default
    or the canary, by traffic weight. Requests with the same `session`, or else the same `user`, get
    the same revision.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, controller: DeploymentHandle
    ) -> None:
        logs.attach()
        disable_progress_bar()  # of loading weights: on a console of many replicas only noise
        began = time.monotonic()
        if settings.torch_threads is not None:
            torch.set_num_threads(settings.torch_threads)
        self._settings = settings
        self._replica = this_replica_id()
        rank = serve.get_replica_context().rank.rank
        self._label = " ".join([*_ORDINALS[rank : rank + 1], "replica", self._replica])
        start = await self._start_engine(began)
        self._control_loop = ControlLoop(
            self._engine,
            _RemoteController(controller),
            replica=self._replica,
            start=start,
            label=self._label,
        )
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                await asyncio.shield(self._control_loop.ready)
        except TimeoutError:
            raise StartTimeout(settings.start_timeout_s) from None
        revision = str(self._engine.default)
        took = f"ready after {time.monotonic() - began:.1f} s"
        self._log_phase(f"holds {revision}, {took}", revision=revision)

    async def _start_engine(self, began: float) -> StartView:
        """Loads, compiles and warms up; logs each phase."""
        settings = self._settings
        self._log_phase(f"loading {settings.model_name} (model={settings.model})")
        loaded = await asyncio.to_thread(load, settings)
        self._task = loaded.task
        cache = await asyncio.to_thread(open_compile_cache, loaded.slot, settings)
        how = f"compile cache: {cache.state}" if settings.compile else "compile=false"
        self._log_phase(f"preparing {settings.model_name}, task {loaded.task} ({how})")
        self._engine = _engine(loaded, settings)
        self._engine.start()
        loaded_s = time.monotonic() - began
        regions = self._engine.compiled_regions
        what = f"compiling {regions} regions" if settings.compile else "no compilation"
        self._log_phase(f"warming up, {what} (loaded in {loaded_s:.1f} s)")
        warm_s = await self._engine.warm_up()
        await asyncio.to_thread(cache.publish)
        self._generation, self._encoder = _serving(self._engine, loaded, settings, self._replica)
        return StartView(
            load_s=round(loaded_s, 3),
            warm_up_s=round(warm_s, 3),
            compiled_regions=regions,
            compile_cache=cache.state,
        )

    def _log_phase(self, phase: str, **fields: str) -> None:
        logger.info(f"{self._label}: {phase}", extra=fields)

    async def chat(
        self,
        request: ChatRequest | dict[str, Any],
        pin: str | None = None,
        session: str | None = None,
    ) -> GenerationDocument:
        """Returns OpenAI's `chat.completion` document."""
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
        """Returns OpenAI's `text_completion` document."""
        checked = CompletionRequest.model_validate(request)
        return await self._generating.whole(
            checked, self._pin(checked.model, pin), session or checked.user
        )

    async def stream(
        self,
        request: ChatOrCompletion,
        pin: str | None = None,
        session: str | None = None,
    ) -> AsyncIterator[GenerationChunk]:
        """Yields the same answer in chunks.

        To be called as `handle.options(stream=True).stream.remote(request)`.
        """
        chunks = self._generating.stream(
            request, self._pin(request.model, pin), session or request.user
        )
        async with aclosing(chunks):  # at once, when the client goes away
            async for chunk in chunks:
                yield chunk

    async def score(self, texts: list[str], pin: str | None = None) -> list[TextScore]:
        """Returns the log-likelihood of each text, without its first token."""
        return await self._generating.score(texts, self._pin(None, pin))

    async def embeddings(
        self,
        request: EmbeddingRequest | dict[str, Any],
        pin: str | None = None,
        session: str | None = None,
    ) -> EmbeddingList:
        """Returns OpenAI's list of embeddings."""
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
        """Returns vLLM's classification document: the probabilities of each text's classes."""
        checked = ClassifyRequest.model_validate(request)
        return await self._encoding("classify").classify(
            checked, self._pin(checked.model, pin), session or checked.user
        )

    def record_routing_stats(self) -> Mapping[str, object]:
        """Called by Serve, which passes the result to every `RevisionRouter` of the gateway."""
        return self._control_loop.routing_stats() if hasattr(self, "_control_loop") else {}

    async def check_health(self) -> None:
        if not self._engine.alive:
            raise EngineStopped

    async def __del__(self) -> None:
        if hasattr(self, "_control_loop"):
            await self._control_loop.close()
        if hasattr(self, "_engine"):
            await asyncio.to_thread(self._engine.stop)

    @property
    def _generating(self) -> GenerationServing:
        if self._generation is None:
            raise self._other_task()
        return self._generation

    def _encoding(self, task: Task) -> EncoderServing:
        if self._encoder is None or self._task != task:
            raise self._other_task()
        return self._encoder

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


def _serving(
    engine: Engine, loaded: Loaded, settings: Settings, replica: str
) -> tuple[GenerationServing | None, EncoderServing | None]:
    if isinstance(engine, EncoderEngine):
        return None, EncoderServing(
            engine, loaded.tokenizer, settings, replica=replica, labels=loaded.labels
        )
    config = loaded.slot.model.get_base_model().config.get_text_config()
    return GenerationServing(
        engine, loaded.tokenizer, settings, replica=replica, vocabulary=config.vocab_size
    ), None
