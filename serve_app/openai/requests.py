"""OpenAI's request shapes, checked. What is answered is in `serve_app.openai.responses`.

What is not supported is refused, never ignored; null, and a value that asks for nothing, is no
request. Extensions are vLLM's: `top_k`, `return_token_ids`, `/classify`.
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


# ---- what a field may be ------------------------------------------------------------------------


def _refused(message: str) -> PydanticCustomError:
    # as an argument: pydantic would read braces in a template of its own
    return PydanticCustomError("refused", "{why}", {"why": message})


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refused("half of a surrogate pair is not text") from None
    return text


def _texts(value: Any, *, most: int, ids: bool) -> list[str | TokenIds]:
    """One text or token list, or several, as a list of them."""
    several = value if isinstance(value, list) and value else [value]
    if several is value and type(several[0]) is int:
        several = [several]
    if len(several) > most:
        raise _refused(f"at most {most} can be given at once, not {len(several)}")
    for one in several:
        if isinstance(one, str):
            _unicode(one)
        elif not (ids and isinstance(one, list) and set(map(type, one)) <= {int}):
            kinds = "texts or lists of token ids" if ids else "texts"
            raise _refused(f"must be one or several {kinds}")
        if not one:
            raise _refused("must not be empty")
        if isinstance(one, list) and min(one) < 0:
            raise _refused("token ids are 0 or more")
    return several


def _prompts(value: Any) -> list[str | TokenIds]:
    return _texts(value, most=MAX_PROMPTS, ids=True)


def _inputs(value: Any) -> list[str | TokenIds]:
    return _texts(value, most=MAX_INPUTS, ids=True)


def _only_texts(value: Any) -> list[str | TokenIds]:
    return _texts(value, most=MAX_INPUTS, ids=False)


def _listed(value: Any) -> Any:
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
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]


# ---- requests -----------------------------------------------------------------------------------


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # parameters that are not supported, with the values that ask for nothing
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


class TextPart(_Request):
    type: Literal["text"]
    text: Unicode


# fail_fast: two million errors about one body are gigabytes
_Parts = Annotated[list[TextPart], Field(fail_fast=True)]


class Message(_Request):
    """`content` may be absent only where OpenAI's own answers have null."""

    neutral: ClassVar = {"tool_calls": ([],), "annotations": ([],)}

    role: Literal["system", "user", "assistant", "developer"]
    content: Annotated[
        Annotated[Unicode, Tag("text")] | Annotated[_Parts, Tag("parts")],
        Discriminator(lambda value: "parts" if isinstance(value, list) else "text"),
    ] = ""
    name: Unicode | None = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise _refused(f"a message of the {self.role} needs a content")
        return self

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
    def _of_a_stream(cls, value: object, info: ValidationInfo) -> object:
        if not info.data.get("stream"):
            raise _refused("is only for `stream`")
        return value

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to name for each token; None: no log-probabilities at all."""
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
    # like `user`: for whoever stores, caches or polices answers, and never part of one
    metadata: dict[str, str] = {}
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, value: int, info: ValidationInfo) -> int:
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
            raise _refused(f"`n` for each prompt are {choices}, and at most {MAX_CHOICES} can be")
        return value

    @field_validator("best_of")
    @classmethod
    def _all_of_them(cls, value: int, info: ValidationInfo) -> int:
        if value != info.data.get("n"):
            raise _refused("is only supported when it equals `n`")
        return value

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class EmbeddingRequest(_Request):
    """`input` is a list of texts and token lists, whichever way it came."""

    model: str | None = None
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class ClassifyRequest(_Request):
    """`input` is a list of texts, whichever way it came."""

    model: str | None = None
    input: Texts
    user: str | None = None
