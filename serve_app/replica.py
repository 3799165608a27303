"""The Model deployment: one replica for each GPU, a prepared and compiled model in each.

A replica loads, compiles, warms up, asks the controller what to hold, commits and verifies that,
and only then is ready: Serve routes nothing to it before `__init__` returns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from hotswap_lib import Layout

from .detokenizer import Detokenizer
from .engine import Engine, EngineStopped, Step
from .lane import Lane
from .loading import load
from .messages import Answer, Report
from .openai import ChatRequest, CompletionRequest, RequestRefused, Responses
from .settings import Settings

logger = logging.getLogger("ray.serve")


class StartTimeout(Exception):
    """The controller named no revision in time."""

    code = "start_timeout"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        return f"the replica held no revision after {self.timeout_s:g} s"


class _Remote:
    """The controller behind its handle, as the lane wants to call it."""

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
    """Handle methods: `chat`, `complete` (a document each), `stream` (chunks)."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, controller: DeploymentHandle
    ) -> None:
        began = time.monotonic()
        if settings.torch_threads is not None:
            torch.set_num_threads(settings.torch_threads)
        self._settings = settings
        self._replica = serve.get_replica_context().replica_id.unique_id
        loaded = await asyncio.to_thread(load, settings)
        self._tokenizer = loaded.tokenizer
        self._engine = Engine(loaded.slot, settings, eos_token_ids=loaded.eos_token_ids)
        self._engine.start()
        loaded_s = time.monotonic() - began
        warm_s = await self._engine.warm_up()
        self._lane = Lane(self._engine, _Remote(controller), replica=self._replica)
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                await asyncio.shield(self._lane.ready)
        except TimeoutError:
            raise StartTimeout(settings.start_timeout_s) from None
        logger.info(
            f"ready on {self._engine.slot.revision}: "
            f"load {loaded_s:.1f} s, warm-up {warm_s:.1f} s, "
            f"{self._engine.compiled_regions} compiled regions"
        )

    async def chat(self, request: ChatRequest | dict[str, Any]) -> dict[str, Any]:
        """Answer a chat: OpenAI's request in, OpenAI's `chat.completion` document out."""
        return await self._whole(ChatRequest.model_validate(request))

    async def complete(self, request: CompletionRequest | dict[str, Any]) -> dict[str, Any]:
        """Continue a text: OpenAI's request in, OpenAI's `text_completion` document out."""
        return await self._whole(CompletionRequest.model_validate(request))

    async def stream(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncIterator[dict[str, Any]]:
        """The same answer in chunks. Use `handle.options(stream=True).stream.remote(request)`."""
        prompt_ids, max_tokens = self._prompt(request)
        responses = Responses(request, model=self._settings.model_name, replica=self._replica)
        detokenizer = Detokenizer(self._tokenizer)
        sent = 0
        async with self._steps(request, prompt_ids, max_tokens) as steps:
            async for step in steps:
                if sent == 0:
                    yield responses.first(revision=step.revision, prompt_ids=prompt_ids)
                new = step.token_ids[sent:]
                sent = len(step.token_ids)
                text = detokenizer.step(new)
                yield responses.piece(
                    text=text + detokenizer.rest(step.token_ids) if step.finished else text,
                    revision=step.revision,
                    reason=self._reason(step) if step.finished else None,
                    token_ids=new,
                )
        if request.include_usage:
            yield responses.last(
                revision=step.revision, prompt_ids=prompt_ids, token_ids=step.token_ids
            )

    async def check_health(self) -> None:
        if not self._engine.alive:
            raise EngineStopped

    async def __del__(self) -> None:
        if hasattr(self, "_lane"):
            await self._lane.close()
        if hasattr(self, "_engine"):
            await asyncio.to_thread(self._engine.stop)

    async def _whole(self, request: ChatRequest | CompletionRequest) -> dict[str, Any]:
        prompt_ids, max_tokens = self._prompt(request)
        responses = Responses(request, model=self._settings.model_name, replica=self._replica)
        async with self._steps(request, prompt_ids, max_tokens) as steps:
            last = [step async for step in steps][-1]
        return responses.whole(
            text=self._tokenizer.decode(last.token_ids, skip_special_tokens=True),
            revision=last.revision,
            reason=self._reason(last),
            prompt_ids=prompt_ids,
            token_ids=last.token_ids,
        )

    def _steps(
        self, request: ChatRequest | CompletionRequest, prompt_ids: list[int], max_tokens: int
    ) -> aclosing[AsyncGenerator[Step, None]]:
        """The engine's steps; closed at once when the client goes away, which cancels them."""
        return aclosing(
            self._engine.generate(
                prompt_ids,
                max_tokens=max_tokens,
                temperature=request.temperature,
                stream=request.stream,
            )
        )

    def _reason(self, step: Step) -> str:
        return "stop" if self._engine.ended_by_itself(step.token_ids) else "length"

    def _prompt(self, request: ChatRequest | CompletionRequest) -> tuple[list[int], int]:
        """Token ids and how many may follow. Raises `RequestRefused` when they do not fit."""
        if isinstance(request, ChatRequest):
            ids = self._chat_ids(request)
        else:
            ids = self._tokenizer(request.prompt)["input_ids"]
        limit = self._settings.max_model_len
        room = limit - len(ids)
        wanted = request.wanted_tokens or max(min(self._settings.max_tokens_default, room), 1)
        if wanted > room:
            message = (
                f"the context is at most {limit} tokens, but the prompt has {len(ids)} "
                f"and {wanted} are wanted after it"
            )
            raise RequestRefused(400, "context_length_exceeded", message)
        return list(ids), wanted

    def _chat_ids(self, request: ChatRequest) -> list[int]:
        if self._tokenizer.chat_template is None:
            message = f"{self._settings.model_name} has no chat template; use /v1/completions"
            raise RequestRefused(400, "no_chat_template", message)
        messages = [{"role": m.role, "content": m.text} for m in request.messages]
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids
