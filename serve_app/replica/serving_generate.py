"""Between an OpenAI request and the engine: prompts in, choices out, whole or in pieces.

All choices of a request run at once, on the one revision that the engine admitted it on. When one
fails, or whoever asked goes away, all of them are cancelled.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Protocol

from jinja2 import TemplateError

from hotswap_lib import Revision
from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs
from serve_app.engine.steps import GenerationOutput
from serve_app.openai.requests import ChatRequest, CompletionRequest, TokenIds
from serve_app.openai.response_schemas import GenerationChunk, GenerationDocument
from serve_app.openai.responses import NamedToken, Piece, Responses, TokenScore, responses_to
from serve_app.openai.stop_strings import StopStrings
from serve_app.replica.detokenizer import Detokenizer, TokenNames
from serve_app.settings import Settings
from serve_app.wire.errors import InvalidRequest
from serve_app.wire.request_stats import PROBE
from serve_app.wire.text_score import TextScore

# No exact bound exists, since normalizers may drop any number of spaces. The longest tokens of
# usual vocabularies are some 128 spaces, and text that averages half of that is no prompt.
_MOST_CHARS_PER_TOKEN = 64
_MESSAGE_CHARS = 32  # about what a chat template puts around a message
_INLINE_CHARS = 4_000  # tokenized in a few milliseconds; what is longer must not hold up the loop

Request = ChatRequest | CompletionRequest


class Ticket(Protocol):
    """One admitted request; its generations all run on `revision`."""

    @property
    def revision(self) -> Revision: ...

    def generate(
        self, prompt_ids: list[int], *, max_tokens: int, sampling: SamplingParams, stream: bool
    ) -> AsyncGenerator[GenerationOutput, None]:
        """Steps, only the finished one unless `stream`. Leaving early cancels the generation."""
        ...


class Engine(Protocol):
    @property
    def scores_texts(self) -> bool: ...

    def admit(
        self, pin: str | None, session: str | None
    ) -> AbstractAsyncContextManager[Ticket]: ...

    def ended_by_itself(self, token_ids: list[int]) -> bool: ...


class GenerationServing:
    """GenerationServing requests of one model. `vocabulary`: how many token ids it knows."""

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
        self._settings = settings
        self._replica = replica
        self._names = TokenNames(tokenizer)
        self._vocabulary = vocabulary or max(tokenizer.get_vocab().values()) + 1
        # settles its truncation and padding: from now on threads only read it
        tokenizer("a")

    async def whole(
        self, request: Request, pin: str | None = None, session: str | None = None
    ) -> GenerationDocument:
        """The answer in one document. Raises `InvalidRequest`."""
        prompts = await self._prompts(request)
        async with self._engine.admit(pin, session) as ticket:
            # text by text only where a stop string may end it early
            jobs = self._jobs(ticket, request, prompts, stream=bool(request.stop))
            choices: list[list[Piece]] = [[] for _ in jobs]
            async with aclosing(_merged(jobs)) as pieces:
                async for piece in pieces:
                    choices[piece.index].append(piece)
            responses = self._responses(request, prompts, ticket)
            return responses.whole([_joined(pieces) for pieces in choices])

    async def stream(
        self, request: Request, pin: str | None = None, session: str | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        """The answer in chunks, the first one when there is a first token. Raises as `whole`."""
        prompts = await self._prompts(request)
        async with self._engine.admit(pin, session) as ticket:
            responses = self._responses(request, prompts, ticket)
            jobs = self._jobs(ticket, request, prompts, stream=True)
            begun: set[int] = set()
            tokens = 0
            async with aclosing(_merged(jobs)) as pieces:
                async for piece in pieces:
                    tokens += len(piece.token_ids)
                    if piece.index not in begun:
                        begun.add(piece.index)
                        yield responses.first(piece.index)
                    if _says(piece, request):
                        yield responses.piece(piece)
            if request.include_usage:
                yield responses.last(tokens)

    async def score(self, texts: list[str], pin: str | None = None) -> list[TextScore]:
        """How likely the model finds each text: of its first token nothing is said.

        For probes, and so not counted among the requests of users. Raises `InvalidRequest` for a
        text with fewer than two tokens, or more than fit, and where the model continues no texts.
        """
        if not self._engine.scores_texts:
            message = f"{self._settings.model_name} cannot say how likely a text is"
            raise InvalidRequest(400, "task_not_served", message)
        prompts = await self._in_time(
            [len(text) for text in texts],
            lambda: [self._tokenizer(text)["input_ids"] for text in texts],
        )
        limit = self._settings.max_model_len
        for ids in prompts:
            if not 2 <= len(ids) <= limit:
                message = f"a text to score has 2 to {limit} tokens, and one has {len(ids)}"
                raise InvalidRequest(400, "invalid_parameter", message, "texts")
        async with self._engine.admit(pin, PROBE) as ticket:
            jobs = [asyncio.create_task(_score(ticket, ids)) for ids in prompts]
            try:
                return await asyncio.gather(*jobs)
            finally:  # all of them are out of the engine before the ticket is
                for job in jobs:
                    job.cancel()
                await asyncio.gather(*jobs, return_exceptions=True)

    def _responses(self, request: Request, prompts: list[TokenIds], ticket: Ticket) -> Responses:
        return responses_to(
            request,
            prompts,
            model=self._settings.model_name,
            revision=str(ticket.revision),
            replica=self._replica,
        )

    # ---- choices ------------------------------------------------------------------------------

    def _jobs(
        self, ticket: Ticket, request: Request, prompts: list[TokenIds], *, stream: bool
    ) -> list[AsyncGenerator[Piece, None]]:
        return [
            self._pieces(
                _Choice(index * request.n + i, request, self._tokenizer, self._names),
                ticket.generate(
                    prompt,
                    max_tokens=self._room(request, prompt),
                    sampling=sampling_params(request, i),
                    stream=stream,
                ),
            )
            for index, prompt in enumerate(prompts)
            for i in range(request.n)
        ]

    async def _pieces(
        self, choice: _Choice, steps: AsyncGenerator[GenerationOutput, None]
    ) -> AsyncGenerator[Piece, None]:
        async with aclosing(steps):
            async for step in steps:
                ended = step.finished and self._engine.ended_by_itself(step.token_ids)
                piece = choice.advance(step, ended=ended)
                yield piece
                if piece.reason is not None:
                    return
        raise AssertionError("the engine's last step is a finished one")

    # ---- prompts ------------------------------------------------------------------------------

    async def _prompts(self, request: Request) -> list[TokenIds]:
        """Token ids of each prompt. Raises `InvalidRequest` for what cannot be run."""
        if (request.alternatives or 0) > self._settings.max_logprobs:
            param = "top_logprobs" if isinstance(request, ChatRequest) else "logprobs"
            message = f"{param}: at most {self._settings.max_logprobs} are given here"
            raise InvalidRequest(400, "invalid_parameter", message, param)
        if isinstance(request, ChatRequest):
            prompts = await self._chat_ids(request)
        else:
            prompts = await self._text_ids(request)
        for prompt in prompts:
            self._check(request, prompt)
        return prompts

    async def _chat_ids(self, request: ChatRequest) -> list[TokenIds]:
        if self._tokenizer.chat_template is None:
            message = f"{self._settings.model_name} has no chat template; use /v1/completions"
            raise InvalidRequest(400, "no_chat_template", message)
        messages = [
            {"role": message.role, "content": message.text}
            | ({"name": message.name} if message.name else {})
            for message in request.messages
        ]
        chars = sum(len(message["content"]) + _MESSAGE_CHARS for message in messages)

        def render() -> list[TokenIds]:
            ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            return [ids]

        try:
            return await self._in_time([chars], render)
        except TemplateError as error:  # templates refuse roles, or an order of them
            message = f"the chat template of {self._settings.model_name} refuses this: {error}"
            raise InvalidRequest(400, "chat_template", message, "messages") from None

    async def _text_ids(self, request: CompletionRequest) -> list[TokenIds]:
        highest = max((max(each) for each in request.prompt if isinstance(each, list)), default=0)
        if highest >= self._vocabulary:
            message = f"the token id {highest} is not below {self._vocabulary}"
            raise InvalidRequest(400, "invalid_parameter", message, "prompt")

        def encode() -> list[TokenIds]:
            return [
                self._tokenizer(each)["input_ids"] if isinstance(each, str) else each
                for each in request.prompt
            ]

        return await self._in_time(
            [len(each) for each in request.prompt if isinstance(each, str)], encode
        )

    async def _in_time(
        self, chars: list[int], tokenize: Callable[[], list[TokenIds]]
    ) -> list[TokenIds]:
        """`tokenize` where it does not hold up the loop; not at all when the texts are too long."""
        limit = self._settings.max_model_len
        longest = max(chars, default=0)
        if longest > limit * _MOST_CHARS_PER_TOKEN:
            message = f"the context is at most {limit} tokens, and {longest} characters are more"
            raise InvalidRequest(400, "context_length_exceeded", message)
        return tokenize() if sum(chars) <= _INLINE_CHARS else await asyncio.to_thread(tokenize)

    def _check(self, request: Request, prompt: TokenIds) -> None:
        if not prompt:
            raise InvalidRequest(400, "invalid_parameter", "the prompt has no tokens")
        limit = self._settings.max_model_len
        wanted = self._room(request, prompt)
        if wanted > limit - len(prompt):
            message = (
                f"the context is at most {limit} tokens, but the prompt has {len(prompt)} "
                f"and {wanted} are wanted after it"
            )
            raise InvalidRequest(400, "context_length_exceeded", message)

    def _room(self, request: Request, prompt: TokenIds) -> int:
        """How many tokens may follow the prompt: as many as wanted, else what there is room for."""
        room = self._settings.max_model_len - len(prompt)
        return request.wanted_tokens or max(min(self._settings.max_tokens_default, room), 1)


async def _score(ticket: Ticket, ids: list[int]) -> TextScore:
    first, *rest = ids
    sampling = SamplingParams(temperature=0.0, logprobs=0, forced=(1, tuple(rest)))
    steps = ticket.generate([first], max_tokens=len(rest), sampling=sampling, stream=False)
    async with aclosing(steps):
        async for step in steps:  # the finished one
            logprobs = [each.chosen for each in step.logprobs]
    return TextScore(logprob=sum(logprobs), tokens=len(logprobs))


class _Choice:
    """One choice while it is generated."""

    def __init__(self, index: int, request: Request, tokenizer: Any, names: TokenNames) -> None:
        self._index = index
        self._scored = request.alternatives is not None
        self._names = names
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(request.stop)
        self._read = 0  # tokens
        self._chars = 0  # of the tokens that were read
        self._said = 0  # characters that left in pieces
        self._offsets: list[int] = []  # of each token of the text, where it begins
        self._told = 0  # tokens whose scores left in pieces

    def advance(self, step: GenerationOutput, *, ended: bool) -> Piece:
        """What the step adds; `ended` when its last token is the end token, which is not text."""
        read = self._read
        text = "".join(self._texts(step, ended=ended))
        self._said += len(text)
        done = step.finished or self._stops.found
        return Piece(
            index=self._index,
            text=text,
            token_ids=step.token_ids[read : self._read],
            scores=self._scores(step) if self._scored else [],
            reason=None if not done else "stop" if ended or self._stops.found else "length",
        )

    def _texts(self, step: GenerationOutput, *, ended: bool) -> Iterator[str]:
        for token in step.token_ids[self._read : len(step.token_ids) - ended]:
            self._read += 1
            self._offsets.append(self._chars)
            text = self._detokenizer.step(token)
            self._chars += len(text)
            yield self._stops.feed(text)
            if self._stops.found:  # a longer step changes nothing: what follows is never read
                return
        if step.finished:
            self._read = len(step.token_ids)
            yield self._stops.feed(self._detokenizer.rest())
            yield self._stops.rest()

    def _scores(self, step: GenerationOutput) -> list[TokenScore]:
        """Of the tokens that have begun in the text that was sent."""
        first = self._told
        while self._told < len(self._offsets) and self._offsets[self._told] < self._said:
            self._told += 1
        return [
            self._score(step.token_ids[at], step.logprobs[at], self._offsets[at])
            for at in range(first, self._told)
        ]

    def _score(self, token: int, logprobs: TokenLogprobs, offset: int) -> TokenScore:
        top = [NamedToken(*self._names(other), logprob) for other, logprob in logprobs.top]
        return TokenScore(NamedToken(*self._names(token), logprobs.chosen), top, offset)


async def _merged(jobs: list[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """The pieces of all, as they come. All are closed when this ends, however it ends."""
    news: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_drained(job, news)) for job in jobs]
    for task in tasks:
        task.add_done_callback(news.put_nowait)
    try:
        running = len(tasks)
        while running:
            new = await news.get()
            if isinstance(new, Piece):
                yield new
            else:
                running -= 1
                new.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drained(
    job: AsyncGenerator[Piece, None], news: asyncio.Queue[Piece | asyncio.Task[None]]
) -> None:
    async with aclosing(job):
        async for piece in job:
            news.put_nowait(piece)


def _joined(pieces: list[Piece]) -> Piece:
    return Piece(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        scores=[score for piece in pieces for score in piece.scores],
        reason=pieces[-1].reason,
    )


def _says(piece: Piece, request: Request) -> bool:
    return bool(
        piece.text or piece.reason or piece.scores or (request.return_token_ids and piece.token_ids)
    )


def sampling_params(request: Request, choice: int = 0) -> SamplingParams:
    """Sampling parameters of one choice of a prompt. Choices of a seeded request differ in seed."""
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
