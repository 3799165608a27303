"""Text to text in batches: every row is what a plain PEFT model generates for it alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, T5Config, T5ForConditionalGeneration

from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.seq2seq import Seq2SeqEngine
from serve_app.engine.steps import GenerationOutput
from serve_app.settings import Settings
from serve_app.wire.errors import EngineStopped, GenerationFailed
from tests.serve_app.batching import Models, Running, running, texts
from tests.serve_app.fakes import until

VOCABULARY = 64
EOS = 22
GREEDY = SamplingParams(temperature=0.0)
LENGTHS = (3, 9, 1, 20, 6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        initializer_factor=4.0,
        decoder_start_token_id=0,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # else every answer is one token
    return Models(model, tmp_path_factory.mktemp("adapters"), task_type="SEQ_2_SEQ_LM")


def made(models: Models, kind: type[Seq2SeqEngine] = Seq2SeqEngine) -> Seq2SeqEngine:
    settings = Settings(max_batch_size=len(LENGTHS), batch_wait_s=60)  # runs when it is full
    return kind(models.slot(), settings, eos_token_ids=[EOS])


@pytest.fixture(scope="module")
def engine(models: Models) -> Iterator[Running[Seq2SeqEngine]]:
    with running(made(models), models) as started:
        yield started


def plain(models: Models, name: str, ids: list[int], tokens: int) -> list[int]:
    model = models.plain(name)
    prompt = torch.tensor([ids])
    with torch.no_grad():
        [out] = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=tokens,
        )
    found: list[int] = out.tolist()[1:]
    return found


async def steps(
    engine: Seq2SeqEngine,
    ids: list[int],
    tokens: int = 12,
    sampling: SamplingParams = GREEDY,
    *,
    stream: bool = False,
    pin: str | None = None,
) -> list[GenerationOutput]:
    async with (
        engine.admit(pin) as ticket,
        aclosing(
            ticket.generate(ids, max_tokens=tokens, sampling=sampling, stream=stream)
        ) as found,
    ):
        return [step async for step in found]


async def batch(engine: Seq2SeqEngine, *each: Any) -> list[Any]:
    """These at once, and as many others as make a batch. Exceptions are results."""
    rest = texts(VOCABULARY, *LENGTHS)[len(each) :]
    others = (steps(engine, ids, 3) for ids in rest)
    found = await asyncio.gather(*each, *others, return_exceptions=True)
    return found[: len(each)]


# ---- exact answers ------------------------------------------------------------------------------


def test_greedy_answers_of_a_batch_are_those_of_a_plain_peft_model(
    engine: Running[Seq2SeqEngine], models: Models
) -> None:
    prompts = texts(VOCABULARY, *LENGTHS)
    lengths = [12, 3, 7, 1, 20]
    ends: set[bool] = set()
    for name in ("red", "blue", "red"):
        engine(engine.swap(name))
        asked = (steps(engine.engine, ids, n) for ids, n in zip(prompts, lengths, strict=True))
        for ids, n, found in zip(
            prompts, lengths, engine(batch(engine.engine, *asked)), strict=True
        ):
            [step] = found
            assert step.finished
            assert step.token_ids == plain(models, name, ids, n)
            ended = engine.engine.ended_by_itself(step.token_ids)
            assert ended is (step.token_ids[-1] == EOS)
            ends.add(ended)
            assert ended or len(step.token_ids) == n
    assert ends == {True, False}


def test_answers_of_two_revisions_at_once_are_each_exact(models: Models) -> None:
    with running(made(models), models) as started:

        async def story() -> list[list[GenerationOutput]]:
            await started.swap("red")
            await started.engine.add(started.staged("blue"))
            pins = [None, "blue", "red", "blue", None]
            prompts = texts(VOCABULARY, *LENGTHS)
            asked = (
                steps(started.engine, ids, pin=pin) for ids, pin in zip(prompts, pins, strict=True)
            )
            return await batch(started.engine, *asked)

        answers = started(story())
        names = ["red", "blue", "red", "blue", "red"]
        for ids, name, [step] in zip(texts(VOCABULARY, *LENGTHS), names, answers, strict=True):
            assert step.token_ids == plain(models, name, ids, 12)


def test_a_stream_grows_token_by_token(engine: Running[Seq2SeqEngine]) -> None:
    [ids] = texts(VOCABULARY, 9)
    asked = steps(engine.engine, ids, 8, SamplingParams(seed=1), stream=True)
    [found] = engine(batch(engine.engine, asked))
    assert [len(step.token_ids) for step in found] == list(range(1, len(found) + 1))
    assert [step.finished for step in found] == [False] * (len(found) - 1) + [True]


def test_a_seed_draws_the_same_tokens_in_any_batch(
    engine: Running[Seq2SeqEngine],
) -> None:
    [ids] = texts(VOCABULARY, 9)
    seeded = SamplingParams(seed=7, temperature=20.0)
    [alone] = engine(batch(engine.engine, steps(engine.engine, ids, 10, seeded)))
    free = [
        SamplingParams(temperature=20.0),
        seeded,
        SamplingParams(seed=8, temperature=20.0),
        GREEDY,
    ]
    found = engine(batch(engine.engine, *(steps(engine.engine, ids, 10, one) for one in free)))
    tokens = [step.token_ids for [step] in found]
    assert tokens[1] == alone[0].token_ids
    assert tokens[2] != tokens[1]


def test_logprobs_are_the_models_own(engine: Running[Seq2SeqEngine], models: Models) -> None:
    engine(engine.swap("red"))
    [ids] = texts(VOCABULARY, 9)
    asked = SamplingParams(temperature=0.0, logprobs=3)
    [[step]] = engine(batch(engine.engine, steps(engine.engine, ids, 5, asked)))
    assert len(step.logprobs) == len(step.token_ids)
    with torch.no_grad():
        prompt, begun = torch.tensor([ids]), torch.tensor([[0, *step.token_ids[:-1]]])
        [logits_LV] = models.plain("red")(input_ids=prompt, decoder_input_ids=begun).logits
    for token, said, logits_V in zip(step.token_ids, step.logprobs, logits_LV, strict=True):
        expected_V = logits_V.log_softmax(-1)
        assert said.chosen == pytest.approx(float(expected_V[token]), abs=1e-4)
        assert [other for other, _ in said.top] == expected_V.topk(3).indices.tolist()


# ---- failures and cancellation ------------------------------------------------------------------


def test_a_client_that_leaves_a_stream_ends_its_row_and_no_other(
    engine: Running[Seq2SeqEngine], models: Models
) -> None:
    engine(engine.swap("red"))
    prompts = texts(VOCABULARY, *LENGTHS)

    async def leave() -> int:
        async with engine.engine.admit() as ticket:
            answer = ticket.generate(
                prompts[0], max_tokens=1500, sampling=SamplingParams(seed=1), stream=True
            )
            async with aclosing(answer) as found:
                async for step in found:
                    return len(step.token_ids)
        raise AssertionError

    async def story() -> list[Any]:
        asked = (steps(engine.engine, ids, 12) for ids in prompts[1:])
        found = await batch(engine.engine, leave(), *asked)
        await until(lambda: engine.engine.admission.running == 0)
        return found

    left, *others = engine(story())
    assert left == 1
    for ids, [step] in zip(prompts[1:], others, strict=True):
        assert step.token_ids == plain(models, "red", ids, 12)


class _Faulty(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, after: int) -> None:
        self._left = after

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("no memory is left")
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Faulty(Seq2SeqEngine):
    """Fails in every batch, at its third token; and at the first for a prompt of one token."""

    def _run_generate(self, prompts: Sequence[list[int]], *, most: int, **how: Any) -> None:
        if len(prompts) > 1:
            how["stopping_criteria"].append(_Faulty(3))
        elif len(prompts[0]) == 1:
            how["stopping_criteria"].append(_Faulty(1))
        super()._run_generate(prompts, most=most, **how)


def test_after_a_failed_batch_every_row_goes_on_alone_where_it_was(models: Models) -> None:
    with running(made(models, Faulty), models) as started:
        started(started.swap("red"))
        prompts = texts(VOCABULARY, *LENGTHS)
        asked = (steps(started.engine, ids, 12, stream=True) for ids in prompts)
        for ids, found in zip(prompts, started(batch(started.engine, *asked)), strict=True):
            expected = plain(models, "red", ids, 12)
            if len(ids) == 1:
                assert len(expected) > 3
                assert isinstance(found, GenerationFailed)
                assert "no memory is left" in str(found)
                continue
            assert found[-1].token_ids == expected
            assert [step.token_ids for step in found] == [
                expected[: n + 1] for n in range(len(expected))
            ]
        assert started.engine.alive
        assert started.engine.admission.running == 0


def test_stopping_ends_what_is_being_generated(models: Models) -> None:
    with running(made(models), models) as started:
        engine = started.engine

        async def story() -> list[Any]:
            seen = asyncio.Event()

            async def watch(ids: list[int]) -> None:
                async with engine.admit() as ticket:
                    sampling = SamplingParams(seed=3, temperature=0.0)
                    async with aclosing(
                        ticket.generate(ids, max_tokens=100_000, sampling=sampling, stream=True)
                    ) as found:
                        async for step in found:
                            if not step.finished:
                                seen.set()
                            if step.finished:
                                return

            watching = [asyncio.create_task(watch(ids)) for ids in texts(VOCABULARY, *LENGTHS)]
            await until(seen.is_set, "no output came")
            await asyncio.to_thread(engine.stop)
            return await asyncio.gather(*watching, return_exceptions=True)

        found = started(story())
        assert all(one is None or isinstance(one, EngineStopped) for one in found)
        assert any(isinstance(one, EngineStopped) for one in found)
        assert not engine.alive


def test_warm_up_leaves_nothing_to_compile(engine: Running[Seq2SeqEngine]) -> None:
    assert engine(engine.engine.warm_up()) > 0
    engine(batch(engine.engine))
    assert engine.engine.guard.recompiles == 0
