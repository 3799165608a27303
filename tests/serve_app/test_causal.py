"""Generation over a tiny Llama: exact answers, exact revisions, and what it needs of transformers.

Whatever is private in transformers and used by serve_app/causal.py has a test here that fails with
a sentence when it changes.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from hotswap_lib import AdapterImage, Envelope, Revision, Slot, pack, prepare
from serve_app.admission import DrainTimeout
from serve_app.causal import CausalEngine, _Manager, _Scheduler
from serve_app.engine import EngineStopped, GenerationFailed, Step
from serve_app.rollout.plan import InFlight
from serve_app.sampling import Sampling, TokenLogprobs
from serve_app.settings import Settings
from tests.e2e.tiny_world import TinyWorld
from tests.hotswap_lib.families import randomize

from .conftest import new_slot
from .fakes import settled, until

T = TypeVar("T")
GREEDY = Sampling(temperature=0.0)
PAGE = 32
SHORT = [3, 1, 4, 1, 5]
LONG = [(7 * i) % 250 for i in range(4 * PAGE + 5)]  # four whole pages, and a bit


class Said(NamedTuple):
    """A step, and the revision that its request runs on."""

    revision: str
    token_ids: list[int]
    finished: bool
    logprobs: Sequence[TokenLogprobs]


class Running:
    """A started engine, its loop, and the images for its slot."""

    def __init__(
        self,
        world: TinyWorld,
        images: dict[str, AdapterImage],
        kind: type[CausalEngine] = CausalEngine,
        slot: Slot | None = None,
        **settings: Any,
    ) -> None:
        given = {"compile": False, "max_ongoing_requests": 8, "kv_cache_tokens": 2048}
        self.world, self.images = world, images
        self.slot: Slot = slot or new_slot(world)
        self._runner = asyncio.Runner()
        self.engine = kind(
            self.slot,
            Settings(model=str(world.model), **{**given, **settings}),
            eos_token_ids=[259],
        )
        self.engine.start()

    def __call__(self, story: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(story, 120))

    def close(self) -> None:
        self.engine.stop()
        self._runner.close()

    async def swap(self, name: str, in_flight: InFlight = "drain") -> str:
        """Make this adapter the default; returns its revision."""
        await self.engine.cut_over(self.slot.stage(self.images[name]), in_flight=in_flight)
        return str(self.engine.default)

    async def hold(self, name: str) -> str:
        """Serve this adapter beside the default; returns its revision."""
        await self.engine.hold(self.slot.stage(self.images[name]))
        return self.world.revision(name)

    @asynccontextmanager
    async def steps(
        self,
        ids: list[int],
        tokens: int,
        *,
        pin: str | None = None,
        stream: bool = False,
        sampling: Sampling = GREEDY,
    ) -> AsyncIterator[AsyncIterator[Said]]:
        """The steps of one request, each with the revision that the request runs on."""

        async def said(revision: str, steps: AsyncIterator[Step]) -> AsyncIterator[Said]:
            async for step in steps:
                yield Said(revision, step.token_ids, step.finished, step.logprobs)

        async with self.engine.admit(pin) as ticket:
            generation = ticket.generate(ids, max_tokens=tokens, sampling=sampling, stream=stream)
            async with aclosing(generation) as steps:
                yield said(str(ticket.revision), steps)

    async def answer(self, ids: list[int], tokens: int = 12, **how: Any) -> Said:
        async with self.steps(ids, tokens, **how) as steps:
            answers = [step async for step in steps]
        [step] = answers
        assert step.finished
        return step

    def is_exact(self, step: Said, ids: list[int], tokens: int = 12) -> bool:
        """Whether the answer is what a plain PeftModel with the named revision generates."""
        return step.token_ids == self.world.expected(step.revision, ids, tokens)


def started(
    world: TinyWorld,
    images: dict[str, AdapterImage],
    kind: type[CausalEngine] = CausalEngine,
    **settings: Any,
) -> Iterator[Running]:
    running = Running(world, images, kind, **settings)
    running.engine.admission.open()
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def eager(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    yield from started(world, images)


@pytest.fixture
def fresh(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    yield from started(world, images, drain_timeout_s=0.05)


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
            async with eager.steps(SHORT, 12, sampling=Sampling(temperature=1.5)) as steps:
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


def test_a_client_that_goes_away_leaves_the_gate_and_the_next_swap_works(eager: Running) -> None:
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


def test_a_task_that_is_cancelled_leaves_the_gate_too(eager: Running) -> None:
    async def story() -> None:
        tasks = [asyncio.create_task(eager.answer(SHORT, 500)) for _ in range(3)]
        await until(lambda: eager.engine.admission.running == 3)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: eager.engine.admission.running == 0)
        await eager.swap("gamma")

    eager(story())


def test_a_client_that_goes_away_while_it_waits_at_the_gate_was_never_inside(
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


def test_an_engine_whose_thread_has_stopped_says_so_and_lets_everybody_out(
    fresh: Running,
) -> None:
    async def story() -> None:
        assert fresh.engine.alive
        running = asyncio.create_task(fresh.answer(SHORT, 500))
        await until(lambda: fresh.engine.admission.running == 1)
        await asyncio.to_thread(fresh.engine.stop)
        assert not fresh.engine.alive
        with pytest.raises((EngineStopped, GenerationFailed)):  # whichever was noticed first
            await running
        with pytest.raises(EngineStopped):
            await fresh.answer(SHORT)
        assert fresh.engine.admission.running == 0

    fresh(story())


# ---- prefixes -----------------------------------------------------------------------------------


class KeepsPrefixes(CausalEngine):
    """What the engine would be if a lane did not empty its cache for another revision."""

    async def _clear(self, lane: int, revision: Revision) -> None:
        self._managers[lane].revision = revision


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
    world: TinyWorld, images: dict[str, AdapterImage]
) -> None:
    for running in started(world, images, KeepsPrefixes):
        _, after = running(long_prompt_before_and_after(running))
        assert not running.is_exact(after, LONG)


# ---- a request that makes the model fail --------------------------------------------------------

BAD = 61  # no prompt has it, and no answer that is expected here


class Poison:
    """Makes the model fail for every batch with `BAD` in it; `always`: for every batch."""

    def __init__(self, running: Running, patch: pytest.MonkeyPatch) -> None:
        self.always = False
        self.failed: list[int] = []  # how many tokens were in the batch
        embedding = running.slot.model.base_model.model.get_input_embeddings()
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


async def at_once(running: Running, *stories: Coroutine[Any, Any, Any]) -> list[Any]:
    """Everything in the same step, in this order; what was answered or raised."""
    with manager_of(running).pause():
        tasks = [asyncio.create_task(story) for story in stories]
        await settled()
    return await asyncio.gather(*tasks, return_exceptions=True)


async def all_steps(running: Running, *args: Any, **how: Any) -> list[Said]:
    async with running.steps(*args, **how) as steps:
        return [step async for step in steps]


@pytest.mark.parametrize("place", [0, 2, 4])
def test_only_the_request_that_makes_the_model_fail_fails(
    fresh: Running, poison: Poison, place: int
) -> None:
    async def story() -> None:
        await fresh.swap("alpha")
        running = asyncio.create_task(all_steps(fresh, SHORT, 60, stream=True))
        await until(lambda: bool(manager_of(fresh).batch_processor.scheduler.active_requests))
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


def test_those_who_survive_draw_the_tokens_and_logprobs_that_they_would_have_drawn(
    fresh: Running, poison: Poison
) -> None:
    samplings = [
        Sampling(temperature=1.0, seed=5, logprobs=2),
        Sampling(temperature=1.3, top_p=0.8, seed=6, logprobs=0),
        Sampling(temperature=0.0, logprobs=3),
    ]

    async def story() -> None:
        await fresh.swap("beta")
        undisturbed = [await fresh.answer(SHORT, 25, sampling=one) for one in samplings]
        tasks = [
            asyncio.create_task(all_steps(fresh, SHORT, 25, sampling=one, stream=True))
            for one in samplings
        ]
        manager = manager_of(fresh)
        await until(lambda: len(manager.batch_processor.scheduler.active_requests) == 3)
        with pytest.raises(GenerationFailed, match="poison"):
            await fresh.answer([BAD])
        for before, steps in zip(undisturbed, await asyncio.gather(*tasks), strict=True):
            assert steps[-1].token_ids == before.token_ids
            for step in steps:
                assert len(step.logprobs) == len(step.token_ids)
            assert_near(steps[-1].logprobs, before.logprobs)
        assert poison.failed

    fresh(story())


def test_somebody_who_goes_away_or_comes_while_the_bad_one_is_looked_for_is_served(
    fresh: Running, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the steps of the search: one request is cancelled, another one arrives."""
    manager = manager_of(fresh)
    searching, go = threading.Event(), threading.Event()
    has_no_token = manager._has_no_token

    def held(*args: Any) -> bool:
        searching.set()
        assert go.wait(10)
        return has_no_token(*args)

    async def story() -> None:
        await fresh.swap("alpha")
        monkeypatch.setattr(manager, "_has_no_token", held)
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


def test_the_engine_can_be_stopped_while_a_bad_request_is_looked_for(
    fresh: Running, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = manager_of(fresh)
    searching, go = threading.Event(), threading.Event()
    has_no_token = manager._has_no_token

    def held(*args: Any) -> bool:
        searching.set()
        assert go.wait(10)
        return has_no_token(*args)

    async def story() -> None:
        monkeypatch.setattr(manager, "_has_no_token", held)
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
        assert fresh.engine.admission.running == 0

    fresh(story())


def test_bad_requests_and_nothing_else_do_not_stop_an_engine_whose_model_works(
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
def test_an_engine_whose_every_step_fails_stops_and_nobody_waits_for_it(
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


async def nothing_is_left(running: Running) -> None:
    assert running.engine.alive
    await until(lambda: running.engine.admission.running == 0)
    for manager in running.engine._managers:
        scheduler = manager.batch_processor.scheduler
        await until(lambda scheduler=scheduler: not scheduler.has_pending_requests())  # type: ignore[misc]
        assert (scheduler.only, manager._logprobs) == (None, {})
        assert not scheduler.waiting_requests_order


# ---- a cache that is too small for all ----------------------------------------------------------


@pytest.fixture
def small(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    """Two requests of a hundred tokens fill its cache."""
    yield from started(world, images, kv_cache_tokens=256, max_model_len=256, lanes=1)


def soft_resets(running: Running, patch: pytest.MonkeyPatch) -> list[bool]:
    """Grows whenever the cache was full."""
    manager = manager_of(running).batch_processor.offloading_manager
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
    sampling = Sampling(temperature=1.0, seed=11, logprobs=1)

    async def story() -> None:
        await small.swap("alpha")
        alone = await small.answer(SHORT, 150, sampling=sampling)
        prompts = [SHORT, LONG[:40], [9], [9, 8, 7], LONG[:33]]
        *steps, sampled = await asyncio.gather(
            *(small.answer(ids, 150) for ids in prompts),
            small.answer(SHORT, 150, sampling=sampling),
        )
        assert any(resets), "the cache was large enough"
        for step, ids in zip(steps, prompts, strict=True):
            assert small.is_exact(step, ids, 150)
        assert sampled.token_ids == alone.token_ids
        assert_near(sampled.logprobs, alone.logprobs)

    small(story())


def test_whoever_waits_for_a_full_cache_gets_in_when_the_others_went_away(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets = soft_resets(small, monkeypatch)

    async def story() -> None:
        await small.swap("alpha")
        scheduler = manager_of(small).batch_processor.scheduler
        tasks = [asyncio.create_task(small.answer(ids, 200)) for ids in (SHORT, [9])]
        await until(lambda: scheduler.block_new_requests)
        with manager_of(small).pause():
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
        prompts = [SHORT, [9], [9, 8], LONG[:40]]
        tasks = [asyncio.create_task(small.answer(ids, 150)) for ids in prompts]
        await until(lambda: any(resets))
        with pytest.raises(GenerationFailed):
            await small.answer([BAD])
        for step, ids in zip(await asyncio.gather(*tasks), prompts, strict=True):
            assert small.is_exact(step, ids, 150)
        assert poison.failed
        await nothing_is_left(small)

    small(story())


def test_a_request_that_is_larger_than_the_cache_fails_and_nobody_else_does(
    small: Running,
) -> None:
    async def story() -> None:
        await small.swap("alpha")
        beside = asyncio.create_task(small.answer(SHORT, 60))
        await until(lambda: small.engine.admission.running == 1)
        for ids, tokens in [(LONG * 2, 10), (LONG, 200), (SHORT, 1000)]:
            with pytest.raises(GenerationFailed, match="KV cache"):
                await small.answer(ids, tokens)
        assert small.is_exact(await beside, SHORT, 60)
        assert small.is_exact(await small.answer(LONG), LONG)
        just = await small.answer(LONG, 256 - len(LONG))
        assert small.is_exact(just, LONG, 256 - len(LONG))

    small(story())


# ---- sampling -----------------------------------------------------------------------------------


def assert_near(some: Sequence[TokenLogprobs], others: Sequence[TokenLogprobs]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.chosen == pytest.approx(other.chosen, abs=1e-3)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_a_seed_draws_the_same_tokens_whatever_runs_beside_it(eager: Running) -> None:
    async def story() -> None:
        await eager.swap("alpha")
        seeded = Sampling(temperature=1.0, top_p=0.95, seed=42)
        alone = await eager.answer(SHORT, 30, sampling=seeded)
        unseeded = [
            eager.answer(ids, 30, sampling=Sampling(temperature=1.0)) for ids in (SHORT, LONG, [9])
        ]
        batched, *_, again = await asyncio.gather(
            eager.answer(SHORT, 30, sampling=seeded),
            *unseeded,
            eager.answer(SHORT, 30, sampling=seeded),
        )
        assert alone.token_ids == batched.token_ids == again.token_ids
        other = await eager.answer(SHORT, 30, sampling=Sampling(temperature=1.0, seed=43))
        assert other.token_ids != alone.token_ids
        assert not eager.is_exact(alone, SHORT, 30)

    eager(story())


def test_the_likeliest_token_alone_is_the_greedy_one(eager: Running) -> None:
    async def story() -> None:
        await eager.swap("beta")
        for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-6)):
            step = await eager.answer(LONG, sampling=sampling)
            assert eager.is_exact(step, LONG)

    eager(story())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_a_plain_model_one_for_each_token(
    eager: Running, temperature: float
) -> None:
    async def story() -> None:
        await eager.swap("alpha")
        sampling = Sampling(temperature=temperature, seed=1, top_k=20, logprobs=3)
        seen, _ = await asyncio.gather(
            all_steps(eager, LONG, 15, sampling=sampling, stream=True), eager.answer(SHORT, 15)
        )
        step = seen[-1]
        for one in seen:
            assert len(one.logprobs) == len(one.token_ids)
        model = eager.world._plain(step.revision)
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
        Sampling(temperature=0.0, logprobs=5),
        Sampling(temperature=0.7, top_p=0.9, top_k=5, seed=1),
        Sampling(temperature=1.0, logprobs=0),
    ]

    async def story() -> None:
        await compiled.engine.warm_up()
        await compiled.swap("alpha")
        await compiled.hold("gamma")
        for number, name in enumerate(["beta", "alpha", "beta"]):
            old = compiled.engine.default
            long = asyncio.create_task(compiled.answer(LONG[: 40 + number], 30))
            await until(lambda: compiled.engine._running[old] > 0)  # noqa: B023
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
        compiled.engine.drop(compiled.images["gamma"].revision)
        compiled.engine.guard.check()

    compiled(story())


# ---- canaries: what the engine relies on and nobody promised ------------------------------------


def manager_of(running: Running) -> _Manager:
    return running.engine._managers[0]


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_transformers_still_has_the_managers_calls_that_the_engine_makes(eager: Running) -> None:
    manager = manager_of(eager)
    wanted = {"request_id", "max_new_tokens", "streaming"}
    assert wanted <= parameters(manager.add_request), "add_request takes other arguments now"
    assert "hard_stop" in parameters(manager.stop), "stop(hard_stop=) is gone"
    for name in ("warmup", "start", "is_running", "cancel_request", "register_result_handler"):
        assert callable(getattr(manager, name, None)), f"the manager has no {name}() any more"
    assert hasattr(manager.background_thread_status, "fatal_error"), "no background_thread_status"


def test_transformers_still_pauses_between_two_steps(eager: Running) -> None:
    with manager_of(eager).pause():
        assert not manager_of(eager).batch_processor.scheduler.active_requests
    assert eager(eager.answer(SHORT)).finished, "the engine did not go on after a pause()"


def test_transformers_still_lets_the_prefix_cache_be_emptied(eager: Running) -> None:
    processor = manager_of(eager).batch_processor
    assert processor is not None, "manager.batch_processor is gone"
    assert callable(getattr(processor.cache, "reset", None)), "cache.reset() is gone"


def test_transformers_still_says_when_a_cancelled_request_is_out(eager: Running) -> None:
    scheduler = manager_of(eager).batch_processor.scheduler
    assert isinstance(scheduler.active_requests, dict), "scheduler.active_requests is no dict"
    assert parameters(scheduler.request_is_cancelled) == {"request_id"}
    assert scheduler.request_is_cancelled("nobody"), "it asks another question now"


def test_transformers_still_keeps_result_handlers_under_a_lock(eager: Running) -> None:
    router = manager_of(eager).output_router
    with router._lock:
        assert isinstance(router.result_handlers, dict), "output_router.result_handlers moved"
    assert router.result_handlers == {}, "a request that ended left its handler behind"


def test_transformers_still_takes_a_ready_made_list_of_processors(eager: Running) -> None:
    processors = manager_of(eager).logit_processor
    assert hasattr(processors, "tensors_required"), "logit_processor.tensors_required is gone"
    wanted = {"check_kwargs", "fill_defaults", "prepare_tensor_args", "__call__"}
    base = type(processors).__mro__[1]
    for name in wanted:
        assert callable(getattr(base, name, None)), f"the list of processors has no {name}() now"


def test_transformers_still_answers_with_tokens_error_and_end() -> None:
    from transformers.generation.continuous_batching.requests import GenerationOutput

    fields = set(GenerationOutput.__dataclass_fields__)
    assert {"generated_tokens", "error"} <= fields, "GenerationOutput has other fields now"
    assert callable(getattr(GenerationOutput, "is_finished", None))


def test_transformers_still_takes_a_scheduler_by_name_and_lets_it_choose(eager: Running) -> None:
    scheduler = manager_of(eager).batch_processor.scheduler
    assert isinstance(scheduler, _Scheduler), "SCHEDULER_MAPPING is not asked any more"
    base = FIFOScheduler
    assert "candidates" in parameters(base._process_candidates), "_process_candidates changed"
    assert parameters(base.schedule_batch) == {"self", "token_budget", "cache_budget"}
    assert isinstance(scheduler.block_new_requests, bool), "block_new_requests is gone"
    for name in ("finish_request", "add_waiting_request"):
        assert callable(getattr(base, name, None)), f"the scheduler has no {name}() any more"
    assert isinstance(scheduler.waiting_requests, dict), "scheduler.waiting_requests is no dict"


def test_transformers_still_runs_its_steps_through_the_methods_that_are_overridden() -> None:
    loop = inspect.getsource(ContinuousBatchingManager._run_generation_loop)
    body = inspect.getsource(ContinuousBatchingManager._generation_loop_body)
    assert "self._generation_loop_body(" in loop, "the loop has another body"
    assert "self._generation_step()" in body, "a step runs in another way"
    assert parameters(ContinuousBatchingManager._generation_loop_body) == {
        "self",
        "batch_processor",
        "bootstrapping",
    }
    assert "_handle_request_error" in dir(ContinuousBatchProcessor), "_handle_request_error is gone"


def test_transformers_still_knows_who_was_in_the_last_batch(eager: Running) -> None:
    eager(eager.answer(SHORT))
    [future] = manager_of(eager).batch_processor.inputs_and_outputs.requests_in_batch
    assert hasattr(future, "has_new_token"), "a request in a batch does not say if it has a token"
    assert isinstance(future.state, RequestState), "requests_in_batch holds something else"


def test_transformers_still_starts_a_request_over_with_its_tokens_in_the_prompt() -> None:
    state = RequestState("one", [1, 2, 3], max_new_tokens=10, generated_tokens=[4, 5])
    again = state.create_equivalent_initial_request()
    assert (again.request_id, again.initial_tokens) == ("one", [1, 2, 3, 4, 5])
    assert (again.generated_len(), again.max_new_tokens) == (0, 8)
    assert again.to_generation_output().generated_tokens == [4, 5], "it forgot what it had said"


def test_transformers_still_queues_requests_with_their_ids(eager: Running) -> None:
    manager = manager_of(eager)
    assert hasattr(manager.input_queue, "mutex"), "input_queue is no queue.Queue any more"
    assert manager.cancel_queue.empty()
