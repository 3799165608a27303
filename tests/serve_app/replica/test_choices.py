"""Choices: text up to a stop string, and log-probabilities of its tokens."""

from __future__ import annotations

import asyncio
import string
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion

from serve_app.settings import Settings
from tests.serve_app.replica.desk import (
    END,
    Desk,
    FakeEngine,
    chat,
    joined,
    scores,
    serving,
    text,
)

# ---- stop strings -------------------------------------------------------------------------------


def test_a_stop_string_ends_the_answer_before_it_and_the_generation_at_once(
    tokenizer: Any,
) -> None:
    desk = Desk(tokenizer, "one STOP two three")
    document = desk.text(stop=["STOP"], return_token_ids=True)
    choice = document["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")
    assert tokenizer.decode(choice["token_ids"]) == "one STOP"
    assert document["usage"]["completion_tokens"] == 8
    assert (desk.engine.cancelled, desk.engine.sent) == (1, 8)


def test_the_start_of_a_stop_string_is_not_sent_until_it_is_none(tokenizer: Any) -> None:
    chunks = Desk(tokenizer, "a STOP").chunks(text(stream=True, stop="STOP", n=1))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "a", " ", ""]
    chunks = Desk(tokenizer, "a STx").chunks(text(stream=True, stop="STOP"))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "a", " ", "STx", ""]
    chunks = Desk(tokenizer, "a ST").chunks(text(stream=True, stop="STOP"))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "a", " ", "ST"]


def test_a_stop_string_may_have_characters_of_several_tokens(tokenizer: Any) -> None:
    choice = Desk(tokenizer, "né🦜!").chat(stop=["🦜"])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("né", "stop")


@settings(deadline=None)  # a busy machine is no failure
@given(
    said=st.text(alphabet="abé🦜\n", max_size=25),
    broken=st.lists(st.integers(0, 258), max_size=4),
    stops=st.lists(st.text(alphabet="abé🦜\n", min_size=1, max_size=3), max_size=4),
    room=st.integers(1, 40),
    step_tokens=st.integers(1, 4),
)
def test_a_stream_adds_up_to_the_whole_answer(
    tokenizer: Any, said: str, broken: list[int], stops: list[str], room: int, step_tokens: int
) -> None:
    desk = Desk(tokenizer)
    tokens = [*broken, *desk.ids(said), *broken, END]
    desk.engine = FakeEngine(lambda _: tokens, step_tokens=step_tokens)
    desk.answers = serving(desk.engine, tokenizer, Settings(max_model_len=512), vocabulary=260)
    more = {"stop": stops, "max_tokens": room, "return_token_ids": True}
    for request in (chat(**more, logprobs=True, top_logprobs=1), text(**more, logprobs=1)):
        document: Any = asyncio.run(desk.answers.whole(request))
        [one] = document["choices"]
        [other] = joined(desk.chunks(request)).values()
        said_whole = one["text"] if "text" in one else one["message"]["content"]
        assert other == {
            "text": said_whole,
            "token_ids": one["token_ids"],
            "scores": scores(one),
            "finish_reason": one["finish_reason"],
        }
        plain = tokenizer.decode(tokens[:room], skip_special_tokens=True)
        assert plain.startswith(said_whole)
        assert not any(stop in said_whole for stop in stops)
        if not stops:
            assert said_whole == plain


# ---- log-probabilities --------------------------------------------------------------------------


def test_every_token_of_the_text_has_a_log_probability_and_no_other(tokenizer: Any) -> None:
    desk = Desk(tokenizer, "a🦜b STOP")
    answer = ChatCompletion.model_validate(
        desk.chat(logprobs=True, top_logprobs=1, stop="STOP"), strict=True
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert b"".join(bytes(one.bytes or []) for one in content).decode() == "a🦜b "
    assert [one.logprob for one in content] == [-0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert [len(one.top_logprobs) for one in content] == [2] * 7
    assert content[1].token == r"bytes:\xf0"


def test_a_texts_log_probabilities_say_where_each_token_begins(tokenizer: Any) -> None:
    answer = Completion.model_validate(Desk(tokenizer, "aé!").text(logprobs=0), strict=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", r"bytes:\xc3", r"bytes:\xa9", "!"]
    assert logprobs.text_offset == [0, 1, 1, 2]


def test_the_end_token_is_not_text_even_where_the_tokenizer_thinks_so(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    letter = desk.ids("!")[0]
    desk.engine.script = lambda _: [*desk.ids("yes"), letter]
    desk.engine.end = letter
    choice = desk.text(logprobs=0, return_token_ids=True)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("yes", "stop")
    assert (choice["logprobs"]["tokens"], choice["token_ids"][-1]) == (["y", "e", "s"], letter)


def test_an_operator_may_bound_the_alternatives(tokenizer: Any) -> None:
    desk = Desk(tokenizer, max_logprobs=3)
    error = desk.refusal(chat(logprobs=True, top_logprobs=4))
    assert (error.status, error.param) == (400, "top_logprobs")
    assert desk.refusal(text(logprobs=4)).param == "logprobs"


def test_any_printable_text_comes_through(tokenizer: Any) -> None:
    assert Desk(tokenizer, string.printable).text()["choices"][0]["text"] == string.printable
