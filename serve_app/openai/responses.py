"""OpenAI's response shapes: documents and stream chunks, built from what an engine said.

The revision that answered is `system_fingerprint`, in every body and every stream chunk.
"""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app.openai.requests import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    TokenIds,
)

_LOWEST = -9999.0  # OpenAI's word for "very unlikely"; JSON has no infinity


@dataclass(frozen=True, slots=True)
class NamedToken:
    """A token by its text and bytes, and the logarithm of its probability."""

    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token that was taken, the likeliest ones there, and where in the answer it begins."""

    chosen: NamedToken
    top: list[NamedToken]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is new in a choice; the last piece of it has a `reason`."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    reason: Literal["stop", "length"] | None = None


class Responses:
    """Builds the documents of one answer: the same id, time, model and revision in all of them."""

    def __init__(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: list[TokenIds],
        *,
        model: str,
        revision: str,
        replica: str,
    ) -> None:
        self._request = request
        self._prompts = prompts
        self._chat = isinstance(request, ChatRequest)
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": revision,
            "replica_id": replica,
        }

    def whole(self, choices: Sequence[Piece]) -> dict[str, Any]:
        """The answer in one document; each choice in one piece, in the order of their index."""
        kind = "chat.completion" if self._chat else "text_completion"
        documents = [
            self._choice(piece, scored=True)
            | ({"message": _message(piece.text)} if self._chat else {"text": piece.text})
            | self._prompt_of(piece.index)
            for piece in choices
        ]
        tokens = sum(len(piece.token_ids) for piece in choices)
        usage = {"usage": self._usage(tokens)}
        return self._document(kind, documents) | self._prompt() | usage

    def first(self, index: int) -> dict[str, Any]:
        """The chunk that opens a choice: a chat's has the role, a text's is an empty piece."""
        document = self.piece(Piece(index=index))
        choice = document["choices"][0]
        choice |= self._prompt_of(index)
        if self._chat:
            choice["delta"] = {"role": "assistant", "content": ""}
        return document | self._prompt()

    def piece(self, piece: Piece) -> dict[str, Any]:
        """One chunk."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        content = {"content": piece.text} if piece.text else {}
        new = {"delta": content} if self._chat else {"text": piece.text}
        document = self._document(kind, [self._choice(piece, scored=bool(piece.scores)) | new])
        return document | ({"usage": None} if self._request.include_usage else {})

    def last(self, completion_tokens: int) -> dict[str, Any]:
        """The chunk with the usage, for `stream_options.include_usage`."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._document(kind, []) | {"usage": self._usage(completion_tokens)}

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, piece: Piece, *, scored: bool) -> dict[str, Any]:
        scores = _chat_scores if self._chat else _text_scores
        scored = scored and self._request.alternatives is not None
        choice: dict[str, Any] = {
            "index": piece.index,
            "logprobs": scores(piece.scores) if scored else None,
            "finish_reason": piece.reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _prompt(self) -> dict[str, Any]:
        if not self._request.return_token_ids or len(self._prompts) > 1:
            return {}
        return {"prompt_token_ids": self._prompts[0]}

    def _prompt_of(self, index: int) -> dict[str, Any]:
        """Where vLLM has it, since a text request may have several prompts."""
        if not self._request.return_token_ids or self._chat:
            return {}
        return {"prompt_token_ids": self._prompts[index // self._request.n]}

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        prompt_tokens = sum(map(len, self._prompts))
        return _usage(prompt_tokens) | {
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


def embedding_document(
    request: EmbeddingRequest,
    vectors: Sequence[Sequence[float]],
    *,
    model: str,
    revision: str,
    replica: str,
    tokens: int,
) -> dict[str, Any]:
    """A vector for each input, in their order; `tokens` is how many all inputs had."""
    coded = request.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _base64(vector) if coded else list(vector),
        }
        for index, vector in enumerate(vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "system_fingerprint": revision,
        "replica_id": replica,
        "usage": _usage(tokens),
    }


def classification_document(
    request: ClassifyRequest,
    probs: Sequence[Sequence[float]],
    labels: Sequence[str],
    *,
    model: str,
    revision: str,
    replica: str,
    tokens: int,
) -> dict[str, Any]:
    """A row of probabilities for each input, in their order; `labels` name the columns."""
    assert len(probs) == len(request.input)
    data = [
        {
            "index": index,
            "label": labels[max(range(len(row)), key=row.__getitem__)],
            "probs": list(row),
            "num_classes": len(row),
        }
        for index, row in enumerate(probs)
    ]
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": revision,
        "replica_id": replica,
        "data": data,
        "usage": _usage(tokens),
    }


def _message(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "refusal": None}


def _chat_scores(scores: list[TokenScore]) -> dict[str, Any]:
    content = [
        _chat_token(score.chosen) | {"top_logprobs": [_chat_token(token) for token in score.top]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: NamedToken) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.data)}


def _text_scores(scores: list[TokenScore]) -> dict[str, Any]:
    return {
        "tokens": [score.chosen.text for score in scores],
        "token_logprobs": [_finite(score.chosen.logprob) for score in scores],
        # the token that was taken is always among them, as OpenAI has it
        "top_logprobs": [
            {token.text: _finite(token.logprob) for token in (*score.top, score.chosen)}
            for score in scores
        ],
        "text_offset": [score.offset for score in scores],
    }


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # so NaN is the lowest, too


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's clients decode it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _usage(prompt_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
