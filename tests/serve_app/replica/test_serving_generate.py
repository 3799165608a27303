"""Between a request and the engine: prompts, choices, stop strings, and who is cancelled when."""

from __future__ import annotations

import asyncio
import string
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from transformers import AutoTokenizer

from hotswap_lib import AdapterImage, Revision
from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs
from serve_app.engine.steps import GenerationOutput
from serve_app.openai.requests import ChatRequest, CompletionRequest
from serve_app.replica.serving_generate import GenerationServing
from serve_app.settings import Settings
from serve_app.wire.errors import InvalidRequest
from serve_app.wire.request_stats import PROBE
from serve_app.wire.text_score import TextScore
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.fakes import until
from tests.serve_app.generating import SHORT, Running, started

PIRATE = Revision("pirate", "1234abcd" * 8)
END = 259
T = TypeVar("T")


class Broken(Exception):
    pass


class FakeEngine:
    """Says what `script` gives for a prompt, so many tokens a step. Waits for ever on None."""

    def __init__(
        self, script: Callable[[list[int]], list[int] | None], *, step_tokens: int = 1
    ) -> None:
        self.script = script
        self.step_tokens = step_tokens
        self.end = END
        self.scores_texts = True
        self.pins: list[str | None] = []
        self.sessions: list[str | None] = []
        self.asked: list[tuple[list[int], int, SamplingParams, bool]] = []
        self.running = self.inside = self.sent = self.cancelled = 0

    @asynccontextmanager
    async def admit(self, pin: str | None, session: str | None) -> AsyncIterator[FakeEngine]:
        self.pins.append(pin)
        self.sessions.append(session)
        self.inside += 1
        try:
            yield self
        finally:
            assert self.running == 0, "generations outlive their request"
            self.inside -= 1

    @property
    def revision(self) -> Revision:
        return PIRATE

    def ended_by_itself(self, token_ids: list[int]) -> bool:
        return token_ids[-1:] == [self.end]

    async def generate(
        self, prompt_ids: list[int], *, max_tokens: int, sampling: SamplingParams, stream: bool
    ) -> AsyncGenerator[GenerationOutput, None]:
        self.asked.append((prompt_ids, max_tokens, sampling, stream))
        self.running += 1
        finished = False
        try:
            tokens = self.script(prompt_ids)
            if tokens is None:
                await asyncio.Event().wait()
            assert tokens
            tokens = tokens[:max_tokens]
            scores = [
                TokenLogprobs(-float(at), ((token, -float(at)), (0, -9.0)))
                for at, token in enumerate(tokens)
            ]
            first = self.step_tokens if stream else len(tokens)
            for end in range(first, len(tokens) + self.step_tokens, self.step_tokens):
                await asyncio.sleep(0)
                end = min(end, len(tokens))
                finished = end == len(tokens)
                self.sent += 1
                logprobs = scores[:end] if sampling.logprobs is not None else []
                yield GenerationOutput(token_ids=tokens[:end], finished=finished, logprobs=logprobs)
        finally:
            self.running -= 1
            self.cancelled += not finished


@pytest.fixture(scope="module")
def tokenizer(world: TinyWorld) -> Any:
    return AutoTokenizer.from_pretrained(world.model)


class Desk:
    """GenerationServing over a fake engine that says one text to everything."""

    def __init__(self, tokenizer: Any, said: str = "hello", **more: Any) -> None:
        self.tokenizer = tokenizer
        self.engine = FakeEngine(lambda _: [*self.ids(said), END])
        values = {"served_model_name": "tiny", "max_model_len": 512, "max_tokens_default": 100}
        self.answers = GenerationServing(
            self.engine, tokenizer, Settings.model_validate(values | more), replica="r1"
        )

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def chat(self, **more: Any) -> dict[str, Any]:
        return asyncio.run(self.answers.whole(chat(**more)))

    def text(self, **more: Any) -> dict[str, Any]:
        return asyncio.run(self.answers.whole(text(**more)))

    def chunks(self, request: ChatRequest | CompletionRequest) -> list[dict[str, Any]]:
        async def run() -> list[dict[str, Any]]:
            return [chunk async for chunk in self.answers.stream(request)]

        return asyncio.run(run())

    def refusal(self, request: ChatRequest | CompletionRequest) -> InvalidRequest:
        for ask in (self.answers.whole, lambda request: anext(self.answers.stream(request))):
            with pytest.raises(InvalidRequest) as caught:
                asyncio.run(_awaited(ask(request)))
        assert not self.engine.asked
        return caught.value


async def _awaited(coroutine: Any) -> Any:
    return await coroutine


def chat(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **more})


def text(**more: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hi", **more})


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """A stream's choices, put together again."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for new in chunk["choices"]:
            empty: dict[str, Any] = {"text": "", "token_ids": [], "scores": []}
            choice = choices.setdefault(new["index"], empty | {"finish_reason": None})
            assert choice["finish_reason"] is None, "nothing follows the end"
            choice["text"] += new["text"] if "text" in new else new["delta"].get("content", "")
            choice["token_ids"] += new.get("token_ids", [])
            choice["scores"] += scores(new)
            choice["finish_reason"] = new["finish_reason"]
    return choices


def scores(choice: dict[str, Any]) -> list[Any]:
    logprobs = choice["logprobs"] or {"content": []}
    if "content" in logprobs:
        return list(logprobs["content"])
    return list(zip(*logprobs.values(), strict=True))


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
    desk.answers = GenerationServing(
        desk.engine, tokenizer, Settings(max_model_len=512), replica="r1", vocabulary=260
    )
    more = {"stop": stops, "max_tokens": room, "return_token_ids": True}
    for request in (chat(**more, logprobs=True, top_logprobs=1), text(**more, logprobs=1)):
        [one] = asyncio.run(desk.answers.whole(request))["choices"]
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


# ---- how likely a text is -----------------------------------------------------------------------


TEXTS = ["ab", "hello, world", "the tiny model says nothing", "été 🦜"]


@pytest.fixture(scope="module")
def running(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    yield from started(world, images, lanes=2)


def real(running: Running, tokenizer: Any) -> GenerationServing:
    settings = Settings(max_model_len=512)
    return GenerationServing(running.engine, tokenizer, settings, replica="r1")


def teacher_forced(model: Any, ids: list[int]) -> float:
    """What plain PEFT finds: each token after those before it."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return float(sum(logprobs[at, token] for at, token in enumerate(ids[1:])))


def test_texts_are_as_likely_as_plain_peft_finds_them_under_either_revision(
    running: Running, tokenizer: Any, world: TinyWorld
) -> None:
    answers = real(running, tokenizer)

    async def story() -> dict[str, list[TextScore]]:
        await running.swap("alpha")
        beta = await running.hold("beta")
        beside = asyncio.create_task(running.answer(SHORT, 100))
        pins = {"alpha": None, "beta": beta}
        scores = await asyncio.gather(*(answers.score(TEXTS, pin) for pin in pins.values()))
        assert running.is_exact(await beside, SHORT, 100)
        running.engine.remove(running.images["beta"].revision)
        return dict(zip(pins, scores, strict=True))

    for name, scores in running(story()).items():
        plain = world._plain(world.revision(name))
        for text, score in zip(TEXTS, scores, strict=True):
            ids = tokenizer(text)["input_ids"]
            assert score.tokens == len(ids) - 1
            assert score.logprob == pytest.approx(teacher_forced(plain, ids), rel=1e-4, abs=1e-3)


def test_the_two_revisions_do_not_find_the_same_text_equally_likely(
    running: Running, tokenizer: Any
) -> None:
    """Or the test above would say nothing."""
    answers = real(running, tokenizer)

    async def story() -> None:
        await running.swap("alpha")
        beta = await running.hold("beta")
        [one], [other] = await asyncio.gather(answers.score(["ab"]), answers.score(["ab"], beta))
        assert abs(one.logprob - other.logprob) > 0.1

    running(story())


def test_a_text_with_an_end_token_in_it_is_scored_up_to_there(
    running: Running, tokenizer: Any
) -> None:
    answers = real(running, tokenizer)

    async def story() -> None:
        [whole], [cut] = await asyncio.gather(
            answers.score(["ab<e>"]), answers.score(["ab<e>and more"])
        )
        assert cut.tokens == whole.tokens
        assert cut.logprob == pytest.approx(whole.logprob, rel=1e-5)
        assert cut.tokens == 2

    assert tokenizer("ab<e>c")["input_ids"][2] == END
    running(story())


def test_scoring_asks_for_exactly_the_tokens_of_the_text_and_is_counted_for_nobody(
    tokenizer: Any,
) -> None:
    desk = Desk(tokenizer)
    [score] = asyncio.run(desk.answers.score(["abc"], "some pin"))
    first, *rest = desk.ids("abc")
    want = SamplingParams(temperature=0.0, logprobs=0, forced=(1, tuple(rest)))
    assert desk.engine.asked == [([first], 2, want, False)]
    assert (desk.engine.pins, desk.engine.sessions) == (["some pin"], [PROBE])
    assert score == TextScore(logprob=-1.0, tokens=2)


@pytest.mark.parametrize("said", ["", "a", "a" * 513])
def test_a_text_that_cannot_be_scored_is_refused_with_its_length(tokenizer: Any, said: str) -> None:
    desk = Desk(tokenizer)
    with pytest.raises(InvalidRequest) as refused:
        asyncio.run(desk.answers.score(["fine", said]))
    assert (refused.value.status, refused.value.code) == (400, "invalid_parameter")
    assert str(refused.value).endswith(f"one has {len(said)}")
    assert not desk.engine.asked


def test_a_model_that_continues_no_texts_scores_none(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    desk.engine.scores_texts = False
    with pytest.raises(InvalidRequest, match="how likely") as refused:
        asyncio.run(desk.answers.score(["abc"]))
    assert refused.value.code == "task_not_served"


def test_a_text_that_makes_the_model_fail_raises_as_it_is_and_takes_the_others_with_it(
    tokenizer: Any,
) -> None:
    desk = Desk(tokenizer)

    def script(prompt: list[int]) -> list[int] | None:
        if prompt == desk.ids("x"):
            raise Broken
        return None

    desk.engine.script = script
    with pytest.raises(Broken):
        asyncio.run(desk.answers.score(["abc", "xyz", "abd"]))
    assert (desk.engine.running, desk.engine.inside) == (0, 0)


def test_whoever_stops_waiting_for_scores_cancels_them_all(tokenizer: Any) -> None:
    desk = Desk(tokenizer)
    desk.engine.script = lambda _: None

    async def run() -> None:
        task = asyncio.create_task(desk.answers.score(["abc", "xyz"]))
        await until(lambda: desk.engine.running == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (desk.engine.running, desk.engine.inside, desk.engine.cancelled) == (0, 0, 2)

    asyncio.run(run())


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


# ---- prompts ------------------------------------------------------------------------------------


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


def test_any_printable_text_comes_through(tokenizer: Any) -> None:
    assert Desk(tokenizer, string.printable).text()["choices"][0]["text"] == string.printable
