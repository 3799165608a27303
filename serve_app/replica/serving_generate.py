"""Chat and completion requests: prompts to the engine, choices back, whole or in chunks.

All choices of a request run concurrently, on the revision that the engine admitted the request to.
If one fails, or the client disconnects, all of them are cancelled.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from serve_app.engine.engine import Engine, Ticket
from serve_app.engine.sampling_params import SamplingParams
from serve_app.openai.requests import TokenIds
from serve_app.openai.response_schemas import GenerationChunk, GenerationDocument
from serve_app.openai.responses import Piece, Responses, responses_to
from serve_app.replica.choices import Choice, is_visible, joined, merged
from serve_app.replica.detokenizer import TokenNames
from serve_app.replica.prompts import ChatOrCompletion, Prompts
from serve_app.replica.scoring import score_texts
from serve_app.settings import Settings
from serve_app.wire.errors import InvalidRequest
from serve_app.wire.text_score import TextScore


class GenerationServing:
    """Answers requests to a model that generates text.

    `vocabulary`: the number of token ids; None: as many as the tokenizer has.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        settings: Settings,
        *,
        replica: str,
        vocabulary: int | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model = settings.model_name
        self._replica = replica
        self._names = TokenNames(tokenizer)
        self._prompts = Prompts(tokenizer, settings, vocabulary=vocabulary)

    async def whole(
        self, request: ChatOrCompletion, pin: str | None = None, session: str | None = None
    ) -> GenerationDocument:
        """Returns the response as one document. Raises `InvalidRequest`, and as `Engine.admit`."""
        prompts = await self._prompts.of(request)
        async with self._engine.admit(pin, session) as ticket:
            # every step only where a stop string may end the answer early
            choices = self._choices(ticket, request, prompts, stream=bool(request.stop))
            pieces_of: list[list[Piece]] = [[] for _ in choices]
            async with aclosing(merged(choices)) as pieces:
                async for piece in pieces:
                    pieces_of[piece.index].append(piece)
            responses = self._responses(request, prompts, ticket)
            return responses.whole([joined(pieces) for pieces in pieces_of])

    async def stream(
        self, request: ChatOrCompletion, pin: str | None = None, session: str | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        """Yields the response in chunks, from the first token on. Raises as `whole`."""
        prompts = await self._prompts.of(request)
        async with self._engine.admit(pin, session) as ticket:
            responses = self._responses(request, prompts, ticket)
            choices = self._choices(ticket, request, prompts, stream=True)
            begun: set[int] = set()
            tokens = 0
            async with aclosing(merged(choices)) as pieces:
                async for piece in pieces:
                    tokens += len(piece.token_ids)
                    if piece.index not in begun:
                        begun.add(piece.index)
                        yield responses.first(piece.index)
                    if is_visible(piece, request):
                        yield responses.piece(piece)
            if request.include_usage:
                yield responses.last(tokens)

    async def score(self, texts: list[str], pin: str | None = None) -> list[TextScore]:
        """Returns the log-likelihood of each text, without its first token.

        Raises `InvalidRequest` for a text that is too short or too long, and for a model that
        cannot score texts.
        """
        if not self._engine.scores_texts:
            message = f"{self._model} cannot say how likely a text is"
            raise InvalidRequest(400, "task_not_served", message)
        return await score_texts(self._engine, self._prompts, texts, pin=pin)

    def _choices(
        self, ticket: Ticket, request: ChatOrCompletion, prompts: list[TokenIds], *, stream: bool
    ) -> list[AsyncGenerator[Piece, None]]:
        """Returns the pieces of `n` choices for each prompt. They start when they are read."""
        return [
            self._choice(index * request.n + i, request).pieces(
                ticket.generate(
                    prompt,
                    max_tokens=self._prompts.room(request, prompt),
                    sampling=sampling_params(request, i),
                    stream=stream,
                )
            )
            for index, prompt in enumerate(prompts)
            for i in range(request.n)
        ]

    def _choice(self, index: int, request: ChatOrCompletion) -> Choice:
        return Choice(
            index,
            request,
            self._tokenizer,
            names=self._names,
            is_end=self._engine.ended_by_itself,
        )

    def _responses(
        self, request: ChatOrCompletion, prompts: list[TokenIds], ticket: Ticket
    ) -> Responses:
        return responses_to(
            request,
            prompts,
            model=self._model,
            revision=str(ticket.revision),
            replica=self._replica,
        )


def sampling_params(request: ChatOrCompletion, choice: int = 0) -> SamplingParams:
    """Returns the sampling parameters of one choice of a prompt.

    The choices of a request with a seed have different seeds.
    """
    seed = request.seed
    if seed is not None and choice > 0:
        digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, signed=True)
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(request.top_k, 0),
        seed=seed,
        logprobs=request.alternatives,
    )
