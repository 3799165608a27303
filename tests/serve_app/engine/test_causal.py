"""Generation over a tiny Llama: exact answers, from the revision that each one names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from hotswap_lib import AdapterImage, Envelope, pack, prepare
from serve_app.engine.admission import DrainTimeout
from serve_app.engine.sampling_params import SamplingParams
from serve_app.wire.errors import EngineStopped, GenerationFailed
from tests.e2e.tiny_world import TinyWorld
from tests.hotswap_lib.families import randomize
from tests.serve_app.fakes import until
from tests.serve_app.generating import GREEDY, LONG, PAGE, SHORT, Running, Said, all_steps, started


@pytest.fixture(scope="module")
def eager(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    yield from started(world, images)


@pytest.fixture
def fresh(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    yield from started(world, images, lanes=1, drain_timeout_s=0.05)


@pytest.fixture(scope="module")
def compiled(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    yield from started(world, images, compile=True)


# ---- exact answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_greedy_answers_are_those_of_a_plain_peft_model(eager: Running, name: str) -> None:
    async def story() -> None:
        revision = await eager.swap(name)
        prompts = [[9], SHORT, LONG, LONG[:PAGE], LONG[: PAGE + 1]]
        steps = await asyncio.gather(*(eager.answer(ids) for ids in prompts))
        assert {step.revision for step in steps} == {revision}
        for ids, step in zip(prompts, steps, strict=True):
            assert eager.is_exact(step, ids)

    eager(story())


DORA: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "r": 8}
HEAD: dict[str, Any] = {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "r": 2}


@pytest.mark.slow
def test_dora_and_saved_heads_are_served_exactly_by_a_compiled_model(
    world: TinyWorld, tmp_path: Path
) -> None:
    def llama() -> Any:
        return LlamaForCausalLM.from_pretrained(world.model, attn_implementation="sdpa").eval()

    def plain(path: Path) -> list[int]:
        model = PeftModel.from_pretrained(llama(), str(path)).eval()
        ids = torch.tensor([SHORT])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        return list(out[0, len(SHORT) :].tolist())

    for seed, (name, config) in enumerate({"dora": DORA, "head": HEAD}.items(), start=1):
        model = get_peft_model(llama(), LoraConfig(**config))
        randomize(model, seed)
        model.save_pretrained(str(tmp_path / name))
    envelope = Envelope(max_rank=8, use_dora=True, modules_to_save=["lm_head"])
    slot = prepare(llama(), envelope=envelope)
    images = {name: pack(tmp_path / name, slot.layout) for name in ("dora", "head")}
    running = Running(world, images, slot=slot, compile=True)
    try:

        async def story() -> None:
            await running.engine.warm_up()
            running.engine.admission.open()
            for name in ("dora", "head", "dora"):
                await running.swap(name)
                assert (await running.answer(SHORT)).token_ids == plain(tmp_path / name)
            running.engine.guard.check()

        running(story())
    finally:
        running.close()


def test_the_adapters_answer_differently_so_the_tests_here_can_tell_them_apart(
    world: TinyWorld,
) -> None:
    for ids in (SHORT, LONG):
        answers = [world.expected(revision, ids, 12) for revision in world.revisions]
        answers.append(world.expected("base@00000000", ids, 12))
        assert len({tuple(answer) for answer in answers}) == 4


def test_a_stream_grows_token_by_token_to_the_same_answer(eager: Running) -> None:
    async def story() -> None:
        await eager.swap("beta")
        async with eager.steps(SHORT, 12, stream=True) as steps:
            seen = [step async for step in steps]
        for earlier, later in pairwise(seen):
            assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
            assert len(later.token_ids) > len(earlier.token_ids)
        assert [step.finished for step in seen] == [False] * (len(seen) - 1) + [True]
        assert eager.is_exact(seen[-1], SHORT)

    eager(story())


def test_an_answer_ends_at_its_limit_or_by_itself(eager: Running) -> None:
    async def story() -> None:
        step = await eager.answer(SHORT, tokens=3)
        assert len(step.token_ids) == 3
        assert not eager.engine.ended_by_itself(step.token_ids)
        assert eager.engine.ended_by_itself([1, 259])
        assert not eager.engine.ended_by_itself([])

    eager(story())


def test_a_greedy_request_beside_sampled_ones_is_still_exact(eager: Running) -> None:
    async def story() -> None:
        await eager.swap("alpha")

        async def sampled() -> Said:
            async with eager.steps(SHORT, 12, sampling=SamplingParams(temperature=1.5)) as steps:
                found = [step async for step in steps]
            return found[-1]

        greedy, *others = await asyncio.gather(eager.answer(SHORT), *(sampled() for _ in range(5)))
        assert eager.is_exact(greedy, SHORT)
        assert len({tuple(step.token_ids) for step in others}) > 1

    eager(story())


# ---- swaps --------------------------------------------------------------------------------------


def test_requests_on_both_sides_of_a_swap_are_exact_for_the_revision_they_name(
    eager: Running,
) -> None:
    async def story() -> None:
        old = await eager.swap("alpha")
        before = [asyncio.create_task(eager.answer(SHORT, 40)) for _ in range(4)]
        await until(lambda: eager.engine.admission.running == 4)
        swapping = asyncio.create_task(eager.swap("beta"))
        await until(lambda: not eager.engine.admission.is_open)
        after = [asyncio.create_task(eager.answer(SHORT, 40)) for _ in range(4)]
        new = await swapping
        steps = await asyncio.gather(*before, *after)
        assert [step.revision for step in steps] == [old] * 4 + [new] * 4
        assert all(eager.is_exact(step, SHORT, 40) for step in steps)

    eager(story())


def test_a_request_that_runs_when_the_swap_begins_finishes_on_the_old_revision(
    eager: Running,
) -> None:
    async def story() -> None:
        old = await eager.swap("alpha")
        async with eager.steps(SHORT, 60, stream=True) as steps:
            first = await anext(steps)
            swapping = asyncio.create_task(eager.swap("gamma"))
            await until(lambda: not eager.engine.admission.is_open)
            waiting = asyncio.create_task(eager.answer(SHORT))
            seen = [first, *[step async for step in steps]]
            assert {step.revision for step in seen} == {old}
            assert eager.is_exact(seen[-1], SHORT, 60)
        new = await swapping
        late = await waiting
        assert (late.revision, eager.is_exact(late, SHORT)) == (new, True)

    eager(story())


def test_many_swaps_under_load_leave_no_answer_on_two_revisions(eager: Running) -> None:
    async def story() -> None:
        done = asyncio.Event()
        steps: list[tuple[Said, list[int], int]] = []

        async def client(number: int) -> None:
            while not done.is_set():
                ids, tokens = [SHORT, LONG, [number]][len(steps) % 3], 3 + len(steps) % 9
                steps.append((await eager.answer(ids, tokens), ids, tokens))

        clients = [asyncio.create_task(client(n)) for n in range(5)]
        for name in ["alpha", "beta", "gamma", "beta", "alpha", "gamma"]:
            await eager.swap(name)
            seen = len(steps)
            await until(lambda seen=seen: len(steps) > seen + 4)  # type: ignore[misc]
        done.set()
        await asyncio.gather(*clients)
        assert len({step.revision for step, _, _ in steps}) >= 3
        assert [s for s, ids, n in steps if not eager.is_exact(s, ids, n)] == []

    eager(story())


def test_a_drain_that_takes_too_long_keeps_the_old_revision_serving(fresh: Running) -> None:
    async def story() -> None:
        old = str(fresh.engine.default)
        async with fresh.steps(SHORT, 400, stream=True) as steps:
            await anext(steps)
            with pytest.raises(DrainTimeout, match="1 requests were still running"):
                await fresh.swap("alpha")
            assert str(fresh.engine.default) == old
            assert fresh.engine.admission.is_open
            step = await fresh.answer(SHORT)
            assert (step.revision, fresh.is_exact(step, SHORT)) == (old, True)
        await until(lambda: fresh.engine.admission.running == 0)
        assert (await fresh.swap("alpha")) != old

    fresh(story())


def test_a_swap_says_what_it_did(eager: Running) -> None:
    async def story() -> None:
        await eager.swap("alpha")
        staged = eager.slot.stage(eager.images["beta"])
        cutover = await eager.engine.cut_over(staged, in_flight="drain")
        assert str(cutover.receipt.revision) == eager.world.revision("beta")
        assert str(cutover.receipt.previous) == eager.world.revision("alpha")
        assert (cutover.receipt.copies, cutover.drain_ms >= 0, cutover.verify_ms > 0) == (
            1,
            True,
            True,
        )
        eager.slot.verify()

    eager(story())


def test_a_swap_that_is_cancelled_while_it_drains_changes_nothing(eager: Running) -> None:
    async def story() -> None:
        old = await eager.swap("alpha")
        async with eager.steps(SHORT, 200, stream=True) as steps:
            await anext(steps)
            swapping = asyncio.create_task(eager.swap("beta"))
            await until(lambda: not eager.engine.admission.is_open)
            swapping.cancel()
            await asyncio.wait([swapping])
        assert (str(eager.engine.default), eager.engine.admission.is_open) == (old, True)
        await until(lambda: eager.engine.admission.running == 0)

    eager(story())


# ---- leaving early ------------------------------------------------------------------------------


def test_a_client_that_goes_away_is_counted_out_and_the_next_swap_works(eager: Running) -> None:
    async def story() -> None:
        await eager.swap("alpha")
        for ids in (SHORT, LONG):
            async with eager.steps(ids, 500, stream=True) as steps:
                await anext(steps)
            await until(lambda: eager.engine.admission.running == 0)
            new = await eager.swap("beta")
            step = await eager.answer(ids)
            assert (step.revision, eager.is_exact(step, ids)) == (new, True)

    eager(story())


def test_a_task_that_is_cancelled_is_counted_out_too(eager: Running) -> None:
    async def story() -> None:
        tasks = [asyncio.create_task(eager.answer(SHORT, 500)) for _ in range(3)]
        await until(lambda: eager.engine.admission.running == 3)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: eager.engine.admission.running == 0)
        await eager.swap("gamma")

    eager(story())


def test_a_client_that_goes_away_while_it_waits_for_admission_was_never_running(
    eager: Running,
) -> None:
    async def story() -> None:
        eager.engine.admission.close()
        waiting = asyncio.create_task(eager.answer(SHORT))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert eager.engine.admission.running == 0
        eager.engine.admission.open()

    eager(story())


def test_an_engine_whose_thread_has_stopped_says_so_and_ends_every_request(
    fresh: Running,
) -> None:
    async def story() -> None:
        assert fresh.engine.alive
        running = asyncio.create_task(fresh.answer(SHORT, 500))
        await until(lambda: fresh.engine.admission.running == 1)
        await asyncio.to_thread(fresh.engine.stop)
        assert not fresh.engine.alive
        with pytest.raises((EngineStopped, GenerationFailed)):  # the engine may notice either first
            await running
        with pytest.raises(EngineStopped):
            await fresh.answer(SHORT)
        await until(lambda: fresh.engine.admission.running == 0)

    fresh(story())


# ---- prefixes -----------------------------------------------------------------------------------


async def long_prompt_before_and_after(running: Running) -> tuple[Said, Said]:
    await running.swap("alpha")
    for _ in range(2):  # the second one finds the pages of the first
        before = await running.answer(LONG)
    assert running.is_exact(before, LONG)
    await running.swap("beta")
    return before, await running.answer(LONG)


def test_a_long_prompt_is_read_again_by_the_new_adapter(eager: Running) -> None:
    before, after = eager(long_prompt_before_and_after(eager))
    assert before.revision != after.revision
    assert eager.is_exact(after, LONG)


def test_an_engine_that_kept_its_prefixes_would_be_caught_by_the_test_above(
    world: TinyWorld, images: dict[str, AdapterImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    for running in started(world, images, lanes=1):
        monkeypatch.setattr(running.manager, "forget_prefixes", lambda: None)
        _, after = running(long_prompt_before_and_after(running))
        assert not running.is_exact(after, LONG)


# ---- sampling -----------------------------------------------------------------------------------


def test_a_seed_draws_the_same_tokens_in_any_batch(eager: Running) -> None:
    async def story() -> None:
        await eager.swap("alpha")
        seeded = SamplingParams(temperature=1.0, top_p=0.95, seed=42)
        alone = await eager.answer(SHORT, 30, sampling=seeded)
        unseeded = [
            eager.answer(ids, 30, sampling=SamplingParams(temperature=1.0))
            for ids in (SHORT, LONG, [9])
        ]
        batched, *_, again = await asyncio.gather(
            eager.answer(SHORT, 30, sampling=seeded),
            *unseeded,
            eager.answer(SHORT, 30, sampling=seeded),
        )
        assert alone.token_ids == batched.token_ids == again.token_ids
        other = await eager.answer(SHORT, 30, sampling=SamplingParams(temperature=1.0, seed=43))
        assert other.token_ids != alone.token_ids
        assert not eager.is_exact(alone, SHORT, 30)

    eager(story())


def test_the_likeliest_token_alone_is_the_greedy_one(eager: Running) -> None:
    async def story() -> None:
        await eager.swap("beta")
        for sampling in (
            SamplingParams(top_k=1),
            SamplingParams(top_p=1e-6),
            SamplingParams(temperature=1e-6),
        ):
            step = await eager.answer(LONG, sampling=sampling)
            assert eager.is_exact(step, LONG)

    eager(story())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_a_plain_model_one_for_each_token(
    eager: Running, temperature: float
) -> None:
    async def story() -> None:
        await eager.swap("alpha")
        sampling = SamplingParams(temperature=temperature, seed=1, top_k=20, logprobs=3)
        seen, _ = await asyncio.gather(
            all_steps(eager, LONG, 15, sampling=sampling, stream=True), eager.answer(SHORT, 15)
        )
        step = seen[-1]
        for one in seen:
            assert len(one.logprobs) == len(one.token_ids)
        model = eager.world.plain(step.revision)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([LONG + step.token_ids])).logits[0]
        expected = logits[len(LONG) - 1 : -1].float().log_softmax(-1)
        for token, found, line in zip(step.token_ids, step.logprobs, expected, strict=True):
            assert found.chosen == pytest.approx(float(line[token]), abs=1e-3)
            best = line.topk(3)
            assert [token for token, _ in found.top] == best.indices.tolist()
            assert [value for _, value in found.top] == pytest.approx(
                best.values.tolist(), abs=1e-3
            )

    eager(story())


# ---- compiled -----------------------------------------------------------------------------------


def test_nothing_is_compiled_after_the_warm_up_whatever_comes(compiled: Running) -> None:
    async def story() -> None:
        seconds = await compiled.engine.warm_up()
        assert seconds > 0
        assert compiled.engine.compiled_regions > 0
        steps: list[tuple[Said, list[int]]] = []
        for name in ["alpha", "beta", "gamma", "alpha"]:
            await compiled.swap(name)
            for batch in (1, 2, 3, 7):
                prompts = [LONG[: 1 + (17 * i + 31 * batch) % len(LONG)] for i in range(batch)]
                answers = await asyncio.gather(*(compiled.answer(ids, 6) for ids in prompts))
                steps += zip(answers, prompts, strict=True)
        assert [s for s, ids in steps if not compiled.is_exact(s, ids, 6)] == []
        guard = compiled.engine.guard
        assert (guard.recompiles, guard.limit_hits) == (0, 0)

    compiled(story())


def test_nothing_is_compiled_with_lanes_swaps_and_sampling_of_every_kind(compiled: Running) -> None:
    samplings = [
        GREEDY,
        SamplingParams(temperature=0.0, logprobs=5),
        SamplingParams(temperature=0.7, top_p=0.9, top_k=5, seed=1),
        SamplingParams(temperature=1.0, logprobs=0),
    ]

    async def story() -> None:
        await compiled.engine.warm_up()
        await compiled.swap("alpha")
        await compiled.hold("gamma")
        for number, name in enumerate(["beta", "alpha", "beta"]):
            old = compiled.engine.default
            long = asyncio.create_task(compiled.answer(LONG[: 40 + number], 30))
            await until(lambda: compiled.engine.revisions.running.get(old) == 1)  # noqa: B023
            await compiled.swap(name, "overlap")
            asks = [
                compiled.answer(LONG[: 1 + 41 * i], 5, sampling=sampling, pin=pin)
                for i, sampling in enumerate(samplings)
                for pin in (None, "gamma")[: 1 + number % 2]
            ]
            await asyncio.gather(*asks)
            step = await long
            assert (step.revision, len(step.token_ids)) == (str(old), 30)
            assert compiled.is_exact(step, LONG[: 40 + number], 30)
        compiled.engine.remove(compiled.images["gamma"].revision)
        compiled.engine.guard.check()

    compiled(story())
