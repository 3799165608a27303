"""What users ask of rollouts: start, promote, abort, pause, resume, retry, undo.

Between the handle's methods (`serve_app.controller.deployment`) and the machine: plans are completed with what
this fleet can do, adapters are checked, and a request that was made before is recognized by its
key. Every refusal comes before anything has changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from hotswap_lib import BASE, Revision, load_adapter
from serve_app.controller.analysis import CanaryAnalysis, Probing
from serve_app.controller.fleet_view import rollout_view
from serve_app.controller.report_server import ReportServer
from serve_app.rollout.errors import IllegalEvent
from serve_app.rollout.events import (
    AbortRequested,
    Asked,
    PauseRequested,
    PromoteRequested,
    Requested,
    ResumeRequested,
    RetryRequested,
)
from serve_app.rollout.plan import InFlight, Plan
from serve_app.rollout.state import Fleet, Rollout, State
from serve_app.settings import Settings
from serve_app.wire.admin import RolloutView
from serve_app.wire.errors import (
    FleetNotReady,
    KeyReused,
    NothingToUndo,
    PlanImpossible,
    RolloutNotFound,
)


class RolloutRequests(ReportServer):
    """A dispatch that users can talk to. For one event loop.

    `key`, wherever it is taken: the caller's own name for this request. The same request under it a
    second time changes nothing. `expected_generation`: the fleet's, as the caller saw it; raises
    `GenerationMismatch` when something was decided since.
    """

    _canary_analysis: CanaryAnalysis
    _probing: Probing

    async def start_rollout(
        self,
        plan: Plan | dict[str, object],
        *,
        expected_generation: int | None = None,
        key: str | None = None,
    ) -> RolloutView:
        """Check plan and adapter, then begin.

        Raises, before anything has changed:
            PlanImpossible: this fleet cannot do what the plan says.
            ProbeInvalid: a function that the plan names is not there.
            FleetNotReady: no replica is there to check the adapter for.
            AdapterRefused: no replica could hold it.
            GenerationMismatch: something was decided since `expected_generation`.
            KeyReused: the key belongs to a rollout with another plan.
        """
        plan = plan if isinstance(plan, Plan) else Plan.model_validate(plan)
        plan = _resolved(plan, self._settings)
        scoped = _scoped("start", key)
        if (known := self._keyed(scoped)) is not None:
            return self._same(known, plan, key)
        if not self._fleet.observed:
            raise FleetNotReady
        if plan.placement == "dedicated" and len(self._fleet.observed) < 2:
            raise PlanImpossible("a dedicated canary needs two replicas, and the fleet has one")
        if plan.analysis is not None and plan.analysis.probes:
            await self._probing.check([probe.function for probe in plan.analysis.probes])
        if plan.adapter == BASE.name:
            return await self._begin(plan, BASE, expected_generation, scoped, key)
        adapter = await asyncio.to_thread(load_adapter, plan.adapter, name=plan.name)
        revision = await self._shelf.accept(adapter)
        return await self._begin(plan, revision, expected_generation, scoped, key)

    async def undo(
        self,
        *,
        to: str | None = None,
        expected_generation: int | None = None,
        key: str | None = None,
    ) -> RolloutView:
        """Abort what runs; else roll back to the stable revision before this one.

        `to`: the earlier revision to roll back to (`name`, `name@digest8` or in full), also over a
        rollout that runs. Raises `NothingToUndo`, and what `start_rollout` raises.
        """
        scoped = _scoped("undo", key)
        if (known := self._keyed(scoped)) is not None:
            if to is not None and not Revision.parse(known.target).matches(to):
                raise KeyReused(str(key))
            return self._view(known)
        for one in self._all():  # it was there to abort, and this key did that
            if _scoped(f"undo {one.id}", key) in self._fleet.keys:
                return self._view(one)
        if to is None and (running := self._fleet.running) is not None:
            return await self._abort(
                running.id, "undone", expected_generation, _scoped(f"undo {running.id}", key)
            )
        revision = self._earlier(to)
        await self._images_of(revision)  # refuse now, not on the replicas
        plan = Plan(
            adapter=self._desired_state.sources.get(revision.key, revision.name),
            name=revision.name or None,
            in_flight=self._way_here(),
        )
        plan = _resolved(plan, self._settings)
        return await self._begin(plan, revision, expected_generation, scoped, key)

    async def abort(
        self,
        id: str,
        reason: str = "aborted by request",
        *,
        expected_generation: int | None = None,
        key: str | None = None,
    ) -> RolloutView:
        """Send every replica back to stable; does nothing when the rollout has ended."""
        return await self._abort(id, reason, expected_generation, _scoped(f"abort {id}", key))

    async def promote(
        self,
        id: str,
        *,
        full: bool = False,
        expected_generation: int | None = None,
        key: str | None = None,
    ) -> RolloutView:
        """Leave the step that it is in, whatever is measured; `full`: all that are left.

        Raises `IllegalEvent` when there is none, or it is being taken back.
        """
        asked = PromoteRequested(
            full=full,
            expected_generation=expected_generation,
            key=_scoped(f"promote {id}", key),
            at=time.time(),
        )
        return await self._ask(id, asked)

    async def pause(
        self, id: str, *, expected_generation: int | None = None, key: str | None = None
    ) -> RolloutView:
        """Stay in the step that it is in; nobody else is sent to the target. No deadline runs."""
        scoped = _scoped(f"pause {id}", key)
        return await self._ask(
            id,
            PauseRequested(expected_generation=expected_generation, key=scoped, at=time.time()),
        )

    async def resume(
        self, id: str, *, expected_generation: int | None = None, key: str | None = None
    ) -> RolloutView:
        """Go on after `pause`."""
        scoped = _scoped(f"resume {id}", key)
        return await self._ask(
            id,
            ResumeRequested(expected_generation=expected_generation, key=scoped, at=time.time()),
        )

    async def retry(
        self, id: str, *, expected_generation: int | None = None, key: str | None = None
    ) -> RolloutView:
        """Try again what failed: from its step when it is paused, from its start when it ended."""
        rollout = self._find(id)
        scoped = _scoped(f"retry {id}", key)
        if (known := self._keyed(scoped)) is not None:
            return self._view(known)
        if not rollout.ended or scoped in self._fleet.keys:
            asked = RetryRequested(
                expected_generation=expected_generation, key=scoped, at=time.time()
            )
            return await self._ask(id, asked)
        if rollout.state is State.SUCCEEDED:
            raise IllegalEvent("a retry", f"{id} has succeeded")
        revision = Revision.parse(rollout.target)
        await self._images_of(revision)
        return await self._begin(rollout.plan, revision, expected_generation, scoped, key)

    async def rollout(self, id: str) -> RolloutView:
        return self._view(self._find(id))

    async def rollouts(self) -> list[RolloutView]:
        """Newest first."""
        return [self._view(one) for one in reversed(self._all())]

    # ---- inside -----------------------------------------------------------------------------

    async def _begin(
        self,
        plan: Plan,
        revision: Revision,
        expected_generation: int | None,
        scoped: str | None,
        key: str | None,
    ) -> RolloutView:
        target = revision.key
        self._desired_state.sources[target] = plan.adapter
        if scoped in self._fleet.keys and self._keyed(scoped) is None:
            raise KeyReused(str(key))  # so long ago that the rollout is forgotten
        asked = Asked(
            plan=plan,
            target=target,
            expected_generation=expected_generation,
            key=scoped,
            at=time.time(),
        )
        await self._feed(asked)
        if (known := self._keyed(scoped)) is not None:  # this one, or one that was faster
            return self._same(known, plan, key)
        assert self._fleet.rollout is not None
        return self._view(self._fleet.rollout)

    async def _abort(
        self, id: str, reason: str, expected_generation: int | None, scoped: str | None
    ) -> RolloutView:
        if self._find(id).ended:
            return await self.rollout(id)
        asked = AbortRequested(
            reason=reason, expected_generation=expected_generation, key=scoped, at=time.time()
        )
        return await self._ask(id, asked)

    async def _ask(self, id: str, asked: Requested) -> RolloutView:
        """Raises `IllegalEvent` when that rollout is not the running one."""
        self._find(id)
        await self._feed(asked, check=_still_running(id, asked))
        return await self.rollout(id)

    def _keyed(self, scoped: str | None) -> Rollout | None:
        """The rollout that a request with this key began."""
        return next((one for one in self._all() if scoped is not None and one.key == scoped), None)

    def _same(self, known: Rollout, plan: Plan, key: str | None) -> RolloutView:
        if known.plan != plan:
            raise KeyReused(str(key))
        return self._view(known)

    def _earlier(self, to: str | None) -> Revision:
        earlier = [
            Revision.parse(name) for name in self._fleet.history if name != self._fleet.stable
        ]
        for revision in reversed(earlier):
            if to is None or revision.matches(to):
                return revision
        raise NothingToUndo(to)

    async def _images_of(self, revision: Revision) -> None:
        for fingerprint in {report.layout for report in self._reports.last().values()}:
            await self._shelf.get(revision, fingerprint)

    def _view(self, rollout: Rollout) -> RolloutView:
        return rollout_view(
            self._fleet, rollout, latest=self._canary_analysis.latest, step_id=self._canary_stats
        )

    def _way_here(self) -> InFlight | None:
        """The policy of the rollout that an undo takes back; None: whatever the fleet can."""
        for rollout in reversed(self._all()):
            if rollout.state is State.SUCCEEDED:
                return "drain" if rollout.plan.in_flight == "drain" else None
        return None

    def _all(self) -> list[Rollout]:
        """What was asked for, oldest first. Raises `Fenced` where somebody else knows more."""
        self._check_fenced()
        last = self._fleet.rollout
        return [*self._fleet.past, *([] if last is None else [last])]

    def _find(self, id: str) -> Rollout:
        for one in self._all():
            if one.id == id:
                return one
        raise RolloutNotFound(id)


def _still_running(id: str, asked: Requested) -> Callable[[Fleet], None]:
    """For when the request's turn has come: what was decided until then may have ended it."""

    def check(fleet: Fleet) -> None:
        running = fleet.running
        seen = asked.key is not None and asked.key in fleet.keys
        if not seen and (running is None or running.id != id):
            raise IllegalEvent(f"to change {id}", "it has ended")

    return check


def _scoped(what: str, key: str | None) -> str | None:
    """A key names one request: the same one for another verb or rollout is another request."""
    return None if key is None else f"{what} {key}"


def _resolved(plan: Plan, settings: Settings) -> Plan:
    """With what this fleet makes of the fields that were left open. Raises `PlanImpossible`."""
    # what does not generate keeps nothing of a request between two steps
    both = settings.task in ("embed", "classify") or settings.lanes >= 2
    for field, value in (("in_flight", "overlap"), ("placement", "shared")):
        if getattr(plan, field) == value and not both:
            raise PlanImpossible(f"{field}={value!r} needs two lanes, and the fleet has lanes=1")
    update: dict[str, object] = {"in_flight": plan.in_flight or ("overlap" if both else "drain")}
    if plan.strategy == "canary":
        update["placement"] = plan.placement or ("shared" if both else "dedicated")
    return plan.model_copy(update=update)
