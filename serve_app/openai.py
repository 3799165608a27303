"""OpenAI's HTTP shapes: requests checked, responses built.

What is not supported is refused, never ignored. `return_token_ids` is vLLM's extension. The
revision that answered is `system_fingerprint`, in every body and every stream chunk.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class RequestRefused(Exception):
    """A request that this server will not run; `status` is the HTTP status."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(status, code, message, param)
        self.status, self.code, self.message, self.param = status, code, message, param

    def __str__(self) -> str:
        return self.message


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Request):
    type: Literal["text"]
    text: str


class Message(_Request):
    role: Literal["system", "user", "assistant", "developer"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Request):
    include_usage: bool = False


class _Generation(_Request):
    """What both endpoints take."""

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=1, le=1, description="only 1: nucleus is not supported")] = 1.0
    n: Annotated[int, Field(ge=1, le=1)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool = False

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Generation):
    prompt: Annotated[str, Field(min_length=1)]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value


class Responses:
    """Builds the documents of one answer: the same id, time, model and revision in all of them."""

    def __init__(
        self, request: ChatRequest | CompletionRequest, *, model: str, replica: str
    ) -> None:
        self._chat = isinstance(request, ChatRequest)
        self._request = request
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "replica_id": replica,
        }

    def whole(
        self, *, text: str, revision: str, reason: str, prompt_ids: list[int], token_ids: list[int]
    ) -> dict[str, Any]:
        """The answer in one document."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        if self._request.return_token_ids:
            choice["token_ids"] = token_ids
        document = self._document(revision, [choice], chunk=False)
        if self._request.return_token_ids:
            document["prompt_token_ids"] = prompt_ids
        return document | {"usage": usage(prompt_ids, token_ids)}

    def first(self, *, revision: str, prompt_ids: list[int]) -> dict[str, Any]:
        """A chat stream's opening chunk: the role. A text stream has none; an empty piece then."""
        extra = {"prompt_token_ids": prompt_ids} if self._request.return_token_ids else {}
        if not self._chat:
            return self.piece(text="", revision=revision) | extra
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._document(revision, [choice], chunk=True) | extra

    def piece(
        self,
        *,
        text: str,
        revision: str,
        reason: str | None = None,
        token_ids: list[int] | None = None,
    ) -> dict[str, Any]:
        """One chunk; `token_ids`: the tokens that are new in it."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self._chat:
            choice["delta"] = {"content": text} if text else {}
        else:
            choice["text"] = text
        if self._request.return_token_ids and token_ids is not None:
            choice["token_ids"] = token_ids
        return self._document(revision, [choice], chunk=True)

    def last(self, *, revision: str, prompt_ids: list[int], token_ids: list[int]) -> dict[str, Any]:
        """The chunk with the usage, for `stream_options.include_usage`."""
        return self._document(revision, [], chunk=True) | {"usage": usage(prompt_ids, token_ids)}

    def _document(self, revision: str, choices: list[Any], *, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {**self._head, "object": kind, "system_fingerprint": revision, "choices": choices}


def usage(prompt_ids: list[int], token_ids: list[int]) -> dict[str, int]:
    return {
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": len(token_ids),
        "total_tokens": len(prompt_ids) + len(token_ids),
    }
