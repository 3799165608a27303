"""OpenAI's request bodies as pydantic models.

An unsupported parameter is an error, unless its value is null or the one that changes nothing.
Extensions are vLLM's: `top_k`, `return_token_ids`, `/classify`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_N = 16
MAX_PROMPTS = 64
MAX_CHOICES = 128  # of one request: n for each of its prompts
MAX_INPUTS = 2048
_INT64 = 2**63

TokenIds = list[int]


# ---- types of fields ----------------------------------------------------------------------------


def _refused(message: str) -> PydanticCustomError:
    # as an argument: pydantic formats the template, and the message may have braces
    return PydanticCustomError("refused", "{why}", {"why": message})


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refused("is not valid Unicode: it has half of a surrogate pair") from None
    return text


def _texts(value: Any, *, most: int, ids: bool) -> list[str | TokenIds]:
    """Returns the given text, token list, or list of these as a list of texts and token lists."""
    several = value if isinstance(value, list) and value else [value]
    if several is value and type(several[0]) is int:
        several = [several]
    if len(several) > most:
        raise _refused(f"has {len(several)} elements, and the limit is {most}")
    for one in several:
        if isinstance(one, str):
            _unicode(one)
        elif not (ids and isinstance(one, list) and set(map(type, one)) <= {int}):
            kinds = "texts or lists of token ids" if ids else "texts"
            raise _refused(f"must be one or more {kinds}")
        if not one:
            raise _refused("must not be empty")
        if isinstance(one, list) and min(one) < 0:
            raise _refused("token ids must not be negative")
    return several


def _prompts(value: Any) -> list[str | TokenIds]:
    return _texts(value, most=MAX_PROMPTS, ids=True)


def _inputs(value: Any) -> list[str | TokenIds]:
    return _texts(value, most=MAX_INPUTS, ids=True)


def _only_texts(value: Any) -> list[str | TokenIds]:
    return _texts(value, most=MAX_INPUTS, ids=False)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_AnyTexts = str | list[str] | TokenIds | list[TokenIds]
Unicode = Annotated[str, AfterValidator(_unicode)]
Prompts = Annotated[
    list[str | TokenIds], PlainValidator(_prompts, json_schema_input_type=_AnyTexts)
]
Inputs = Annotated[list[str | TokenIds], PlainValidator(_inputs, json_schema_input_type=_AnyTexts)]
Texts = Annotated[list[str], PlainValidator(_only_texts, json_schema_input_type=str | list[str])]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_unicode)]],
    Field(max_length=4),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]


# ---- requests -----------------------------------------------------------------------------------


class _StrictModel(BaseModel):
    """Refuses unknown fields. Null, and a value in `neutral`, count as not given."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # unsupported parameters, with the values that change nothing
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if value is not None and not _is_one_of(value, cls.neutral.get(key, ()))
        }


_Values = tuple[Any, ...]
_SAMPLING: dict[str, _Values] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
}


def _is_one_of(value: Any, values: _Values) -> bool:
    return any(type(value) is type(each) and value == each for each in values)  # False is not 0


class TextPart(_StrictModel):
    type: Literal["text"]
    text: Unicode


# fail_fast: two million errors about one body are gigabytes
_Parts = Annotated[list[TextPart], Field(fail_fast=True)]


class Message(_StrictModel):
    """One message of a chat. `content` is optional for the assistant, whose may be null."""

    neutral: ClassVar = {"tool_calls": ([],), "annotations": ([],)}

    role: Literal["system", "user", "assistant", "developer"]
    content: Annotated[
        Annotated[Unicode, Tag("text")] | Annotated[_Parts, Tag("parts")],
        Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
    ] = ""
    name: Unicode | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise _refused(f"a message of role {self.role} needs `content`")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_StrictModel):
    include_usage: bool = False


class _Generation(_StrictModel):
    """The parameters of both chats and completions."""

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31, description="0 or -1: all tokens")] = 0
    stop: StopStrings = []
    seed: Annotated[int | None, Field(ge=-_INT64, lt=_INT64)] = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    return_token_ids: bool = False

    @field_validator("stream_options")
    @classmethod
    def _only_with_stream(cls, value: object, info: ValidationInfo) -> object:
        if not info.data.get("stream"):
            raise _refused("is only allowed with `stream`")
        return value

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def alternatives(self) -> int | None:
        """The likeliest tokens to return for each position; None: no log-probabilities at all."""
        raise NotImplementedError


class ChatRequest(_Generation):
    neutral: ClassVar = _SAMPLING | {
        "tools": ([],),
        "tool_choice": ("none",),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "store": (False,),
        "service_tier": ("auto", "default"),
    }

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    # accepted and not used: these are for OpenAI's storage, cache and abuse checks
    metadata: dict[str, str] = {}
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if not info.data.get("logprobs"):
            raise _refused("needs `logprobs` to be true")
        return value

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(_Generation):
    neutral: ClassVar = _SAMPLING | {"echo": (False,)}

    prompt: Prompts
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None
    best_of: int | None = None

    @field_validator("prompt")
    @classmethod
    def _not_too_many(cls, value: list[str | TokenIds], info: ValidationInfo) -> Any:
        choices = info.data.get("n", 1) * len(value)
        if choices > MAX_CHOICES:
            raise _refused(f"`n` times the prompts is {choices}, and the limit is {MAX_CHOICES}")
        return value

    @field_validator("best_of")
    @classmethod
    def _equals_n(cls, value: int, info: ValidationInfo) -> int:
        if value != info.data.get("n"):
            raise _refused("is only supported when it equals `n`")
        return value

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


ChatOrCompletion = ChatRequest | CompletionRequest


class EmbeddingRequest(_StrictModel):
    """`input` becomes a list of texts and token lists, also if only one was given."""

    model: str | None = None
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class ClassifyRequest(_StrictModel):
    """`input` becomes a list of texts, also if only one was given."""

    model: str | None = None
    input: Texts
    user: str | None = None
