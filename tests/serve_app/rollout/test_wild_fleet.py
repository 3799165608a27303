"""The rollout machine and a fleet gone wild: what must hold, whatever happens in whatever order."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from serve_app.controller.journal import Journal, JournalEntry
from serve_app.rollout.analysis import Outcome
from serve_app.rollout.assignment import canaries
from serve_app.rollout.canary import traffic
from serve_app.rollout.documents import Documents
from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.rollout.events import (
    AbortRequested,
    AnyUserRequest,
    Event,
    Judged,
    Left,
    LoadRequested,
    PromoteRequested,
    ReportBatch,
    Reported,
    StartRequested,
    Ticked,
    UnloadRequested,
)
from serve_app.rollout.machine import advance
from serve_app.rollout.plan import CanaryStep, InFlight, OnFailure, Placement, Plan, Strategy
from serve_app.rollout.precondition import Precondition
from serve_app.rollout.recovery import rebuilt, restored
from serve_app.rollout.state import Desired, Failure, Fleet, Observed, Pause, Rollout, State
from tests.serve_app.rollout.fake_replica import FakeReplica
from tests.serve_app.rollout.fleets import (
    NEW,
    OLD,
    OTHER,
    TENANT,
    WATCHED,
    abort,
    ask,
    desired,
    judged,
    load,
    pause,
    pending,
    promote,
    resume,
    retry,
    unload,
)
from tests.serve_app.rollout.test_table import reachable

TARGETS = [NEW, OTHER, OLD]
TENANTS = [TENANT, NEW, OLD, "more@5"]
HOLDS: list[float | Literal["manual"]] = [0.0, 0.5, "manual"]
some_replica = st.integers(0, 6)
some_weights = st.lists(
    st.sampled_from([1.0, 10.0, 34.0, 50.0, 99.0, 100.0]), min_size=1, max_size=3, unique=True
).map(sorted)
some_steps = st.tuples(some_weights, st.lists(st.sampled_from(HOLDS), min_size=3, max_size=3)).map(
    lambda given: tuple(CanaryStep(weight=w, hold=h) for w, h in zip(*given, strict=False))
)


@st.composite
def plans(draw: st.DrawFn, *, deadlines: Sequence[float] = (5.0, 1000.0)) -> Plan:
    strategy: Strategy = draw(st.sampled_from(["canary", "canary", "rolling", "all_at_once"]))
    placement: Placement | None = draw(st.sampled_from(["shared", "dedicated"]))
    in_flight: InFlight | None = draw(st.sampled_from(["drain", "overlap", None]))
    on_failure: OnFailure = draw(st.sampled_from(["rollback", "pause"]))
    watched = draw(st.booleans())
    steps = draw(some_steps)
    a_canary = strategy == "canary"
    return Plan(
        adapter="what the target is of",
        strategy=strategy,
        steps=steps if a_canary else (),
        placement=placement if a_canary else None,
        analysis=WATCHED if a_canary and watched else None,
        max_unavailable=draw(st.integers(1, 3)),
        in_flight=in_flight,
        progress_deadline=draw(st.sampled_from(deadlines)),
        on_failure=on_failure,
        history_limit=1000,  # what it compares with what was
    )


class WildFleet(RuleBasedStateMachine):
    """Replicas obey, lag, fail, die, vanish and join, while users ask and the controller dies."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.fleet = Fleet(stable=OLD, history=(OLD,))
        self.replicas: dict[str, FakeReplica] = {}
        self.loaded: list[str] = []
        self.mail: list[tuple[Reported, Desired | None]] = []
        self.patient = False  # users let a rollout end before they ask for another one
        self.found: set[str] = set()  # what replicas held when the fleet was rebuilt from them
        self.journal = Journal(f"memory://wild-fleet/{uuid.uuid4().hex}")

    # ---- what happens -----------------------------------------------------------------------

    @initialize(
        count=st.integers(1, 5),
        plan=plans(deadlines=(1000.0,)),
        rounds=st.integers(0, 4),
        patient=st.booleans(),
        before=st.sampled_from([None, None, OTHER, NEW]),
    )
    def a_rollout_has_begun(
        self, count: int, plan: Plan, rounds: int, patient: bool, before: str | None
    ) -> None:
        for _ in range(count):
            self.a_replica_joins()
        self.every_replica_obeys()
        if before is not None and count > 1:  # another one is in the middle of its waves
            self.feed(ask(before, history_limit=1000, at=self.now))
            self.every_replica_obeys()
            self.obey(self.replicas["r0"])
        self.feed(StartRequested(plan=plan, target=NEW, at=self.now))
        for _ in range(rounds):
            self.every_replica_obeys()
        self.patient = patient

    @precondition(lambda self: len(self.replicas) < 6)
    @rule()
    def a_replica_joins(self) -> None:
        name = f"r{len(self.replicas)}"
        self.replicas[name] = FakeReplica(name)
        self.feed(self.replicas[name].report(at=self.now))

    @rule(which=some_replica)
    def a_replica_receives_its_document(self, which: int) -> None:
        if replica := self.pick(which):
            replica.receive(desired(self.fleet, replica.name))

    @rule(which=some_replica)
    def a_replica_works(self, which: int) -> None:
        if replica := self.pick(which):
            replica.work()

    @rule(which=some_replica)
    def a_replica_reports(self, which: int) -> None:
        if replica := self.pick(which):
            self.feed(replica.report(at=self.now))

    @rule(which=some_replica)
    def a_replica_obeys(self, which: int) -> None:
        if replica := self.pick(which):
            self.obey(replica)

    @rule()
    def every_replica_obeys(self) -> None:
        for replica in self.living():
            self.obey(replica)

    @rule(which=some_replica)
    def a_replica_fails(self, which: int) -> None:
        replica = self.pick(which)
        if replica and replica.job is not None:
            replica.fail()

    @rule(which=some_replica, revision=st.sampled_from(TENANTS))
    def a_replica_cannot_serve_another_one(self, which: int, revision: str) -> None:
        if replica := self.pick(which):
            replica.cannot.add(revision)

    @rule(
        revision=st.sampled_from(TENANTS),
        instead_of=st.none() | st.sampled_from(TENANTS),
        late=st.booleans(),
    )
    def a_user_loads(self, revision: str, instead_of: str | None, late: bool) -> None:
        event = load(revision, instead_of=None if instead_of == revision else instead_of)
        self.a_user_changes_tenants(event, late=late)

    @rule(revision=st.sampled_from(TENANTS), late=st.booleans())
    def a_user_unloads(self, revision: str, late: bool) -> None:
        self.a_user_changes_tenants(unload(revision), late=late)

    def a_user_changes_tenants(self, event: LoadRequested | UnloadRequested, *, late: bool) -> None:
        before = self.fleet
        given = Precondition(expected_generation=before.generation - late)
        event = replace(event, at=self.now, precondition=given)
        if late:
            with pytest.raises(GenerationMismatch):
                advance(before, event)
            return
        gone = event.revision if isinstance(event, UnloadRequested) else event.instead_of
        self.loaded = [name for name in self.loaded if name != gone]
        if isinstance(event, LoadRequested) and event.revision not in self.loaded:
            self.loaded.append(event.revision)
        otherwise = advance(before, Ticked(at=self.now))
        self.feed(event)
        now = self.fleet
        otherwise = replace(otherwise, loaded=now.loaded, generation=now.generation)
        assert now == otherwise, "it moved a replica, or ended something"

    @rule(which=some_replica)
    def a_report_is_under_way_for_long(self, which: int) -> None:
        if replica := self.pick(which):
            self.mail.append((replica.report(at=self.now), replica.doc))

    @precondition(lambda self: self.mail)
    @rule(which=some_replica, again=st.booleans())
    def a_late_report_arrives(self, which: int, again: bool) -> None:
        late, acted_on = letter = self.mail[which % len(self.mail)]
        if not again:
            self.mail.remove(letter)
        replica = self.replicas[late.replica]
        if replica.alive and late.replica in self.fleet.observed:
            # the controller sees that it has told the replica something else since
            self.feed(late if acted_on == replica.doc else self.overtaken(late))

    @rule(which=some_replica)
    def a_replica_dies(self, which: int) -> None:
        if replica := self.pick(which):
            replica.alive = False

    @rule(which=some_replica)
    def a_replica_is_counted_as_gone(self, which: int) -> None:
        names = [r for r in self.replicas if r in self.fleet.observed]
        if names:
            name = names[which % len(names)]
            self.replicas[name].lost = True
            self.feed(Left(replica=name, at=self.now))

    @rule(which=st.sets(some_replica, min_size=1))
    def several_replicas_report_at_once(self, which: set[int]) -> None:
        if living := self.living():
            some = {each % len(living) for each in which}
            reports = tuple(living[each].report(at=self.now) for each in sorted(some))
            self.feed(ReportBatch(reports=reports, at=self.now))

    @rule()
    def nothing_goes_wrong_for_a_while(self) -> None:
        """Then the weights hold: a step is carried by as many replicas as it needs."""
        self.the_dead_are_noticed()
        for _ in range(3 * len(self.replicas)):
            self.every_replica_obeys()
        rollout = self.fleet.running
        fleet = self.fleet
        if rollout is None or rollout.current is None or not rollout.begun or not fleet.observed:
            return
        failed = rollout.pause is Pause.FAILURE or rollout.state is State.ABORTING
        if failed or self.failures():
            return
        on_it = sum(what == rollout.target for what in fleet.assigned.values())
        wanted = canaries(len(fleet.observed), weight=rollout.current.weight)
        dedicated = rollout.plan.placement == "dedicated"
        if rollout.target != fleet.stable:
            assert on_it == (wanted if dedicated else 0)
        if rollout.state is State.PROGRESSING:
            assert rollout.placed_at is not None or (dedicated and wanted == 0)

    @precondition(lambda self: self.may_end)
    @rule(revision=st.sampled_from(TARGETS), plan=plans())
    def a_user_asks(self, revision: str, plan: Plan) -> None:
        asked = StartRequested(plan=plan, target=revision, at=self.now)
        if self.fleet.observed:
            self.feed(asked)
        else:
            self.refused(asked)

    @rule(what=st.sampled_from([pause, resume, retry, promote]), late=st.booleans())
    def a_user_steers(self, what: Any, late: bool) -> None:
        event = what(self.newest, at=self.now)
        if late:
            given = Precondition(expected_generation=self.fleet.generation - 1)
            event = replace(event, precondition=given)
            running = self.fleet.running
            is_running = running is not None and running.id == self.newest
            self.refused(event, by=GenerationMismatch if is_running else IllegalEvent)
            return
        self.may_be_refused(event)

    @rule()
    def a_user_promotes_every_step(self) -> None:
        self.may_be_refused(promote(self.newest, full=True, at=self.now))

    @precondition(lambda self: self.fleet.rollout is not None)
    @rule(outcome=st.sampled_from(Outcome))
    def a_canary_is_judged(self, outcome: Outcome) -> None:
        self.feed(judged(self.fleet, outcome, at=self.now))

    @precondition(lambda self: self.fleet.rollout is not None)
    @rule(outcome=st.sampled_from(Outcome))
    def a_step_is_judged_that_was_left(self, outcome: Outcome) -> None:
        otherwise = advance(self.fleet, Ticked(at=self.now))
        self.feed(judged(self.fleet, outcome, at=self.now, step_id="rollout-1.1.0"))
        assert self.fleet == otherwise

    @precondition(lambda self: self.may_end)
    @rule()
    def a_user_aborts(self) -> None:
        if self.fleet.running is None:
            self.refused(abort(self.newest, at=self.now))
            return
        self.feed(abort(self.newest, at=self.now))
        assert self.fleet.running is None or self.fleet.running.state is State.ABORTING

    @rule(seconds=st.sampled_from([0.25, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Ticked(at=self.now))

    @rule()
    def the_controller_dies_and_comes_back(self) -> None:
        before = self.fleet
        self.journal.write(JournalEntry(fleet=before, declared=None, sources={}))
        entry = self.journal.read()
        assert entry is not None
        again = restored(entry.fleet, at=self.now)
        assert (again.epoch, again.generation) > (before.epoch, before.generation)
        assert (again.rollout, again.stable) == (before.rollout, before.stable)
        assert again.loaded == before.loaded
        for name in before.assigned:  # the documents stay the same, except for the weights
            was, now = desired(before, name), desired(again, name)
            assert replace(now, epoch=was.epoch, traffic=was.traffic) == was
            assert (now.traffic is None) == (was.traffic is None)
        self.fleet = again
        self.journal = Journal(f"memory://wild-fleet/{uuid.uuid4().hex}")

    @precondition(lambda self: self.may_end)
    @rule()
    def the_journal_is_lost(self) -> None:
        documents = {r.name: r.doc for r in self.living() if r.doc is not None}
        if not documents:
            return
        again = rebuilt(documents, at=self.now)
        for doc in documents.values():
            assert (again.epoch, again.generation) > (doc.epoch, doc.generation)
            assert again.stable in {each.stable for each in documents.values()}
        assert again.assigned == {name: doc.hold for name, doc in documents.items()}
        assert again.running is None or again.running.state is State.ABORTING
        # as the controller does: an epoch that no other controller has had
        self.fleet = replace(again, epoch=max(again.epoch, self.fleet.epoch + 1))
        self.found = {doc.hold for doc in documents.values()}
        self.loaded = list(again.loaded)
        for replica in self.living():
            replica.lost = True  # it may be anywhere: what it was told last may be forgotten

    def the_dead_are_noticed(self) -> None:
        for replica in self.replicas.values():
            if not replica.alive and replica.name in self.fleet.observed:
                self.feed(Left(replica=replica.name, at=self.now))

    def everything_calms_down(self) -> None:
        """Liveness: nothing fails any more, so the fleet gets to where it shall be.

        A loaded adapter that cannot be served does not prevent that; it comes last.
        """
        self.mail.clear()
        if not self.living():
            self.a_replica_joins()  # Serve starts another
        self.the_dead_are_noticed()
        for _ in range(10 * len(self.replicas) + 30):
            self.now += 0.25
            self.every_replica_obeys()
            self.feed(Ticked(at=self.now))
            self.a_user_decides()
            if self.fleet.running is None and all(
                each.holds == self.fleet.stable and each.is_open for each in self.living()
            ):
                break
        assert self.fleet.running is None
        for replica in self.living():
            replica.cannot.clear()
        for _ in range(2):
            self.every_replica_obeys()
        assert pending(self.fleet) == {}
        assert {replica.name for replica in self.living()} == set(self.fleet.observed)
        assert all(r.holds == self.fleet.stable and r.is_open for r in self.living())
        assert all({r.holds, *r.also_serves} >= set(self.loaded) for r in self.living())

    def a_user_decides(self) -> None:
        """What a rollout waits for that only a user or the analysis can give."""
        rollout = self.fleet.running
        if rollout is None or rollout.state is State.ABORTING:
            return
        if rollout.pause is Pause.FAILURE:
            again = rollout.attempt < 3
            self.feed((retry if again else abort)(rollout.id, at=self.now))
        elif rollout.pause is Pause.ASKED:
            self.feed(resume(rollout.id, at=self.now))
        elif rollout.pause is Pause.STEP:
            self.feed(promote(rollout.id, at=self.now))
        elif rollout.current is not None and rollout.begun:
            alone = canaries(len(self.fleet.observed), weight=rollout.current.weight) == 0
            if alone and rollout.plan.placement == "dedicated":
                self.feed(promote(rollout.id, full=True, at=self.now))
            elif rollout.plan.analysis is not None:
                self.feed(judged(self.fleet, Outcome.PASS, at=self.now))

    def teardown(self) -> None:
        self.everything_calms_down()

    # ---- what must hold ---------------------------------------------------------------------

    @invariant()
    def every_replica_is_told_something_sensible(self) -> None:
        fleet = self.fleet
        assert set(fleet.assigned) == set(fleet.observed)
        known = {fleet.stable, *(r.target for r in self.rollouts(fleet).values())}
        assert set(fleet.assigned.values()) <= known | self.found
        if fleet.running is not None and fleet.running.state is State.ABORTING:
            assert {Documents(fleet).of(r).stage for r in fleet.assigned} <= {None}

    @invariant()
    def what_is_loaded_is_served_by_all_of_them(self) -> None:
        fleet, now = self.fleet, traffic(self.fleet)
        assert list(fleet.loaded) == self.loaded
        others = list(self.loaded)
        if now is not None and now.placement == "shared" and now.weight > 0:
            others += [] if now.canary in others else [now.canary]
        documents = Documents(fleet)
        for name in [*fleet.assigned, "a late joiner"]:
            want = documents.of(name)
            assert want.hold not in want.also_serves
            assert list(want.also_serves) == [one for one in others if one != want.hold]

    @invariant()
    def no_request_gets_a_canary_that_it_shall_not_get(self) -> None:
        fleet, rollout, now = self.fleet, self.fleet.running, traffic(self.fleet)
        if rollout is None or now is None:
            assert now is None
            return
        if rollout.state is State.ABORTING:
            assert now.weight == 0
            return
        asked = 100 if rollout.current is None else rollout.current.weight
        assert now.weight == asked or (now.placement == "dedicated" and now.weight < asked)
        on_it = {r for r, what in fleet.assigned.items() if what == rollout.target}
        if now.placement == "dedicated" and now.weight > 0:
            assert any(r.serves(rollout.target) or not r.state for r in map(self.seen, on_it))
        steady = rollout.current is not None and rollout.placed_at is not None
        if steady and now.placement == "shared":
            assert {*fleet.assigned.values()} <= {fleet.stable}

    @invariant()
    def the_way_back_is_the_stable_revision(self) -> None:
        running = self.fleet.running
        assert running is None or running.previous == self.fleet.stable

    def feed(self, event: Event) -> None:
        before = self.fleet
        self.fleet = advance(before, event)
        self.check_numbers(before)
        self.check_walk(before)
        self.check_stable(before)
        self.check_joiners(event, before)
        self.check_service(before)
        self.check_waves(before)
        self.check_steps(event, before)
        self.check_pause(before)
        self.check_abort(before)
        self.check_why(event, before)
        documents = Documents(self.fleet)
        for replica in self.replicas.values():
            if replica.is_open and documents.of(replica.name).hold == replica.holds:
                replica.lost = replica.lost and replica.name not in self.fleet.observed

    def check_joiners(self, event: Event, before: Fleet) -> None:
        reports = event.reports if isinstance(event, ReportBatch) else (event,)
        for report in reports:
            if isinstance(report, Reported) and report.replica not in before.assigned:
                sent = self.fleet.assigned[report.replica]
                assert sent == before.stable or report.state.serving, "a late joiner gets stable"

    def check_steps(self, event: Event, before: Fleet) -> None:
        """A step is left by a promotion, a verdict or when it was held; it never comes back."""
        was = before.running
        if was is None:
            return
        now = self.rollouts(self.fleet)[was.id]
        assert now.step >= was.step
        left = was.plan.steps[was.step : now.step]
        if isinstance(event, PromoteRequested) or not left:
            return
        if was.plan.analysis is not None:
            assert isinstance(event, Judged)
            assert event.verdict.outcome is Outcome.PASS
            assert len(left) == 1
        assert all(step.hold == 0 for step in left[1:])
        assert left[0].hold != "manual"
        since = event.at if was.placed_at is None else was.placed_at
        assert event.at >= since + left[0].hold

    def check_pause(self, before: Fleet) -> None:
        """After a failure no further replica goes to the target, nor behind the steps."""
        was, now = before.running, self.fleet.running
        if was is None or now is None or was.id != now.id or now.state is not State.PAUSED:
            return
        if was.pause is not now.pause or (now.pause is not Pause.FAILURE and now.current):
            return
        for name, revision in self.fleet.assigned.items():
            if revision == now.target != self.fleet.stable:
                assert before.assigned.get(name) == revision

    def check_waves(self, before: Fleet) -> None:
        """Of those known to serve, no wave takes out too many, nor the last on stable."""
        running, now = self.fleet.running, self.fleet
        if running is None or running.plan.strategy == "all_at_once":
            return
        moved = {r for r, what in now.assigned.items() if before.assigned.get(r, what) != what}
        then = {r: replace(now.observed[r], outdated=False) for r in moved}
        taken = {r for r in moved if then[r].serves(before.assigned[r])}
        if not taken:
            return
        serving = {r for r, seen in now.observed.items() if seen.serves(now.assigned[r])}
        assert len(now.observed) - len(serving) <= running.plan.max_unavailable
        assert serving or len(now.observed) == 1
        sent = any(now.assigned[r] == running.target for r in moved)
        if sent and running.current is not None and running.current.weight < 100:
            assert now.stable in now.assigned.values()

    def check_numbers(self, before: Fleet) -> None:
        fleet = self.fleet
        assert (fleet.epoch, fleet.generation) >= (before.epoch, before.generation)
        if fleet.generation == before.generation:
            then, now = Documents(before), Documents(fleet)
            assert all(now.of(name) == then.of(name) for name in fleet.assigned)

    def check_walk(self, before: Fleet) -> None:
        was, now = self.rollouts(before), self.rollouts(self.fleet)
        for id, rollout in was.items():
            if rollout.ended:
                assert now[id] == rollout, "what has ended does not change"
            else:
                assert now[id].state in reachable(rollout.state)
        assert sum(not rollout.ended for rollout in now.values()) <= 1

    def check_stable(self, before: Fleet) -> None:
        fleet = self.fleet
        if succeeded := self.succeeded(before):
            assert [fleet.stable] == succeeded
            for replica in self.present():
                assert replica.holds == fleet.stable, f"{replica.name} does not hold the target"
        else:
            assert fleet.stable == before.stable

    def check_abort(self, before: Fleet) -> None:
        """Once it is going back, replicas are sent to stable only; then none serves it."""
        running = before.running
        ended = running and self.rollouts(self.fleet)[running.id].state is State.ABORTED
        if running and ended and running.target not in {self.fleet.stable, *self.loaded}:
            for replica in self.present():
                assert running.target not in (replica.holds, *replica.also_serves)
        same = running is not None and self.rollouts(self.fleet)[running.id].state
        if same and running and running.state is State.ABORTING and same is not State.SUPERSEDED:
            for name, revision in self.fleet.assigned.items():
                assert revision in (self.fleet.stable, before.assigned.get(name))

    def check_why(self, event: Event, before: Fleet) -> None:
        """A rollout goes back for its own target, its deadline or a user, and nothing else."""
        running = before.running
        if running is None or running.state is State.ABORTING:
            return
        now = self.rollouts(self.fleet)[running.id]
        failed = now.pause is Pause.FAILURE and running.pause is not Pause.FAILURE
        if not failed and now.state not in (State.ABORTING, State.ABORTED, State.FAILED):
            return
        assert (
            isinstance(event, AbortRequested)
            or (isinstance(event, Judged) and event.verdict.outcome is Outcome.FAIL)
            or event.at >= now.deadline_at
            or any(failure.revision == running.target for failure in self.failures())
        )

    def check_service(self, before: Fleet) -> None:
        """Whoever is taken out of service for a rolling swap leaves enough others behind."""
        running = self.fleet.running
        if running is None or running.plan.strategy == "all_at_once":
            return
        if running.state is not State.PROGRESSING:
            return
        sent = [
            replica
            for replica in self.present()
            if before.assigned.get(replica.name) not in (None, running.target)
            and self.fleet.assigned[replica.name] == running.target
            and replica.is_open
            and replica.holds != running.target
            and replica.failure is None
        ]
        if not sent:
            return
        at_work = [r for r in self.present() if r.holds is not None and not self.settled(r)]
        assert len(at_work) <= running.plan.max_unavailable, "too many swap at once"
        serving = [r for r in self.present() if r.is_open and self.settled(r)]
        known = [r for r in self.replicas.values() if r.name in self.fleet.observed]
        gone = [r for r in known if r.lost or not r.alive]
        assert serving or gone or len(self.fleet.assigned) == 1, "no replica serves"

    # ---- helpers ----------------------------------------------------------------------------

    @property
    def newest(self) -> str:
        return f"rollout-{self.fleet.rollouts}"

    @property
    def may_end(self) -> bool:
        return not self.patient or self.fleet.running is None

    def obey(self, replica: FakeReplica) -> None:
        replica.receive(desired(self.fleet, replica.name))
        for _ in range(5):
            replica.work()
        self.feed(replica.report(at=self.now))

    def refused(self, event: AnyUserRequest, *, by: type[Exception] = IllegalEvent) -> None:
        kept = copy.deepcopy(self.fleet)
        with pytest.raises(by):
            advance(self.fleet, event)
        assert self.fleet == kept

    def may_be_refused(self, event: AnyUserRequest) -> None:
        try:
            advance(self.fleet, event)
        except IllegalEvent:
            self.refused(event)
        else:
            self.feed(event)

    @staticmethod
    def overtaken(late: Reported) -> Reported:
        return replace(late, state=replace(late.state, serving=False))

    def failures(self) -> list[Failure]:
        """Of the default, of what is staged, and of a canary besides the default."""
        states = [seen.state for seen in self.fleet.observed.values() if seen.state]
        found = [state.failure for state in states if state.failure]
        rollout = self.fleet.rollout  # it may have ended with this event
        return found + [f for s in states if rollout for f in s.failures_of(rollout.target)]

    def seen(self, name: str) -> Observed:
        return self.fleet.observed[name]

    def pick(self, which: int) -> FakeReplica | None:
        living = self.living()
        return living[which % len(living)] if living else None

    def living(self) -> list[FakeReplica]:
        return [replica for replica in self.replicas.values() if replica.alive]

    def present(self) -> list[FakeReplica]:
        """Alive, and never counted as gone since they served last."""
        return [r for r in self.living() if r.name in self.fleet.observed and not r.lost]

    def settled(self, replica: FakeReplica) -> bool:
        """It serves what it shall hold, or failed on it and so serves nothing that counts."""
        if replica.failure is not None and not replica.is_open:
            return True
        return replica.is_open and replica.holds == self.fleet.assigned[replica.name]

    def succeeded(self, before: Fleet) -> list[str]:
        was = self.rollouts(before)
        return [
            rollout.target
            for id, rollout in self.rollouts(self.fleet).items()
            if rollout.state is State.SUCCEEDED and (id not in was or not was[id].ended)
        ]

    @staticmethod
    def rollouts(fleet: Fleet) -> Mapping[str, Rollout]:
        every = [*fleet.past, *([] if fleet.rollout is None else [fleet.rollout])]
        return {rollout.id: rollout for rollout in every}


def searched(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=35,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        # every run is another one; a failure that is found becomes an example of its own
        database=None,
        phases=[Phase.generate, Phase.shrink],
    )


def test_the_invariants_hold_in_a_wild_fleet() -> None:
    run_state_machine_as_test(WildFleet, settings=searched(60))


@pytest.mark.slow
def test_the_invariants_hold_in_many_wild_fleets() -> None:
    run_state_machine_as_test(WildFleet, settings=searched(1000))
