"""Chat and completion requests: whole and in chunks, several choices, and cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.steps import GenerationOutput
from tests.serve_app.fakes import until
from tests.serve_app.replica.desk import (
    END,
    PIRATE,
    Broken,
    Desk,
    chat,
    joined,
    text,
)

# ---- one choice ---------------------------------------------------------------------------------


def test_a_chat_is_answered_through_the_template(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    answer = ChatCompletion.model_validate(desk.chat(), strict=True)
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.model, answer.system_fingerprint) == ("tiny", str(PIRATE))
    [(prompt, max_tokens, sampling, stream)] = desk.engine.asked
    assert tokenizer.decode(prompt) == "<u>hi<a>"
    assert (max_tokens, sampling, stream) == (100, SamplingParams(), False)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 6)


def test_an_answer_that_runs_out_of_tokens_says_so(tokenizer: Any) -> None:
    choice = Desk(tokenizer).text(max_tokens=3, return_token_ids=True)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hel", "length")
    assert len(choice["token_ids"]) == 3


def test_what_a_request_asks_of_the_sampler_reaches_it(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    desk.chat(temperature=0.5, top_p=0.25, top_k=7, seed=11, logprobs=True, top_logprobs=2)
    want = SamplingParams(temperature=0.5, top_p=0.25, top_k=7, seed=11, logprobs=2)
    assert desk.engine.asked[0][2] == want


def test_a_pin_reaches_the_gate(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    asyncio.run(desk.answers.whole(text(), "pirate@1234abcd"))
    desk.text()
    assert desk.engine.pins == ["pirate@1234abcd", None]


def test_a_stream_opens_with_the_role_and_closes_with_the_usage(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    request = chat(stream=True, stream_options={"include_usage": True}, return_token_ids=True)
    chunks = desk.chunks(request)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[0]["prompt_token_ids"] == desk.engine.asked[0][0]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 4 + 6
    [choice] = joined(chunks).values()
    assert (choice["text"], choice["token_ids"][-1]) == ("hello", END)


def test_a_chunk_without_anything_new_is_not_sent(tokenizer: Any) -> None:
    chunks = Desk(tokenizer, "a🦜b").chunks(text(stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "a", "🦜", "b", ""]


def test_only_the_finished_step_is_asked_for_where_no_stop_string_may_come(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    desk.text()
    assert desk.engine.sent == 1
    desk.text(stop="x")
    assert desk.engine.asked[1][3]


# ---- several choices ----------------------------------------------------------------------------


def echo(tokenizer: Any) -> Callable[[list[int]], list[int]]:
    """Says its prompt, in capitals."""
    return lambda prompt: [*tokenizer(tokenizer.decode(prompt).upper())["input_ids"], END]


def test_several_prompts_have_n_choices_each_in_their_order(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    desk.engine.script = echo(tokenizer)
    ask = {"prompt": ["a", desk.ids("bb")], "n": 2}
    document = desk.text(**ask)
    Completion.model_validate(document, strict=True)
    assert [(one["index"], one["text"]) for one in document["choices"]] == [
        (0, "A"),
        (1, "A"),
        (2, "BB"),
        (3, "BB"),
    ]
    assert document["usage"] == {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}
    assert len(desk.engine.pins) == 1
    streamed = joined(desk.chunks(text(**ask, stream=True)))
    assert {index: one["text"] for index, one in streamed.items()} == {
        0: "A",
        1: "A",
        2: "BB",
        3: "BB",
    }


def test_every_choice_of_a_streamed_chat_opens_with_the_role(tokenizer: Any) -> None:
    seen: set[int] = set()
    for chunk in Desk(tokenizer).chunks(chat(n=3, stream=True)):
        choice = chunk["choices"][0]
        assert ("role" in choice["delta"]) == (choice["index"] not in seen)
        seen.add(choice["index"])
    assert seen == {0, 1, 2}


def test_each_choice_of_a_prompt_draws_with_a_seed_of_its_own(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    desk.text(prompt=["a", "b"], n=3, seed=5)
    seeds = [sampling.seed for _, _, sampling, _ in desk.engine.asked]
    assert seeds[0] == 5
    assert len(set(seeds[:3])) == 3
    assert seeds[:3] == seeds[3:]  # as if each prompt had been asked alone
    assert all(seed is not None and -(2**63) <= seed < 2**63 for seed in seeds)
    desk.text(n=2)
    assert [sampling.seed for _, _, sampling, _ in desk.engine.asked[6:]] == [None, None]


def test_a_choice_that_fails_takes_the_others_with_it(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    bad = desk.ids("b")

    def script(prompt: list[int]) -> list[int] | None:
        if prompt == bad:
            raise Broken
        return None

    desk.engine.script = script
    for ask in (
        lambda: desk.text(prompt=["a", "b", "c"]),
        lambda: desk.chunks(text(prompt=["a", "b", "c"])),
    ):
        with pytest.raises(Broken):
            ask()
        assert (desk.engine.running, desk.engine.inside) == (0, 0)


def test_an_engine_that_ends_without_an_end_is_a_failure_and_not_a_wait(tokenizer: Any) -> None:
    desk = Desk(tokenizer)

    async def nothing(*_: Any, **__: Any) -> AsyncGenerator[GenerationOutput, None]:
        for tokens in list[list[int]]():
            yield GenerationOutput(token_ids=tokens, finished=False)

    desk.engine.generate = nothing  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="finished"):
        desk.text()


def test_a_client_that_goes_away_cancels_every_choice(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    desk.engine.script = lambda _: None

    async def run() -> None:
        task = asyncio.create_task(desk.answers.whole(text(n=3)))
        await until(lambda: desk.engine.running == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (desk.engine.running, desk.engine.inside, desk.engine.cancelled) == (0, 0, 3)

    asyncio.run(run())


def test_a_stream_that_is_closed_cancels_every_choice(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    desk.engine.script = lambda prompt: None if len(prompt) > 1 else desk.ids("a" * 100)

    async def run() -> None:
        async with aclosing(desk.answers.stream(text(prompt=["a", "bb", "cc"]))) as chunks:
            async for _ in chunks:
                break
        assert (desk.engine.running, desk.engine.inside, desk.engine.cancelled) == (0, 0, 3)

    asyncio.run(run())
