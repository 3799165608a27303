"""Log-likelihoods of texts: those of plain PEFT, and not counted among requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hotswap_lib import AdapterImage
from serve_app.engine.sampling_params import SamplingParams
from serve_app.replica.serving_generate import GenerationServing
from serve_app.settings import Settings
from serve_app.wire.errors import InvalidRequest
from serve_app.wire.request_stats import PROBE
from serve_app.wire.text_score import TextScore
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.fakes import until
from tests.serve_app.generating import SHORT, Running, started
from tests.serve_app.replica.desk import (
    END,
    Broken,
    Desk,
    serving,
)

TEXTS = ["ab", "hello, world", "the tiny model says nothing", "été 🦜"]


@pytest.fixture(scope="module")
def running(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    yield from started(world, images, lanes=2)


def real(running: Running, tokenizer: Any) -> GenerationServing:
    return serving(running.engine, tokenizer, Settings(max_model_len=512))


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
        plain = world.plain(world.revision(name))
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
        whole, [cut] = await asyncio.gather(
            answers.score(["ab<e>"]), answers.score(["ab<e>and more"])
        )
        [same] = whole
        assert cut.tokens == same.tokens == 2
        assert cut.logprob == pytest.approx(same.logprob, rel=1e-4, abs=1e-3)

    assert tokenizer("ab<e>c")["input_ids"][2] == END
    running(story())


def test_scoring_asks_for_exactly_the_tokens_of_the_text_and_is_not_counted(
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


def test_a_caller_that_stops_waiting_for_scores_cancels_them_all(tokenizer: Any) -> None:
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
