"""The intent: what is decided, what was decided before, and what only the replicas still know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hotswap_lib import BASE
from serve_app.controller.desired_state import DesiredState, known
from serve_app.controller.journal import Journal, JournalEntry
from serve_app.rollout.documents import Documents
from serve_app.rollout.errors import IllegalEvent
from serve_app.rollout.events import LoadRequested, Reported
from serve_app.rollout.plan import Plan
from serve_app.rollout.state import Desired, Fleet, ReplicaState, Rollout, State, Traffic
from serve_app.wire.errors import Fenced

A, B, C = (f"{name}@{digit * 64}" for name, digit in (("a", "1"), ("b", "2"), ("c", "3")))


def tell(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 30))


class Failing(Journal):
    """A journal that cannot be written for a while."""

    failures = 0

    def write(self, entry: JournalEntry) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise OSError("the bucket does not answer")
        super().write(entry)


async def begun(state: Path, journal: Journal | None = None) -> DesiredState:
    """A controller's intent that has claimed an epoch and begun with nothing."""
    journal = journal or Journal(str(state))
    intent = DesiredState(journal, declared=None)
    await intent.write(replace(intent.fleet, epoch=journal.claim(after=0)))
    return intent


def acts_on(epoch: int, generation: int, *, stable: str = A, **more: Any) -> Desired:
    return Desired(**({"hold": stable} | more), epoch=epoch, generation=generation, stable=stable)


def heard(replica: str = "r1", *, holds: str = A) -> Reported:
    state = ReplicaState(holds=holds, serving=True)
    return Reported(replica=replica, state=state, at=time.time())


def load(revision: str, *, instead_of: str | None = None) -> LoadRequested:
    return LoadRequested(revision=revision, instead_of=instead_of, at=1.0)


def written(state: Path) -> JournalEntry:
    entry = Journal(str(state)).read()
    assert entry is not None
    return entry


def test_a_fleet_that_nobody_has_acted_for_begins_with_the_base_model(tmp_path: Path) -> None:
    async def story() -> None:
        intent = await begun(tmp_path)
        assert (intent.fleet.stable, intent.fleet.epoch) == (BASE.key, 1)
        assert not intent.decided
        await intent.decide(heard(holds=BASE.key))
        assert not intent.decided, "a replica that reports has asked for nothing"
        await intent.decide(load(A))
        assert intent.decided

    tell(story)


def test_a_decision_that_cannot_be_written_was_never_made(tmp_path: Path) -> None:
    async def story() -> None:
        journal = Failing(str(tmp_path))
        intent = await begun(tmp_path, journal)
        before = intent.fleet
        journal.failures = 1
        with pytest.raises(OSError, match="does not answer"):
            await intent.decide(load(A))
        assert (intent.fleet, intent.decided) == (before, False)

    tell(story)


def test_a_check_sees_the_fleet_as_it_is_when_its_turn_has_come(tmp_path: Path) -> None:
    async def story() -> None:
        intent = await begun(tmp_path)

        def check(fleet: Fleet) -> None:
            if fleet.loaded:
                raise IllegalEvent("this", "something was loaded meanwhile")

        first = asyncio.create_task(intent.decide(load(A)))
        second = asyncio.create_task(intent.decide(load(B), check=check))
        await first
        with pytest.raises(IllegalEvent):
            await second
        assert intent.fleet.loaded == (A,)

    tell(story)


def test_sources_of_what_is_being_asked_for_outlive_decisions_of_others(tmp_path: Path) -> None:
    async def story() -> None:
        intent = await begun(tmp_path)
        intent.sources[A] = "/a"
        await intent.decide(heard(holds=BASE.key))
        await intent.decide(load(B))
        await intent.decide(load(A))
        assert written(tmp_path).sources == {A: "/a"}
        await intent.decide(load(C, instead_of=A))
        assert (intent.sources, written(tmp_path).sources) == ({}, {})

    tell(story)


def test_known_is_whatever_somebody_could_name() -> None:
    def rollout(target: str, state: State) -> Rollout:
        return Rollout(
            id=target, plan=Plan(adapter="x"), target=target, previous="old", state=state
        )

    fleet = Fleet(
        stable="stable",
        history=("first", "stable"),
        loaded=("loaded",),
        assigned={"r1": "assigned"},
        past=(rollout("past", State.ABORTED),),
        rollout=rollout("target", State.STAGING),
    )
    assert known(fleet) == {"stable", "first", "loaded", "assigned", "past", "target"}


# ---- what only the replicas still know ----------------------------------------------------------


def test_what_was_decided_here_or_before_is_known(tmp_path: Path) -> None:
    async def story() -> None:
        intent = await begun(tmp_path)
        assert intent.knows(Documents(intent.fleet).of("r1"))
        assert not intent.knows(acts_on(9, 1))
        await intent.decide(load(A))
        again = DesiredState(Journal(str(tmp_path)), declared=None)
        again.decided = True
        await again.write(replace(written(tmp_path).fleet, epoch=2))
        assert again.knows(Documents(intent.fleet).of("r1"))
        assert not again.knows(acts_on(3, 1))

    tell(story)


@pytest.mark.parametrize("lost", ["journal.json", "epochs and all"])
def test_a_controller_without_a_journal_takes_over_what_the_replicas_act_on(
    tmp_path: Path, lost: str
) -> None:
    async def story() -> None:
        # epochs that are still there make its own later than the one of the replicas
        if lost == "journal.json":
            Journal(str(tmp_path)).claim(after=4)
        intent = await begun(tmp_path)
        said = acts_on(5, 9, loaded=(B,), rollouts=3, sources=((A, "/a"), (B, "/b")))
        assert not intent.knows(said)
        assert await intent.learn({"r1": said, "r2": said})
        fleet = intent.fleet
        assert (fleet.stable, fleet.loaded, fleet.rollouts) == (A, (B,), 3)
        assert (fleet.epoch > 5, fleet.assigned) == (True, {"r1": A, "r2": A})
        assert (fleet.rollout, intent.sources) == (None, {A: "/a", B: "/b"})
        assert written(tmp_path).fleet == replace(fleet, observed={})
        assert not await intent.learn({"r1": said, "r2": said}), "once is enough"

    tell(story)


def test_a_rollout_that_was_under_way_is_taken_back(tmp_path: Path) -> None:
    async def story() -> None:
        intent = await begun(tmp_path)
        now = Traffic(canary=B, weight=10, placement="shared", step_id="rollout-4.1.1")
        await intent.learn(
            {"r1": acts_on(5, 9, stage=B, also_serves=(B,), traffic=now, rollouts=4)}
        )
        rollout = intent.fleet.running
        assert rollout is not None
        assert (rollout.id, rollout.state) == ("rollout-4", State.ABORTING)
        assert (rollout.target, intent.fleet.stable) == (B, A)

    tell(story)


def test_a_replica_that_knows_more_is_believed_though_others_obey_already(tmp_path: Path) -> None:
    async def story() -> None:
        intent = await begun(tmp_path)
        await intent.learn({"r1": acts_on(5, 9)})
        obeys = Documents(intent.fleet).of("r1")
        later = acts_on(5, 12, stable=B)
        assert not intent.knows(later)
        assert await intent.learn({"r1": obeys, "r2": later})
        assert intent.fleet.stable == B
        assert intent.fleet.epoch > obeys.epoch
        assert intent.knows(obeys), "it was decided here"
        assert intent.knows(later)

    tell(story)


def test_who_was_asked_for_something_since_repeats_its_own_decision(tmp_path: Path) -> None:
    async def story() -> None:
        intent = await begun(tmp_path)
        await intent.decide(load(C))
        later = acts_on(7, 3)
        assert await intent.learn({"r1": later})
        assert (intent.fleet.stable, intent.fleet.loaded) == (BASE.key, (C,))
        assert intent.fleet.epoch > 7
        assert intent.knows(later)

    tell(story)


def test_what_another_controller_has_decided_was_not_lost(tmp_path: Path) -> None:
    async def story() -> None:
        old = await begun(tmp_path)
        new = await begun(tmp_path)
        with pytest.raises(Fenced) as fenced:
            await old.learn({"r1": Documents(new.fleet).of("r1")})
        assert (fenced.value.epoch, fenced.value.by) == (1, 2)
        with pytest.raises(Fenced):
            await old.decide(load(A))
        assert not old.fleet.loaded

    tell(story)


def test_an_epoch_that_could_not_be_used_does_not_end_its_controller(tmp_path: Path) -> None:
    async def story() -> None:
        journal = Failing(str(tmp_path))
        intent = await begun(tmp_path, journal)
        said = acts_on(5, 9)
        journal.failures = 1
        with pytest.raises(OSError, match="does not answer"):
            await intent.learn({"r1": said})
        assert not intent.knows(said)
        await intent.decide(heard(holds=BASE.key))
        assert await intent.learn({"r1": said})
        await intent.decide(load(C))
        assert intent.fleet.stable == A

    tell(story)
