"""A fake engine, and requests to a `GenerationServing` over it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hotswap_lib import Revision
from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs
from serve_app.engine.steps import GenerationOutput
from serve_app.openai.requests import ChatRequest, CompletionRequest
from serve_app.replica.serving_generate import GenerationServing
from serve_app.settings import Settings
from serve_app.wire.errors import InvalidRequest

PIRATE = Revision("pirate", "1234abcd" * 8)
END = 259


class Broken(Exception):
    pass


class FakeEngine:
    """Says what `script` gives for a prompt, so many tokens a step. Waits for ever on None."""

    def __init__(
        self, script: Callable[[list[int]], list[int] | None], *, step_tokens: int = 1
    ) -> None:
        self.script = script
        self.step_tokens = step_tokens
        self.end = END
        self.scores_texts = True
        self.pins: list[str | None] = []
        self.sessions: list[str | None] = []
        self.asked: list[tuple[list[int], int, SamplingParams, bool]] = []
        self.running = self.inside = self.sent = self.cancelled = 0

    @asynccontextmanager
    async def admit(self, pin: str | None, session: str | None) -> AsyncIterator[FakeEngine]:
        self.pins.append(pin)
        self.sessions.append(session)
        self.inside += 1
        try:
            yield self
        finally:
            assert self.running == 0, "generations outlive their request"
            self.inside -= 1

    @property
    def revision(self) -> Revision:
        return PIRATE

    def ended_by_itself(self, token_ids: list[int]) -> bool:
        return token_ids[-1:] == [self.end]

    async def generate(
        self, prompt_ids: list[int], *, max_tokens: int, sampling: SamplingParams, stream: bool
    ) -> AsyncGenerator[GenerationOutput, None]:
        self.asked.append((prompt_ids, max_tokens, sampling, stream))
        self.running += 1
        finished = False
        try:
            tokens = self.script(prompt_ids)
            if tokens is None:
                await asyncio.Event().wait()
            assert tokens
            tokens = tokens[:max_tokens]
            scores = [
                TokenLogprobs(-float(at), ((token, -float(at)), (0, -9.0)))
                for at, token in enumerate(tokens)
            ]
            first = self.step_tokens if stream else len(tokens)
            for end in range(first, len(tokens) + self.step_tokens, self.step_tokens):
                await asyncio.sleep(0)
                end = min(end, len(tokens))
                finished = end == len(tokens)
                self.sent += 1
                logprobs = scores[:end] if sampling.logprobs is not None else []
                yield GenerationOutput(token_ids=tokens[:end], finished=finished, logprobs=logprobs)
        finally:
            self.running -= 1
            self.cancelled += not finished


def serving(
    engine: Any, tokenizer: Any, settings: Settings, vocabulary: int | None = None
) -> GenerationServing:
    return GenerationServing(engine, tokenizer, settings, replica="r1", vocabulary=vocabulary)


class Desk:
    """A `GenerationServing` over a fake engine that says one text to everything."""

    def __init__(self, tokenizer: Any, said: str = "hello", **more: Any) -> None:
        self.tokenizer = tokenizer
        self.engine = FakeEngine(lambda _: [*self.ids(said), END])
        values = {"served_model_name": "tiny", "max_model_len": 512, "max_tokens_default": 100}
        self.answers = serving(self.engine, tokenizer, Settings.model_validate(values | more))

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def chat(self, **more: Any) -> Any:
        return asyncio.run(self.answers.whole(chat(**more)))

    def text(self, **more: Any) -> Any:
        return asyncio.run(self.answers.whole(text(**more)))

    def chunks(self, request: ChatRequest | CompletionRequest) -> list[Any]:
        async def run() -> list[Any]:
            return [chunk async for chunk in self.answers.stream(request)]

        return asyncio.run(run())

    def refusal(self, request: ChatRequest | CompletionRequest) -> InvalidRequest:
        for ask in (self.answers.whole, lambda request: anext(self.answers.stream(request))):
            with pytest.raises(InvalidRequest) as caught:
                asyncio.run(_awaited(ask(request)))
        assert not self.engine.asked
        return caught.value


async def _awaited(coroutine: Any) -> Any:
    return await coroutine


def chat(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **more})


def text(**more: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hi", **more})


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """A stream's choices, put together again."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for new in chunk["choices"]:
            empty: dict[str, Any] = {"text": "", "token_ids": [], "scores": []}
            choice = choices.setdefault(new["index"], empty | {"finish_reason": None})
            assert choice["finish_reason"] is None, "nothing follows the end"
            choice["text"] += new["text"] if "text" in new else new["delta"].get("content", "")
            choice["token_ids"] += new.get("token_ids", [])
            choice["scores"] += scores(new)
            choice["finish_reason"] = new["finish_reason"]
    return choices


def scores(choice: dict[str, Any]) -> list[Any]:
    logprobs = choice["logprobs"] or {"content": []}
    if "content" in logprobs:
        return list(logprobs["content"])
    return list(zip(*logprobs.values(), strict=True))
