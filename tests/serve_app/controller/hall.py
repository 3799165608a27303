"""A controller over one state directory, with control loops or hand-written reports."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hotswap_lib import BASE, Layout, Revision
from serve_app.controller.deployment import Controller
from serve_app.controller.images import AdapterStore
from serve_app.controller.journal import Journal, JournalEntry
from serve_app.replica.control_loop import ControlLoop
from serve_app.rollout.state import Desired, ReplicaState
from serve_app.settings import Settings
from serve_app.wire.admin import AdapterView, CanaryView, FleetView, RolloutView
from serve_app.wire.errors import ProbeInvalid
from serve_app.wire.reports import Answer, Report
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.conftest import new_slot
from tests.serve_app.fakes import CountingPut, FakeEngine, until

T = TypeVar("T")
NEVER_S = 15.0
STEPS: list[dict[str, Any]] = [{"weight": 10, "hold": "manual"}, {"weight": 50}]
CANARY: dict[str, Any] = {"strategy": "canary", "steps": STEPS}
ERRORS = {"checks": [{"metric": "error_rate", "max": 0.1}], "min_samples": 4, "interval": 0.05}


def tell(story: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(story, 60))


class FakeProbing:
    """Probes by name: the scores that they return, or the exception that they raise."""

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


class WatchedJournal(Journal):
    """Counts what is written; the next writes take `slow_s` or fail `failures` times.

    `writing`: a write is under way.
    """

    def __init__(self, state_uri: str) -> None:
        super().__init__(state_uri)
        self.written = self.failures = 0
        self.slow_s = 0.0
        self.writing = False

    def write(self, entry: JournalEntry) -> None:
        self.writing = True
        try:
            time.sleep(self.slow_s)
            if self.failures > 0:
                self.failures -= 1
                raise OSError("the bucket does not answer")
            self.written += 1
            super().write(entry)
        finally:
            self.writing = False


class Hall:
    """A controller and the replicas that report to it.

    `reports`: the latest report of each replica. `watched`: the journal of the controller.
    """

    def __init__(self, world: TinyWorld, state: Path | str, **settings: Any) -> None:
        self.world, self.state = world, state
        # one lane: these fleets drain, and the fake engine says when they have
        self.settings_type: type[Settings] = Settings
        self.settings = Settings.model_validate({"poll_s": 0.2, "lanes": 1, **settings})
        self.load_timeout_s = 10.0
        self.grace_s = 300.0
        self.store: Callable[[str], AdapterStore] = AdapterStore
        self.probing = FakeProbing()
        self.engines: dict[str, FakeEngine] = {}
        self.lanes: dict[str, ControlLoop] = {}
        self.reports: dict[str, Report] = {}
        self.up = False

    # the control loops call the newest controller
    async def join(self, replica: str, layout: Layout) -> None:
        await self.controller.join(replica, layout)

    async def report(self, report: Report) -> Answer:
        if not self.up:
            raise ConnectionError("the controller is gone")
        self.reports[report.replica] = report
        return await self.controller.report(report)

    async def leave(self, replica: str) -> None:
        await self.controller.leave(replica)

    async def __aenter__(self) -> Hall:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for lane in self.lanes.values():
            await lane.close()
        await self.kill()

    async def start(self, **changed: Any) -> None:
        self.settings = self.settings_type.model_validate(self.settings.model_dump() | changed)
        self.put = CountingPut()
        self.watched = WatchedJournal(str(self.state))
        controller = Controller(
            self.settings,
            journal=self.watched,
            store=self.store(str(self.state)),
            put=self.put,
            load_timeout_s=self.load_timeout_s,
            probing=self.probing,
            grace_s=self.grace_s,
        )
        await controller.start()
        self.controller = controller  # like Serve: no calls before that
        self.up = True

    async def replace(self, **changed: Any) -> Controller:
        """A redeploy that starts the new controller before the old one ends, which is returned."""
        old = self.controller
        await self.start(**changed)
        return old

    async def kill(self) -> None:
        """As SIGKILL would: nothing of the controller acts any more."""
        self.up = False
        await self.controller.close()

    async def restart(self, **changed: Any) -> None:
        await self.kill()
        await self.start(**changed)

    async def replicas(self, *names: str) -> None:
        for name in names:
            self.engines[name] = FakeEngine(new_slot(self.world))
            engine: Any = self.engines[name]
            self.lanes[name] = ControlLoop(engine, self, replica=name, patience_s=0.5)
        await asyncio.gather(*(self.lanes[name].ready for name in names))
        await self.until_serving(*self.lanes)

    async def until_fleet(
        self, condition: Callable[[FleetView], bool], what: str = "it never happened"
    ) -> FleetView:
        deadline = time.monotonic() + NEVER_S
        while not condition(fleet := await self.controller.fleet()):
            assert time.monotonic() < deadline, (what, fleet)
            await asyncio.sleep(0.005)
        return fleet

    async def until_rollout(
        self, id: str, condition: Callable[[RolloutView], bool], what: str = "it never happened"
    ) -> RolloutView:
        """The rollout once it is known and the condition holds."""
        deadline = time.monotonic() + NEVER_S
        while True:
            rollouts = {one.id: one for one in await self.controller.rollouts()}
            if id in rollouts and condition(rollouts[id]):
                return rollouts[id]
            assert time.monotonic() < deadline, (what, rollouts)
            await asyncio.sleep(0.005)

    async def until_serving(self, *names: str) -> None:
        await self.until_fleet(
            lambda fleet: set(names) <= {r.id for r in fleet.replicas if r.serving},
            "a replica never served",
        )

    def adapter(self, name: str) -> str:
        return str(self.world.adapter(name))

    async def roll(self, name: str, **plan: Any) -> RolloutView:
        return await self.controller.start_rollout({"adapter": self.adapter(name), **plan})

    async def load(self, name: str, adapter: str | None = None, **more: Any) -> AdapterView:
        return await self.controller.load_adapter(name, self.adapter(adapter or name), **more)

    def also_serves(self) -> list[set[str]]:
        """Names of loaded adapters, by replica."""
        return [{one.name for one in each.serves[1:]} for each in self.engines.values()]

    async def ended(self, rollout: RolloutView) -> RolloutView:
        return await self.until_rollout(rollout.id, lambda now: now.ended, "it never ended")

    def holds(self) -> set[str]:
        return {engine.default.name for engine in self.engines.values()}

    def document(self) -> dict[str, Any]:
        """The whole journal."""
        document: dict[str, Any] = json.loads(Path(self.state, "journal.json").read_text())
        return document

    def journal(self) -> dict[str, Any]:
        """The fleet in the journal."""
        fleet: dict[str, Any] = self.document()["fleet"]
        return fleet


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


async def introduced(hall: Hall, layout: Layout) -> Desired:
    """The first document of the replica r1."""
    await hall.join("r1", layout)
    answer = await hall.report(report(layout))
    assert answer.desired is not None
    return answer.desired


def weights(hall: Hall) -> list[float | None]:
    now = [engine.traffic for engine in hall.engines.values()]
    return [None if each is None else each.weight for each in now]


async def paused(hall: Hall, rollout: RolloutView) -> CanaryView:
    """Its canary, once the rollout is paused."""
    now = await hall.until_rollout(rollout.id, lambda now: now.state == "paused", "never paused")
    assert now.canary is not None
    return now.canary


async def placed(hall: Hall, rollout: RolloutView) -> None:
    """Returns once the hold of a timed step has begun."""
    await hall.until_rollout(
        rollout.id, lambda now: now.canary is not None and now.canary.hold_until is not None
    )


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


async def until_writing(hall: Hall) -> None:
    """Returns while the controller writes its journal; set `watched.slow_s` before."""
    await until(lambda: hall.watched.writing, "no decision was written")
