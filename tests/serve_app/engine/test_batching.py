"""Batches: their requests, their revision, and isolation of a failing or cancelled request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from hotswap_lib import Revision, Slot
from serve_app.engine.admission import DrainTimeout
from serve_app.engine.batching import BatchEngine, Job
from serve_app.settings import Settings
from serve_app.wire.errors import EngineStopped, GenerationFailed, RevisionNotServed
from tests.hotswap_lib.families import FAMILIES
from tests.serve_app.batching import Models, Running, running
from tests.serve_app.fakes import settled, until


class Word(Job):
    def __init__(self, revision: Revision, word: str) -> None:
        super().__init__(revision)
        self.word = word


class Fatal(BaseException):
    pass


FAULTS: dict[str, BaseException] = {
    "bad": ValueError("this word is bad"),
    "fatal": Fatal(),
    "lost": torch.AcceleratorError("the device is lost"),
}


class Shouts(BatchEngine[Word]):
    """Returns each word in capitals, and the revision in the weights. `open`: batches may run."""

    def __init__(self, slot: Slot, settings: Settings) -> None:
        super().__init__(slot, settings)
        self.open = threading.Event()
        self.open.set()
        self.batches: list[list[str]] = []

    async def shout(self, word: str, pin: str | None = None) -> tuple[str, str, str]:
        """The shout, the revision in the weights meanwhile, and the revision of the ticket."""
        async with self.admit(pin) as ticket:
            said, ran_on = await self._result(ticket, Word(ticket.revision, word))
            return said, ran_on, str(ticket.revision)

    def _run(self, jobs: Sequence[Word]) -> list[Any]:
        self.batches.append([job.word for job in jobs])
        assert self.open.wait(30)
        for job in jobs:
            if job.word in FAULTS:
                raise FAULTS[job.word]
        return [(job.word.upper(), str(self.slot.revision)) for job in jobs]

    def _run_every_shape(self) -> None:
        assert threading.current_thread().name.startswith("model")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(FAMILIES["bert"].base(), tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def shouts(models: Models) -> Iterator[Running[Shouts]]:
    settings = Settings(max_batch_size=4, batch_wait_s=0, drain_timeout_s=0.05)
    with running(Shouts(models.slot(), settings), models) as started:
        yield started
        started.engine.open.set()


async def busy(engine: Shouts) -> asyncio.Task[tuple[str, str, str]]:
    """A request that runs until `open` is set."""
    engine.open.clear()
    task = asyncio.create_task(engine.shout("busy"))
    await until(lambda: engine.batches == [["busy"]])
    return task


# ---- batches --------------------------------------------------------------------------


def test_requests_at_the_same_time_run_together_as_soon_as_the_batch_is_full(
    models: Models,
) -> None:
    settings = Settings(max_batch_size=4, batch_wait_s=60)
    with running(Shouts(models.slot(), settings), models) as started:
        engine = started.engine

        async def story() -> list[tuple[str, str, str]]:
            return await asyncio.gather(*(engine.shout(word) for word in "abcd"))

        assert [said for said, _, _ in started(story())] == ["A", "B", "C", "D"]
        assert engine.batches == [["a", "b", "c", "d"]]


def test_requests_that_arrive_while_the_model_is_busy_run_in_the_largest_batches(
    shouts: Running[Shouts],
) -> None:
    engine = shouts.engine

    async def story() -> None:
        tasks = [await busy(engine)]
        for count, word in enumerate("abcdef", start=1):  # one by one: six windows of one
            tasks.append(asyncio.create_task(engine.shout(word)))
            await until(lambda count=count: engine.queued == count)  # type: ignore[misc]
        engine.open.set()
        await asyncio.gather(*tasks)

    shouts(story())
    assert engine.batches == [["busy"], ["a", "b", "c", "d"], ["e", "f"]]


def test_warm_up_runs_in_the_thread_that_will_run_the_batches(shouts: Running[Shouts]) -> None:
    assert shouts(shouts.engine.warm_up()) > 0
    assert shouts.engine.guard.recompiles == 0


# ---- revisions ----------------------------------------------------------------------------------


def test_every_batch_runs_on_the_one_revision_of_its_requests(shouts: Running[Shouts]) -> None:
    engine = shouts.engine

    async def story() -> list[tuple[str, str, str]]:
        await shouts.swap("red")
        await engine.add(shouts.staged("blue"))
        task = await busy(engine)
        pins = [None, "blue", None, "red", "blue", None]
        tasks = [asyncio.create_task(engine.shout(f"w{i}", pin)) for i, pin in enumerate(pins)]
        await until(lambda: engine.queued == len(pins))
        engine.open.set()
        return await asyncio.gather(task, *tasks)

    answers = shouts(story())
    assert engine.batches == [["busy"], ["w0", "w2", "w3", "w5"], ["w1", "w4"]]
    assert [name.split("@")[0] for _, name, _ in answers] == [
        "red", "red", "blue", "red", "red", "blue", "red",
    ]  # fmt: skip
    assert all(ran_on == promised for _, ran_on, promised in answers)


def test_requests_finish_on_their_revision_while_new_ones_overlap_on_another(
    shouts: Running[Shouts],
) -> None:
    engine = shouts.engine

    async def story() -> None:
        old = await shouts.swap("red")
        first = await busy(engine)
        second = asyncio.create_task(engine.shout("second"))
        await until(lambda: engine.queued == 1)
        swap = asyncio.create_task(shouts.swap("blue"))
        await settled()
        engine.open.set()  # the swap gets the weight lock before the second batch
        new = await swap
        third = await engine.shout("third")
        assert [(await first)[1], (await second)[1], third[1]] == [old, old, new]
        assert engine.batches == [["busy"], ["second"], ["third"]]
        with pytest.raises(RevisionNotServed):
            await engine.shout("late", "red")

    shouts(story())


def test_a_drain_waits_for_all_requests_and_gives_up_in_time(shouts: Running[Shouts]) -> None:
    engine = shouts.engine

    async def story() -> None:
        task = await busy(engine)
        with pytest.raises(DrainTimeout):
            await engine.cut_over(shouts.staged("red"), in_flight="drain")
        engine.open.set()
        await task
        await engine.cut_over(shouts.staged("red"), in_flight="drain")
        assert (await engine.shout("after"))[1].startswith("red@")

    shouts(story())


def test_lanes_are_the_revisions_that_run_now(shouts: Running[Shouts]) -> None:
    engine = shouts.engine

    async def story() -> None:
        assert engine.lanes() == ()
        task = await busy(engine)
        [lane] = engine.lanes()
        assert (lane.revision, lane.running) == (str(engine.default), 1)
        engine.open.set()
        await task
        assert engine.lanes() == ()

    shouts(story())


# ---- failures -----------------------------------------------------------------------------------


def test_a_request_that_makes_the_model_raise_fails_alone(shouts: Running[Shouts]) -> None:
    engine = shouts.engine

    async def story() -> list[Any]:
        words = ["good", "bad", "fine"]
        return await asyncio.gather(*map(engine.shout, words), return_exceptions=True)

    good, bad, fine = shouts(story())
    assert (good[0], fine[0]) == ("GOOD", "FINE")
    assert isinstance(bad, GenerationFailed)
    assert str(bad) == "the generation failed: this word is bad"
    assert engine.batches[-3:] == [["good"], ["bad"], ["fine"]]
    assert engine.alive


@pytest.mark.parametrize("word", ["fatal", "lost"])
def test_when_the_thread_or_the_device_is_lost_every_request_fails(
    shouts: Running[Shouts], word: str
) -> None:
    engine = shouts.engine

    async def story() -> None:
        task = await busy(engine)
        tasks = [asyncio.create_task(engine.shout(each)) for each in (word, *"abcd")]
        await until(lambda: engine.queued == 5)
        engine.open.set()
        assert (await task)[0] == "BUSY"
        for one in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(one, EngineStopped)
        assert not engine.alive
        with pytest.raises(EngineStopped):
            await engine.shout("late")
        assert engine.admission.running == 0

    shouts(story())


def test_requests_that_wait_for_a_stopped_engine_fail(shouts: Running[Shouts]) -> None:
    engine = shouts.engine

    async def story() -> None:
        task = await busy(engine)
        waiting = asyncio.create_task(engine.shout("waiting"))
        await until(lambda: engine.queued == 1)
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
        await until(lambda: not engine.alive)
        engine.open.set()
        await stopping
        assert (await task)[0] == "BUSY"
        with pytest.raises(EngineStopped):
            await waiting

    shouts(story())


# ---- cancellation -------------------------------------------------------------------------------


def test_a_request_cancelled_in_the_queue_is_never_run(shouts: Running[Shouts]) -> None:
    engine = shouts.engine

    async def story() -> None:
        task = await busy(engine)
        gone, kept = (asyncio.create_task(engine.shout(word)) for word in ("gone", "kept"))
        await until(lambda: engine.queued == 2)
        gone.cancel()
        await until(lambda: gone.done())
        assert engine.admission.running == 2
        engine.open.set()
        await asyncio.gather(task, kept)

    shouts(story())
    assert engine.batches == [["busy"], ["kept"]]


def test_a_request_cancelled_before_the_queue_is_never_run(models: Models) -> None:
    settings = Settings(max_batch_size=2, batch_wait_s=60)
    with running(Shouts(models.slot(), settings), models) as started:
        engine = started.engine

        async def story() -> None:
            gone = asyncio.create_task(engine.shout("gone"))
            await settled()
            gone.cancel()
            await until(lambda: gone.done())
            assert engine.admission.running == 0
            await engine.shout("kept")

        started(story())
        assert engine.batches == [["kept"]]


def test_a_request_cancelled_while_it_runs_counts_until_the_model_is_done(
    shouts: Running[Shouts],
) -> None:
    engine = shouts.engine

    async def story() -> None:
        task = await busy(engine)
        task.cancel()
        await until(lambda: task.done())
        assert engine.admission.running == 1
        engine.open.set()
        await until(lambda: engine.admission.running == 0)
        assert (await engine.shout("next"))[0] == "NEXT"

    shouts(story())
