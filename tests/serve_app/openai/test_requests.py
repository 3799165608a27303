"""OpenAI's request bodies: accepted and refused values, and the revision that `model` names."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
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
from serve_app.replica.serving_generate import sampling_params
from serve_app.wire.errors import InvalidRequest

HELLO = [{"role": "user", "content": "hello"}]


def chat(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": HELLO, **more})


def text(**more: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hello", **more})


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


def test_absent_parameters_have_openais_defaults() -> None:
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


def test_a_pin_next_to_the_model_counts_as_well() -> None:
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
