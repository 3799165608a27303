"""Generation over a tiny Llama: exact answers, exact revisions, and what it needs of transformers.

Whatever is private in transformers and used by serve_app/causal.py has a test here that fails with
a sentence when it changes.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from hotswap_lib import AdapterImage, Envelope, Revision, Slot, pack, prepare
from serve_app.admission import DrainTimeout
from serve_app.causal import CausalEngine, _Manager
from serve_app.engine import EngineStopped, GenerationFailed, InFlight, Step
from serve_app.sampling import Sampling, TokenLogprobs
from serve_app.settings import Settings
from tests.e2e.tiny_world import TinyWorld
from tests.hotswap_lib.families import randomize

from .conftest import new_slot
from .fakes import until

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
    assert processors.tensors_required == 1


def test_transformers_still_answers_with_tokens_error_and_end() -> None:
    from transformers.generation.continuous_batching.requests import GenerationOutput

    fields = set(GenerationOutput.__dataclass_fields__)
    assert {"generated_tokens", "error"} <= fields, "GenerationOutput has other fields now"
    assert callable(getattr(GenerationOutput, "is_finished", None))
