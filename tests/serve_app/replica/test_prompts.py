"""Prompts: templates, token ids and limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from serve_app.openai.requests import ChatRequest, CompletionRequest
from tests.serve_app.replica.desk import (
    Desk,
    chat,
    text,
)

T = TypeVar("T")


@pytest.mark.parametrize("request_of", [chat, text])
def test_a_prompt_that_leaves_too_little_room_is_refused_with_the_numbers(
    tokenizer: Any, request_of: Callable[..., ChatRequest | CompletionRequest]
) -> None:
    error = Desk(tokenizer).refusal(request_of(max_tokens=511))
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert "512" in str(error)
    assert "511" in str(error)


def test_without_a_wish_an_answer_has_what_room_there_is(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    desk.text(prompt="a" * 500)
    assert desk.engine.asked[0][1] == 12
    assert Desk(tokenizer).refusal(text(prompt="a" * 512)).code == "context_length_exceeded"


def test_a_text_that_cannot_fit_is_not_even_tokenized(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    huge = "a" * (512 * 64 + 1)
    error = desk.refusal(text(prompt=huge))
    assert (error.code, "32769 characters" in str(error)) == ("context_length_exceeded", True)
    assert desk.refusal(chat(messages=[{"role": "user", "content": huge}])).status == 400
    many = [{"role": "user", "content": ""}] * 1100
    assert "characters" in str(desk.refusal(chat(messages=many)))


def test_a_long_text_is_tokenized_beside_the_event_loop(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threaded = 0
    to_thread = asyncio.to_thread

    def counted(work: Callable[[], T]) -> Coroutine[Any, Any, T]:
        nonlocal threaded
        threaded += 1
        return to_thread(work)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    desk = Desk(tokenizer, max_model_len=10_000)
    desk.text(prompt="a" * 100)
    assert threaded == 0
    desk.text(prompt="a" * 5000)
    desk.text(prompt=["a" * 100] * 60)
    desk.chat(messages=[{"role": "user", "content": "a" * 5000}])
    assert threaded == 3


def test_token_ids_are_taken_as_they_are_when_the_vocabulary_has_them(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    desk.text(prompt=[[5, 259], [7]])
    assert [prompt for prompt, *_ in desk.engine.asked] == [[5, 259], [7]]
    error = Desk(tokenizer).refusal(text(prompt=[[5], [260]]))
    assert (error.status, error.param) == (400, "prompt")
    assert "260" in str(error)
    assert Desk(tokenizer).refusal(text(prompt=[2**70])).status == 400


def test_a_prompt_without_tokens_is_refused(tokenizer: Any, monkeypatch: Any) -> None:
    desk = Desk(tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{% endfor %}")
    error = desk.refusal(chat())
    assert (error.status, error.code) == (400, "invalid_parameter")


def test_a_model_without_a_chat_template_does_not_chat(tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert Desk(tokenizer).refusal(chat()).code == "no_chat_template"


def test_a_chat_template_may_refuse_a_conversation(tokenizer: Any, monkeypatch: Any) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    error = Desk(tokenizer).refusal(chat())
    assert (error.status, error.code, error.param) == (400, "chat_template", "messages")
    assert "roles must alternate" in str(error)


def test_the_template_sees_roles_texts_and_names(tokenizer: Any, monkeypatch: Any) -> None:
    template = "{% for m in messages %}{{ m.role }}/{{ m.name }}:{{ m.content }};{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    desk = Desk(tokenizer)
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    desk.chat(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": parts, "name": "ann"},
        ]
    )
    want = "system/:s;assistant/:;user/ann:xy;"
    assert tokenizer.decode(desk.engine.asked[0][0]) == want
