"""OpenAI's shapes: what is accepted, what is refused, and that OpenAI's own client reads it."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from serve_app.openai import ChatRequest, CompletionRequest, RequestRefused, Responses, usage

HELLO = [{"role": "user", "content": "hello"}]


def chat(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": HELLO, **more})


def text(**more: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hello", **more})


def responses(request: ChatRequest | CompletionRequest) -> Responses:
    return Responses(request, model="tiny", replica="r1")


def whole(request: ChatRequest | CompletionRequest, reason: str = "stop") -> dict[str, Any]:
    return responses(request).whole(
        text="hi", revision="pirate@1234abcd", reason=reason, prompt_ids=[1, 2], token_ids=[3]
    )


def test_openais_client_reads_a_whole_chat_answer() -> None:
    answer = ChatCompletion.model_validate(whole(chat()), strict=True)
    assert answer.object == "chat.completion"
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == (
        "assistant",
        "hi",
    )
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.model, answer.system_fingerprint) == ("tiny", "pirate@1234abcd")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 3)
    assert answer.id.startswith("chatcmpl-")


def test_openais_client_reads_a_whole_text_answer() -> None:
    answer = Completion.model_validate(whole(text(), reason="length"), strict=True)
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hi", "length")
    assert answer.system_fingerprint == "pirate@1234abcd"
    assert answer.id.startswith("cmpl-")


def test_openais_client_reads_every_chunk_of_a_chat() -> None:
    maker = responses(chat(stream=True))
    documents = [
        maker.first(revision="v@1", prompt_ids=[1]),
        maker.piece(text="h", revision="v@1"),
        maker.piece(text="", revision="v@1", reason="stop"),
        maker.last(revision="v@1", prompt_ids=[1], token_ids=[2, 3]),
    ]
    chunks = [ChatCompletionChunk.model_validate(one, strict=True) for one in documents]
    assert {(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks} == {
        (documents[0]["id"], documents[0]["created"], "v@1")
    }
    first, piece, end = (chunk.choices[0] for chunk in chunks[:3])
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert (piece.delta.content, piece.finish_reason) == ("h", None)
    assert (end.delta.content, end.finish_reason) == (None, "stop")
    assert chunks[3].choices == []
    assert chunks[3].usage is not None
    assert chunks[3].usage.completion_tokens == 2


def test_openais_client_reads_the_last_chunk_of_a_text() -> None:
    maker = responses(text(stream=True))
    end = Completion.model_validate(maker.piece(text="", revision="v@1", reason="length"))
    assert (end.choices[0].text, end.choices[0].finish_reason) == ("", "length")
    first = maker.first(revision="v@1", prompt_ids=[1])
    assert (first["object"], first["choices"][0]["text"]) == ("text_completion", "")


def test_token_ids_come_only_when_they_were_asked_for() -> None:
    assert "token_ids" not in whole(chat())["choices"][0]
    asked = whole(chat(return_token_ids=True))
    assert (asked["prompt_token_ids"], asked["choices"][0]["token_ids"]) == ([1, 2], [3])
    piece = responses(text(return_token_ids=True)).piece(text="x", revision="v@1", token_ids=[9])
    assert piece["choices"][0]["token_ids"] == [9]


def test_answers_to_two_requests_have_two_ids() -> None:
    assert whole(chat())["id"] != whole(chat())["id"]


def test_usage_adds_up() -> None:
    assert usage([1, 2], [3, 4, 5]) == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
    }


def test_a_message_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": parts}]})
    assert request.messages[0].text == "ab"


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=5).wanted_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).wanted_tokens == 7
    assert chat().wanted_tokens is None
    assert text(max_tokens=5).wanted_tokens == 5


def test_one_prompt_may_come_as_a_list_of_one() -> None:
    assert CompletionRequest.model_validate({"prompt": ["hello"]}).prompt == "hello"


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": True},
        {"tools": []},
        {"stop": ["x"]},
        {"seed": 1},
        {"n": 2},
        {"top_p": 0.5},
        {"temperature": 2.5},
        {"temperature": -1},
        {"max_tokens": 0},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"stream_options": {"include": True}},
    ],
)
def test_what_is_not_supported_is_refused_and_never_ignored(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chat(**more)


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [1, 2], [[1, 2]], None])
def test_only_one_text_is_a_prompt(prompt: object) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"prompt": prompt})


def test_usage_in_a_stream_is_for_those_who_ask() -> None:
    assert not chat(stream=True).include_usage
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage


def test_a_refusal_survives_pickle() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(RequestRefused(404, "model_not_found", "no", "model")))
    assert (error.status, error.code, str(error), error.param) == (
        404,
        "model_not_found",
        "no",
        "model",
    )
