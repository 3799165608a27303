"""Engine output to pieces of choices: text, stop strings and log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from serve_app.engine.sampling_params import TokenLogprobs
from serve_app.engine.steps import GenerationOutput
from serve_app.openai.responses import NamedToken, Piece, TokenScore
from serve_app.openai.stop_strings import StopStrings
from serve_app.replica.detokenizer import Detokenizer, TokenNames
from serve_app.replica.prompts import ChatOrCompletion


class Choice:
    """One choice of a response while it is generated.

    `index`: its place among all choices. `is_end`: returns True if the last of these token ids is
    an end token, which is not a part of the text.
    """

    def __init__(
        self,
        index: int,
        request: ChatOrCompletion,
        tokenizer: Any,
        *,
        names: TokenNames,
        is_end: Callable[[list[int]], bool],
    ) -> None:
        self._index = index
        self._scored = request.alternatives is not None
        self._names = names
        self._is_end = is_end
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(request.stop)
        self._tokens_read = 0
        self._chars_read = 0
        self._chars_sent = 0
        self._offsets: list[int] = []  # of each token that was read, the start of its text
        self._scores_sent = 0

    async def pieces(
        self, steps: AsyncGenerator[GenerationOutput, None]
    ) -> AsyncGenerator[Piece, None]:
        """Yields a piece for each step, up to the end or a stop string. Closes `steps`."""
        async with aclosing(steps):
            async for step in steps:
                piece = self._advance(step)
                yield piece
                if piece.reason is not None:
                    return
        raise AssertionError("the engine's last step is a finished one")

    def _advance(self, step: GenerationOutput) -> Piece:
        ended = step.finished and self._is_end(step.token_ids)
        read = self._tokens_read
        text = "".join(self._texts(step, ended=ended))
        self._chars_sent += len(text)
        done = step.finished or self._stops.found
        return Piece(
            index=self._index,
            text=text,
            token_ids=step.token_ids[read : self._tokens_read],
            scores=self._scores(step) if self._scored else [],
            reason=None if not done else "stop" if ended or self._stops.found else "length",
        )

    def _texts(self, step: GenerationOutput, *, ended: bool) -> Iterator[str]:
        for token in step.token_ids[self._tokens_read : len(step.token_ids) - ended]:
            self._tokens_read += 1
            self._offsets.append(self._chars_read)
            text = self._detokenizer.step(token)
            self._chars_read += len(text)
            yield self._stops.feed(text)
            if self._stops.found:  # tokens after it are not read, however many the step has
                return
        if step.finished:
            self._tokens_read = len(step.token_ids)
            yield self._stops.feed(self._detokenizer.rest())
            yield self._stops.rest()

    def _scores(self, step: GenerationOutput) -> list[TokenScore]:
        """Returns the scores of the tokens that begin in the text sent so far."""
        first = self._scores_sent
        while (
            self._scores_sent < len(self._offsets)
            and self._offsets[self._scores_sent] < self._chars_sent
        ):
            self._scores_sent += 1
        return [
            self._score(step.token_ids[at], step.logprobs[at], self._offsets[at])
            for at in range(first, self._scores_sent)
        ]

    def _score(self, token: int, logprobs: TokenLogprobs, offset: int) -> TokenScore:
        top = [NamedToken(*self._names(other), logprob) for other, logprob in logprobs.top]
        return TokenScore(NamedToken(*self._names(token), logprobs.chosen), top, offset)


async def merged(choices: list[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Yields the pieces of all choices as they come. Closes all of them, however it ends."""
    queue: asyncio.Queue[Piece | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(choice, queue)) for choice in choices]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Piece):
                yield item
            else:
                running -= 1
                item.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    choice: AsyncGenerator[Piece, None], queue: asyncio.Queue[Piece | asyncio.Task[None]]
) -> None:
    async with aclosing(choice):
        async for piece in choice:
            queue.put_nowait(piece)


def joined(pieces: list[Piece]) -> Piece:
    """Returns all pieces of one choice as one."""
    return Piece(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        scores=[score for piece in pieces for score in piece.scores],
        reason=pieces[-1].reason,
    )


def is_visible(piece: Piece, request: ChatOrCompletion) -> bool:
    """Returns True if the piece has something that its stream shows."""
    return bool(
        piece.text or piece.reason or piece.scores or (request.return_token_ids and piece.token_ids)
    )
