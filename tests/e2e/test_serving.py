"""What a client sees: OpenAI's API over real Ray Serve, with the revision on every answer."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from .fleet import Fleet, eventually


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


def test_sampling_draws_different_answers(client: openai.OpenAI) -> None:
    answers = {
        client.completions.create(model="tiny", prompt="x", max_tokens=12, temperature=1.5)
        .choices[0]
        .text
        for _ in range(4)
    }
    assert len(answers) > 1


def test_models_lists_the_base_and_the_live_revision(client: openai.OpenAI, fleet: Fleet) -> None:
    names = {model.id for model in client.models.list()}
    assert names == {"tiny", f"tiny:{fleet.world.revision('alpha')}"}


def test_health_is_ok_while_a_replica_serves(fleet: Fleet) -> None:
    assert httpx.get(f"{fleet.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"messages": []}, 400, "invalid_parameter"),
        ({"messages": [{"role": "user", "content": "x"}], "seed": 3}, 400, "unsupported_parameter"),
        (
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9999},
            400,
            "context_length_exceeded",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "model": "gpt"}, 404, "model_not_found"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_gets_openais_error_envelope(
    fleet: Fleet, body: dict[str, object], status: int, code: str, stream: bool
) -> None:
    response = httpx.post(f"{fleet.url}/v1/chat/completions", json=body | {"stream": stream})
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert error["message"]


def test_a_client_that_leaves_a_stream_frees_its_place(fleet: Fleet) -> None:
    body = {"prompt": "long", "max_tokens": 3000, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    eventually(
        lambda: all(r.running == 0 for r in fleet.client.fleet().replicas),
        what="the replica noticing that nobody reads",
    )
