"""OpenAI's own client reads every document and every chunk that is built here."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_app.openai.encoder_responses import classification_document, embedding_document
from serve_app.openai.requests import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from serve_app.openai.responses import (
    NamedToken,
    Piece,
    TokenScore,
    responses_to,
)

HELLO = [{"role": "user", "content": "hello"}]
REVISION = "pirate@1234abcd"
SCORES = [
    TokenScore(
        NamedToken("h", b"h", -0.5), [NamedToken("h", b"h", -0.5), NamedToken("o", b"o", -1.0)], 0
    ),
    TokenScore(NamedToken(r"bytes:\xe2", b"\xe2", -math.inf), [NamedToken("x", b"x", -0.1)], 1),
]


def chat(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": HELLO, **more})


def text(**more: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hello", **more})


def responses(
    request: ChatRequest | CompletionRequest, prompts: list[list[int]] | None = None
) -> Any:
    return responses_to(request, prompts or [[1, 2]], model="tiny", revision=REVISION, replica="r1")


def whole(request: ChatRequest | CompletionRequest, **more: Any) -> Any:
    piece: dict[str, Any] = {"index": 0, "text": "hi", "reason": "stop", "token_ids": [3]} | more
    return responses(request).whole([Piece(**piece)])


def test_openais_client_reads_a_whole_chat_answer() -> None:
    answer = ChatCompletion.model_validate(whole(chat()), strict=True)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", "hi")
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("stop", None)
    assert (answer.model, answer.system_fingerprint) == ("tiny", REVISION)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 3)
    assert answer.id.startswith("chatcmpl-")


def test_an_answer_goes_back_as_a_message_the_way_openais_client_dumps_it() -> None:
    answer = ChatCompletion.model_validate(whole(chat())).choices[0].message.model_dump()
    assert chat(messages=[answer]).messages[0].text == "hi"
    assert chat(messages=[answer | {"content": None}]).messages[0].text == ""


def test_openais_client_reads_a_whole_text_answer() -> None:
    answer = Completion.model_validate(whole(text(), reason="length"), strict=True)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hi", "length")
    assert answer.system_fingerprint == REVISION
    assert answer.id.startswith("cmpl-")


def test_usage_counts_a_prompt_once_and_the_tokens_of_every_choice() -> None:
    maker = responses(text(n=2, prompt=["a", "b"]), prompts=[[1], [2, 3]])
    choices = [Piece(index=i, token_ids=[7] * i, reason="stop") for i in range(4)]
    usage = {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert maker.whole(choices)["usage"] == maker.last(6)["usage"] == usage


def test_openais_client_reads_every_chunk_of_a_chat() -> None:
    maker = responses(chat(stream=True, stream_options={"include_usage": True}))
    documents = [
        maker.first(1),
        maker.piece(Piece(index=1, text="h")),
        maker.piece(Piece(index=1, reason="stop")),
        maker.last(2),
    ]
    chunks = [ChatCompletionChunk.model_validate(one, strict=True) for one in documents]
    assert {(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks} == {
        (documents[0]["id"], documents[0]["created"], REVISION)
    }
    first, piece, end = (chunk.choices[0] for chunk in chunks[:3])
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert (piece.delta.content, piece.finish_reason, piece.index) == ("h", None, 1)
    assert (end.delta.content, end.finish_reason) == (None, "stop")
    assert chunks[3].choices == []
    assert chunks[3].usage is not None
    assert chunks[3].usage.completion_tokens == 2


def test_usage_is_null_in_every_other_chunk_and_nowhere_for_those_who_did_not_ask() -> None:
    asked = responses(text(stream=True, stream_options={"include_usage": True}))
    assert asked.piece(Piece(index=0))["usage"] is None
    assert asked.first(0)["usage"] is None
    assert "usage" not in responses(text(stream=True)).piece(Piece(index=0))
    assert not chat(stream=True, stream_options={}).include_usage


def test_openais_client_reads_every_chunk_of_a_text() -> None:
    maker = responses(text(stream=True))
    end = Completion.model_validate(maker.piece(Piece(index=0, reason="length")), strict=True)
    assert (end.choices[0].text, end.choices[0].finish_reason) == ("", "length")
    first = maker.first(0)
    assert (first["object"], first["choices"][0]["text"]) == ("text_completion", "")


def test_openais_client_reads_a_chats_log_probabilities() -> None:
    request = chat(logprobs=True, top_logprobs=2)
    answer = ChatCompletion.model_validate(whole(request, scores=SCORES), strict=True)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [(one.token, one.logprob, one.bytes) for one in content] == [
        ("h", -0.5, [104]),
        (r"bytes:\xe2", -9999.0, [0xE2]),
    ]
    assert [one.token for one in content[0].top_logprobs] == ["h", "o"]
    chunk = responses(request).piece(Piece(index=0, scores=SCORES))
    ChatCompletionChunk.model_validate(chunk, strict=True)
    assert (
        chunk["choices"][0]["logprobs"] == whole(request, scores=SCORES)["choices"][0]["logprobs"]
    )


def test_openais_client_reads_a_texts_log_probabilities() -> None:
    answer = Completion.model_validate(whole(text(logprobs=2), scores=SCORES), strict=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["h", r"bytes:\xe2"]
    assert logprobs.token_logprobs == [-0.5, -9999.0]
    assert logprobs.text_offset == [0, 1]
    # the token that was taken is always there
    assert logprobs.top_logprobs == [{"h": -0.5, "o": -1.0}, {"x": -0.1, r"bytes:\xe2": -9999.0}]


def test_a_log_probability_is_a_number_for_json() -> None:
    odd = [TokenScore(NamedToken("h", b"h", value), [], 0) for value in (math.nan, -math.inf)]
    for request in (chat(logprobs=True), text(logprobs=0)):
        json.dumps(whole(request, scores=odd), allow_nan=False)


def test_log_probabilities_come_only_when_they_were_asked_for() -> None:
    assert whole(chat(), scores=SCORES)["choices"][0]["logprobs"] is None
    assert whole(chat(logprobs=True))["choices"][0]["logprobs"] == {"content": [], "refusal": None}
    assert responses(text(logprobs=1)).piece(Piece(index=0))["choices"][0]["logprobs"] is None


def test_token_ids_come_only_when_they_were_asked_for() -> None:
    assert "token_ids" not in whole(chat())["choices"][0]
    asked = whole(chat(return_token_ids=True))
    assert (asked["prompt_token_ids"], asked["choices"][0]["token_ids"]) == ([1, 2], [3])
    maker = responses(text(return_token_ids=True))
    assert maker.first(0)["prompt_token_ids"] == [1, 2]
    piece = maker.piece(Piece(index=0, text="x", token_ids=[9]))
    assert piece["choices"][0]["token_ids"] == [9]
    assert "prompt_token_ids" not in piece


def test_each_choice_of_several_prompts_has_its_own_prompt() -> None:
    maker = responses(text(return_token_ids=True, n=2, prompt=["a", "b"]), prompts=[[1], [2, 3]])
    document = maker.whole([Piece(index=i, reason="stop") for i in range(4)])
    assert [one["prompt_token_ids"] for one in document["choices"]] == [[1], [1], [2, 3], [2, 3]]
    assert "prompt_token_ids" not in document
    assert maker.first(2)["choices"][0]["prompt_token_ids"] == [2, 3]


def test_answers_to_two_requests_have_two_ids() -> None:
    assert whole(chat())["id"] != whole(chat())["id"]


@pytest.mark.parametrize("coding", ["float", "base64"])
def test_openais_client_reads_embeddings(coding: str) -> None:
    request = EmbeddingRequest.model_validate({"input": ["a", "b"], "encoding_format": coding})
    document: Any = embedding_document(
        request, [[0.5, -1.0], [0.0, 2.0]], model="tiny", revision=REVISION, replica="r", tokens=7
    )
    assert (document["system_fingerprint"], document["replica_id"]) == (REVISION, "r")
    if coding == "base64":
        for one in document["data"]:
            one["embedding"] = list(struct.unpack("<2f", base64.b64decode(one["embedding"])))
    answer = CreateEmbeddingResponse.model_validate(document, strict=True)
    assert [one.embedding for one in answer.data] == [[0.5, -1.0], [0.0, 2.0]]
    assert [one.index for one in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 7)


def test_a_classification_names_the_likeliest_label() -> None:
    request = ClassifyRequest.model_validate({"input": ["a", "b"]})
    document = classification_document(
        request,
        [[0.25, 0.75], [0.5, 0.5]],
        ["bad", "good"],
        model="tiny",
        revision=REVISION,
        replica="r",
        tokens=7,
    )
    assert document["data"] == [
        {"index": 0, "label": "good", "probs": [0.25, 0.75], "num_classes": 2},
        {"index": 1, "label": "bad", "probs": [0.5, 0.5], "num_classes": 2},
    ]
    assert (document["object"], document["system_fingerprint"]) == ("list", REVISION)
    assert document["usage"]["prompt_tokens"] == 7
