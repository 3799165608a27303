"""One lane: requests that make the model fail, and caches too small for all requests.

Several lanes are in test_engine.py, transformers' own parts in test_transformers_internals.py.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
import torch

from hotswap_lib import AdapterImage
from serve_app.engine.sampling_params import SamplingParams
from serve_app.wire.errors import EngineStopped, GenerationFailed
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.fakes import NEVER_S, settled, until
from tests.serve_app.generating import (
    GREEDY,
    LONG,
    SHORT,
    Running,
    Said,
    all_steps,
    assert_near,
    nothing_is_left,
    started,
)


@pytest.fixture(scope="module")
def eager(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    yield from started(world, images, lanes=1)


@pytest.fixture
def fresh(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    yield from started(world, images, lanes=1)


# ---- a request that makes the model fail --------------------------------------------------------

BAD = 61  # no prompt has it, and no answer that is expected here


class Poison:
    """Makes the model fail for every batch with `BAD` in it; `always`: for every batch."""

    def __init__(self, running: Running, patch: pytest.MonkeyPatch) -> None:
        self.always = False
        self.failed: list[int] = []  # how many tokens were in the batch
        embedding = running.slot.model.get_base_model().get_input_embeddings()
        forward = embedding.forward

        def fails(ids: torch.Tensor) -> Any:
            if self.always or bool((ids == BAD).any()):
                self.failed.append(ids.numel())
                raise ArithmeticError("poison")
            return forward(ids)

        patch.setattr(embedding, "forward", fails)


@pytest.fixture
def poison(fresh: Running, monkeypatch: pytest.MonkeyPatch) -> Poison:
    return Poison(fresh, monkeypatch)


def search_held(
    running: Running, patch: pytest.MonkeyPatch
) -> tuple[threading.Event, threading.Event]:
    """Holds the search for a bad request; the events: it has begun, and it may go on."""
    searching, go = threading.Event(), threading.Event()
    restart_all = running.manager.scheduler.restart_all

    def held() -> None:
        restart_all()
        searching.set()
        assert go.wait(NEVER_S)

    patch.setattr(running.manager.scheduler, "restart_all", held)
    return searching, go


async def at_once(running: Running, *stories: Coroutine[Any, Any, Any]) -> list[Any]:
    """All in the same step, in this order. Answers and exceptions."""
    with running.manager.pause():
        tasks = [asyncio.create_task(story) for story in stories]
        await settled()
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("place", [0, 2, 4])
def test_only_the_request_that_makes_the_model_fail_fails(
    fresh: Running, poison: Poison, place: int
) -> None:
    async def story() -> None:
        await fresh.swap("alpha")
        running = asyncio.create_task(all_steps(fresh, SHORT, 60, stream=True))
        await until(lambda: bool(fresh.manager.scheduler.active_requests))
        prompts = [SHORT, LONG, [9], [9, 8]]
        prompts.insert(place, [*SHORT, BAD])
        answers = await at_once(fresh, *(fresh.answer(ids, 20) for ids in prompts))
        assert isinstance(answers.pop(place), GenerationFailed)
        del prompts[place]
        for step, ids in zip(answers, prompts, strict=True):
            assert fresh.is_exact(step, ids, 20)
        seen = await running
        assert fresh.is_exact(seen[-1], SHORT, 60)
        lengths = [len(step.token_ids) for step in seen]
        assert lengths == sorted(set(lengths)), "a token twice, or not"
        assert len(poison.failed) == 2, "once in the batch, once alone"
        await nothing_is_left(fresh)

    fresh(story())


def test_a_bad_token_in_a_later_part_of_a_long_prompt_fails_alone_too(
    fresh: Running, poison: Poison
) -> None:
    async def story() -> None:
        await fresh.swap("alpha")
        long = (LONG * 5)[:600]  # three steps
        prompts = [SHORT, [*long, BAD, *LONG], LONG, long]
        answers = await at_once(fresh, *(fresh.answer(ids, 30) for ids in prompts))
        assert isinstance(answers.pop(1), GenerationFailed)
        del prompts[1]
        for step, ids in zip(answers, prompts, strict=True):
            assert fresh.is_exact(step, ids, 30)
        assert poison.failed
        await nothing_is_left(fresh)

    fresh(story())


def test_the_other_requests_get_the_tokens_and_logprobs_that_they_would_have_got(
    fresh: Running, poison: Poison
) -> None:
    samplings = [
        SamplingParams(temperature=1.0, seed=5, logprobs=2),
        SamplingParams(temperature=1.3, top_p=0.8, seed=6, logprobs=0),
        SamplingParams(temperature=0.0, logprobs=3),
    ]

    async def story() -> None:
        await fresh.swap("beta")
        undisturbed = [await fresh.answer(SHORT, 25, sampling=one) for one in samplings]
        tasks = [
            asyncio.create_task(all_steps(fresh, SHORT, 25, sampling=one, stream=True))
            for one in samplings
        ]
        manager = fresh.manager
        await until(lambda: len(manager.scheduler.active_requests) == 3)
        with pytest.raises(GenerationFailed, match="poison"):
            await fresh.answer([BAD])
        for before, steps in zip(undisturbed, await asyncio.gather(*tasks), strict=True):
            assert steps[-1].token_ids == before.token_ids
            for step in steps:
                assert len(step.logprobs) == len(step.token_ids)
            assert_near(steps[-1].logprobs, before.logprobs)
        assert poison.failed

    fresh(story())


def test_requests_can_leave_and_arrive_while_the_bad_one_is_searched_for(
    fresh: Running, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the steps of the search: one request is cancelled, another one arrives."""
    manager = fresh.manager

    async def story() -> None:
        await fresh.swap("alpha")
        searching, go = search_held(fresh, monkeypatch)
        with manager.pause():
            gone = asyncio.create_task(fresh.answer(SHORT, 100))
            bad = asyncio.create_task(fresh.answer([BAD], 20))
            good = asyncio.create_task(fresh.answer(LONG, 20))
            await settled()
        await until(searching.is_set)
        gone.cancel()
        newcomers = [asyncio.create_task(fresh.answer(ids, 20)) for ids in (SHORT, [BAD, 1])]
        await settled()
        go.set()
        tasks: list[asyncio.Task[Any]] = [gone, bad, good, *newcomers]
        answers: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = [type(answer) for answer in answers]
        failed = GenerationFailed
        assert kinds == [asyncio.CancelledError, failed, Said, Said, failed]
        assert fresh.is_exact(answers[2], LONG, 20)
        assert fresh.is_exact(answers[3], SHORT, 20)
        assert poison.failed
        await nothing_is_left(fresh)

    fresh(story())


def test_the_engine_can_be_stopped_while_a_bad_request_is_searched_for(
    fresh: Running, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = fresh.manager

    async def story() -> None:
        searching, go = search_held(fresh, monkeypatch)
        with manager.pause():
            tasks = [asyncio.create_task(fresh.answer(ids, 20)) for ids in (SHORT, [BAD], LONG)]
            await settled()
        await until(searching.is_set)
        stopping = asyncio.create_task(asyncio.to_thread(fresh.engine.stop))
        await until(lambda: manager.background_thread_status.local_status > 0)
        go.set()
        await stopping
        assert not manager.is_running()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, (EngineStopped, GenerationFailed))
        assert poison.failed
        await until(lambda: fresh.engine.admission.running == 0)

    fresh(story())


def test_bad_requests_alone_do_not_stop_an_engine_whose_model_works(
    fresh: Running, poison: Poison
) -> None:
    async def story() -> None:
        await fresh.swap("alpha")
        for _ in range(6):
            with pytest.raises(GenerationFailed, match="poison"):
                await fresh.answer([BAD])
        assert fresh.is_exact(await fresh.answer(SHORT), SHORT)
        assert len(poison.failed) == 6
        await nothing_is_left(fresh)

    fresh(story())


@pytest.mark.parametrize("together", [False, True])
def test_an_engine_whose_every_step_fails_stops_and_all_its_requests_end(
    fresh: Running, poison: Poison, together: bool
) -> None:
    poison.always = True

    async def story() -> None:
        if together:
            answers = await at_once(fresh, *(fresh.answer(ids, 50) for ids in [SHORT, LONG] * 3))
        else:
            answers = []
            for _ in range(4):  # one after another, with nothing to do in between
                answers += await asyncio.gather(fresh.answer(SHORT), return_exceptions=True)
        assert {type(answer) for answer in answers} <= {GenerationFailed, EngineStopped}
        await until(lambda: not fresh.engine.alive)
        with pytest.raises(EngineStopped):
            await fresh.answer(SHORT)
        await until(lambda: fresh.engine.admission.running == 0)

    fresh(story())


# ---- a cache that is too small for all ----------------------------------------------------------


@pytest.fixture
def small(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    """Two requests of a hundred tokens fill its cache."""
    yield from started(world, images, kv_cache_tokens=256, max_model_len=256, lanes=1)


def soft_resets(running: Running, patch: pytest.MonkeyPatch) -> list[bool]:
    """Grows whenever the cache was full."""
    manager = running.manager.batch_processor.offloading_manager
    offload, seen = manager.offload_requests, list[bool]()

    def offload_requests() -> bool:
        done = bool(offload())
        seen.append(done)
        return done

    patch.setattr(manager, "offload_requests", offload_requests)
    return seen


def test_requests_that_do_not_all_fit_into_the_cache_finish_exactly(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets = soft_resets(small, monkeypatch)
    sampling = SamplingParams(temperature=1.0, seed=11, logprobs=1)

    async def story() -> None:
        await small.swap("alpha")
        alone = await small.answer(SHORT, 120, sampling=sampling)
        prompts = [SHORT, LONG[:40], [9]]
        *steps, sampled = await asyncio.gather(
            *(small.answer(ids, 120) for ids in prompts),
            small.answer(SHORT, 120, sampling=sampling),
        )
        assert any(resets), "the cache was large enough"
        for step, ids in zip(steps, prompts, strict=True):
            assert small.is_exact(step, ids, 120)
        assert sampled.token_ids == alone.token_ids
        assert_near(sampled.logprobs, alone.logprobs)

    small(story())


def test_a_request_that_waits_for_a_full_cache_runs_when_the_others_are_cancelled(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets = soft_resets(small, monkeypatch)

    async def story() -> None:
        await small.swap("alpha")
        scheduler = small.manager.scheduler
        tasks = [asyncio.create_task(small.answer(ids, 200)) for ids in (SHORT, [9])]
        await until(lambda: scheduler.block_new_requests)
        with small.manager.pause():
            [active] = scheduler.active_requests.values()
            first = active.initial_tokens[: len(SHORT)] == SHORT
            tasks[0 if first else 1].cancel()
            await settled()
        waited = tasks[1 if first else 0]
        step = await asyncio.wait_for(waited, 10)
        assert small.is_exact(step, [9] if first else SHORT, 200)
        assert small.is_exact(await small.answer(LONG), LONG)
        assert any(resets)

    small(story())


def test_a_bad_request_in_a_full_cache_fails_alone(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(small, monkeypatch)
    resets = soft_resets(small, monkeypatch)

    async def story() -> None:
        await small.swap("alpha")
        prompts = [SHORT, [9], LONG[:40]]
        tasks = [asyncio.create_task(small.answer(ids, 120)) for ids in prompts]
        await until(lambda: any(resets))
        with pytest.raises(GenerationFailed):
            await small.answer([BAD])
        for step, ids in zip(await asyncio.gather(*tasks), prompts, strict=True):
            assert small.is_exact(step, ids, 120)
        assert poison.failed
        await nothing_is_left(small)

    small(story())


def test_a_request_that_is_larger_than_the_cache_fails_alone(
    small: Running,
) -> None:
    async def story() -> None:
        await small.swap("alpha")
        other = asyncio.create_task(small.answer(SHORT, 60))
        await until(lambda: small.engine.admission.running == 1)
        for ids, tokens in [(LONG * 2, 10), (LONG, 200), (SHORT, 1000)]:
            with pytest.raises(GenerationFailed, match="KV cache"):
                await small.answer(ids, tokens)
        assert small.is_exact(await other, SHORT, 60)
        assert small.is_exact(await small.answer(LONG), LONG)
        just = await small.answer(LONG, 256 - len(LONG))
        assert small.is_exact(just, LONG, 256 - len(LONG))

    small(story())


async def first_tokens(running: Running, ids: list[int], tokens: int, *, stream: bool) -> set[Any]:
    """The first-token times that the outputs of a request give."""
    async with running.engine.admit() as ticket:
        steps = ticket.generate(ids, max_tokens=tokens, sampling=GREEDY, stream=stream)
        return {step.first_at async for step in steps}


def test_a_request_that_starts_over_in_a_full_cache_had_its_first_token_before(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = small.manager.batch_processor.offloading_manager
    offload, reset_at = manager.offload_requests, list[float]()

    def offload_requests() -> bool:
        reset_at.append(time.perf_counter())
        return bool(offload())

    monkeypatch.setattr(manager, "offload_requests", offload_requests)

    async def story() -> None:
        await small.swap("alpha")
        began = time.perf_counter()
        with small.manager.pause():
            tasks = [
                asyncio.create_task(first_tokens(small, ids, 200, stream=stream))
                for ids, stream in ((SHORT, False), ([9], False), ([9, 8], True))
            ]
            await settled()
        for seen in await asyncio.gather(*tasks):
            [first] = seen
            assert began < first < reset_at[0]

    small(story())


def test_a_request_that_starts_over_beside_a_bad_one_had_its_first_token_before(
    fresh: Running, poison: Poison
) -> None:
    async def story() -> None:
        await fresh.swap("alpha")
        tasks = [
            asyncio.create_task(first_tokens(fresh, SHORT, 150, stream=stream))
            for stream in (False, True)
        ]
        scheduler = fresh.manager.scheduler
        await until(
            lambda: (
                [s.generated_len() > 0 for s in [*scheduler.active_requests.values()]]
                == [True, True]
            )
        )
        known = time.perf_counter()
        with pytest.raises(GenerationFailed):
            await fresh.answer([BAD])
        for seen in await asyncio.gather(*tasks):
            [first] = seen
            assert first < known
        assert poison.failed
        await nothing_is_left(fresh)

    fresh(story())


def test_a_prompt_that_is_read_in_parts_has_no_first_token_before_its_last_part(
    eager: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = eager.manager
    step, began = manager.run_step, list[float]()

    def timed() -> None:
        began.append(time.perf_counter())
        step()

    async def story() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(manager, "run_step", timed)
            [first] = await first_tokens(eager, (LONG * 5)[:600], 1, stream=False)
        assert len(began) > 1
        assert first > began[-1]

    eager(story())
