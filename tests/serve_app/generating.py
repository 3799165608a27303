"""A started engine in this process, to be driven by a test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import pytest

from hotswap_lib import AdapterImage, Slot
from serve_app.engine.causal import CausalEngine
from serve_app.engine.continuous_batching import LaneManager
from serve_app.engine.lanes import TURN_S
from serve_app.engine.sampling_params import SamplingParams, TokenLogprobs
from serve_app.engine.steps import GenerationOutput
from serve_app.rollout.plan import InFlight
from serve_app.settings import Settings
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.conftest import new_slot
from tests.serve_app.fakes import until

T = TypeVar("T")
GREEDY = SamplingParams(temperature=0.0)
PAGE = 32
SHORT = [3, 1, 4, 1, 5]
LONG = [(7 * i) % 250 for i in range(4 * PAGE + 5)]  # four whole pages, and a bit


class Said(NamedTuple):
    """An output, and the revision that its request runs on."""

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
        turn_s: float = TURN_S,
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
            turn_s=turn_s,
        )
        self.engine.start()

    def __call__(self, story: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(asyncio.wait_for(story, 240))

    @property
    def manager(self) -> LaneManager:
        """The first lane's."""
        return self.engine.managers[0]

    def close(self) -> None:
        self.engine.stop()
        self._runner.close()

    async def swap(self, name: str, in_flight: InFlight = "drain") -> str:
        """Make this adapter the default; returns its revision."""
        await self.engine.cut_over(self.slot.stage(self.images[name]), in_flight=in_flight)
        return str(self.engine.default)

    async def hold(self, name: str) -> str:
        """Serve this adapter as well; returns its revision."""
        await self.engine.add(self.slot.stage(self.images[name]))
        return self.world.revision(name)

    @asynccontextmanager
    async def steps(
        self,
        ids: list[int],
        tokens: int,
        *,
        pin: str | None = None,
        stream: bool = False,
        sampling: SamplingParams = GREEDY,
    ) -> AsyncIterator[AsyncIterator[Said]]:
        """The outputs of one request, each with the revision that the request runs on."""

        async def said(
            revision: str, steps: AsyncIterator[GenerationOutput]
        ) -> AsyncIterator[Said]:
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
        """True if the answer is what a plain PeftModel with the named revision generates."""
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


def assert_near(some: Sequence[TokenLogprobs], others: Sequence[TokenLogprobs]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.chosen == pytest.approx(other.chosen, abs=1e-3)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


async def nothing_is_left(running: Running) -> None:
    """Every request is out of the engine and of its schedulers, and the engine works."""
    engine = running.engine
    assert engine.alive
    await until(lambda: engine.admission.running == 0, "requests are still running")
    assert not engine.revisions.running
    assert not any(lane.running for lane in engine.lanes())
    assert engine.weight_lock.revisions == set(engine.serves), "an unused image is in memory"
    for manager in engine.managers:
        scheduler = manager.scheduler
        await until(
            lambda scheduler=scheduler: not scheduler.has_pending_requests(),  # type: ignore[misc]
            "the scheduler still has requests",
        )
        assert scheduler.only is None


async def all_steps(running: Running, *args: Any, **how: Any) -> list[Said]:
    async with running.steps(*args, **how) as steps:
        return [step async for step in steps]
