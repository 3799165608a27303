"""The state: what is decided, what was decided before, and what only the replicas still know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hotswap_lib import BASE
from serve_app.controller.desired_state import DesiredState, references
from serve_app.controller.journal import Journal, JournalEntry
from serve_app.rollout.documents import Documents
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


async def begun(folder: Path, journal: Journal | None = None) -> DesiredState:
    """The state of a controller that has claimed an epoch and decided nothing."""
    journal = journal or Journal(str(folder))
    state = DesiredState(journal, declared=None)
    await state.write(replace(state.fleet, epoch=journal.claim(after=0)))
    return state


def acts_on(epoch: int, generation: int, *, stable: str = A, **more: Any) -> Desired:
    return Desired(**({"hold": stable} | more), epoch=epoch, generation=generation, stable=stable)


def reported(replica: str = "r1", *, holds: str = A) -> Reported:
    state = ReplicaState(holds=holds, serving=True)
    return Reported(replica=replica, state=state, at=time.time())


def load(revision: str, *, instead_of: str | None = None) -> LoadRequested:
    return LoadRequested(revision=revision, instead_of=instead_of, at=1.0)


def written(state: Path) -> JournalEntry:
    entry = Journal(str(state)).read()
    assert entry is not None
    return entry


def test_a_new_fleet_begins_with_the_base_model(tmp_path: Path) -> None:
    async def story() -> None:
        state = await begun(tmp_path)
        assert (state.fleet.stable, state.fleet.epoch) == (BASE.key, 1)
        assert not state.decided
        await state.decide(reported(holds=BASE.key))
        assert not state.decided, "a replica that reports has asked for nothing"
        await state.decide(load(A))
        assert state.decided

    tell(story)


def test_a_decision_that_cannot_be_written_was_never_made(tmp_path: Path) -> None:
    async def story() -> None:
        journal = Failing(str(tmp_path))
        state = await begun(tmp_path, journal)
        before = state.fleet
        journal.failures = 1
        with pytest.raises(OSError, match="does not answer"):
            await state.decide(load(A))
        assert (state.fleet, state.decided) == (before, False)

    tell(story)


def test_sources_of_what_is_being_asked_for_outlive_decisions_of_others(tmp_path: Path) -> None:
    async def story() -> None:
        state = await begun(tmp_path)
        state.sources[A] = "/a"
        await state.decide(reported(holds=BASE.key))
        await state.decide(load(B))
        await state.decide(load(A))
        assert written(tmp_path).sources == {A: "/a"}
        await state.decide(load(C, instead_of=A))
        assert (state.sources, written(tmp_path).sources) == ({}, {})

    tell(story)


def test_references_are_all_revisions_that_a_request_may_name_or_a_replica_holds() -> None:
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
    assert references(fleet) == {"stable", "first", "loaded", "assigned", "past", "target"}


# ---- what only the replicas still know ----------------------------------------------------------


def test_what_was_decided_here_or_before_is_explained(tmp_path: Path) -> None:
    async def story() -> None:
        state = await begun(tmp_path)
        assert state.explains(Documents(state.fleet).of("r1"))
        assert not state.explains(acts_on(9, 1))
        await state.decide(load(A))
        again = DesiredState(Journal(str(tmp_path)), declared=None)
        again.decided = True
        await again.write(replace(written(tmp_path).fleet, epoch=2))
        assert again.explains(Documents(state.fleet).of("r1"))
        assert not again.explains(acts_on(3, 1))

    tell(story)


@pytest.mark.parametrize("lost", ["journal.json", "epochs and all"])
def test_a_controller_without_a_journal_takes_over_what_the_replicas_act_on(
    tmp_path: Path, lost: str
) -> None:
    async def story() -> None:
        # epochs that are still there make its own later than the one of the replicas
        if lost == "journal.json":
            Journal(str(tmp_path)).claim(after=4)
        state = await begun(tmp_path)
        said = acts_on(5, 9, loaded=(B,), rollouts=3, sources=((A, "/a"), (B, "/b")))
        assert not state.explains(said)
        assert await state.rebuild({"r1": said, "r2": said})
        fleet = state.fleet
        assert (fleet.stable, fleet.loaded, fleet.rollouts) == (A, (B,), 3)
        assert (fleet.epoch > 5, fleet.assigned) == (True, {"r1": A, "r2": A})
        assert (fleet.rollout, state.sources) == (None, {A: "/a", B: "/b"})
        assert written(tmp_path).fleet == replace(fleet, observed={})
        assert not await state.rebuild({"r1": said, "r2": said}), "once is enough"

    tell(story)


def test_a_rollout_that_was_under_way_is_taken_back(tmp_path: Path) -> None:
    async def story() -> None:
        state = await begun(tmp_path)
        now = Traffic(canary=B, weight=10, placement="shared", step_id="rollout-4.1.1")
        await state.rebuild(
            {"r1": acts_on(5, 9, stage=B, also_serves=(B,), traffic=now, rollouts=4)}
        )
        rollout = state.fleet.running
        assert rollout is not None
        assert (rollout.id, rollout.state) == ("rollout-4", State.ABORTING)
        assert (rollout.target, state.fleet.stable) == (B, A)

    tell(story)


def test_a_replica_that_knows_more_is_believed_though_others_obey_already(tmp_path: Path) -> None:
    async def story() -> None:
        state = await begun(tmp_path)
        await state.rebuild({"r1": acts_on(5, 9)})
        obeys = Documents(state.fleet).of("r1")
        later = acts_on(5, 12, stable=B)
        assert not state.explains(later)
        assert await state.rebuild({"r1": obeys, "r2": later})
        assert state.fleet.stable == B
        assert state.fleet.epoch > obeys.epoch
        assert state.explains(obeys), "it was decided here"
        assert state.explains(later)

    tell(story)


def test_who_was_asked_for_something_since_repeats_its_own_decision(tmp_path: Path) -> None:
    async def story() -> None:
        state = await begun(tmp_path)
        await state.decide(load(C))
        later = acts_on(7, 3)
        assert await state.rebuild({"r1": later})
        assert (state.fleet.stable, state.fleet.loaded) == (BASE.key, (C,))
        assert state.fleet.epoch > 7
        assert state.explains(later)

    tell(story)


def test_what_another_controller_has_decided_was_not_lost(tmp_path: Path) -> None:
    async def story() -> None:
        old = await begun(tmp_path)
        new = await begun(tmp_path)
        with pytest.raises(Fenced) as fenced:
            await old.rebuild({"r1": Documents(new.fleet).of("r1")})
        assert (fenced.value.epoch, fenced.value.by) == (1, 2)
        with pytest.raises(Fenced):
            await old.decide(load(A))
        assert not old.fleet.loaded

    tell(story)


def test_an_epoch_that_could_not_be_used_does_not_end_its_controller(tmp_path: Path) -> None:
    async def story() -> None:
        journal = Failing(str(tmp_path))
        state = await begun(tmp_path, journal)
        said = acts_on(5, 9)
        journal.failures = 1
        with pytest.raises(OSError, match="does not answer"):
            await state.rebuild({"r1": said})
        assert not state.explains(said)
        await state.decide(reported(holds=BASE.key))
        assert await state.rebuild({"r1": said})
        await state.decide(load(C))
        assert state.fleet.stable == A

    tell(story)
