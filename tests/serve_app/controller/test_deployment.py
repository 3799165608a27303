"""The controller: alone over hand-written reports, and with real lanes over a fleet of slots."""

from __future__ import annotations

import asyncio
import json
import pickle
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hotswap_lib import BASE, AdapterImage, AdapterRefused, Layout, Revision
from serve_app.controller.deployment import Controller
from serve_app.controller.images import AdapterStore
from serve_app.controller.journal import Journal, JournalEntry
from serve_app.engine.admission import DrainTimeout
from serve_app.replica.control_loop import ControlLoop
from serve_app.rollout.documents import Documents
from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.rollout.state import Desired, Failure, ReplicaState
from serve_app.settings import Settings
from serve_app.wire.admin import AdapterView, CanaryView, RolloutView
from serve_app.wire.errors import (
    AdapterAlreadyLoaded,
    AdapterLoadFailed,
    AdapterLoadTimeout,
    AdapterNotLoaded,
    FleetNotReady,
    KeyReused,
    NothingToUndo,
    PlanImpossible,
    ProbeInvalid,
    RolloutNotFound,
)
from serve_app.wire.reports import Answer, Report
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.conftest import new_slot
from tests.serve_app.fakes import CountingPut, FakeEngine, settled, until

T = TypeVar("T")


def tell(story: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(story, 60))


class FakeProbing:
    """Probes by name: what they return, or raise."""

    def __init__(self) -> None:
        self.scores: dict[str, dict[str, float] | Exception] = {}

    async def check(self, functions: Sequence[str]) -> None:
        for function in functions:
            if function not in self.scores:
                raise ProbeInvalid(function, "cannot be imported: no such module")

    async def run(self, function: str, *_: Any) -> dict[str, float]:
        found = self.scores[function]
        if isinstance(found, Exception):
            raise found
        return found


class Hall:
    """A controller over one state directory, and whoever reports to it."""

    def __init__(self, world: TinyWorld, state: Path | str, **settings: Any) -> None:
        self.world, self.state = world, state
        # one lane: these fleets drain, and the fake engine says when they have
        self.settings = Settings.model_validate({"poll_s": 0.2, "lanes": 1, **settings})
        self.load_timeout_s = 10.0
        self.grace_s = 300.0
        self.probing = FakeProbing()
        self.engines: dict[str, FakeEngine] = {}
        self.lanes: dict[str, ControlLoop] = {}
        self.up = False

    # the lanes call whoever is the controller now
    async def join(self, replica: str, layout: Layout) -> None:
        await self.controller.join(replica, layout)

    async def report(self, report: Report) -> Answer:
        if not self.up:
            raise ConnectionError("the controller is gone")
        return await self.controller.report(report)

    async def leave(self, replica: str) -> None:
        await self.controller.leave(replica)

    async def __aenter__(self) -> Hall:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for lane in self.lanes.values():
            await lane.close()
        self.kill()

    async def start(self, **changed: Any) -> None:
        self.settings = Settings.model_validate({**self.settings.model_dump(), **changed})
        self.put = CountingPut()
        controller = Controller(
            self.settings,
            state_uri=str(self.state),
            put=self.put,
            load_timeout_s=self.load_timeout_s,
            probing=self.probing,
            grace_s=self.grace_s,
        )
        await controller.start()
        self.controller = controller  # Serve, too, lets nobody in before
        self.up = True

    async def replace(self, **changed: Any) -> Controller:
        """A redeploy that starts the new controller beside the old one, which is returned."""
        old = self.controller
        await self.start(**changed)
        return old

    def kill(self) -> None:
        """What SIGKILL leaves of a controller in this process: nothing that acts."""
        self.up = False
        if self.controller._ticker is not None:
            self.controller._ticker.cancel()

    async def restart(self, **changed: Any) -> None:
        self.kill()
        await self.start(**changed)

    async def replicas(self, *names: str) -> None:
        for name in names:
            self.engines[name] = FakeEngine(new_slot(self.world))
            engine: Any = self.engines[name]
            self.lanes[name] = ControlLoop(engine, self, replica=name, patience_s=0.5)
        await asyncio.gather(*(self.lanes[name].ready for name in names))
        await self.until_serving(*self.lanes)

    async def until_serving(self, *names: str) -> None:
        async def serving() -> set[str]:
            return {r.id for r in (await self.controller.fleet()).replicas if r.serving}

        deadline = time.monotonic() + 10
        while not set(names) <= await serving():
            assert time.monotonic() < deadline, "a replica never served"
            await asyncio.sleep(0.005)

    def adapter(self, name: str) -> str:
        return str(self.world.adapter(name))

    async def roll(self, name: str, **plan: Any) -> RolloutView:
        return await self.controller.start_rollout({"adapter": self.adapter(name), **plan})

    async def load(self, name: str, adapter: str | None = None, **more: Any) -> AdapterView:
        return await self.controller.load_adapter(name, self.adapter(adapter or name), **more)

    def also_serves(self) -> list[set[str]]:
        """Names, by replica."""
        return [{one.name for one in each.serves[1:]} for each in self.engines.values()]

    async def ended(self, rollout: RolloutView) -> RolloutView:
        deadline = time.monotonic() + 15
        while not (now := await self.controller.rollout(rollout.id)).ended:
            assert time.monotonic() < deadline, now
            await asyncio.sleep(0.005)
        return now

    def holds(self) -> set[str]:
        return {engine.default.name for engine in self.engines.values()}

    def journal(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(Path(self.state, "journal.json").read_text())
        return document["fleet"]  # type: ignore[no-any-return]


def report(
    layout: Layout,
    *,
    replica: str = "r1",
    acting_on: Desired | None = None,
    holds: Revision = BASE,
    **state: Any,
) -> Report:
    said: dict[str, Any] = {"holds": holds.key, "serving": acting_on is not None} | state
    return Report(
        replica=replica,
        layout=layout.fingerprint,
        acting_on=acting_on,
        state=ReplicaState(**said),
        running=0,
        recompiles=0,
        limit_hits=0,
        last_swap=None,
        pid=1,
        node="n",
    )


# ---- the open report ----------------------------------------------------------------------------


def test_a_replica_with_an_unknown_layout_is_asked_to_introduce_itself(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            assert (await hall.report(report(layout))).introduce
            await hall.join("r1", layout)
            answer = await hall.report(report(layout))
            assert answer.desired == Desired(epoch=1, generation=2, hold=BASE.key, stable=BASE.key)
            assert set(answer.images) == {BASE.key}

    tell(story())


async def introduced(hall: Hall, layout: Layout) -> Desired:
    await hall.join("r1", layout)
    answer = await hall.report(report(layout))
    assert answer.desired is not None
    return answer.desired


def test_a_report_with_nothing_new_stays_open_for_poll_s_and_no_longer(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=0.3) as hall:
            want = await introduced(hall, layout)
            began = time.monotonic()
            assert await hall.report(report(layout, acting_on=want)) == Answer()
            assert time.monotonic() - began >= 0.29

    tell(story())


def test_an_open_report_is_answered_at_once_when_there_is_news(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            want = await introduced(hall, layout)
            open_report = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            await settled()
            assert not open_report.done()
            rollout = await hall.roll("alpha")
            answer = await asyncio.wait_for(open_report, 5)
            assert answer.desired is not None
            assert (answer.desired.hold, str(answer.desired.stage)[:6]) == (BASE.key, "alpha@")
            assert set(answer.images) == {answer.desired.hold, answer.desired.stage}
            assert rollout.state == "staging"

    tell(story())


def test_a_newer_report_ends_the_older_one(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            want = await introduced(hall, layout)
            older = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            await settled()
            newer = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            assert await asyncio.wait_for(older, 5) == Answer()
            newer.cancel()

    tell(story())


def test_a_decision_is_in_the_journal_before_the_replica_hears_of_it(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            want = await introduced(hall, layout)
            assert hall.journal()["assigned"] == {"r1": BASE.key}
            open_report = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            await settled()
            await hall.roll("alpha")
            answer = await open_report
            assert answer.desired is not None
            journaled = hall.journal()
            assert journaled["generation"] >= answer.desired.generation
            assert journaled["rollout"]["target"] == answer.desired.stage

    tell(story())


def test_a_report_that_changes_no_intent_is_not_written_down(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=0.01) as hall:
            want = await introduced(hall, layout)
            before = (tmp_path / "journal.json").stat().st_mtime_ns
            for _ in range(5):
                await hall.report(report(layout, acting_on=want))
            assert (tmp_path / "journal.json").stat().st_mtime_ns == before

    tell(story())


class Unreachable:
    """A journal that cannot be written for a while."""

    def __init__(self, journal: Journal, *, failures: int) -> None:
        self.failures = failures
        self._journal = journal

    def write(self, entry: JournalEntry) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise OSError("the bucket does not answer")
        self._journal.write(entry)


def test_a_journal_that_is_out_of_reach_for_a_while_does_not_end_deadlines(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            await introduced(hall, layout)
            plan = {"adapter": str(world.adapter("alpha")), "progress_deadline": 0.1}
            await hall.controller.start_rollout(plan)  # which nobody ever stages
            journal = Unreachable(hall.controller._desired_state._journal, failures=2)
            hall.controller._desired_state._journal = journal  # type: ignore[assignment]
            # what the controller goes by, which it changes once the journal is written
            await until(lambda: bool(getattr(hall.controller._fleet.rollout, "reason", None)))
            assert journal.failures == 0
            assert hall.journal()["rollout"]["reason"]
            [rollout] = await hall.controller.rollouts()
            assert rollout.state in ("aborting", "aborted")

    tell(story())


def test_the_journal_forgets_where_forgotten_revisions_came_from(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            await introduced(hall, layout)
            for name in ("alpha", "beta", "gamma"):  # each replaced before anybody staged it
                await hall.roll(name, history_limit=1)
            sources = {name.split("@")[0] for name in hall.controller._desired_state.sources}
            assert sources == {"beta", "gamma"}, "the last one, and the one before"

    tell(story())


def test_a_replica_that_could_not_go_back_to_stable_is_told_again(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=0.05) as hall:
            want = await introduced(hall, layout)
            failure = Failure(revision=want.hold, reason="busy", generation=want.generation)
            stuck = report(layout, acting_on=want, serving=False, failure=failure)
            answers = [await hall.report(stuck) for _ in range(4)]
            assert any(answer.desired is not None for answer in answers), (
                "it will never hold what it shall, and nobody tries again"
            )

    tell(story())


def test_a_replica_that_is_silent_leaves_the_fleet(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=0.05) as hall:
            await introduced(hall, layout)
            assert len((await hall.controller.fleet()).replicas) == 1
            await until(lambda: not hall.controller._fleet.observed)
            assert hall.journal()["assigned"] == {}

    tell(story())


def test_a_replica_that_says_goodbye_leaves_at_once(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            want = await introduced(hall, layout)
            open_report = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            await settled()
            await hall.leave("r1")
            assert await asyncio.wait_for(open_report, 5) == Answer()
            assert (await hall.controller.fleet()).replicas == []
            await hall.leave("r1")

    tell(story())


# ---- rollouts over real lanes -------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["rolling", "all_at_once"])
def test_a_rollout_brings_its_adapter_to_every_replica(
    world: TinyWorld, tmp_path: Path, strategy: str
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2", "r3")
            done = await hall.ended(await hall.roll("beta", strategy=strategy))
            assert (done.state, done.total, done.committed) == ("succeeded", 3, 3)
            assert hall.holds() == {"beta"}
            fleet = await hall.controller.fleet()
            assert (fleet.stable, fleet.ready) == (done.target, True)
            assert len(hall.put.images) == 2, "the base and beta, packed once each"

    tell(story())


def test_the_declared_adapter_is_what_the_fleet_begins_with(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        adapter = str(world.adapter("alpha"))
        async with Hall(world, tmp_path, adapter=adapter, adapter_name="first") as hall:
            await hall.replicas("r1")
            assert hall.holds() == {"first"}
            assert [name.split("@")[0] for name in (await hall.controller.fleet()).history] == [
                "base",
                "first",
            ]

    tell(story())


def test_a_declared_adapter_that_cannot_be_read_stops_the_start_and_writes_nothing(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        hall = Hall(world, tmp_path / "state", adapter=str(tmp_path / "nothing"))
        with pytest.raises(AdapterRefused):
            await hall.start()
        assert not (tmp_path / "state").exists()

    tell(story())


def test_a_bad_adapter_is_refused_and_nothing_has_changed(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path / "state") as hall:
            await hall.replicas("r1", "r2")
            bad = tmp_path / "bad"
            bad.mkdir()
            config = json.loads((world.adapter("alpha") / "adapter_config.json").read_text())
            (bad / "adapter_config.json").write_text(json.dumps({**config, "r": 4096}))
            (bad / "adapter_model.safetensors").write_bytes(
                (world.adapter("alpha") / "adapter_model.safetensors").read_bytes()
            )
            journal = (tmp_path / "state" / "journal.json").read_bytes()
            for source in (str(bad), str(tmp_path / "missing")):
                with pytest.raises(AdapterRefused):
                    await hall.controller.start_rollout({"adapter": source})
            assert (tmp_path / "state" / "journal.json").read_bytes() == journal
            assert not (tmp_path / "state" / "adapters").exists()
            assert (hall.holds(), await hall.controller.rollouts()) == ({"base"}, [])

    tell(story())


def test_no_rollout_starts_before_a_replica_was_heard(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            with pytest.raises(FleetNotReady):
                await hall.roll("alpha")

    tell(story())


def test_a_replica_that_fails_sends_the_fleet_back_and_the_reason_is_kept(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            await hall.ended(await hall.roll("alpha"))
            hall.engines["r2"].faults.append(DrainTimeout(2, 0.5))
            done = await hall.ended(await hall.roll("beta"))
            assert done.state == "aborted"
            assert done.reason == ("replica r2: 2 requests were still running after 0.5 s of drain")
            await hall.until_serving("r1", "r2")
            assert hall.holds() == {"alpha"}

    tell(story())


def test_an_abort_during_staging_or_swapping_brings_stable_back(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r2"].drained.clear()
            running = await hall.roll("beta")
            await until(lambda: not hall.engines["r2"].admission.is_open)
            assert hall.engines["r1"].default.name == "beta"
            await hall.controller.abort(running.id)
            done = await hall.ended(running)
            assert (done.state, done.reason) == ("aborted", "aborted by request")
            hall.engines["r2"].drained.set()
            await hall.until_serving("r1", "r2")
            assert hall.holds() == {"base"}
            again = await hall.controller.abort(running.id)
            assert again == done, "an abort of what has ended changes nothing"

    tell(story())


def test_an_unknown_rollout_is_named(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            for ask in (hall.controller.rollout, hall.controller.abort):
                with pytest.raises(RolloutNotFound, match="there is no rollout 'rollout-9'"):
                    await ask("rollout-9")

    tell(story())


def test_a_rollout_over_a_running_one_takes_its_place(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            await hall.ended(await hall.roll("alpha"))
            hall.engines["r1"].drained.clear()
            first = await hall.roll("beta")
            await until(lambda: not hall.engines["r1"].admission.is_open)
            second = await hall.roll("gamma")
            assert (await hall.controller.rollout(first.id)).state == "superseded"
            assert second.previous.startswith("alpha@")
            hall.engines["r1"].drained.set()
            assert (await hall.ended(second)).state == "succeeded"
            assert hall.holds() == {"gamma"}
            ids = [rollout.id for rollout in await hall.controller.rollouts()]
            assert ids == [second.id, first.id, "rollout-1"]

    tell(story())


def test_undo_goes_back_one_revision_though_its_source_is_gone(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        import shutil

        moved = tmp_path / "alpha"
        shutil.copytree(world.adapter("alpha"), moved)
        async with Hall(world, tmp_path / "state") as hall:
            await hall.replicas("r1", "r2")
            await hall.ended(await hall.controller.start_rollout({"adapter": str(moved)}))
            await hall.ended(await hall.roll("beta"))
            shutil.rmtree(moved)
            done = await hall.ended(await hall.controller.undo())
            assert (done.state, hall.holds()) == ("succeeded", {"alpha"})

    tell(story())


def test_undo_of_the_first_rollout_is_the_base_model(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            await hall.ended(await hall.roll("alpha"))
            await hall.ended(await hall.controller.undo())
            assert hall.holds() == {"base"}

    tell(story())


def test_undo_while_something_runs_aborts_it(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r1"].drained.clear()
            running = await hall.roll("alpha")
            undone = await hall.controller.undo()
            assert undone.id == running.id
            hall.engines["r1"].drained.set()
            done = await hall.ended(running)
            assert (done.state, done.reason) == ("aborted", "undone")

    tell(story())


def test_there_is_nothing_to_undo_in_the_beginning(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            with pytest.raises(NothingToUndo):
                await hall.controller.undo()

    tell(story())


def test_undo_of_a_revision_whose_kept_copy_is_gone_is_refused_with_nothing_changed(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        import shutil

        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            for name in ("alpha", "beta"):
                await hall.ended(await hall.roll(name))
            await hall.restart()
            await hall.until_serving("r1")
            shutil.rmtree(tmp_path / "adapters")
            with pytest.raises(Exception, match="alpha"):
                await hall.controller.undo()
            assert (hall.holds(), len(await hall.controller.rollouts())) == ({"beta"}, 2)

    tell(story())


# ---- restarts -----------------------------------------------------------------------------------


def test_a_controller_that_dies_in_the_middle_of_a_rollout_finishes_it(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2", "r3")
            hall.engines["r2"].drained.clear()
            running = await hall.roll("beta")
            await until(lambda: not hall.engines["r2"].admission.is_open)
            await hall.restart()
            fleet = await hall.controller.fleet()
            assert fleet.rollout is not None
            assert (fleet.epoch, fleet.rollout.id) == (2, running.id)
            hall.engines["r2"].drained.set()
            assert (await hall.ended(running)).state == "succeeded"
            assert hall.holds() == {"beta"}

    tell(story())


def test_a_restarted_controller_decides_nothing_before_every_replica_was_heard(
    world: TinyWorld, layout: Layout, tmp_path: Path, images: dict[str, AdapterImage]
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=5) as hall:
            beta = images["beta"].revision
            for name in ("r1", "r2"):
                await hall.join(name, layout)
                want = (await hall.report(report(layout, replica=name))).desired
                with suppress(TimeoutError):
                    one = report(layout, replica=name, acting_on=want)
                    await asyncio.wait_for(hall.report(one), 0.01)
            running = await hall.roll("beta")
            await hall.restart()
            await hall.join("r1", layout)
            heard = report(layout, replica="r1", staged=beta.key)
            answer = await hall.report(heard)
            assert answer.desired is not None
            assert (answer.desired.epoch, answer.desired.hold) == (2, BASE.key)
            for _ in range(3):
                with suppress(TimeoutError):
                    ready = report(layout, acting_on=answer.desired, staged=beta.key)
                    await asyncio.wait_for(hall.report(ready), 0.05)
            assert (await hall.controller.rollout(running.id)).state == "staging"
            assert set(hall.journal()["assigned"].values()) == {BASE.key}

    tell(story())


def test_a_restart_goes_on_with_what_the_fleet_holds_and_not_with_the_first_adapter(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, adapter=str(world.adapter("alpha"))) as hall:
            await hall.replicas("r1")
            await hall.ended(await hall.roll("beta"))
            await hall.restart()
            await hall.until_serving("r1")
            assert (await hall.controller.fleet()).stable.startswith("beta@")
            await hall.replicas("r2")
            assert hall.holds() == {"beta"}

    tell(story())


def test_a_deploy_that_declares_another_adapter_wins_over_the_journal(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, adapter=str(world.adapter("alpha"))) as hall:
            await hall.replicas("r1")
            await hall.ended(await hall.roll("beta"))
            await hall.restart(adapter=str(world.adapter("gamma")))
            await until(lambda: hall.holds() == {"gamma"})
            assert (await hall.controller.fleet()).epoch == 2

    tell(story())


def test_a_controller_that_lost_its_journal_is_still_obeyed(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            await hall.restart()
            await hall.until_serving("r1")
            await hall.ended(await hall.roll("beta"))
            (tmp_path / "journal.json").unlink()
            await hall.restart()
            await hall.until_serving("r1")
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())


def test_a_journal_that_cannot_be_read_is_put_aside_and_the_fleet_says_where(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        (tmp_path / "journal.json").write_text("{")
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            [aside] = tmp_path.glob("journal.json.unreadable-*")
            assert aside.read_text() == "{"
            warnings = (await hall.controller.fleet()).warnings
            assert any(str(aside) in warning for warning in warnings)
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())


def test_a_journal_that_cannot_be_written_leaves_the_fleet_as_it_was(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path / "state") as hall:
            await hall.replicas("r1")
            before = await hall.controller.fleet()
            (tmp_path / "state").rename(tmp_path / "kept")
            (tmp_path / "state").touch()  # no folder can be made of it
            with pytest.raises(OSError, match="state"):
                await hall.controller.start_rollout({"adapter": "base"})
            after = await hall.controller.fleet()
            assert (after.generation, after.rollout) == (before.generation, None)
            (tmp_path / "state").unlink()
            (tmp_path / "kept").rename(tmp_path / "state")
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())


def test_a_user_who_goes_away_in_the_middle_of_a_decision_leaves_no_two_truths(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=5) as hall:
            await introduced(hall, layout)
            asking = asyncio.create_task(hall.controller.start_rollout({"adapter": "base"}))
            while not hall.controller._desired_state._lock.locked():
                await asyncio.sleep(0)
            asking.cancel()  # Serve does this when an HTTP client hangs up
            await asyncio.wait([asking])
            await until(lambda: hall.journal()["rollouts"] == 1)
            decided = hall.controller
            await until(lambda: decided._fleet.rollouts == 1, "it is in the journal only")

    tell(story())


def test_the_fleet_says_that_its_journal_may_not_survive_the_node(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            fleet = await hall.controller.fleet()
            assert fleet.journal_uri == Journal(str(tmp_path)).uri
            assert len(fleet.warnings) == 1
            await hall.restart(state_uri=str(tmp_path))
            assert (await hall.controller.fleet()).warnings == []

    tell(story())


# ---- requests that run --------------------------------------------------------------------------


def test_a_rollout_overlaps_where_the_fleet_can_and_drains_elsewhere(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        for lanes, policy in ((1, "drain"), (2, "overlap")):
            async with Hall(world, tmp_path / policy, lanes=lanes) as hall:
                await hall.replicas("r1")
                done = await hall.ended(await hall.roll("alpha"))
                assert done.in_flight == policy
                assert hall.engines["r1"].policies[-1] == policy

    tell(story())


def test_a_plan_may_say_drain_and_its_undo_drains_as_well(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1")
            await hall.ended(await hall.roll("alpha", in_flight="drain"))
            done = await hall.ended(await hall.controller.undo())
            assert (done.state, done.in_flight) == ("succeeded", "drain")
            assert set(hall.engines["r1"].policies) == {"drain"}

    tell(story())


def test_an_abort_goes_back_the_way_it_came(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r2"].faults.append(DrainTimeout(2, 0.5))
            done = await hall.ended(await hall.roll("beta", in_flight="overlap"))
            assert done.state == "aborted"
            await until(lambda: hall.holds() == {"base"})
            assert hall.engines["r1"].policies == ["overlap", "overlap"]

    tell(story())


def test_overlap_on_one_lane_is_refused_before_anything_has_changed(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            with pytest.raises(PlanImpossible, match="needs two lanes") as refused:
                await hall.roll("alpha", in_flight="overlap")
            assert refused.value.code == "plan_impossible"
            assert await hall.controller.rollouts() == []

    tell(story())


# ---- canaries -----------------------------------------------------------------------------------

STEPS: list[dict[str, Any]] = [{"weight": 10, "hold": "manual"}, {"weight": 50}]
CANARY: dict[str, Any] = {"strategy": "canary", "steps": STEPS}
ERRORS = {"checks": [{"metric": "error_rate", "max": 0.1}], "min_samples": 4, "interval": 0.05}


def weights(hall: Hall) -> list[float | None]:
    now = [engine.traffic for engine in hall.engines.values()]
    return [None if each is None else each.weight for each in now]


async def paused(hall: Hall, rollout: RolloutView) -> CanaryView:
    """Its canary, once it waits for somebody."""
    await until(lambda: hall.controller._find(rollout.id).state == "paused")
    canary = (await hall.controller.rollout(rollout.id)).canary
    assert canary is not None
    return canary


def answered(hall: Hall, adapter: str, *, failed: int, of: int) -> None:
    """Each replica has answered requests that named no revision."""
    for engine in hall.engines.values():
        [revision] = [one.key for one in engine.serves if one.name == adapter]
        for number in range(of):
            engine.recorder.record(
                revision,
                step_id=engine.recorder.step_id,
                chosen=True,
                failed=number < failed,
                latency_s=0.1,
            )


@pytest.mark.parametrize("placement", ["shared", "dedicated"])
def test_a_canary_goes_step_by_step_until_it_is_stable(
    world: TinyWorld, tmp_path: Path, placement: str
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1", "r2", "r3")
            running = await hall.roll("alpha", **CANARY, placement=placement)
            canary = await paused(hall, running)
            assert (canary.placement, canary.steps) == (placement, [10, 50])
            assert (canary.step, canary.weight, canary.pause) == (0, 10, "step")
            await until(lambda: weights(hall) == [10, 10, 10])
            held = [engine.default.name for engine in hall.engines.values()]
            assert sorted(held).count("alpha") == (1 if placement == "dedicated" else 0)
            beside = [{"alpha"}] * 3 if placement == "shared" else [set()] * 3
            assert hall.also_serves() == beside
            await hall.controller.promote(running.id)
            assert (await hall.ended(running)).state == "succeeded"
            await until(lambda: weights(hall) == [None] * 3)
            await until(lambda: hall.also_serves() == [set()] * 3)
            assert hall.holds() == {"alpha"}

    tell(story())


def test_a_canary_that_fails_its_analysis_is_taken_back_with_its_numbers(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2, poll_s=0.05) as hall:
            await hall.replicas("r1", "r2")
            steps = [{"weight": 25, "hold": "1h"}]
            running = await hall.roll("beta", strategy="canary", steps=steps, analysis=ERRORS)
            await until(lambda: hall.controller._find(running.id).placed_at is not None)
            answered(hall, "base", failed=0, of=12)
            answered(hall, "beta", failed=2, of=4)
            done = await hall.ended(running)
            assert (done.state, hall.holds()) == ("aborted", {"base"})
            assert done.reason is not None
            assert "error_rate is 0.5, and has to be at most 0.1" in done.reason
            assert done.canary is not None
            [verdict] = [one for one in done.canary.verdicts if one.outcome == "fail"]
            assert (verdict.step, verdict.weight, verdict.share) == (0, 25, 25)
            assert (verdict.requests, verdict.measurements[0].canary) == (32, 0.5)
            await until(lambda: hall.also_serves() == [set(), set()])

    tell(story())


def test_a_canary_that_passes_its_analysis_is_promoted_by_it(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2, poll_s=0.05) as hall:
            await hall.replicas("r1", "r2")
            hall.probing.scores = {"mine:probe": {"gain": 0.5}}
            probe = {"function": "mine:probe", "scores": {"gain": {"min": 0}}}
            analysis = ERRORS | {"probes": [probe]}
            steps = [{"weight": 25, "hold": 0.1}]
            running = await hall.roll("beta", strategy="canary", steps=steps, analysis=analysis)
            await until(lambda: hall.controller._find(running.id).placed_at is not None)
            answered(hall, "beta", failed=0, of=4)
            done = await hall.ended(running)
            assert (done.state, hall.holds()) == ("succeeded", {"beta"})
            assert done.canary is not None
            assert [one.outcome for one in done.canary.verdicts] == ["pass"]

    tell(story())


def test_a_restarted_controller_goes_on_in_the_step_that_was_reached(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1", "r2")
            running = await hall.roll("alpha", **CANARY)
            await paused(hall, running)
            await hall.restart()
            await hall.until_serving("r1", "r2")
            canary = await paused(hall, running)
            assert (canary.step, canary.weight) == (0, 10)
            assert weights(hall) == [10, 10]
            await hall.controller.promote(running.id, full=True)
            assert (await hall.ended(running)).state == "succeeded"

    tell(story())


@pytest.mark.parametrize(
    ("plan", "lanes", "error", "why"),
    [
        ({**CANARY, "placement": "dedicated"}, 2, PlanImpossible, "needs two replicas"),
        (CANARY, 1, PlanImpossible, "needs two replicas"),
        ({**CANARY, "placement": "shared"}, 1, PlanImpossible, "needs two lanes"),
        ({"in_flight": "overlap"}, 1, PlanImpossible, "needs two lanes"),
        (
            CANARY | {"analysis": {"probes": [{"function": "a:b", "scores": {"x": {"min": 0}}}]}},
            2,
            ProbeInvalid,
            "a:b cannot be imported",
        ),
    ],
)
def test_a_plan_that_this_fleet_cannot_do_is_refused_with_nothing_changed(
    world: TinyWorld,
    tmp_path: Path,
    plan: dict[str, Any],
    lanes: int,
    error: type[Exception],
    why: str,
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=lanes) as hall:
            await hall.replicas("r1")
            journal = hall.journal()
            with pytest.raises(error, match=why):
                await hall.roll("alpha", **plan)
            assert (await hall.controller.rollouts(), hall.journal()) == ([], journal)

    tell(story())


# ---- steering -----------------------------------------------------------------------------------


def test_a_pause_holds_a_rollout_until_it_is_resumed(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r1"].drained.clear()
            running = await hall.roll("alpha")
            await until(lambda: not hall.engines["r1"].admission.is_open)
            assert (await hall.controller.pause(running.id)).state == "paused"
            hall.engines["r1"].drained.set()
            await hall.until_serving("r1", "r2")
            assert hall.engines["r2"].default.name == "base"
            await hall.controller.resume(running.id)
            assert (await hall.ended(running)).state == "succeeded"

    tell(story())


def test_what_failed_is_tried_again_when_somebody_says_so(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r2"].faults.append(DrainTimeout(2, 0.5))
            running = await hall.roll("alpha", on_failure="pause")
            await until(lambda: hall.controller._find(running.id).state == "paused")
            with pytest.raises(IllegalEvent, match="retry, promote or abort"):
                await hall.controller.resume(running.id)
            again = await hall.controller.retry(running.id)
            assert again.id == running.id
            assert (await hall.ended(running)).state == "succeeded"
            with pytest.raises(IllegalEvent, match="has succeeded"):
                await hall.controller.retry(running.id)

    tell(story())


def test_what_was_taken_back_is_begun_again_by_a_retry(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            hall.engines["r1"].faults.append(DrainTimeout(2, 0.5))
            failed = await hall.ended(await hall.roll("alpha"))
            assert failed.state == "aborted"
            await hall.until_serving("r1")
            again = await hall.controller.retry(failed.id, key="k")
            assert again.id != failed.id
            assert (await hall.controller.retry(failed.id, key="k")).id == again.id
            assert (await hall.ended(again)).state == "succeeded"

    tell(story())


def test_undo_can_go_back_to_any_earlier_revision(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            for name in ("alpha", "beta", "gamma"):
                await hall.ended(await hall.roll(name))
            for to in ("nobody", world.revision("gamma")):
                with pytest.raises(NothingToUndo, match=to):
                    await hall.controller.undo(to=to)
            for to in ("alpha", world.revision("beta"), "base"):
                undone = await hall.ended(await hall.controller.undo(to=to))
                assert undone.state == "succeeded"
                assert hall.holds() == {to.split("@")[0]}

    tell(story())


def test_whoever_looked_too_long_ago_is_refused_by_every_verb(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1")
            running = await hall.roll("alpha", **CANARY)
            await paused(hall, running)
            control = hall.controller
            now = (await control.fleet()).generation
            late: dict[str, Any] = {"expected_generation": now - 1}
            asks = [
                control.start_rollout({"adapter": "base"}, **late),
                control.promote(running.id, **late),
                control.abort(running.id, **late),
                control.pause(running.id, **late),
                control.resume(running.id, **late),
                control.retry(running.id, **late),
                control.undo(**late),
            ]
            for ask in asks:
                with pytest.raises(GenerationMismatch):
                    await ask
            assert (await control.fleet()).generation == now
            await control.promote(running.id, expected_generation=now)
            assert (await hall.ended(running)).state == "succeeded"

    tell(story())


def test_the_same_request_under_the_same_key_changes_nothing(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1")
            control = hall.controller
            plan = {"adapter": hall.adapter("alpha"), **CANARY}
            plan["steps"] = [{"weight": 10 * n, "hold": "manual"} for n in (1, 2, 3)]
            both = await asyncio.gather(*(control.start_rollout(plan, key="k") for _ in range(2)))
            assert {rollout.id for rollout in both} == {"rollout-1"}
            await paused(hall, both[0])
            await control.promote("rollout-1", key="k")
            await until(lambda: weights(hall) == [20])
            assert (await paused(hall, both[0])).step == 1
            seen = (await control.fleet()).generation
            late: dict[str, Any] = {"key": "k", "expected_generation": 1}
            assert (await control.promote("rollout-1", **late)).canary.step == 1  # type: ignore[union-attr]
            assert (await control.start_rollout(plan, **late)).id == "rollout-1"
            await hall.restart()
            await hall.until_serving("r1")
            control = hall.controller
            assert (await control.promote("rollout-1", **late)).canary.step == 1  # type: ignore[union-attr]
            assert (await control.fleet()).generation == seen
            with pytest.raises(KeyReused, match="'k' was used for another request"):
                await control.start_rollout({"adapter": "base"}, key="k")
            await control.promote("rollout-1", key="another")
            assert (await paused(hall, both[0])).step == 2
            await control.undo(key="k")
            assert (await hall.ended(both[0])).reason == "undone"
            again = await control.undo(key="k")
            assert (again.id, len(await control.rollouts())) == ("rollout-1", 1)

    tell(story())


def test_an_undo_under_the_same_key_goes_back_once(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            for name in ("alpha", "beta", "gamma"):
                await hall.ended(await hall.roll(name))
            first = await hall.ended(await hall.controller.undo(key="k"))
            assert (await hall.controller.undo(key="k")).id == first.id
            assert hall.holds() == {"beta"}
            with pytest.raises(KeyReused):
                await hall.controller.undo(to="alpha", key="k")

    tell(story())


def test_a_verb_for_a_rollout_that_was_replaced_meanwhile_does_not_reach_the_new_one(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            await introduced(hall, layout)
            first = await hall.roll("alpha")
            async with hall.controller._desired_state._lock:  # both wait for their turn
                newer = asyncio.create_task(
                    hall.controller.start_rollout({"adapter": hall.adapter("beta")})
                )
                while not hall.controller._desired_state._lock._waiters:
                    await asyncio.sleep(0.001)
                aborting = asyncio.create_task(hall.controller.abort(first.id))
                await settled()
            with pytest.raises(IllegalEvent, match=first.id):
                await aborting
            second = await newer
            assert (await hall.controller.rollout(second.id)).state == "staging"
            for verb in ("promote", "pause", "resume"):
                with pytest.raises(IllegalEvent, match=first.id):
                    await getattr(hall.controller, verb)(first.id)

    tell(story())


# ---- kept adapters ------------------------------------------------------------------------------


def test_adapters_that_nobody_can_name_any_more_are_deleted(
    world: TinyWorld, tmp_path: Path
) -> None:
    names = {revision.rpartition("@")[2]: name for revision, name in world.revisions.items()}

    def kept() -> set[str]:
        return {names[path.name[:8]] for path in (tmp_path / "adapters").iterdir()}

    async def story() -> None:
        hall = Hall(world, tmp_path)
        hall.grace_s = 0.0
        async with hall:
            await hall.replicas("r1")
            await hall.load("gamma")
            for name in ("alpha", "beta"):
                await hall.ended(await hall.roll(name, history_limit=1))
            assert kept() == {"alpha", "beta", "gamma"}
            await hall.controller.unload_adapter("gamma")
            await until(lambda: kept() == {"alpha", "beta"})
            await hall.ended(await hall.controller.undo())
            assert hall.holds() == {"alpha"}
            await hall.ended(await hall.roll("gamma", history_limit=1))
            await until(lambda: kept() == {"alpha", "gamma"})

    tell(story())


def test_an_adapter_that_cannot_be_deleted_is_no_reason_to_stop(
    world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(AdapterStore):
        def drop(self, *_: Any, **__: Any) -> None:
            raise OSError("the bucket does not answer")

    async def story() -> None:
        hall = Hall(world, tmp_path)
        hall.grace_s = 0.0
        async with hall:
            hall.controller._store = Stuck(str(tmp_path))
            await hall.replicas("r1")
            await hall.load("gamma")
            await hall.controller.unload_adapter("gamma")
            await until(lambda: "could not delete the adapters" in caplog.text)
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())


# ---- adapters beside the default ----------------------------------------------------------------


def test_a_loaded_adapter_is_served_by_every_replica_when_the_call_returns(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            view = await hall.load("alpha")
            assert hall.also_serves() == [{"alpha"}, {"alpha"}]
            assert (view.lora_name, view.lora_path) == ("alpha", hall.adapter("alpha"))
            assert (view.revision, view.ready, view.total) == (world.revision("alpha"), 2, 2)
            assert await hall.controller.adapters() == [view]
            fleet = await hall.controller.fleet()
            assert (fleet.generation, fleet.loaded) == (view.generation, [view.revision])
            assert fleet.replicas[0].serves == [fleet.stable, view.revision]
            assert hall.holds() == {"base"}

    tell(story())


def test_an_unloaded_adapter_is_named_by_no_replica_when_the_call_returns(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            loaded = await hall.load("alpha")
            view = await hall.controller.unload_adapter("alpha")
            assert hall.also_serves() == [set(), set()]
            assert (view.revision, view.ready) == (loaded.revision, 0)
            assert view.generation > loaded.generation
            assert await hall.controller.adapters() == []
            with pytest.raises(AdapterNotLoaded, match="no adapter is loaded as 'alpha'"):
                await hall.controller.unload_adapter("alpha")

    tell(story())


def test_the_same_content_again_changes_nothing_and_another_needs_load_inplace(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            first = await hall.load("bot", "alpha")
            assert await hall.load("bot", "alpha") == first
            assert await hall.load("bot", "alpha", load_inplace=True) == first
            with pytest.raises(AdapterAlreadyLoaded, match="load_inplace"):
                await hall.load("bot", "beta")
            assert await hall.controller.adapters() == [first]
            second = await hall.load("bot", "beta", load_inplace=True)
            assert second.generation == first.generation + 1, "one decision"
            assert await hall.controller.adapters() == [second]
            assert [str(one) for one in hall.engines["r1"].serves[1:]] == [second.revision]

    tell(story())


def test_replacing_an_adapter_leaves_no_moment_without_its_name(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            await hall.load("bot", "alpha")
            hall.engines["r1"].served.clear()
            for name in ("beta", "gamma", "alpha"):
                await hall.load("bot", name, load_inplace=True)
            assert all("bot" in names for names in hall.engines["r1"].served)

    tell(story())


@pytest.mark.parametrize("name", ["", "base", "a:b", "a@b", "a/b", "a b"])
def test_a_name_that_no_request_could_use_is_refused(
    world: TinyWorld, tmp_path: Path, name: str
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            with pytest.raises(AdapterRefused, match="name"):
                await hall.load(name, "alpha")
            assert hall.also_serves() == [set()]

    tell(story())


def test_an_adapter_that_no_replica_could_hold_is_refused_with_nothing_changed(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path / "state") as hall:
            with pytest.raises(FleetNotReady):
                await hall.load("alpha")
            await hall.replicas("r1")
            journal = hall.journal()
            with pytest.raises(AdapterRefused):
                await hall.controller.load_adapter("x", str(tmp_path / "missing"))
            assert hall.journal() == journal

    tell(story())


def test_a_generation_that_has_passed_is_refused_for_loading_and_unloading(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            seen = (await hall.controller.fleet()).generation
            loaded = await hall.load("alpha", expected_generation=seen)
            with pytest.raises(GenerationMismatch) as refused:
                await hall.load("beta", expected_generation=seen)
            assert (refused.value.expected, refused.value.actual) == (seen, loaded.generation)
            with pytest.raises(GenerationMismatch):
                await hall.controller.unload_adapter("alpha", expected_generation=seen)
            assert hall.also_serves() == [{"alpha"}]
            now = loaded.generation
            await hall.controller.unload_adapter("alpha", expected_generation=now)

    tell(story())


def test_an_adapter_that_one_replica_cannot_serve_is_unloaded_again(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r2"].holding_fails["beta"] = RuntimeError("no memory")
            with pytest.raises(AdapterLoadFailed, match=r"beta.*: replica r2: no memory"):
                await hall.load("beta")
            assert await hall.controller.adapters() == []
            await until(lambda: hall.also_serves() == [set(), set()])
            await hall.until_serving("r1", "r2")
            hall.engines["r2"].holding_fails.clear()
            assert (await hall.load("beta")).ready == 2, "an old failure is no reason"

    tell(story())


def test_a_replacement_that_fails_brings_back_what_it_replaced(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            first = await hall.load("bot", "alpha")
            hall.engines["r2"].holding_fails["bot"] = RuntimeError("no memory")
            with pytest.raises(AdapterLoadFailed):
                await hall.load("bot", "beta", load_inplace=True)
            hall.engines["r2"].holding_fails.clear()
            [back] = await hall.controller.adapters()
            assert (back.revision, back.lora_path) == (first.revision, hall.adapter("alpha"))
            await until(
                lambda: all(
                    [str(one) for one in each.serves[1:]] == [first.revision]
                    for each in hall.engines.values()
                )
            )

    tell(story())


def test_an_adapter_that_is_not_served_in_time_is_unloaded_again(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        hall = Hall(world, tmp_path, poll_s=60)
        hall.load_timeout_s = 0.1
        async with hall:
            await introduced(hall, layout)
            with pytest.raises(AdapterLoadTimeout) as late:
                await hall.load("alpha")
            assert (late.value.replicas, late.value.timeout_s) == (("r1",), 0.1)
            assert await hall.controller.adapters() == []
            assert hall.journal()["loaded"] == []

    tell(story())


def test_a_report_from_before_the_replica_was_told_something_else_is_not_believed(
    world: TinyWorld, layout: Layout, tmp_path: Path, images: dict[str, AdapterImage]
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            alpha = images["alpha"].revision
            await introduced(hall, layout)
            loading = asyncio.create_task(hall.load("alpha"))
            await until(lambda: bool(hall.controller._fleet.loaded))
            with_it = Documents(hall.controller._fleet).of("r1")
            serves = report(layout, acting_on=with_it, also_serves=(alpha.key,))
            open_report = asyncio.create_task(hall.report(serves))
            await asyncio.wait_for(loading, 5)
            unloading = asyncio.create_task(hall.controller.unload_adapter("alpha"))
            answer = await asyncio.wait_for(open_report, 5)
            assert answer.desired is not None
            assert answer.desired.also_serves == ()
            # it hears that now and drops alpha, while its last word is that it serves it
            again = asyncio.create_task(hall.load("alpha"))
            await until(lambda: bool(hall.controller._fleet.loaded))
            await asyncio.wait_for(unloading, 5)
            assert not again.done()
            without = report(layout, acting_on=answer.desired)
            answer = await asyncio.wait_for(hall.report(without), 5)
            assert answer.desired is not None
            last = report(layout, acting_on=answer.desired, also_serves=(alpha.key,))
            open_report = asyncio.create_task(hall.report(last))
            assert (await asyncio.wait_for(again, 5)).ready == 1
            open_report.cancel()

    tell(story())


def test_a_late_joiner_serves_what_is_loaded_before_it_is_ready(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            await hall.load("alpha")
            await hall.replicas("r2")
            assert hall.also_serves() == [{"alpha"}, {"alpha"}]

    tell(story())


def test_a_restarted_controller_knows_what_was_loaded_and_from_where(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            loaded = await hall.load("alpha")
            await hall.restart()
            await hall.until_serving("r1")
            [again] = await hall.controller.adapters()
            assert (again.revision, again.lora_path) == (loaded.revision, loaded.lora_path)
            await hall.replicas("r2")
            assert hall.also_serves() == [{"alpha"}, {"alpha"}]
            await hall.restart(adapter=hall.adapter("gamma"))
            await until(lambda: hall.holds() == {"gamma"})
            assert hall.also_serves() == [{"alpha"}, {"alpha"}], "another default is no reason"

    tell(story())


def test_a_rollout_goes_on_while_adapters_come_and_go(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r1"].drained.clear()
            running = await hall.roll("beta")
            await until(lambda: not hall.engines["r1"].admission.is_open)
            loading = asyncio.create_task(hall.load("alpha"))
            await until(lambda: "alpha" in {one.name for one in hall.engines["r2"].also_serves})
            hall.engines["r1"].drained.set()
            assert (await loading).ready == 2
            assert (await hall.ended(running)).state == "succeeded"
            assert (hall.holds(), hall.also_serves()) == ({"beta"}, [{"alpha"}, {"alpha"}])

    tell(story())


def test_a_loaded_adapter_that_becomes_the_default_stays_loaded(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            await hall.load("alpha")
            await hall.ended(await hall.roll("alpha"))
            [view] = await hall.controller.adapters()
            assert (view.ready, hall.also_serves()) == (2, [set(), set()])
            await hall.ended(await hall.roll("beta"))
            await until(lambda: hall.also_serves() == [{"alpha"}, {"alpha"}])
            assert all("alpha" in names for names in hall.engines["r1"].served)

    tell(story())


def test_an_adapter_that_cannot_be_packed_any_more_keeps_no_replica_from_its_default(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        import shutil

        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            loaded = await hall.load("alpha")
            shutil.rmtree(tmp_path / "adapters")
            await hall.restart()
            await hall.until_serving("r1")
            await hall.replicas("r2")
            await hall.until_serving("r1", "r2")
            assert hall.also_serves() == [{"alpha"}, set()]
            reports = hall.controller._reports.last
            await until(lambda: bool(reports()["r2"].state.refused))
            fleet = await hall.controller.fleet()
            assert str(fleet.replicas[1].failure).startswith(f"{loaded.revision}: ")
            [view] = await hall.controller.adapters()
            assert (view.ready, view.total) == (1, 2)
            await hall.load("alpha")  # which keeps a copy of it again
            assert hall.also_serves() == [{"alpha"}, {"alpha"}]

    tell(story())


def test_a_user_who_goes_away_while_an_adapter_fails_leaves_nothing_half_loaded(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r2"].holding_fails["beta"] = RuntimeError("no memory")
            loading = asyncio.create_task(hall.load("beta"))
            await until(lambda: bool(hall.controller._fleet.loaded))
            loading.cancel()
            await until(lambda: not hall.controller._fleet.loaded)
            await until(lambda: hall.also_serves() == [set(), set()])

    tell(story())


@pytest.mark.parametrize(
    "error",
    [
        AdapterAlreadyLoaded("bot", "bot@1", "bot@2"),
        AdapterNotLoaded("bot"),
        AdapterLoadFailed("bot@1", "replica r1: no memory"),
        AdapterLoadTimeout("bot@1", ("r1", "r2"), 60.0),
        GenerationMismatch(3, 4),
        PlanImpossible("no"),
        KeyReused("k"),
        NothingToUndo("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_refusal_survives_the_way_through_a_handle(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
