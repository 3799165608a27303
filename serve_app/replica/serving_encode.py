"""Between a request and an encoder: texts in, vectors or class probabilities out.

All texts of a request run on the one revision that the engine admitted it on, in whatever batches.
When one fails, or whoever asked goes away, all of them are cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from serve_app.engine.encoder import EncoderEngine
from serve_app.openai.encoder_responses import classification_document, embedding_document
from serve_app.openai.requests import ClassifyRequest, EmbeddingRequest
from serve_app.openai.response_schemas import ClassificationList, EmbeddingList
from serve_app.settings import Settings
from serve_app.wire.errors import InvalidRequest

_MOST_CHARS_PER_TOKEN = 64  # some 128 spaces can be a token, but no text is made of those alone
_INLINE_CHARS = 4_000  # tokenized in a few milliseconds; what is longer must not hold up the loop


class EncoderServing:
    """GenerationServing requests of one model. `labels` name the columns of its classifications."""

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
        # settles its truncation and padding: from now on threads only read it
        tokenizer("a")

    async def embeddings(
        self,
        request: EmbeddingRequest | dict[str, Any],
        pin: str | None = None,
        session: str | None = None,
    ) -> EmbeddingList:
        """OpenAI's request in, its document out. Raises `InvalidRequest`, and as `admit`."""
        asked = EmbeddingRequest.model_validate(request)
        revision, tokens, vectors = await self._rows(asked.input, pin, session)
        return embedding_document(
            asked,
            vectors,
            model=self._model,
            revision=revision,
            replica=self._replica,
            tokens=tokens,
        )

    async def classify(
        self,
        request: ClassifyRequest | dict[str, Any],
        pin: str | None = None,
        session: str | None = None,
    ) -> ClassificationList:
        """vLLM's request in, its document out. Raises `InvalidRequest`, and as `admit`."""
        asked = ClassifyRequest.model_validate(request)
        revision, tokens, probs = await self._rows(asked.input, pin, session)
        return classification_document(
            asked,
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
        """The revision that answered, how many tokens all inputs had, and a row for each."""
        texts = await self._ids(inputs)
        async with self._engine.admit(pin, session) as ticket:
            try:
                async with asyncio.TaskGroup() as group:
                    rows = [group.create_task(self._engine.run(ticket, ids)) for ids in texts]
            except BaseExceptionGroup as failed:  # the others were cancelled, and tell nothing
                raise failed.exceptions[0] from None
            return str(ticket.revision), sum(map(len, texts)), [row.result() for row in rows]

    async def _ids(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        limit = self._engine.max_tokens
        chars = [len(each) for each in inputs if isinstance(each, str)]
        if max(chars, default=0) > limit * _MOST_CHARS_PER_TOKEN:
            message = f"a text is at most {limit} tokens, and {max(chars)} characters are more"
            raise InvalidRequest(400, "context_length_exceeded", message, "input")

        def encode() -> list[list[int]]:
            return [
                list(self._tokenizer(each)["input_ids"]) if isinstance(each, str) else each
                for each in inputs
            ]

        texts = encode() if sum(chars) <= _INLINE_CHARS else await asyncio.to_thread(encode)
        for ids in texts:
            self._check(ids, limit)
        return texts

    def _check(self, ids: list[int], limit: int) -> None:
        if not ids:
            message = "an input has no tokens"
            raise InvalidRequest(400, "invalid_parameter", message, "input")
        if len(ids) > limit:
            message = f"a text is at most {limit} tokens, and one has {len(ids)}"
            raise InvalidRequest(400, "context_length_exceeded", message, "input")
        if max(ids) >= self._engine.vocabulary:
            message = f"the token id {max(ids)} is not below {self._engine.vocabulary}"
            raise InvalidRequest(400, "invalid_parameter", message, "input")
