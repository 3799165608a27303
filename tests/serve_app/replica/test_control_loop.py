"""The replica's control loop, over a controller that answers what the test gives it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from hotswap_lib import BASE, AdapterImage, Layout, Revision
from serve_app.engine.admission import DrainTimeout
from serve_app.replica.control_loop import ControlLoop
from serve_app.rollout.plan import InFlight
from serve_app.rollout.state import Desired
from serve_app.wire.admin import StartView
from serve_app.wire.errors import RevisionLost
from serve_app.wire.reports import Answer, Report
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.conftest import new_slot
from tests.serve_app.fakes import FakeEngine, FakeRef, settled, until

START = StartView(load_s=1.5, warm_up_s=2.5, compiled_regions=3, compile_cache="hit")


class ScriptedController:
    """Answers a report with the next answer of the test, and holds it open until there is one."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.joined: list[tuple[str, Layout]] = []
        self.left: list[str] = []
        self.introduce = False
        self.deaf = 0  # so many calls end with an error
        self._answers: asyncio.Queue[Answer] = asyncio.Queue()

    def say(self, answer: Answer) -> None:
        self._answers.put_nowait(answer)

    async def join(self, replica: str, layout: Layout) -> None:
        self.joined.append((replica, layout))
        self.introduce = False

    async def report(self, report: Report) -> Answer:
        if self.deaf:
            self.deaf -= 1
            raise ConnectionError("the controller is gone")
        self.reports.append(report)
        if self.introduce:
            return Answer(introduce=True)
        return await self._answers.get()

    async def leave(self, replica: str) -> None:
        self.left.append(replica)

    @property
    def last(self) -> Report:
        return self.reports[-1]


class Stage:
    """One lane at work, with everything that a story needs."""

    def __init__(self, world: TinyWorld, images: dict[str, AdapterImage]) -> None:
        self.images = images
        self.engine = FakeEngine(new_slot(world))
        self.controller = ScriptedController()
        engine: Any = self.engine
        self.lane = ControlLoop(engine, self.controller, replica="r1", start=START, patience_s=0.2)

    def key(self, name: str) -> str:
        return BASE.key if name == "base" else self.images[name].revision.key

    def want(
        self,
        hold: str,
        stage: str | None = None,
        *,
        generation: int,
        epoch: int = 1,
        also_serves: tuple[str, ...] = (),
        in_flight: InFlight = "drain",
        **images: Any,
    ) -> Desired:
        """Say that the replica shall hold this and stage that; images may be replaced by others."""
        desired = Desired(
            epoch=epoch,
            generation=generation,
            hold=self.key(hold),
            stage=None if stage is None else self.key(stage),
            also_serves=tuple(map(self.key, also_serves)),
            in_flight=in_flight,
        )
        answer = Answer(desired=desired)
        for name in {hold, stage, *also_serves} - {None, "base"}:
            assert name is not None
            given = images.get(name, FakeRef(self.images[name]))
            if isinstance(given, RevisionLost):
                answer.refused[self.key(name)] = given
            else:
                answer.images[self.key(name)] = given
        self.controller.say(answer)
        return desired

    def reported(self, what: Callable[[Report], bool]) -> bool:
        return bool(self.controller.reports) and what(self.controller.last)

    async def until_holding(self, name: str) -> None:
        await until(
            lambda: self.reported(lambda r: r.state.holds == self.key(name) and r.state.serving),
            f"it never served {name}",
        )

    async def until_beside(self, *names: str) -> None:
        await until(
            lambda: self.reported(
                lambda r: {key.rpartition("@")[0] for key in r.state.also_serves} == set(names)
            ),
            f"it never served {names} beside its default",
        )

    async def until_refused(self, name: str, *, generation: int = 0) -> None:
        await until(
            lambda: self.reported(
                lambda r: any(
                    one.revision == self.key(name) and one.generation >= generation
                    for one in r.state.refused
                )
            ),
            f"{name} was never refused",
        )

    async def until_failed(self) -> None:
        await until(lambda: self.reported(lambda r: r.state.failure is not None), "it never failed")


def never() -> asyncio.Future[AdapterImage]:
    """An image that does not arrive."""
    return asyncio.get_running_loop().create_future()


def lost() -> asyncio.Future[AdapterImage]:
    """An image that the object store has lost."""
    future = never()
    future.set_exception(ObjectLostError("00" * 28, b"", ""))
    return future


@pytest.fixture
def stage(world: TinyWorld, images: dict[str, AdapterImage]) -> Callable[[], Any]:
    @asynccontextmanager
    async def open_stage() -> AsyncIterator[Stage]:
        stage = Stage(world, images)
        try:
            async with asyncio.timeout(30):
                yield stage
        finally:
            await stage.lane.close()
            if stage.lane.ready.done():
                with suppress(Exception):
                    stage.lane.ready.result()

    return open_stage


Open = Callable[[], Any]


def test_a_replica_is_ready_once_its_first_revision_is_live(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            await until(lambda: len(one.controller.reports) == 1)
            assert not one.controller.last.state.serving
            assert not one.engine.admission.is_open
            one.want("alpha", generation=3)
            await one.lane.ready
            assert one.engine.default.key == one.key("alpha")
            assert one.engine.admission.is_open
            await one.until_holding("alpha")

    asyncio.run(story())


def test_a_replica_that_shall_hold_the_base_model_needs_no_image(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("base", generation=1)
            await one.until_holding("base")
            assert one.engine.swaps == []

    asyncio.run(story())


def test_a_replica_that_is_not_known_introduces_itself_and_asks_again(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.controller.introduce = True
            await until(lambda: len(one.controller.joined) == 1)
            [(name, layout)] = one.controller.joined
            assert (name, layout.fingerprint) == ("r1", one.engine.slot.layout.fingerprint)
            await until(lambda: len(one.controller.reports) == 2)

    asyncio.run(story())


def test_the_target_is_staged_beside_what_is_served_and_committed_only_when_told(
    stage: Open,
) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            one.want("alpha", "beta", generation=2)
            await until(lambda: one.controller.last.state.staged is not None)
            assert one.controller.last.state.staged == one.key("beta")
            assert one.controller.last.state.serving
            assert one.engine.swaps[-1].startswith("alpha@")
            one.want("beta", "beta", generation=3, beta=never())  # no need to fetch it again
            await one.until_holding("beta")
            assert [name.split("@")[0] for name in one.engine.swaps] == ["alpha", "beta"]
            await until(lambda: one.controller.last.state.staged is None)

    asyncio.run(story())


def test_what_shall_be_held_is_committed_before_the_next_image_is_waited_for(
    stage: Open,
) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", "beta", generation=1, beta=never())
            await one.until_holding("alpha")
            assert one.controller.last.state.staged is None

    asyncio.run(story())


def test_an_abort_does_not_wait_for_an_image_that_is_still_on_its_way(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            slow = never()
            one.want("alpha", "beta", generation=2, beta=slow)
            await until(lambda: one.reported(lambda r: r.acting_on and r.acting_on.generation == 2))
            want = one.want("alpha", generation=3)
            await until(lambda: one.reported(lambda r: r.acting_on == want))
            await one.until_holding("alpha")
            assert slow.cancelled()
            assert one.controller.last.state.failure is None

    asyncio.run(story())


def test_an_abort_stops_a_swap_that_still_drains(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            one.engine.drained.clear()
            one.want("beta", generation=2)
            await until(lambda: not one.engine.admission.is_open)
            await until(lambda: not one.controller.last.state.serving)
            one.want("alpha", generation=3)
            await one.until_holding("alpha")
            assert one.engine.swaps[-1].startswith("alpha@")
            assert one.engine.admission.is_open

    asyncio.run(story())


@pytest.mark.parametrize(("epoch", "generation"), [(1, 9), (2, 4), (1, 99)])
def test_a_document_that_is_older_than_the_last_one_is_refused(
    stage: Open, epoch: int, generation: int
) -> None:
    async def story() -> None:
        async with stage() as one:
            newest = one.want("alpha", epoch=2, generation=5)
            await one.until_holding("alpha")
            heard = len(one.controller.reports)
            one.want("beta", epoch=epoch, generation=generation)
            await until(lambda: len(one.controller.reports) > heard)
            await settled()
            assert one.controller.last.acting_on == newest
            assert one.engine.swaps == [str(one.images["alpha"].revision)]

    asyncio.run(story())


def test_a_new_epoch_is_newer_whatever_its_generation(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", epoch=1, generation=50)
            await one.until_holding("alpha")
            one.want("beta", epoch=2, generation=1)
            await one.until_holding("beta")

    asyncio.run(story())


def test_a_swap_that_fails_is_told_once_with_its_generation_and_the_old_one_serves_on(
    stage: Open,
) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            one.engine.faults.append(DrainTimeout(2, 0.5))
            one.want("beta", generation=7)
            await one.until_failed()
            failure = one.controller.last.state.failure
            assert (failure.revision, failure.generation) == (one.key("beta"), 7)
            assert failure.reason == "2 requests were still running after 0.5 s of drain"
            assert one.controller.last.state.holds == one.key("alpha")
            assert one.engine.admission.is_open
            told = len(one.controller.reports)
            await settled()
            assert len(one.controller.reports) == told, "nothing changed, so nothing more to tell"
            one.want("alpha", generation=8)
            await one.until_holding("alpha")
            assert one.controller.last.state.failure is None

    asyncio.run(story())


def test_an_unexpected_error_is_reported_as_well(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            one.engine.faults.append(RuntimeError("CUDA out of memory"))
            one.want("beta", generation=2)
            await one.until_failed()  # else the fleet waits for the deadline and never learns why
            assert one.controller.last.state.failure.reason == "CUDA out of memory"

    asyncio.run(story())


def test_an_image_of_another_layout_is_a_failure_and_not_a_crash(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            image = one.images["beta"]
            foreign = AdapterImage(
                revision=image.revision,
                layout_fingerprint="0" * 64,
                blocks=image.blocks,
                config=image.config,
                ranks=image.ranks,
                written=image.written,
            )
            one.want("alpha", "beta", generation=2, beta=FakeRef(foreign))
            await one.until_failed()
            assert "packed for layout 00000000" in one.controller.last.state.failure.reason
            assert one.controller.last.state.serving

    asyncio.run(story())


def test_a_revision_that_the_controller_could_not_pack_is_a_failure_with_its_reason(
    stage: Open,
) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            one.want("alpha", "beta", generation=2, beta=RevisionLost("beta@1", "/there"))
            await one.until_failed()
            assert one.controller.last.state.failure.reason == str(RevisionLost("beta@1", "/there"))

    asyncio.run(story())


def test_an_image_that_was_lost_is_asked_for_again_and_is_no_failure(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1, alpha=lost())
            await until(lambda: len(one.controller.reports) >= 3)
            assert one.controller.last.acting_on is None
            assert one.controller.last.state.failure is None
            one.want("alpha", generation=1)
            await one.until_holding("alpha")

    asyncio.run(story())


def test_a_replica_with_nothing_to_serve_and_nothing_to_come_does_not_start(
    stage: Open,
) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1, alpha=RevisionLost("alpha@1", "/there"))
            with pytest.raises(RevisionLost):
                await one.lane.ready

    asyncio.run(story())


def test_a_replica_that_cannot_hold_stable_waits_for_the_rollout_that_is_under_way(
    stage: Open,
) -> None:
    async def story() -> None:
        async with stage() as one:
            gone = RevisionLost("alpha@1", "/there")
            one.want("alpha", "beta", generation=1, alpha=gone)
            await one.until_failed()
            assert not one.lane.ready.done()
            await until(lambda: one.controller.last.state.staged is not None)
            one.want("beta", "beta", generation=2)
            await one.lane.ready
            await one.until_holding("beta")

    asyncio.run(story())


def test_a_controller_that_is_gone_for_a_while_is_asked_until_it_is_back(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.controller.deaf = 2
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            assert one.controller.deaf == 0

    asyncio.run(story())


def test_the_times_of_a_swap_are_told(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            swap = one.controller.last.last_swap
            assert swap is not None
            assert (swap.revision, swap.copies) == (str(one.images["alpha"].revision), 1)
            assert (swap.drain_ms, swap.verify_ms) == (0.5, 0.25)
            assert swap.image_bytes == one.engine.slot.layout.nbytes
            assert swap.commit_us > 0

    asyncio.run(story())


def test_a_replica_that_closes_says_goodbye_and_leaves_no_task(stage: Open) -> None:
    async def story() -> None:
        before = asyncio.all_tasks()
        async with stage() as one:
            one.want("alpha", "beta", generation=1, beta=never())
            await one.until_holding("alpha")
        assert one.controller.left == ["r1"]
        await settled()
        assert asyncio.all_tasks() == before

    asyncio.run(story())


# ---- revisions beside the default --------------------------------------------------------------


def test_what_shall_be_served_beside_is_and_what_shall_not_is_dropped(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1, also_serves=("beta", "gamma"))
            await one.until_beside("beta", "gamma")
            assert one.controller.last.state.serving
            assert one.controller.last.state.holds == one.key("alpha")
            assert {lane.revision for lane in one.controller.last.lanes} == {
                str(Revision.parse(key)) for key in one.controller.last.state.served
            }
            one.want("alpha", generation=2, also_serves=("gamma",))
            await one.until_beside("gamma")
            one.want("alpha", generation=3)
            await one.until_beside()

    asyncio.run(story())


def test_a_replica_is_ready_when_those_beside_have_been_tried_and_serves_before(
    stage: Open,
) -> None:
    async def story() -> None:
        async with stage() as one:
            late = never()
            one.want("alpha", generation=1, also_serves=("beta", "gamma"), beta=late)
            await one.until_holding("alpha")
            assert not one.lane.ready.done()
            late.set_result(one.images["beta"])
            await one.lane.ready
            assert one.engine.served[-1] == {"alpha", "beta", "gamma"}

    asyncio.run(story())


def test_an_adapter_that_cannot_be_loaded_is_reported_and_changes_nothing_else(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.engine.holding_fails["beta"] = RuntimeError("CUDA out of memory")
            one.want("alpha", generation=4, also_serves=("beta", "gamma"))
            await one.lane.ready
            await one.until_refused("beta")
            [refused] = one.controller.last.state.refused
            assert (refused.reason, refused.generation) == ("CUDA out of memory", 4)
            assert one.controller.last.state.failure is None
            assert one.controller.last.state.serving
            await one.until_beside("gamma")

    asyncio.run(story())


def test_an_image_beside_that_does_not_come_keeps_nothing_else_waiting(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            stuck = never()
            one.want("alpha", "beta", generation=1, also_serves=("gamma",), gamma=stuck)
            await one.until_refused("gamma")
            [refused] = one.controller.last.state.refused
            assert refused.reason == "its image did not come within 0.2 s"
            await until(lambda: one.reported(lambda r: r.state.staged is not None))
            assert one.lane.ready.done()

    asyncio.run(story())


@pytest.mark.parametrize("why", [RevisionLost("beta@1", "/there"), lost])
def test_one_whose_image_is_not_to_be_had_is_tried_again_with_the_next_document(
    stage: Open, why: Any
) -> None:
    async def story() -> None:
        async with stage() as one:
            gone = why if isinstance(why, Exception) else why()
            one.want("alpha", generation=1, also_serves=("beta",), beta=gone)
            await one.until_refused("beta")
            assert one.controller.last.acting_on is not None, "the default goes on"
            one.want(
                "alpha", generation=1, also_serves=("beta",)
            )  # the controller says it once more
            await one.until_beside("beta")
            await until(lambda: one.controller.last.state.refused == ())

    asyncio.run(story())


def test_what_is_wanted_no_more_is_no_failure_any_more(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want(
                "alpha", generation=1, also_serves=("beta",), beta=RevisionLost("beta@1", "/x")
            )
            await one.until_refused("beta")
            one.want("alpha", generation=2)
            await until(lambda: one.controller.last.state.refused == ())

    asyncio.run(story())


def test_one_that_becomes_the_default_and_goes_back_is_served_all_the_time(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("base", generation=1, also_serves=("alpha",))
            await one.until_beside("alpha")
            one.want("alpha", "alpha", generation=2)
            await one.until_holding("alpha")
            one.want("beta", "beta", generation=3, also_serves=("alpha",), alpha=never())
            await one.until_holding("beta")
            await one.until_beside("alpha")
            assert all("alpha" in names for names in one.engine.served)

    asyncio.run(story())


def test_one_loaded_while_it_is_the_default_stays_when_the_default_moves_on(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            # the copy that is live is the copy that stays: nothing is sent for
            one.want("beta", generation=2, also_serves=("alpha",), alpha=never())
            await one.until_holding("beta")
            assert all("alpha" in names for names in one.engine.served)

    asyncio.run(story())


def test_a_document_with_other_tenants_does_not_start_a_drain_over(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            one.engine.drained.clear()
            one.want("beta", generation=2)
            await until(lambda: not one.engine.admission.is_open)
            want = one.want("beta", generation=3, also_serves=("gamma",))
            await until(lambda: one.reported(lambda r: r.acting_on == want))
            assert not one.engine.admission.is_open
            one.engine.drained.set()
            await one.until_beside("gamma")
            assert one.controller.last.state.holds == one.key("beta")
            assert one.engine.policies == ["drain", "drain"]

    asyncio.run(story())


def test_an_image_on_its_way_is_not_sent_for_again_because_something_else_changed(
    stage: Open,
) -> None:
    async def story() -> None:
        async with stage() as one:
            slow = never()
            one.want("alpha", "beta", generation=1, beta=slow)
            await one.until_holding("alpha")
            one.want("alpha", "beta", generation=2, also_serves=("gamma",), beta=slow)
            await one.until_beside("gamma")
            assert not slow.cancelled()
            slow.set_result(one.images["beta"])
            await until(lambda: one.reported(lambda r: r.state.staged is not None))

    asyncio.run(story())


# ---- requests that run -------------------------------------------------------------------------


def test_the_document_says_what_becomes_of_running_requests(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            one.engine.drained.clear()  # they run on, and the cutover does not wait for them
            one.want("beta", generation=2, in_flight="overlap")
            await one.until_holding("beta")
            assert one.engine.policies == ["drain", "overlap"]
            assert one.controller.last.last_swap.in_flight == "overlap"
            assert one.controller.last.admits

    asyncio.run(story())


def test_overlap_ends_a_drain_to_the_same_revision(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1)
            await one.until_holding("alpha")
            one.engine.drained.clear()
            one.want("beta", generation=2)
            await until(lambda: not one.engine.admission.is_open)
            one.want("beta", generation=3, in_flight="overlap")
            await one.until_holding("beta")

    asyncio.run(story())


def test_how_the_replica_started_is_in_every_report(stage: Open) -> None:
    async def story() -> None:
        async with stage() as one:
            await until(lambda: len(one.controller.reports) == 1)
            assert one.controller.last.start == START

    asyncio.run(story())


def test_log_messages_name_the_replica_and_have_the_revision_as_a_field(
    stage: Open, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with stage() as one:
            one.want("alpha", generation=1, also_serves=("beta",), beta=RevisionLost("b", "/x"))
            await one.until_refused("beta")

    with caplog.at_level(logging.INFO, logger="serve_app.replica"):
        asyncio.run(story())
    fields = {record.message: vars(record).get("revision", "") for record in caplog.records}
    assert all(message.startswith("replica r1: ") for message in fields)
    [swapped] = [message for message in fields if "swapped" in message]
    [refused] = [message for message in fields if "/x" in message]
    assert fields[swapped].startswith("alpha@")
    assert refused.startswith(f"replica r1: {fields[refused]}: ")
