"""Builds the responses to chats and completions: documents, and the chunks of a stream.

Their types are in `serve_app.openai.response_schemas`. The revision that answered is
`system_fingerprint`, in every document and every chunk.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.openai.requests import (
    ChatOrCompletion,
    ChatRequest,
    TokenIds,
)
from serve_app.openai.response_schemas import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatDocument,
    ChatScores,
    ChatToken,
    Choice,
    FinishReason,
    Head,
    TextChoice,
    TextChunk,
    TextDocument,
    TextScores,
    Usage,
)

_LOWEST_LOGPROB = -9999.0  # OpenAI's value for "very unlikely"; JSON has no infinity


@dataclass(frozen=True, slots=True)
class NamedToken:
    """A token by its text and bytes, and its log-probability."""

    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A sampled token, the likeliest tokens at its position, and its character offset."""

    chosen: NamedToken
    top: list[NamedToken]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New text and tokens of one choice. The last piece of a choice has a `reason`."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    reason: FinishReason | None = None


# ---- chats and completions ----------------------------------------------------------------------


class _GenerationResponses:
    """The parts that are the same in every document and chunk of one response."""

    def __init__(self, request: ChatOrCompletion, prompts: list[TokenIds], *, head: Head) -> None:
        self._prompts = prompts
        self._head = head
        self._n = request.n
        self._scored = request.alternatives is not None
        self._with_token_ids = request.return_token_ids
        self._with_usage = request.include_usage

    def _first_head(self) -> Head:
        """The head of a document or of a choice's first chunk: with the tokens of a lone prompt."""
        if not self._with_token_ids or len(self._prompts) > 1:
            return self._head
        return {**self._head, "prompt_token_ids": self._prompts[0]}

    def _usage(self, completion_tokens: int) -> Usage:
        prompt_tokens = sum(map(len, self._prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


class ChatResponses(_GenerationResponses):
    """Builds the document or the chunks of one chat; all have the same id, time and revision."""

    def whole(self, choices: Sequence[Piece]) -> ChatDocument:
        """The whole response; each choice in one piece, in the order of their index."""
        return {
            **self._first_head(),
            "object": "chat.completion",
            "choices": [self._whole_choice(piece) for piece in choices],
            "usage": self._usage(sum(len(piece.token_ids) for piece in choices)),
        }

    def first(self, index: int) -> ChatChunk:
        """The chunk that opens a choice: it names the role."""
        return self._chunk(
            self._first_head(), Piece(index=index), {"role": "assistant", "content": ""}
        )

    def piece(self, piece: Piece) -> ChatChunk:
        """The chunk with one piece."""
        return self._chunk(self._head, piece, {"content": piece.text} if piece.text else {})

    def last(self, completion_tokens: int) -> ChatChunk:
        """The chunk with the usage, for `stream_options.include_usage`."""
        return {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": self._usage(completion_tokens),
        }

    def _choice(self, piece: Piece) -> Choice:
        choice: Choice = {"index": piece.index, "finish_reason": piece.reason}
        if self._with_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _whole_choice(self, piece: Piece) -> ChatChoice:
        return {
            **self._choice(piece),
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": _chat_scores(piece.scores) if self._scored else None,
        }

    def _chunk(self, head: Head, piece: Piece, delta: ChatDelta) -> ChatChunk:
        choice: ChatChunkChoice = {
            **self._choice(piece),
            "delta": delta,
            "logprobs": _chat_scores(piece.scores) if self._scored and piece.scores else None,
        }
        chunk: ChatChunk = {
            **head,
            "object": "chat.completion.chunk",
            "choices": [choice],
            "usage": None,
        }
        if not self._with_usage:
            del chunk["usage"]
        return chunk


class TextResponses(_GenerationResponses):
    """Builds the document or the chunks of one completion, as `ChatResponses` does."""

    def whole(self, choices: Sequence[Piece]) -> TextDocument:
        """The whole response; each choice in one piece, in the order of their index."""
        return {
            **self._first_head(),
            "object": "text_completion",
            "choices": [
                self._with_prompt(self._text_choice(piece, scored=self._scored))
                for piece in choices
            ],
            "usage": self._usage(sum(len(piece.token_ids) for piece in choices)),
        }

    def first(self, index: int) -> TextChunk:
        """The chunk that opens a choice: an empty piece."""
        choice = self._text_choice(Piece(index=index), scored=False)
        return self._chunk(self._first_head(), self._with_prompt(choice))

    def piece(self, piece: Piece) -> TextChunk:
        """The chunk with one piece."""
        scored = self._scored and bool(piece.scores)
        return self._chunk(self._head, self._text_choice(piece, scored=scored))

    def last(self, completion_tokens: int) -> TextChunk:
        """The chunk with the usage, for `stream_options.include_usage`."""
        return {
            **self._head,
            "object": "text_completion",
            "choices": [],
            "usage": self._usage(completion_tokens),
        }

    def _text_choice(self, piece: Piece, *, scored: bool) -> TextChoice:
        choice: TextChoice = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": _text_scores(piece.scores) if scored else None,
            "finish_reason": piece.reason,
        }
        if self._with_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _with_prompt(self, choice: TextChoice) -> TextChoice:
        """The choice with the tokens of its prompt, where vLLM has them: there may be several."""
        if self._with_token_ids:
            choice["prompt_token_ids"] = self._prompts[choice["index"] // self._n]
        return choice

    def _chunk(self, head: Head, choice: TextChoice) -> TextChunk:
        chunk: TextChunk = {
            **head,
            "object": "text_completion",
            "choices": [choice],
            "usage": None,
        }
        if not self._with_usage:
            del chunk["usage"]
        return chunk


Responses = ChatResponses | TextResponses


def responses_to(
    request: ChatOrCompletion,
    prompts: list[TokenIds],
    *,
    model: str,
    revision: str,
    replica: str,
) -> Responses:
    """The builder of the responses to one request. `prompts`: the token ids of each prompt."""
    chat = isinstance(request, ChatRequest)
    head: Head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": revision,
        "replica_id": replica,
    }
    if isinstance(request, ChatRequest):
        return ChatResponses(request, prompts, head=head)
    return TextResponses(request, prompts, head=head)


# ---- log-probabilities --------------------------------------------------------------------------


def _chat_scores(scores: list[TokenScore]) -> ChatScores:
    return {
        "content": [
            {**_chat_token(score.chosen), "top_logprobs": [_chat_token(each) for each in score.top]}
            for score in scores
        ],
        "refusal": None,
    }


def _chat_token(token: NamedToken) -> ChatToken:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.data)}


def _text_scores(scores: list[TokenScore]) -> TextScores:
    return {
        "tokens": [score.chosen.text for score in scores],
        "token_logprobs": [_finite(score.chosen.logprob) for score in scores],
        # the sampled token is always among them, as OpenAI has it
        "top_logprobs": [
            {token.text: _finite(token.logprob) for token in (*score.top, score.chosen)}
            for score in scores
        ],
        "text_offset": [score.offset for score in scores],
    }


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB  # NaN too becomes the lowest
