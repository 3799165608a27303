"""OpenAI's shapes: what is accepted, what is refused, and that OpenAI's own client reads it."""

from __future__ import annotations

import base64
import json
import math
import pickle
import struct
from typing import Any

import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ValidationError

from serve_app.engine.sampling_params import SamplingParams
from serve_app.openai.model_name import find_pin
from serve_app.openai.requests import (
    MAX_INPUTS,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from serve_app.openai.responses import (
    NamedToken,
    Piece,
    Responses,
    TokenScore,
    classification_document,
    embedding_document,
)
from serve_app.replica.serving_generate import sampling_params
from serve_app.wire.errors import InvalidRequest

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
) -> Responses:
    return Responses(request, prompts or [[1, 2]], model="tiny", revision=REVISION, replica="r1")


def whole(request: ChatRequest | CompletionRequest, **more: Any) -> dict[str, Any]:
    piece: dict[str, Any] = {"index": 0, "text": "hi", "reason": "stop", "token_ids": [3]} | more
    return responses(request).whole([Piece(**piece)])


def refusal(kind: type[BaseModel], body: dict[str, Any]) -> tuple[str, str]:
    """The type and the place of the first thing that is wrong."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    first = caught.value.errors()[0]
    return first["type"], ".".join(map(str, first["loc"]))


# ---- requests -----------------------------------------------------------------------------------


def test_every_parameter_of_a_chat_is_read() -> None:
    request = chat(
        model="tiny",
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        stop=["a", "b"],
        seed=-3,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        user="me",
        return_token_ids=True,
        logprobs=True,
        top_logprobs=7,
        metadata={"a": "b"},
        safety_identifier="x",
        prompt_cache_key="y",
    )
    assert sampling_params(request) == SamplingParams(
        temperature=0.5, top_p=0.9, top_k=40, seed=-3, logprobs=7
    )
    assert (request.stop, request.n, request.include_usage) == (["a", "b"], 2, True)
    assert pickle.loads(pickle.dumps(request)) == request


def test_what_is_left_away_is_openais_default() -> None:
    for request in (chat(), text()):
        assert sampling_params(request) == SamplingParams()
        assert (request.stop, request.n, request.stream, request.wanted_tokens) == (
            [],
            1,
            False,
            None,
        )


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, EmbeddingRequest])
def test_null_is_the_default_of_every_optional_parameter(kind: type[BaseModel]) -> None:
    needed: dict[str, Any] = {"messages": HELLO} if kind is ChatRequest else {}
    needed |= {"prompt": "x"} if kind is CompletionRequest else {}
    needed |= {"input": "x"} if kind is EmbeddingRequest else {}
    optional = [name for name in kind.model_fields if name not in needed]
    nulls = dict.fromkeys([*optional, "tools", "logit_bias", "suffix", "dimensions"])
    assert kind.model_validate(needed | nulls) == kind.model_validate(needed)
    for name in needed:
        assert refusal(kind, {**needed, name: None}) == ("missing", name)


@pytest.mark.parametrize(
    "more",
    [
        {"frequency_penalty": 0},
        {"presence_penalty": 0.0},
        {"logit_bias": {}},
        {"tools": []},
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"store": False},
        {"service_tier": "default"},
    ],
)
def test_a_value_that_asks_for_nothing_is_accepted(more: dict[str, Any]) -> None:
    assert chat(**more) == chat()


@pytest.mark.parametrize(
    "more",
    [
        {"frequency_penalty": 0.1},
        {"presence_penalty": -1},
        {"presence_penalty": False},
        {"logit_bias": {"5": 1}},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "auto"},
        {"parallel_tool_calls": 1},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["text", "audio"]},
        {"store": True},
        {"service_tier": "flex"},
        {"best_of": 1},
        {"min_p": 0.1},
        {"pin": "pirate"},
        {"nonsense": 0},
    ],
)
def test_what_is_not_supported_is_refused_and_never_ignored(more: dict[str, Any]) -> None:
    [name] = more
    assert refusal(ChatRequest, {"messages": HELLO, **more}) == ("extra_forbidden", name)


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"temperature": 2.5}, "less_than_equal"),
        ({"temperature": -1}, "greater_than_equal"),
        ({"temperature": "1"}, "float_type"),
        ({"temperature": True}, "float_type"),
        ({"temperature": math.nan}, "finite_number"),
        ({"top_p": 0}, "greater_than"),
        ({"top_p": 1.1}, "less_than_equal"),
        ({"top_p": math.inf}, "finite_number"),
        ({"top_k": -2}, "greater_than_equal"),
        ({"top_k": 1.0}, "int_type"),
        ({"max_tokens": 0}, "greater_than_equal"),
        ({"max_tokens": True}, "int_type"),
        ({"max_completion_tokens": 0}, "greater_than_equal"),
        ({"seed": 2**63}, "less_than"),
        ({"seed": "1"}, "int_type"),
        ({"n": 0}, "greater_than_equal"),
        ({"n": 17}, "less_than_equal"),
        ({"stop": ["a"] * 5}, "too_long"),
        ({"stream": 1}, "bool_type"),
        ({"stream_options": {"include_usage": True}}, "refused"),
        ({"logprobs": 3}, "bool_type"),
        ({"top_logprobs": 3}, "refused"),
        ({"top_logprobs": 3, "logprobs": False}, "refused"),
        ({"top_logprobs": 21, "logprobs": True}, "less_than_equal"),
        ({"messages": []}, "too_short"),
        ({"metadata": []}, "dict_type"),
    ],
)
def test_a_value_out_of_its_range_is_refused(more: dict[str, Any], kind: str) -> None:
    [name, *_] = more
    assert refusal(ChatRequest, {"messages": HELLO, **more}) == (kind, name)


@pytest.mark.parametrize(
    ("more", "kind", "where"),
    [
        ({"stop": [""]}, "string_too_short", "stop.0"),
        ({"stop": ["x" * 1025]}, "string_too_long", "stop.0"),
        ({"stop": ["\ud800"]}, "string_unicode", "stop.0"),
        ({"stream": True, "stream_options": {"a": 1}}, "extra_forbidden", "stream_options.a"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "literal_error", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "refused", "messages.0"),
        ({"messages": [{"role": "user", "content": None}]}, "refused", "messages.0"),
        ({"messages": [{"role": "user", "content": 1}]}, "string_type", "messages.0.content.text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "refused", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "literal_error",
            "messages.0.content.parts.0.type",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "extra_forbidden",
            "messages.0.tool_calls",
        ),
    ],
)
def test_a_refusal_names_the_place(more: dict[str, Any], kind: str, where: str | None) -> None:
    found, place = refusal(ChatRequest, {"messages": HELLO, **more})
    assert found == kind
    assert where in (None, place)


def test_minus_one_is_all_tokens_for_top_k() -> None:
    assert sampling_params(chat(top_k=-1)).top_k == 0


def test_one_stop_string_needs_no_list() -> None:
    assert chat(stop="END").stop == ["END"]


def test_a_message_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "ab"


def test_an_answer_goes_back_as_a_message_the_way_openais_client_dumps_it() -> None:
    answer = ChatCompletion.model_validate(whole(chat())).choices[0].message.model_dump()
    assert chat(messages=[answer]).messages[0].text == "hi"
    assert chat(messages=[answer | {"content": None}]).messages[0].text == ""


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=5).wanted_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).wanted_tokens == 7
    assert text(max_tokens=5).wanted_tokens == 5


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    assert chat(logprobs=True).alternatives == 0
    assert chat(logprobs=False).alternatives is None
    assert (text(logprobs=0).alternatives, text().alternatives) == (0, None)
    assert refusal(CompletionRequest, {"prompt": "x", "logprobs": 6})[1] == "logprobs"
    assert refusal(CompletionRequest, {"prompt": "x", "logprobs": True})[1] == "logprobs"


@pytest.mark.parametrize(
    ("prompt", "several"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [3]], ["a", [3]]),
    ],
)
def test_prompts_come_as_texts_or_tokens_one_or_several(prompt: Any, several: list[Any]) -> None:
    assert text(prompt=prompt).prompt == several
    embedding = EmbeddingRequest.model_validate({"input": prompt})
    assert embedding.input == several
    assert CompletionRequest.model_validate(text(prompt=prompt).model_dump()).prompt == several


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [""],
        [[]],
        ["a", ""],
        [1, "a"],
        [[1], 2],
        [-1],
        [True],
        [[1, True]],
        [1.0],
        {},
        5,
        "\ud800",
        ["a"] * 65,
    ],
)
def test_what_is_no_prompt_is_refused_in_one_place(prompt: Any) -> None:
    assert refusal(CompletionRequest, {"prompt": prompt}) == ("refused", "prompt")


def test_a_request_has_a_bound_on_all_its_choices() -> None:
    assert len(text(prompt=["a"] * 64, n=2).prompt) == 64
    assert refusal(CompletionRequest, {"prompt": ["a"] * 64, "n": 3}) == ("refused", "prompt")


def test_the_best_of_so_many_is_only_all_of_them() -> None:
    assert text(best_of=1).n == 1
    assert text(best_of=3, n=3, echo=False).n == 3
    assert refusal(CompletionRequest, {"prompt": "x", "best_of": 2}) == ("refused", "best_of")
    assert refusal(CompletionRequest, {"prompt": "x", "echo": True}) == ("extra_forbidden", "echo")
    assert refusal(CompletionRequest, {"prompt": "x", "suffix": ""})[0] == "extra_forbidden"


def test_embeddings_and_classes_are_asked_for_many_inputs_at_once() -> None:
    assert ClassifyRequest.model_validate({"input": "a"}).input == ["a"]
    assert EmbeddingRequest.model_validate({"input": "a", "dimensions": None}).input == ["a"]
    body = {"input": "a", "dimensions": 3}
    assert refusal(EmbeddingRequest, body) == ("extra_forbidden", "dimensions")
    assert refusal(EmbeddingRequest, {"input": ["a"] * (MAX_INPUTS + 1)}) == ("refused", "input")
    assert refusal(ClassifyRequest, {"input": [1, 2]}) == ("refused", "input")
    assert refusal(EmbeddingRequest, {"input": "a", "encoding_format": "int8"})[1] == (
        "encoding_format"
    )


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, EmbeddingRequest])
def test_the_shapes_are_in_the_api_schema(kind: type[BaseModel]) -> None:
    assert kind.model_json_schema()["additionalProperties"] is False


@pytest.mark.parametrize("served", ["tiny", "org/tiny:v1"])
def test_a_pin_comes_behind_the_served_name_or_alone(served: str) -> None:
    for pin in ("pirate", "pirate@1234abcd", "pirate@" + "a" * 64, "base@00000000"):
        assert find_pin(f"{served}:{pin}", None, served=served) == pin
        assert find_pin(pin, None, served=served) == pin
    assert find_pin(served, None, served=served) is None
    assert find_pin(None, None, served=served) is None


def test_a_pin_beside_the_model_counts_as_well() -> None:
    for model in (None, "tiny", "tiny:pirate", "pirate"):
        assert find_pin(model, "pirate", served="tiny") == "pirate"


@pytest.mark.parametrize("model", ["tiny:other", "other", "tiny:"])
def test_two_pins_that_are_not_the_same_are_refused(model: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        find_pin(model, "pirate", served="tiny")
    assert (caught.value.status, caught.value.code) == (400, "conflicting_revisions")


def test_a_refusal_survives_pickle() -> None:
    error = pickle.loads(pickle.dumps(InvalidRequest(404, "model_not_found", "no", "model")))
    assert (error.status, error.code, str(error), error.param) == (
        404,
        "model_not_found",
        "no",
        "model",
    )


# ---- responses ----------------------------------------------------------------------------------


def test_openais_client_reads_a_whole_chat_answer() -> None:
    answer = ChatCompletion.model_validate(whole(chat()), strict=True)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", "hi")
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("stop", None)
    assert (answer.model, answer.system_fingerprint) == ("tiny", REVISION)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 3)
    assert answer.id.startswith("chatcmpl-")


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
    document = embedding_document(
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
