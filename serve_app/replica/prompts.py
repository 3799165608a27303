"""Requests to token ids, within the limits of the model. Long texts are tokenized in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from serve_app.openai.requests import ChatRequest, CompletionRequest, TokenIds
from serve_app.settings import Settings
from serve_app.wire.errors import InvalidRequest

ChatOrCompletion = ChatRequest | CompletionRequest

# There is no exact bound, because normalizers may drop any number of spaces. The longest tokens of
# usual vocabularies are about 128 spaces, and no sensible text averages half of that.
_MOST_CHARS_PER_TOKEN = 64
_MESSAGE_CHARS = 32  # about as many as a chat template adds to a message
_INLINE_CHARS = 4_000  # a few milliseconds of tokenizing; more would block the event loop


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLimits:
    """Limits of the texts of a request, and the words for them in errors.

    Attributes:
        tokens: the most tokens that one text may have.
        vocabulary: the number of token ids that the model knows.
        noun: one text of the request, as errors name it.
        param: the field of the request that errors about its length name.
    """

    tokens: int
    vocabulary: int
    noun: str
    param: str | None = None

    async def tokenize(
        self, chars: Sequence[int], work: Callable[[], list[TokenIds]]
    ) -> list[TokenIds]:
        """Runs `work` for texts of these lengths, in a thread where it would take long.

        Raises `InvalidRequest` for a text that cannot fit, without tokenizing it.
        """
        longest = max(chars, default=0)
        if longest > self.tokens * _MOST_CHARS_PER_TOKEN:
            message = f"{self.noun} has at most {self.tokens} tokens, {longest} characters are more"
            raise InvalidRequest(400, "context_length_exceeded", message, self.param)
        return work() if sum(chars) <= _INLINE_CHARS else await asyncio.to_thread(work)

    async def encode(
        self, tokenizer: Any, texts: Sequence[str | TokenIds], *, param: str | None = None
    ) -> list[TokenIds]:
        """Returns the token ids of each text. Raises `InvalidRequest` for ids out of range."""
        given = max((max(ids, default=0) for ids in texts if isinstance(ids, list)), default=0)
        if given >= self.vocabulary:
            message = f"the token id {given} is not below {self.vocabulary}"
            raise InvalidRequest(400, "invalid_parameter", message, param)
        return await self.tokenize(
            [len(text) for text in texts if isinstance(text, str)],
            lambda: [tokenizer(t)["input_ids"] if isinstance(t, str) else t for t in texts],
        )

    def require_tokens(self, ids: TokenIds) -> None:
        if not ids:
            message = f"{self.noun} has no tokens"
            raise InvalidRequest(400, "invalid_parameter", message, self.param)


class Prompts:
    """The prompts of chat and completion requests."""

    def __init__(self, tokenizer: Any, settings: Settings, *, vocabulary: int | None) -> None:
        """`vocabulary`: the number of token ids; None: as many as the tokenizer has."""
        self._tokenizer = tokenizer
        self._settings = settings
        self.limits = TokenLimits(
            tokens=settings.max_model_len,
            vocabulary=vocabulary or max(tokenizer.get_vocab().values()) + 1,
            noun="the prompt",
        )
        # the first call sets truncation and padding; from now on threads only read them
        tokenizer("a")

    async def of(self, request: ChatOrCompletion) -> list[TokenIds]:
        """Returns the token ids of each prompt. Raises `InvalidRequest`."""
        if (request.alternatives or 0) > self._settings.max_logprobs:
            param = "top_logprobs" if isinstance(request, ChatRequest) else "logprobs"
            message = f"{param} is at most {self._settings.max_logprobs} here"
            raise InvalidRequest(400, "invalid_parameter", message, param)
        if isinstance(request, ChatRequest):
            prompts = await self._of_chat(request)
        else:
            prompts = await self.limits.encode(self._tokenizer, request.prompt, param="prompt")
        for prompt in prompts:
            self._check_room(request, prompt)
        return prompts

    async def of_texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Returns the token ids of each text, whatever their number."""
        return await self.limits.encode(self._tokenizer, texts)

    def room(self, request: ChatOrCompletion, prompt: TokenIds) -> int:
        """Returns the most tokens that may follow the prompt.

        That is `max_tokens` of the request, or else as many as fit, up to `max_tokens_default`.
        """
        room = self.limits.tokens - len(prompt)
        return request.wanted_tokens or max(min(self._settings.max_tokens_default, room), 1)

    async def _of_chat(self, request: ChatRequest) -> list[TokenIds]:
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
            return await self.limits.tokenize([chars], render)
        except TemplateError as error:  # a template may reject a role, or an order of roles
            message = f"the chat template of {self._settings.model_name} rejects this: {error}"
            raise InvalidRequest(400, "chat_template", message, "messages") from None

    def _check_room(self, request: ChatOrCompletion, prompt: TokenIds) -> None:
        self.limits.require_tokens(prompt)
        limit, wanted = self.limits.tokens, self.room(request, prompt)
        if wanted > limit - len(prompt):
            message = (
                f"the context is at most {limit} tokens, but the prompt has {len(prompt)} "
                f"and {wanted} are requested after it"
            )
            raise InvalidRequest(400, "context_length_exceeded", message)
