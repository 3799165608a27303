"""The JSON of the data routes' responses, as types.

`serve_app.openai.responses` builds these dictionaries, the gateway sends them, FastAPI documents
them. TypedDicts, so that a streamed chunk costs no validation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic accepts typing's only from Python 3.12 on

from serve_app.wire.admin import ErrorBody

FinishReason = Literal["stop", "length"]

_closed = with_config(ConfigDict(extra="forbid"))  # not inherited: each TypedDict needs it


# ---- all generations ----------------------------------------------------------------------------


@_closed
class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@_closed
class Head(TypedDict):
    """The fields that a document and every chunk of a stream begin with."""

    id: str
    created: int
    model: str
    system_fingerprint: Annotated[str, Field(description="the revision that answered")]
    replica_id: str
    prompt_token_ids: NotRequired[
        Annotated[list[int] | None, Field(description="for `return_token_ids` and one prompt")]
    ]


@_closed
class Choice(TypedDict):
    index: int
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int] | None]


# ---- chats --------------------------------------------------------------------------------------


@_closed
class ChatToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


@_closed
class ChatScore(ChatToken):
    top_logprobs: list[ChatToken]


@_closed
class ChatScores(TypedDict):
    content: list[ChatScore]
    refusal: None


@_closed
class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


@_closed
class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatScores | None


@_closed
class ChatDocument(Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


@_closed
class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"] | None]
    content: NotRequired[str | None]


@_closed
class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatScores | None


@_closed
class ChatChunk(Head):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[
        Annotated[
            Usage | None, Field(description="in the last chunk, for `stream_options.include_usage`")
        ]
    ]


# ---- completions --------------------------------------------------------------------------------


@_closed
class TextScores(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


@_closed
class TextChoice(Choice):
    text: str
    logprobs: TextScores | None
    prompt_token_ids: NotRequired[list[int] | None]


@_closed
class TextDocument(Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


@_closed
class TextChunk(Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


# ---- embeddings, classes, models, health --------------------------------------------------------


@_closed
class InputUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


@_closed
class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: Annotated[
        list[float] | str, Field(description="a string for `encoding_format` base64")
    ]


@_closed
class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    system_fingerprint: str
    replica_id: str
    usage: InputUsage


@_closed
class Classification(TypedDict):
    index: int
    label: str
    probs: list[float]
    num_classes: int


@_closed
class ClassificationList(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    system_fingerprint: str
    replica_id: str
    data: list[Classification]
    usage: InputUsage


@_closed
class ModelEntry(TypedDict):
    id: Annotated[str, Field(description="a value for a request's `model`")]
    object: Literal["model"]
    created: int
    owned_by: str
    parent: NotRequired[str | None]
    root: NotRequired[Annotated[str | None, Field(description="the revision")]]


@_closed
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelEntry]


@_closed
class Health(TypedDict):
    status: Literal["ok"]


GenerationDocument = ChatDocument | TextDocument
GenerationChunk = ChatChunk | TextChunk
Document = GenerationDocument | EmbeddingList | ClassificationList


# ---- OpenAPI ------------------------------------------------------------------------------------

_HEADERS = {
    "X-Adapter-Revision": {
        "description": "the revision that answered; percent-encoded where it is not ASCII",
        "schema": {"type": "string"},
    },
    "X-Replica-Id": {"schema": {"type": "string"}},
}


def success(document: type, chunk: type | None = None) -> dict[str, Any]:
    """Documentation of a 200: one document, and for `stream` one server-sent event per chunk."""
    response: dict[str, Any] = {
        "description": "the answer",
        "model": document,
        "headers": _HEADERS,
    }
    if chunk is not None:
        name = chunk.__name__
        text = f"`data: {name}` for each chunk, then `data: [DONE]`; after an error no [DONE]"
        schema = {"type": "string", "description": text}
        response["content"] = {"text/event-stream": {"schema": schema}}
    return response


def complete_openapi(openapi: dict[str, Any]) -> dict[str, Any]:
    """Adds the schemas of the chunks, and removes FastAPI's 422, which no route answers."""
    for path in openapi["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas = openapi["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for kind in (ChatChunk, TextChunk, ErrorBody):
        schema = TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {}) | {kind.__name__: schema}
    return openapi
