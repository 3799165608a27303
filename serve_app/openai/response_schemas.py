"""What the data routes answer, as types for the API's own documentation.

Nothing is built from them: `serve_app.openai.requests` makes plain dicts. The tests hold the two together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.wire.admin import ErrorBody

Finish = Literal["stop", "length"] | None


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelEntry(Document):
    id: Annotated[str, Field(description="what a request's `model` may be")]
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = None
    root: Annotated[str | None, Field(description="the revision")] = None


class ModelList(Document):
    object: Literal["list"]
    data: list[ModelEntry]


class Health(Document):
    status: Literal["ok"]


class Usage(Document):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class InputUsage(Document):
    prompt_tokens: int
    total_tokens: int


class Head(Document):
    """What every answer and every chunk begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: Annotated[str, Field(description="the revision that answered")]
    replica_id: str
    prompt_token_ids: Annotated[
        list[int] | None, Field(description="for `return_token_ids` and one prompt")
    ] = None


class Choice(Document):
    index: int
    finish_reason: Finish
    token_ids: list[int] | None = None


class ChatToken(Document):
    token: str
    logprob: float
    bytes: list[int]


class ChatScore(ChatToken):
    top_logprobs: list[ChatToken]


class ChatScores(Document):
    content: list[ChatScore]
    refusal: None


class ChatMessage(Document):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatScores | None


class ChatDocument(Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Document):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatScores | None


class ChatChunk(Head):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Annotated[Usage | None, Field(description="in the last one, when it was asked for")] = (
        None
    )


class TextScores(Document):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Choice):
    text: str
    logprobs: TextScores | None
    prompt_token_ids: list[int] | None = None


class TextDocument(Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TextChunk(Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class Embedding(Document):
    object: Literal["embedding"]
    index: int
    embedding: Annotated[
        list[float] | str, Field(description="a string for `encoding_format` base64")
    ]


class EmbeddingList(Document):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    system_fingerprint: str
    replica_id: str
    usage: InputUsage


class Classification(Document):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassificationList(Document):
    id: str
    object: Literal["list"]
    created: int
    model: str
    system_fingerprint: str
    replica_id: str
    data: list[Classification]
    usage: InputUsage


_HEADERS = {
    "X-Adapter-Revision": {
        "description": "the revision that answered; percent-encoded where it is not ASCII",
        "schema": {"type": "string"},
    },
    "X-Replica-Id": {"schema": {"type": "string"}},
}


def answered(kind: type[Document], chunk: type[Document] | None = None) -> dict[str, Any]:
    """The 200 of a route: one document, or, for `stream`, one event for each chunk."""
    response: dict[str, Any] = {
        "description": "the answer",
        "model": kind,
        "headers": _HEADERS,
    }
    if chunk is not None:
        name = chunk.__name__
        text = f"`data: {name}` for each chunk, then `data: [DONE]`; or an error, and no [DONE]"
        schema = {"type": "string", "description": text}
        response["content"] = {"text/event-stream": {"schema": schema}}
    return response


def with_chunks(openapi: dict[str, Any]) -> dict[str, Any]:
    """The API's schema without FastAPI's 422, which nothing here answers, and with the chunks."""
    for path in openapi["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas = openapi["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for kind in (ChatChunk, TextChunk, ErrorBody):
        made = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= made.pop("$defs", {}) | {kind.__name__: made}
    return openapi
