"""Embedding and classification requests: texts to the engine, vectors or probabilities back.

All texts of a request run on the revision that the engine admitted the request to, in any batches.
If one fails, or the client disconnects, all of them are cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from serve_app.engine.encoder import EncoderEngine
from serve_app.openai.encoder_responses import classification_document, embedding_document
from serve_app.openai.requests import ClassifyRequest, EmbeddingRequest
from serve_app.openai.response_schemas import ClassificationList, EmbeddingList
from serve_app.replica.prompts import TokenLimits
from serve_app.settings import Settings
from serve_app.wire.errors import InvalidRequest


class EncoderServing:
    """Answers requests to an encoder. `labels` are the names of a classifier's classes."""

    def __init__(
        self,
        engine: EncoderEngine,
        tokenizer: Any,
        settings: Settings,
        *,
        replica: str,
        labels: Sequence[str] = (),
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model = settings.model_name
        self._replica = replica
        self._labels = labels
        self._limits = TokenLimits(
            tokens=engine.max_tokens, vocabulary=engine.vocabulary, noun="an input", param="input"
        )
        # the first call sets truncation and padding; from now on threads only read them
        tokenizer("a")

    async def embeddings(
        self,
        request: EmbeddingRequest,
        pin: str | None = None,
        session: str | None = None,
    ) -> EmbeddingList:
        """Returns OpenAI's list of embeddings. Raises `InvalidRequest`, and as `Engine.admit`."""
        revision, tokens, vectors = await self._rows(request.input, pin, session)
        return embedding_document(
            request,
            vectors,
            model=self._model,
            revision=revision,
            replica=self._replica,
            tokens=tokens,
        )

    async def classify(
        self,
        request: ClassifyRequest,
        pin: str | None = None,
        session: str | None = None,
    ) -> ClassificationList:
        """Returns vLLM's document of classes. Raises `InvalidRequest`, and as `Engine.admit`."""
        revision, tokens, probs = await self._rows(request.input, pin, session)
        return classification_document(
            request,
            probs,
            self._labels,
            model=self._model,
            revision=revision,
            replica=self._replica,
            tokens=tokens,
        )

    async def _rows(
        self, inputs: Sequence[str | list[int]], pin: str | None, session: str | None
    ) -> tuple[str, int, list[list[float]]]:
        """Returns the revision that ran, the number of tokens in all inputs, and a row for each."""
        texts = await self._token_ids(inputs)
        async with self._engine.admit(pin, session) as ticket:
            try:
                async with asyncio.TaskGroup() as group:
                    rows = [group.create_task(self._engine.run(ticket, ids)) for ids in texts]
            except BaseExceptionGroup as failed:  # the first failure cancelled the other tasks
                raise failed.exceptions[0] from None
            return str(ticket.revision), sum(map(len, texts)), [row.result() for row in rows]

    async def _token_ids(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        limits = self._limits
        texts = await limits.tokenize(
            [len(text) for text in inputs if isinstance(text, str)],
            lambda: [
                self._tokenizer(text)["input_ids"] if isinstance(text, str) else text
                for text in inputs
            ],
        )
        for ids in texts:
            limits.require_tokens(ids)
            if len(ids) > limits.tokens:
                message = f"an input has at most {limits.tokens} tokens, and one has {len(ids)}"
                raise InvalidRequest(400, "context_length_exceeded", message, "input")
            if max(ids) >= limits.vocabulary:  # a tokenizer may have more tokens than its model
                message = f"the token id {max(ids)} is not below {limits.vocabulary}"
                raise InvalidRequest(400, "invalid_parameter", message, "input")
        return texts
