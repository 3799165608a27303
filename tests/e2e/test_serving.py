"""What a client sees: OpenAI's API over real Ray Serve, with the revision on every answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from .fleet import Fleet, code_of

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_the_first_answer_is_exact_and_names_the_declared_adapter(fleet: Fleet) -> None:
    answer = fleet.ask("hello")
    assert answer.revision == fleet.world.revision("alpha")
    assert fleet.is_exact(answer)


def test_the_openai_client_chats(client: openai.OpenAI, fleet: Fleet) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=0
    )
    assert chat.system_fingerprint == fleet.world.revision("alpha")
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage is not None
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


def test_a_stream_is_the_whole_answer_in_pieces_and_every_piece_names_the_revision(
    client: openai.OpenAI, fleet: Fleet
) -> None:
    ask = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    messages = [{"role": "user", "content": "stream this"}]
    whole = client.chat.completions.create(messages=messages, **ask)  # type: ignore[call-overload]
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        messages=messages, stream=True, stream_options={"include_usage": True}, **ask
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert {c.system_fingerprint for c in chunks} == {fleet.world.revision("alpha")}
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")


def test_text_completions_work_whole_and_streamed(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": "once upon", "max_tokens": 10, "temperature": 0}
    whole = client.completions.create(**ask)  # type: ignore[call-overload]
    pieces = client.completions.create(stream=True, **ask)  # type: ignore[call-overload]
    assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text


def test_sampling_draws_different_answers_and_with_a_seed_the_same(client: openai.OpenAI) -> None:
    def draw(seed: int | None) -> list[str]:
        drawn = client.completions.create(
            model="tiny", prompt="x", max_tokens=12, temperature=1.5, top_p=0.9, n=3, seed=seed
        )
        assert [choice.index for choice in drawn.choices] == [0, 1, 2]
        return [choice.text for choice in drawn.choices]

    assert len({text for _ in range(2) for text in draw(None)}) > 1
    first = draw(7)
    assert len(set(first)) > 1  # each choice has a seed of its own
    assert draw(7) == first
    assert draw(8) != first


def test_nearly_no_top_p_is_greedy(client: openai.OpenAI, fleet: Fleet) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": fleet.steady, "max_tokens": 12}
    likeliest = client.completions.create(temperature=0, **ask).choices[0].text
    assert client.completions.create(top_p=1e-6, **ask).choices[0].text == likeliest


def test_an_answer_ends_before_its_stop_string_streamed_as_well(
    client: openai.OpenAI, fleet: Fleet
) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": fleet.steady, "temperature": 0}
    whole = client.completions.create(max_tokens=40, **ask).choices[0]
    assert whole.finish_reason == "length"
    stop = whole.text[10:13]
    want = whole.text[: whole.text.index(stop)]
    stopped = client.completions.create(max_tokens=40, stop=stop, **ask).choices[0]
    assert (stopped.text, stopped.finish_reason) == (want, "stop")
    pieces = [
        piece.choices[0]
        for piece in client.completions.create(max_tokens=40, stop=[stop], stream=True, **ask)
    ]
    assert "".join(piece.text for piece in pieces) == want
    assert pieces[-1].finish_reason == "stop"


def test_choices_are_streamed_side_by_side(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, n=3, seed=5, max_completion_tokens=8, stream=True, user="me"
    )
    texts, reasons = ["", "", ""], {}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    whole = client.chat.completions.create(
        model="tiny", messages=HELLO, n=3, seed=5, max_completion_tokens=8
    )
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24


def test_each_token_comes_with_its_log_probability_and_the_likeliest_others(
    client: openai.OpenAI, fleet: Fleet
) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    scores = chat.choices[0].logprobs
    assert scores is not None
    assert scores.content
    for token in scores.content:
        assert [other.logprob for other in token.top_logprobs] == sorted(
            (other.logprob for other in token.top_logprobs), reverse=True
        )
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
    text = client.completions.create(
        model="tiny", prompt=fleet.steady, max_tokens=6, temperature=0, logprobs=2
    ).choices[0]
    assert text.logprobs is not None
    assert text.logprobs.tokens is not None
    assert len(text.logprobs.tokens) == 6
    assert len(text.logprobs.token_logprobs or []) == len(text.logprobs.tokens)


def test_usage_counts_prompt_and_answer(client: openai.OpenAI, fleet: Fleet) -> None:
    answer = client.completions.create(
        model="tiny", prompt=fleet.steady, max_tokens=9, temperature=0, n=2
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(fleet.steady)  # a token a byte
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (18, "length")


# ---- revisions ----------------------------------------------------------------------------------


def test_models_lists_what_is_live_and_each_of_them_can_be_asked_for(
    client: openai.OpenAI, fleet: Fleet
) -> None:
    alpha = fleet.world.revision("alpha")
    names = {model.id for model in client.models.list()}
    assert names == {"tiny", f"tiny:{alpha}"}
    for name in names:
        answer = client.completions.create(model=name, prompt="x", max_tokens=1)
        assert answer.system_fingerprint == alpha


@pytest.mark.parametrize("stream", [False, True])
def test_a_revision_can_be_pinned_by_model_or_header_and_the_two_must_agree(
    fleet: Fleet, stream: bool
) -> None:
    alpha = fleet.world.revision("alpha")

    def ask(model: str, pin: str | None) -> httpx.Response:
        headers = {} if pin is None else {"x-adapter-revision": pin}
        body = {"model": model, "prompt": "x", "max_tokens": 2, "stream": stream}
        return fleet.post(body, headers=headers)

    for model, pin in (
        (f"tiny:{alpha}", None),
        ("alpha", None),
        ("tiny", alpha),
        (f"tiny:{alpha}", alpha),
    ):
        answer = ask(model, pin)
        assert (answer.status_code, answer.headers["x-adapter-revision"]) == (200, alpha)
    beta = fleet.world.revision("beta")  # exists, but nobody has loaded it
    for model, pin in ((f"tiny:{beta}", None), ("tiny", beta), ("gpt-4", None), ("tiny:", None)):
        assert (ask(model, pin).status_code, code_of(ask(model, pin))) == (404, "model_not_found")
    refused = ask(f"tiny:{alpha}", beta)
    assert (refused.status_code, code_of(refused)) == (400, "conflicting_revisions")


def test_a_loaded_adapter_answers_whoever_names_it_and_nobody_else(
    client: openai.OpenAI, fleet: Fleet
) -> None:
    alpha, beta = fleet.world.revision("alpha"), fleet.world.revision("beta")
    load = {"lora_name": "beta", "lora_path": str(fleet.world.adapter("beta"))}
    stale = fleet.post(load | {"expected_generation": 10**6}, path="/v1/load_lora_adapter")
    assert (stale.status_code, code_of(stale)) == (409, "generation_mismatch")
    loaded = fleet.post(load, path="/v1/load_lora_adapter").json()
    assert (loaded["revision"], loaded["ready"], loaded["total"]) == (beta, 2, 2)
    listed = httpx.get(f"{fleet.url}/v1/lora_adapters").json()
    assert [adapter["lora_name"] for adapter in listed["data"]] == ["beta"]

    names = {model.id for model in client.models.list()}
    assert names == {"tiny", f"tiny:{alpha}", f"tiny:{beta}"}
    for model, want in [(None, alpha), ("tiny", alpha), ("beta", beta), ("tiny:beta", beta)] + [
        (name, beta) for name in names if name.endswith(beta)
    ]:
        answer = fleet.ask("which one", model=model)
        assert answer.revision == want
        assert fleet.is_exact(answer)

    gone = fleet.post({"lora_name": "beta"}, path="/v1/unload_lora_adapter")
    assert gone.status_code == 200
    answer_to_it = fleet.post({"model": "beta", "prompt": "x"})
    assert (answer_to_it.status_code, code_of(answer_to_it)) == (404, "model_not_found")
    again = fleet.post({"lora_name": "beta"}, path="/v1/unload_lora_adapter")
    assert (again.status_code, code_of(again)) == (404, "adapter_not_loaded")
    assert fleet.ask("which one").revision == alpha


# ---- refusals -----------------------------------------------------------------------------------


def test_health_is_ok_while_a_replica_serves(fleet: Fleet) -> None:
    assert httpx.get(f"{fleet.url}/health").status_code == 200


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"messages": []}, 400, "invalid_parameter"),
        (CHAT | {"tools": [{"type": "function"}]}, 400, "unsupported_parameter"),
        (CHAT | {"logit_bias": {"5": 1}}, 400, "unsupported_parameter"),
        (CHAT | {"frequency_penalty": 0.5}, 400, "unsupported_parameter"),
        (CHAT | {"response_format": {"type": "json_object"}}, 400, "unsupported_parameter"),
        (CHAT | {"max_tokens": 9999}, 400, "context_length_exceeded"),
        (CHAT | {"model": "gpt"}, 404, "model_not_found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_gets_openais_error_envelope(
    fleet: Fleet, body: dict[str, object], status: int, code: str, stream: bool
) -> None:
    response = fleet.post(body | {"stream": stream}, path="/v1/chat/completions")
    assert (response.status_code, code_of(response)) == (status, code)


def test_the_openai_client_raises_errors_of_its_own_kinds(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="x", suffix="y")
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "suffix")


JSON = {"content-type": "application/json"}
BODIES: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "nothing": (b"", JSON, 400, "invalid_json"),
    "bad JSON": (b'{"prompt"', JSON, 400, "invalid_json"),
    "no content type": (b'{"prompt": "x"}', {}, 415, "unsupported_media_type"),
    "too large": (b"x" * (4 * 2**20 + 1), JSON, 413, "body_too_large"),
    "not UTF-8": (b'{"prompt": "\xff"}', JSON, 400, "invalid_json"),
    "NaN": (b'{"prompt": "x", "top_p": NaN}', JSON, 400, "invalid_json"),
    "a name twice": (b'{"prompt": "x", "prompt": "y"}', JSON, 400, "invalid_json"),
    "nested": (b'{"prompt": ' + b"[" * 10**5, JSON, 400, "invalid_json"),
    "huge number": (b'{"prompt": "x", "n": ' + b"9" * 10**4 + b"}", JSON, 400, "invalid_json"),
    "large number": (b'{"prompt": "x", "n": 1' + b"0" * 99 + b"}", JSON, 400, "invalid_parameter"),
    "surrogate": (b'{"prompt": "\\ud800"}', JSON, 400, "invalid_parameter"),
    "empty prompt": (b'{"prompt": ""}', JSON, 400, "invalid_parameter"),
    "no object": (b"[]", JSON, 400, "invalid_parameter"),
    "long": (b'{"prompt": "' + b"x" * 5000 + b'"}', JSON, 400, "context_length_exceeded"),
}


@pytest.mark.parametrize("kind", BODIES)
def test_whatever_comes_as_a_body_is_the_clients_fault(fleet: Fleet, kind: str) -> None:
    body, headers, status, code = BODIES[kind]
    url = f"{fleet.url}/v1/completions"
    response = httpx.post(url, content=body, headers=headers, timeout=60)
    assert (response.status_code, code_of(response)) == (status, code)
    if kind == "too large":  # and when its size is not announced
        pieces = iter([body[: 2**20]] * 8)
        response = httpx.post(url, content=pieces, headers=headers, timeout=60)
        assert (response.status_code, code_of(response)) == (status, code)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("PATCH", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/admin/rollouts/%00", 404, "rollout_not_found"),
        ("POST", "/admin/rollouts/%ED%A0%80/abort", 404, "rollout_not_found"),
    ],
)
def test_a_wrong_address_gets_the_same_envelope(
    fleet: Fleet, method: str, path: str, status: int, code: str
) -> None:
    response = httpx.request(method, f"{fleet.url}{path}")
    assert (response.status_code, code_of(response)) == (status, code)


def test_a_header_that_is_not_ascii_is_a_revision_that_is_not_there(fleet: Fleet) -> None:
    headers = {b"x-adapter-revision": b"\xff\xfe", b"content-type": b"application/json"}
    url = f"{fleet.url}/v1/completions"
    response = httpx.post(url, content=b'{"prompt": "x"}', headers=headers)
    assert (response.status_code, code_of(response)) == (404, "model_not_found")


def test_a_client_that_leaves_a_stream_frees_its_place(fleet: Fleet) -> None:
    url, body = f"{fleet.url}/v1/completions", {"prompt": "x", "n": 16, "stream": True}
    with httpx.stream("POST", url, json=body, timeout=30) as response:
        next(response.iter_lines())
    fleet.until_running(0)
